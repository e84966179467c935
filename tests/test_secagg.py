"""Secure aggregation without wire and processes: fixed point, shares, masks, and a silo against a server that lies."""

import dataclasses
import itertools
import math

import pytest
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft.config import MOST_SILOS, SecureTerms, fraction_bits
from fedpft.errors import InvalidUpdate, PrivacyViolation
from fedpft.privacy import fixedpoint, masking, secagg, shares
from fedpft.privacy.fixedpoint import Contribution, Layout
from fedpft.privacy.secagg import Context, Keys, Roster, SiloAttempt, masks_of_sum

TERMS = SecureTerms(most_samples=1000, max_entry=1.0, threshold_fraction=0.5, min_silos=2, weights="samples")
SHAPES = {"head": (3,), "lora_A": (2, 5)}
LAYOUT = Layout.of(SHAPES, {1: 4, 3: 2})
FIVE = ("east", "north", "north-2", "south", "west")


# --- fixed point ------------------------------------------------------------------------------------------------------


def contribution(seed, samples=7, weight=None, inactivity=True, spread=0.1, **metrics):
    draw = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    trained = {name: tensor + spread * torch.randn(tensor.shape, generator=draw) for name, tensor in start.items()}
    counts = {"1": torch.tensor([0, 3, 5, 9]), "1.tokens": torch.tensor(9)}
    counts |= {"3": torch.tensor([1 << 40, 2]), "3.tokens": torch.tensor([1 << 41, 7])}
    return Contribution(
        start, trained, samples, samples if weight is None else weight, metrics, counts if inactivity else None
    )


def encoded(what, seed=0, silo="north"):
    return fixedpoint.encode(what, LAYOUT, TERMS, fixedpoint.rounding_key(seed, silo, 1))[0]


@given(st.integers(1, 10_000_000), st.floats(1e-6, 1e6))
def test_fraction_bits_are_the_most_with_which_no_sum_wraps(most_samples, max_entry):
    limit = (1 << 31) - 1
    if MOST_SILOS * math.ceil(most_samples * max_entry) > limit:
        with pytest.raises(ValueError, match=f"64 silos x most_samples {most_samples} .* could wrap a word of 32 bits"):
            fraction_bits(most_samples, max_entry)
        return
    found = fraction_bits(most_samples, max_entry)
    assert MOST_SILOS * math.ceil(most_samples * max_entry * 2.0**found) <= limit
    assert MOST_SILOS * math.ceil(most_samples * max_entry * 2.0 ** (found + 1)) > limit


def test_what_is_decoded_is_the_sum_of_what_was_encoded():
    first, second = contribution(1, 7, train_loss=0.5, tokens=30.0), contribution(2, 500, 31.25, train_loss=2.0)
    total = fixedpoint.decode(encoded(first) + encoded(second, silo="south"), LAYOUT, TERMS, 2)
    assert (total.samples, total.weight) == (507, 38.25)
    assert total.metrics == {"train_loss": (2.5, 2), "tokens": (30.0, 1)}
    assert total.inactivity["1"].tolist() == [0, 6, 10, 18]
    assert total.inactivity["1.tokens"].tolist() == [18] * 4
    assert total.inactivity["3"].tolist() == [1 << 41, 4]
    assert total.inactivity["3.tokens"].tolist() == [1 << 42, 14]
    for name in SHAPES:
        wanted = 0
        for each in (first, second):
            wanted = wanted + each.weight * (each.trained[name].double() - each.start[name].double())
        assert float((total.change[name] - wanted).abs().max()) < 2 * 2.0**-TERMS.fraction_bits


