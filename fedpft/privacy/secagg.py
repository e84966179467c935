"""Secure aggregation of one attempt at a round: what a silo does, and what the server can do with it. No I/O.

Bonawitz et al. 2017 (Practical Secure Aggregation for Privacy-Preserving Machine Learning), with two masks and against
a server that lies, on a complete graph of at most MOST_SILOS silos:

    keys         a silo makes two X25519 keys and a self mask's seed; it signs the public keys with the key of its
                 certificate -> the roster: the keys of all that take part
    shares       each splits its mask key and its seed among the roster, a sealed pair of shares for each other silo
    vectors      each adds to its vector its self mask, and for each other silo whose shares came a mask that both know:
                 added by the one whose name is first, taken off by the other
    signatures   each signs which silos' vectors the server says it has: the survivors
    reveals      once enough have signed the same survivors, each gives its shares: of the seed of a survivor, of the
                 mask key of one that shared but did not survive, and of nobody both

The sum of the survivors' vectors carries their self masks and what they share with those that did not survive; with
`threshold` of the reveals the server takes both off. Of a silo's own vector it knows no more than the sum tells.

Everything that is signed, derived or sealed is bound to the attempt (run, round, attempt, what is trained on and under
which terms), and from the shares on to the roster. Keys are made anew for each attempt and are only in memory.
"""

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedpft.config import MOST_SILOS, SecureTerms
from fedpft.errors import InvalidUpdate, PrivacyViolation
from fedpft.privacy.masking import Mask, derived, hashed, packed, same
from fedpft.privacy.shares import SHARE_BYTES, combine, split

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 1024  # at most
SEALED_BYTES = 2 * SHARE_BYTES + 16  # and the tag
NONCE = bytes(12)  # each key seals one message

_REMEDY = "nothing more was sent; tell the other silos, and ask the server's operator what it runs"

Sign = Callable[[bytes], bytes]
# certificate (PEM), message, signature -> the name in the certificate; raises PrivacyViolation
Verify = Callable[[bytes, bytes, bytes], str]


@dataclass(frozen=True)
class Context:
    """What an attempt is about, the same for all who take part.

    run: of the federation. task: digest of what is trained on: adapter, version of the proxy, what is counted.
    """

    run: str
    round: int
    attempt: int
    task: bytes
    terms: SecureTerms

    def message(self, purpose: str, *fields: str | int | bytes) -> bytes:
        """What is signed, or bound in, for a purpose."""
        terms = self.terms.model_dump_json()
        return packed(purpose, self.run, self.round, self.attempt, self.task, terms, *fields)


@dataclass(frozen=True)
class Keys:
    """A silo's public keys for one attempt.

    certificate: PEM. seal_key, mask_key: X25519. commitment: SHA-256 of the seed of the self mask.
    """

    silo: str
    certificate: bytes
    seal_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes

    def message(self, context: Context) -> bytes:
        """What the signature is of."""
        return context.message("keys", self.silo, self.seal_key, self.mask_key, self.commitment)

    def check_form(self) -> None:
        """Raises InvalidUpdate if it cannot be used whoever made it: the server looks at no more."""
        sizes = {len(self.seal_key), len(self.mask_key), len(self.commitment)}
        if sizes != {PUBLIC_BYTES} or not 0 < len(self.signature) <= SIGNATURE_BYTES:
            raise InvalidUpdate(f"{self.silo}: its keys for secure aggregation are none", _REMEDY)


def task_digest(adapter: bytes, proxy_version: int, *, count_inactivity: bool) -> bytes:
    """Of what a round trains on. adapter: SHA-256 of the file that it starts from."""
    return hashed("task", adapter, proxy_version, int(count_inactivity))


class Roster:
    """Those whose keys are known, in the order of their names.

    threshold: how many shares open a secret, and how many signatures and survivors there must be.
    """

    def __init__(self, context: Context, keys: Iterable[Keys]) -> None:
        self.context = context
        self.keys = {each.silo: each for each in sorted(keys, key=lambda each: each.silo)}
        self.places = {silo: number for number, silo in enumerate(self.keys, 1)}  # x of the shares
        self.threshold = context.terms.threshold(len(self.keys))
        content = [part for each in self.keys.values() for part in (each.silo, each.seal_key, each.mask_key)]
        content += [each.commitment for each in self.keys.values()]
        self.digest = hashed(context.message("roster", *content))

    def survivors_message(self, survivors: Collection[str]) -> bytes:
        """What a silo signs of the survivors."""
        return self.context.message("survivors", self.digest, *sorted(survivors))

    def commits(self, silo: str, kind: str, secret: bytes) -> bool:
        """Whether a secret is the silo's. kind: "seed" or "mask key"."""
        if kind == "seed":
            return same(hashed("seed", secret), self.keys[silo].commitment)
        return same(_public(X25519PrivateKey.from_private_bytes(secret)), self.keys[silo].mask_key)