def test_largest_vectors_of_all_silos_do_not_wrap():
    start = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    trained = {name: torch.full(shape, 5.0) for name, shape in SHAPES.items()}
    what = Contribution(start, trained, 1000, 1000, {"tokens": 2.0**60}, None)
    words, cut = fixedpoint.encode(what, LAYOUT, TERMS, bytes(32))
    assert cut == 13, "every value was beyond max_entry"
    total = fixedpoint.decode(sum(words.long() for _ in range(MOST_SILOS)).int(), LAYOUT, TERMS, MOST_SILOS)
    assert all(bool((change == 1000.0 * MOST_SILOS).all()) for change in total.change.values())
    assert total.metrics["tokens"] == (float(fixedpoint.LARGEST_COUNT * MOST_SILOS), MOST_SILOS)


def test_rounding_has_the_right_mean_and_errs_by_less_than_a_step():
    layout, terms = Layout.of({"a": (40_000,)}, {}), TERMS
    step = 2.0**-terms.fraction_bits
    start, trained = {"a": torch.zeros(40_000)}, {"a": torch.full((40_000,), 0.3 * step)}
    words, _ = fixedpoint.encode(Contribution(start, trained, 1, 1, {}, None), layout, terms, bytes(range(32)))
    entries = words[:40_000]
    assert set(entries.unique().tolist()) == {0, 1}
    assert abs(float(entries.double().mean()) - 0.3) < 5 * 0.46 / 200  # five standard errors
    negative = {"a": -trained["a"]}
    words, _ = fixedpoint.encode(Contribution(start, negative, 1, 1, {}, None), layout, terms, bytes(range(32)))
    assert set(words[:40_000].unique().tolist()) == {-1, 0}
    assert abs(float(words[:40_000].double().mean()) + 0.3) < 5 * 0.46 / 200


def test_rounding_is_a_silos_own_and_the_same_in_every_attempt():
    what = contribution(3)
    assert torch.equal(encoded(what), encoded(what))
    assert not torch.equal(encoded(what), encoded(what, silo="south"))
    assert not torch.equal(encoded(what), encoded(what, seed=1))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"samples": 1001}, "most_samples is 1000"),
        ({"samples": 0}, "most_samples"),
        ({"weight": 1000.5}, "most_samples"),
        ({"spread": float("nan")}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_summed_is_refused(fault, message):
    with pytest.raises(InvalidUpdate, match=message):
        encoded(contribution(1, **fault))


def test_other_shapes_and_whole_numbers_are_refused():
    what = contribution(1)
    for tensor in (torch.zeros(4), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(InvalidUpdate, match="'head'"):
            encoded(dataclasses.replace(what, trained=what.trained | {"head": tensor}))


def test_a_sum_with_a_mask_on_it_is_noticed():
    words = encoded(contribution(1)) + encoded(contribution(2))
    masking.add_masks(words, [(bytes(range(32)), 1)])
    with pytest.raises(InvalidUpdate, match="none that silos could have put in"):
        fixedpoint.decode(words, LAYOUT, TERMS, 2)


# --- shares -----------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 5), st.randoms())
def test_any_threshold_of_the_shares_gives_the_secret(secret, threshold, more, draw):
    count = threshold + more
    parts = dict(enumerate(shares.split(secret, threshold, count), 1))
    assert {len(part) for part in parts.values()} == {shares.SHARE_BYTES}
    chosen = dict(draw.sample(sorted(parts.items()), threshold))
    assert shares.combine(chosen, threshold, lambda found: found == secret) == secret
    fewer = dict(list(chosen.items())[1:])
    assert shares.combine(fewer, threshold, lambda found: True) is None


def test_fewer_shares_fit_every_secret():
    """Of the shares that are missing one can be chosen so that any other secret follows: these say nothing of it."""
    parts = dict(enumerate(shares.split(bytes(32), 3, 5), 1))
    known = {x: int.from_bytes(parts[x]) for x in (2, 4)}
    other = 12345
    # the curve of degree 2 through (0, other) and the two known shares passes x = 5 somewhere: that share completes it
    points = {0: other, 2: known[2], 4: known[4]}
    shifted = shares._interpolated({x - 5: value for x, value in points.items()})
    found = shares.combine({**{x: parts[x] for x in (2, 4)}, 5: shifted.to_bytes(33)}, 3, lambda _: True)
    assert int.from_bytes(found) == other


def test_one_wrong_share_does_no_harm_if_there_are_more_than_enough():
    secret = bytes(range(32))
    parts = dict(enumerate(shares.split(secret, 3, 4), 1))
    for wrong in parts:
        damaged = parts | {wrong: bytes(33)}
        assert shares.combine(damaged, 3, lambda found: found == secret) == secret
        del damaged[wrong % 4 + 1]
        assert shares.combine(damaged, 3, lambda found: found == secret) is None, "three are no more than enough"


def test_the_prime_is_one():
    assert all(pow(a, shares.PRIME - 1, shares.PRIME) == 1 for a in range(2, 40))  # Fermat
    assert shares.PRIME > 1 << 256


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_ciphers_key_stream():
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key, count = bytes(range(32)), 3 * masking.CHUNK_WORDS + 5
    words = torch.zeros(count, dtype=torch.int32)
    masking.add_masks(words, [(key, 1)])
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    assert words.numpy().tobytes() == stream


@pytest.mark.parametrize("size", [0, 5, masking.CHUNK_WORDS, 2 * masking.CHUNK_WORDS + 3])
def test_masks_are_the_same_whether_they_are_added_at_once_or_later(size):
    layout, draw = Layout.of({"a": (size,)}, {1: 2}), torch.Generator().manual_seed(size)
    start, trained = ({"a": torch.randn(size, generator=draw)} for _ in range(2))
    what = Contribution(start, trained, 7, 7, {"tokens": 5.0}, None)
    masks = [(bytes([n]) * 32, sign) for n, sign in ((1, -1), (2, 1), (3, -1), (4, 1))]
    at_once, _ = fixedpoint.encode(what, layout, TERMS, bytes(32), masks)
    later, _ = fixedpoint.encode(what, layout, TERMS, bytes(32))
    assert fixedpoint.decode(later, layout, TERMS, 1).samples == 7
    masking.add_masks(later, masks)
    assert torch.equal(at_once, later)


def test_masks_that_are_taken_off_leave_nothing():
    words = torch.arange(-200_000, 200_000, dtype=torch.int32)
    before, masks = words.clone(), [(bytes([n]) * 32, sign) for n, sign in ((1, 1), (2, -1), (3, 1))]
    masking.add_masks(words, masks)
    assert not torch.equal(words, before)
    masking.add_masks(words, masks, -1)
    assert torch.equal(words, before)


@given(st.lists(st.integers(0, 9) | st.text(max_size=4) | st.binary(max_size=4), max_size=4), st.data())
def test_no_two_lists_of_fields_are_packed_alike(fields, data):
    other = data.draw(st.lists(st.integers(0, 9) | st.text(max_size=4) | st.binary(max_size=4), max_size=4))
    assert (masking.packed(*fields) == masking.packed(*other)) == (
        [(type(each), each) for each in fields] == [(type(each), each) for each in other]
    )


# --- an attempt -------------------------------------------------------------------------------------------------------


class Authority:
    """Certificates that are a name, and a public key that the authority knows."""

    def __init__(self):
        self.keys = {}

    def kit(self, name):
        key = Ed25519PrivateKey.generate()
        certificate = b"%s %s" % (name.encode(), key.public_key().public_bytes_raw().hex().encode())
        self.keys[certificate] = name
        return certificate, key.sign

    def verify(self, certificate, message, signature):
        if certificate not in self.keys:
            raise PrivacyViolation("the certificate is not of this federation's authority", "")
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(certificate.split()[1].decode()))
        try:
            public.verify(signature, message)
        except InvalidSignature:
            raise PrivacyViolation("the signature is wrong", "") from None
        return self.keys[certificate]


class Attempt:
    """Silos, each with a vector of its own, and an honest server; a test plays the stages, or lies."""

    def __init__(self, silos=FIVE, terms=TERMS, words=50, authority=None, kits=None, number=0, run="run", **named):
        self.context = Context(run, 3, number, b"task", terms)
        self.authority = authority or Authority()
        self.kits = kits or {silo: self.authority.kit(silo) for silo in silos}
        self.silos = {
            silo: SiloAttempt(self.context, silo, *self.kits[silo], self.authority.verify, **named) for silo in silos
        }
        draw = torch.Generator().manual_seed(len(silos))
        self.vectors = {
            silo: torch.randint(-(1 << 20), 1 << 20, (words,), generator=draw, dtype=torch.int32) for silo in silos
        }
        self.masked, self.received = {}, {}

    @property
    def roster(self):
        return [silo.keys() for silo in self.silos.values()]

    def share(self, sharers=None):
        """Returns what each silo gets."""
        self.sharers = sharers or tuple(self.silos)
        self.sealed = {silo: self.silos[silo].shares(self.roster) for silo in self.sharers}
        self.received = {
            silo: {other: self.sealed[other][silo] for other in self.sharers if other != silo} for silo in self.sharers
        }
        return self.received

    def mask(self, survivors=None):
        received = self.received or self.share()
        self.survivors = survivors or self.sharers
        for silo in self.survivors:
            self.masked[silo] = self.vectors[silo].clone()
            masking.add_masks(self.masked[silo], self.silos[silo].masks(received[silo]))

    def signed(self, signers=None):
        return {silo: self.silos[silo].sign(self.survivors) for silo in signers or self.survivors}

    def unmask(self, reveals):
        total = sum(self.masked[silo].long() for silo in self.survivors)
        total = ((total + (1 << 31)) % (1 << 32) - (1 << 31)).int()
        masks = masks_of_sum(Roster(self.context, self.roster), self.sharers, self.survivors, reveals)
        masking.add_masks(total, masks, -1)
        return total


def violation(what, function, *arguments):
    with pytest.raises(PrivacyViolation, match=what) as caught:
        function(*arguments)
    assert caught.value.message.startswith("round 3, attempt 0: the server ")


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_sum_is_that_of_the_survivors_whoever_drops_out_when(data):
    attempt = Attempt(FIVE[: data.draw(st.integers(2, 5))])
    silos, threshold = tuple(attempt.silos), TERMS.threshold(len(attempt.silos))
    draw = lambda among: tuple(sorted(data.draw(st.sets(st.sampled_from(among), min_size=threshold))))  # noqa: E731
    attempt.received = attempt.share(draw(silos))
    attempt.mask(draw(attempt.sharers))
    signatures = attempt.signed(draw(attempt.survivors))
    reveals = {silo: attempt.silos[silo].reveal(attempt.survivors, signatures) for silo in draw(tuple(signatures))}
    assert torch.equal(attempt.unmask(reveals), sum(attempt.vectors[silo] for silo in attempt.survivors))


def test_every_answer_is_the_same_when_it_is_asked_for_again():
    attempt = Attempt()
    received = attempt.share()
    north = attempt.silos["north"]
    assert north.keys() == north.keys()
    assert north.shares(attempt.roster[::-1]) == attempt.sealed["north"]
    assert north.masks(received["north"]) == north.masks(received["north"])
    attempt.mask()
    signatures = attempt.signed()
    assert north.sign(FIVE[::-1]) == signatures["north"]
    assert north.reveal(FIVE, signatures) == north.reveal(FIVE, dict(list(signatures.items())[:3]))


def test_with_one_share_too_few_nothing_is_opened():
    attempt = Attempt()
    attempt.mask(FIVE[:4])
    signatures = attempt.signed()
    reveals = {silo: attempt.silos[silo].reveal(FIVE[:4], signatures) for silo in FIVE[:2]}
    with pytest.raises(InvalidUpdate, match="does not follow from the 2 shares"):
        attempt.unmask(reveals)


def test_a_wrong_share_is_outvoted_or_noticed():
    attempt = Attempt()
    attempt.mask(FIVE[:4])
    signatures = attempt.signed()
    reveals = {silo: dict(attempt.silos[silo].reveal(FIVE[:4], signatures)) for silo in FIVE[:4]}
    reveals["north"]["west"] = bytes(33)
    reveals["east"]["south"] = bytes(33)
    assert torch.equal(attempt.unmask(reveals), sum(attempt.vectors[silo] for silo in FIVE[:4]))
    del reveals["south"]
    with pytest.raises(InvalidUpdate, match=r"the (seed|mask key) of its masks does not follow"):
        attempt.unmask(reveals)


def test_masked_vectors_look_like_chance_whatever_is_in_them():
    """Means of bits, over 2^17 words: five standard deviations."""
    attempt = Attempt(words=1 << 17)
    attempt.vectors = {silo: torch.full((1 << 17,), 7, dtype=torch.int32) for silo in FIVE}
    attempt.mask()
    bound = 5 * 0.5 / (1 << 17) ** 0.5
    for masked in attempt.masked.values():
        for bit in range(32):
            assert abs(float(((masked >> bit) & 1).double().mean()) - 0.5) < bound
    one, other = (attempt.masked[silo].double() for silo in FIVE[:2])
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / (1 << 17) ** 0.5


class Chance:
    """The same draws each time; stands for the class of the keys too."""

    from_private_bytes = staticmethod(secagg.X25519PrivateKey.from_private_bytes)

    def __init__(self):
        self._numbers = itertools.count()

    def draw(self):
        return masking.hashed("drawn", next(self._numbers))

    def below(self, limit):
        return int.from_bytes(self.draw()) % limit

    def generate(self):
        return self.from_private_bytes(self.draw())


def test_two_inputs_of_the_same_sum_give_the_server_the_same_bytes_up_to_a_known_shift(monkeypatch):
    """With the same chance, all that the server sees is equal, but for the vectors, which are shifted by what the
    inputs differ: for other masks, equally likely, even those are equal."""
    seen = []
    shift = torch.arange(50, dtype=torch.int32) * 12_345
    kits, authority = {}, Authority()
    for silo in FIVE:
        kits[silo] = authority.kit(silo)
    for moved in (0, 1):
        chance = Chance()
        with monkeypatch.context() as patch:
            patch.setattr(secagg, "X25519PrivateKey", chance)
            patch.setattr(secagg, "_random", chance.draw)
            patch.setattr(
                shares.secrets, "randbelow", lambda limit, chance=chance: int.from_bytes(chance.draw()) % limit
            )
            attempt = Attempt(authority=authority, kits=kits)
            attempt.vectors["north"] += moved * shift
            attempt.vectors["south"] -= moved * shift
            attempt.mask()
            signatures = attempt.signed()
            reveals = {silo: attempt.silos[silo].reveal(FIVE, signatures) for silo in FIVE}
            seen.append((attempt.roster, attempt.sealed, signatures, reveals, attempt.masked, attempt.unmask(reveals)))
    (*said, masked, total), (*said_then, masked_then, total_then) = seen
    assert said == said_then
    assert torch.equal(total, total_then)
    for silo in FIVE:
        by = {"north": shift, "south": -shift}.get(silo, torch.zeros_like(shift))
        assert torch.equal(masked_then[silo] - masked[silo], by)


# --- a server that lies -----------------------------------------------------------------------------------------------


def test_a_key_that_the_server_swapped_is_refused():
    attempt, other = Attempt(), Attempt()
    for field in ("seal_key", "mask_key", "commitment"):
        swapped = [
            dataclasses.replace(each, **{field: getattr(other.silos["south"].keys(), field)})
            if each.silo == "south"
            else each
            for each in attempt.roster
        ]
        violation("what south did not sign", attempt.silos["north"].shares, swapped)
        own = [
            dataclasses.replace(each, **{field: getattr(other.silos["north"].keys(), field)})
            if each.silo == "north"
            else each
            for each in attempt.roster
        ]
        violation("other keys of this silo", attempt.silos["north"].shares, own)


def test_a_silo_that_the_server_made_up_is_refused():
    attempt, stranger = Attempt(), Attempt(("ghost", "north"))
    ghost = stranger.silos["ghost"].keys()
    violation("what ghost did not sign", attempt.silos["north"].shares, [*attempt.roster, ghost])
    posing = Attempt(authority=attempt.authority, kits=attempt.kits).silos["south"].keys()
    named_west = [dataclasses.replace(posing, silo="west")] + [each for each in attempt.roster if each.silo != "west"]
    violation("what west did not sign", attempt.silos["north"].shares, named_west)


def test_a_silo_that_signs_for_another_is_refused():
    attempt = Attempt()
    certificate, sign = attempt.kits["south"]
    forged = Keys("west", certificate, *(bytes(32),) * 3, b"")
    forged = dataclasses.replace(forged, signature=sign(forged.message(attempt.context)))
    others = [each for each in attempt.roster if each.silo != "west"]
    violation("what south signed as if west had", attempt.silos["north"].shares, [*others, forged])


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 1}, {"run": "another"}, {"task": b"other"}])
def test_keys_of_another_attempt_are_refused(change):
    """Nobody's old keys can be played back, and all train on the same."""
    attempt = Attempt()
    context = dataclasses.replace(attempt.context, **change)
    kits, verify = attempt.kits, attempt.authority.verify
    old = SiloAttempt(context, "south", *kits["south"], verify).keys()
    others = [each for each in attempt.roster if each.silo != "south"]
    violation("what south did not sign for this attempt", attempt.silos["north"].shares, [*others, old])