class SiloAttempt:
    """One silo's part in one attempt, in the order of the methods. Asked the same again, each answers the same again.

    Every method raises PrivacyViolation, naming the fault, where what the server says is not what the protocol allows;
    nothing may be sent of this attempt after that.
    """

    def __init__(
        self, context: Context, silo: str, certificate: bytes, sign: Sign, verify: Verify, *, smallest_sum: int = 2
    ) -> None:
        """Args:
        certificate: the silo's own, PEM.
        sign: with the key of that certificate.
        verify: another silo's signature, and its certificate against the authority.
        smallest_sum: of fewer silos this silo lets nobody have the sum.
        """
        self.context, self.silo, self._sign, self._verify = context, silo, sign, verify
        self._smallest = max(smallest_sum, context.terms.min_silos, 2)
        self._seal, self._mask, self._seed = X25519PrivateKey.generate(), X25519PrivateKey.generate(), _random()
        keys = Keys(silo, certificate, _public(self._seal), _public(self._mask), hashed("seed", self._seed), b"")
        self._keys = Keys(**{**vars(keys), "signature": sign(keys.message(context))})
        self._roster: Roster | None = None
        self._sealed: dict[str, bytes] = {}
        self._own: tuple[bytes, bytes] = (b"", b"")
        self._opened: dict[str, tuple[bytes, bytes]] = {}  # silo -> share of its mask key, share of its seed
        self._received: dict[str, bytes] | None = None
        self._survivors: frozenset[str] | None = None
        self._signature = b""
        self._revealed: dict[str, bytes] | None = None

    def keys(self) -> Keys:
        """What this silo shows of itself."""
        return self._keys

    def shares(self, roster: Sequence[Keys]) -> dict[str, bytes]:
        """For each other silo its two shares, sealed."""
        found = Roster(self.context, roster)
        if self._roster is not None:
            if self._roster.digest != found.digest:
                raise self._violation("showed two lists of keys in one attempt")
            return self._sealed
        self._check_roster(found, len(roster))
        silos, threshold = list(found.keys), found.threshold
        halves = [split(secret, threshold, len(silos)) for secret in (self._mask.private_bytes_raw(), self._seed)]
        pairs = {silo: (key, seed) for silo, key, seed in zip(silos, *halves, strict=True)}
        self._roster, self._own = found, pairs.pop(self.silo)
        self._sealed = {silo: self._cipher(self.silo, silo).encrypt(NONCE, key + seed, self._sealing(self.silo, silo))
                        for silo, (key, seed) in pairs.items()}  # fmt: skip
        return self._sealed

    def masks(self, sealed: Mapping[str, bytes]) -> list[Mask]:
        """The masks for this silo's vector.

        Args:
            sealed: what the other silos sealed for this one, of those whose shares came.
        """
        roster = self._known_roster()
        if self._received is not None:
            if self._received != dict(sealed):
                raise self._violation("showed two sets of shares in one attempt")
        else:
            if not sealed.keys() <= roster.keys.keys() - {self.silo}:
                raise self._violation("sent shares of a silo that does not take part")
            self._check_number(len(sealed) + 1, "have shared their secrets")
            self._opened = {silo: self._open(silo, each) for silo, each in sealed.items()}
            self._received = dict(sealed)
        masks = [(derived(self._seed, "self mask", roster.digest), 1)]
        return masks + [pairwise(self._mask, roster, self.silo, other) for other in sorted(sealed)]

    def sign(self, survivors: Collection[str]) -> bytes:
        """Signs that the sum is of these silos, of which this is one."""
        roster, named = self._known_roster(), frozenset(survivors)
        if self._received is None:
            raise self._violation("named survivors before this silo sent its vector")
        if self._survivors is not None:
            if self._survivors != named:
                raise self._violation("named two sets of survivors in one attempt")
            return self._signature
        if self.silo not in named or not named <= self._opened.keys() | {self.silo}:
            raise self._violation("named survivors that did not share, or not this silo, whose vector it has")
        self._check_number(len(named), "survive")
        self._survivors, self._signature = named, self._sign(roster.survivors_message(named))
        return self._signature

    def reveal(self, survivors: Collection[str], signatures: Mapping[str, bytes]) -> dict[str, bytes]:
        """Of each silo that shared, one share: of its seed if it survived, of its mask key if not.

        Args:
            signatures: by survivors, of these survivors.
        """
        roster, named = self._known_roster(), frozenset(survivors)
        if self._survivors is None or self._survivors != named:
            raise self._violation("asks for the shares of another sum than this silo has signed")
        if self._revealed is None:
            for silo, signature in signatures.items():
                if silo not in named:
                    raise self._violation(f"shows a signature of {silo}, which is no survivor")
                self._check_signed(roster.keys[silo], roster.survivors_message(named), signature)
            if len(signatures) < roster.threshold:
                raise self._violation(
                    f"shows {len(signatures)} signatures of the survivors, {roster.threshold} are needed"
                )
            every = self._opened | {self.silo: self._own}
            self._revealed = {silo: every[silo][silo in named] for silo in sorted(every)}
        return self._revealed

    def _check_roster(self, roster: Roster, entries: int) -> None:
        if roster.keys.get(self.silo) != self._keys:
            raise self._violation("shows other keys of this silo than it sent")
        if len(roster.keys) != entries or not entries <= MOST_SILOS:
            raise self._violation(f"lists {entries} keys, some of one silo or too many")
        self._check_number(entries, "take part")
        for each in roster.keys.values():
            each.check_form()
            self._check_signed(each, each.message(self.context), each.signature)

    def _check_signed(self, keys: Keys, message: bytes, signature: bytes) -> None:
        try:
            name = self._verify(keys.certificate, message, signature)
        except PrivacyViolation as error:
            raise self._violation(f"shows what {keys.silo} did not sign for this attempt ({error.message})") from None
        if name != keys.silo:
            raise self._violation(f"shows what {name} signed as if {keys.silo} had")

    def _check_number(self, count: int, what: str) -> None:
        threshold = 0 if self._roster is None else self._roster.threshold
        if count < max(self._smallest, threshold):
            raise self._violation(f"says that {count} silos {what}, {max(self._smallest, threshold)} are needed")

    def _known_roster(self) -> Roster:
        if self._roster is None:
            raise self._violation("went on before it showed the keys of all silos")
        return self._roster

    def _open(self, silo: str, sealed: bytes) -> tuple[bytes, bytes]:
        try:
            pair = self._cipher(silo, self.silo).decrypt(NONCE, sealed, self._sealing(silo, self.silo))
        except InvalidTag:
            pair = b""
        if len(pair) != 2 * SHARE_BYTES:
            raise self._violation(f"sent shares of {silo} that are not those that it sealed for this attempt")
        return pair[:SHARE_BYTES], pair[SHARE_BYTES:]

    def _cipher(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """Of one message: from the one silo to the other, in this attempt."""
        other = self._known_roster().keys[receiver if sender == self.silo else sender]
        secret = _agreed(self._seal, other.seal_key, other.silo)
        return ChaCha20Poly1305(derived(secret, "seal", self._known_roster().digest, sender, receiver))

    def _sealing(self, sender: str, receiver: str) -> bytes:
        return self.context.message("shares", self._known_roster().digest, sender, receiver)

    def _violation(self, what: str) -> PrivacyViolation:
        place = f"round {self.context.round}, attempt {self.context.attempt}"
        return PrivacyViolation(f"{place}: the server {what}", _REMEDY)


def pairwise(own: X25519PrivateKey, roster: Roster, silo: str, other: str) -> Mask:
    """The mask that a silo shares with another, as the one whose key is given adds it."""
    secret = _agreed(own, roster.keys[other].mask_key, other)
    first, last = sorted((silo, other))
    return derived(secret, "pairwise mask", roster.digest, first, last), 1 if silo == first else -1


def masks_of_sum(
    roster: Roster, sharers: Collection[str], survivors: Collection[str], reveals: Mapping[str, Mapping[str, bytes]]
) -> list[Mask]:
    """What is on the sum of the survivors' vectors.

    Args:
        sharers: the silos that shared their secrets.
        reveals: silo -> what it revealed; at least `roster.threshold` of them.

    Raises:
        InvalidUpdate: a secret cannot be had from the shares: so many of them are wrong.
    """
    masks: list[Mask] = []
    for silo in sorted(sharers):
        kind = "seed" if silo in survivors else "mask key"
        shares = {roster.places[by]: given[silo] for by, given in reveals.items() if silo in given}
        secret = combine(shares, roster.threshold, lambda found: roster.commits(silo, kind, found))  # noqa: B023
        if secret is None:
            raise InvalidUpdate(
                f"{silo}: the {kind} of its masks does not follow from the {len(shares)} shares that silos gave",
                "the round is begun anew; if that persists, a silo does not run this version of fedpft",
            )
        if kind == "seed":
            masks.append((derived(secret, "self mask", roster.digest), 1))
            continue
        key = X25519PrivateKey.from_private_bytes(secret)
        for other in sorted(survivors):
            mask, sign = pairwise(key, roster, silo, other)
            masks.append((mask, -sign))
    return masks


def _random() -> bytes:
    return secrets.token_bytes(32)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _agreed(own: X25519PrivateKey, public: bytes, silo: str) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise PrivacyViolation(f"the key of {silo} is one with which nothing is secret", _REMEDY) from None