def test_keys_under_other_terms_are_refused():
    attempt = Attempt()
    terms = TERMS.model_copy(update={"min_silos": 3})
    context = dataclasses.replace(attempt.context, terms=terms)
    other = SiloAttempt(context, "south", *attempt.kits["south"], attempt.authority.verify).keys()
    others = [each for each in attempt.roster if each.silo != "south"]
    violation("what south did not sign", attempt.silos["north"].shares, [*others, other])


def test_two_lists_of_keys_are_refused():
    attempt = Attempt()
    attempt.share()
    violation("two lists of keys", attempt.silos["north"].shares, attempt.roster[:4])


def test_a_silo_that_is_listed_twice_is_refused():
    attempt = Attempt()
    violation("lists 6 keys", attempt.silos["north"].shares, [*attempt.roster, attempt.roster[0]])


@pytest.mark.parametrize("smallest", [2, 4])
def test_too_few_silos_are_refused_at_every_stage(smallest):
    attempt = Attempt(FIVE, smallest_sum=smallest)
    needed = max(smallest, 3)
    violation(
        f"1 silos take part, {smallest} are needed", attempt.silos["north"].shares, [attempt.silos["north"].keys()]
    )
    received = attempt.share()
    few = dict(list(received["north"].items())[: needed - 2])
    violation(f"says that {needed - 1} silos have shared their secrets", attempt.silos["north"].masks, few)
    attempt.received = received
    attempt.mask()
    named = ("north", *(silo for silo in FIVE if silo != "north"))[: needed - 1]
    violation(f"says that {needed - 1} silos survive", attempt.silos["north"].sign, named)


def test_shares_that_were_sealed_for_another_silo_or_attempt_are_refused():
    attempt = Attempt()
    received = attempt.share()
    swapped = received["north"] | {"south": received["east"]["south"]}
    violation("shares of south that are not those", attempt.silos["north"].masks, swapped)
    crossed = received["north"] | {"south": received["north"]["west"]}
    violation("shares of south that are not those", attempt.silos["north"].masks, crossed)
    later = Attempt(authority=attempt.authority, kits=attempt.kits, number=1)
    replayed = received["north"] | {"south": later.share()["north"]["south"]}
    violation("shares of south that are not those", attempt.silos["north"].masks, replayed)
    violation("does not take part", attempt.silos["north"].masks, received["north"] | {"ghost": bytes(82)})


def test_two_sets_of_shares_are_refused():
    """With a second one the server would get the same vector under other masks."""
    attempt = Attempt()
    received = attempt.share()
    attempt.silos["north"].masks(received["north"])
    fewer = {silo: sealed for silo, sealed in received["north"].items() if silo != "west"}
    violation("two sets of shares", attempt.silos["north"].masks, fewer)


def test_two_sets_of_survivors_are_refused():
    attempt = Attempt()
    attempt.mask()
    attempt.silos["north"].sign(FIVE)
    violation("two sets of survivors", attempt.silos["north"].sign, FIVE[:4])


def test_survivors_without_the_silo_or_with_a_stranger_are_refused():
    attempt = Attempt()
    attempt.received = attempt.share(FIVE[:4])
    attempt.mask()
    violation("did not share, or not this silo", attempt.silos["east"].sign, FIVE[1:4])
    violation("did not share, or not this silo", attempt.silos["east"].sign, FIVE)


def test_different_survivors_for_different_silos_open_nothing():
    """The attack that the signatures are for: one half shall open seeds, the other half mask keys."""
    attempt = Attempt()
    attempt.mask()
    signatures = {silo: attempt.silos[silo].sign(FIVE) for silo in FIVE[:3]}
    signatures |= {silo: attempt.silos[silo].sign(FIVE[1:]) for silo in FIVE[3:]}
    assert attempt.silos["east"].reveal(FIVE, {silo: signatures[silo] for silo in FIVE[:3]})
    with pytest.raises(PrivacyViolation, match="north-2 did not sign"):
        attempt.silos["west"].reveal(FIVE[1:], {silo: signatures[silo] for silo in FIVE[2:]})
    with pytest.raises(PrivacyViolation, match="shows 2 signatures of the survivors, 3 are needed"):
        attempt.silos["west"].reveal(FIVE[1:], {silo: signatures[silo] for silo in FIVE[3:]})


def test_both_shares_of_a_silo_are_never_given():
    attempt = Attempt()
    attempt.mask()
    signatures = attempt.signed()
    given = attempt.silos["north"].reveal(FIVE, signatures)
    violation("another sum than this silo has signed", attempt.silos["north"].reveal, FIVE[:4], signatures)
    assert attempt.silos["north"].reveal(FIVE, signatures) == given


def test_nothing_is_revealed_before_enough_have_signed_or_out_of_turn():
    attempt = Attempt()
    violation("before it showed the keys", attempt.silos["north"].masks, {})
    received = attempt.share()
    violation("before this silo sent its vector", attempt.silos["north"].sign, FIVE)
    attempt.received = received
    attempt.mask()
    violation("another sum than this silo has signed", attempt.silos["north"].reveal, FIVE, {})
    signatures = attempt.signed()
    few = dict(list(signatures.items())[:2])
    violation("shows 2 signatures of the survivors, 3 are needed", attempt.silos["north"].reveal, FIVE, few)
    wrong = signatures | {"south": signatures["east"]}
    violation("south did not sign", attempt.silos["north"].reveal, FIVE, wrong)


def test_a_key_with_which_nothing_is_secret_is_refused():
    attempt = Attempt()
    certificate, sign = attempt.kits["south"]
    weak = Keys("south", certificate, *(bytes(32),) * 3, b"")
    weak = dataclasses.replace(weak, signature=sign(weak.message(attempt.context)))
    others = [each for each in attempt.roster if each.silo != "south"]
    with pytest.raises(PrivacyViolation, match="the key of south is one with which nothing is secret"):
        attempt.silos["north"].shares([*others, weak])


def test_two_attempts_share_no_secret():
    first = Attempt()
    second = Attempt(authority=first.authority, kits=first.kits, number=1)
    masks = []
    for attempt in (first, second):
        received = attempt.share()
        masks += [key for silo in FIVE for key, _ in attempt.silos[silo].masks(received[silo])]
    # of each attempt a self mask for each silo, and one mask for each pair, which both sides know
    assert len(set(masks)) == 2 * (5 + 10)
