"""A silo's part in secure aggregation (fedpft/privacy/secagg.py): from a round's update to its share in the sum.

The update stays in the work directory; what leaves are keys, sealed shares, a vector under masks, a signature and, of
each silo that shared, one share. The secrets of an attempt are in memory alone: a silo that is started again cannot go
on with it, says so, and takes part in the next one with other secrets.

Of one round a silo helps to open the sum over one set of silos only, whatever the attempt: the difference of two sums
would be the update of those that are in one of them. Which set, is on disk before the first share leaves; from then on
the silo takes part in an attempt only if its roster is that set. So nothing of it gets into another sum, and since more
than half of the set are bound to it, no other sum over any of it can be opened with those.

With silo_privacy (fedpft/privacy/wholesilo.py) a round is one release of this silo, and what it puts in is the same
words in every attempt: update, noise and terms are on disk before the first vector leaves, and nothing else gets into
that round. Nor does it enter where two sums could be opened that have no silo in common to refuse the second.
"""

import logging
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedpft.config import RoundSettings, SecureTerms, SiloConfig, SiloPrivacyTerms
from fedpft.errors import CertificateError, ConfigError, PrivacyViolation
from fedpft.model.adapters import trains
from fedpft.privacy import fixedpoint, wholesilo
from fedpft.privacy.fixedpoint import Contribution, Layout
from fedpft.privacy.masking import KEY_BYTES, Mask
from fedpft.privacy.noise import Secret
from fedpft.privacy.secagg import Context, Keys, SiloAttempt, task_digest
from fedpft.silo import data
from fedpft.silo.connection import ServerConnection
from fedpft.silo.work import Entered, Opened, Update, Work
from fedpft.wire import transfer
from fedpft.wire.messages import keys_of, message_of
from fedpft.wire.signatures import Signer, Verifier
from fedpft.wire.tensors import read_tensors
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

_REMEDY = "ask the server's operator why; nothing was sent"
_BOUND = "this silo has helped to open this round's sum over other silos"
_ENTERED = "silo_privacy: this silo has put another update into this round, or the same under other terms"
_APART = "silo_privacy: the round's silos have changed so much that two sums could be opened"


def check_agreed(
    config: SiloConfig, *, said: bool, terms: SecureTerms | None, said_private: SiloPrivacyTerms | None = None
) -> None:
    """Whether the federation is what the silo demands, and what the server said of it before.

    Args:
        said: what Hello told of secure aggregation.
        terms: of the settings that came on enrolment; None: there is none.
        said_private: what Hello told of silo_privacy.

    Raises:
        PrivacyViolation, ConfigError: it is not.
    """
    private = None if terms is None else terms.silo_privacy
    data.check_required(config, secure=terms is not None, private=private)
    if (said, said_private) != (terms is not None, private):
        raise PrivacyViolation(f"{config.server} says another thing of secure aggregation than before", _REMEDY)
    if terms is None:
        return
    if config.tls is None:
        raise ConfigError("secure aggregation needs `tls` in silo.yaml: by it silos know each other", "ask for a kit")
    if terms.min_silos < 2:
        raise PrivacyViolation(f"{config.server} would open a sum of one silo", _REMEDY)


def words_of(
    silo: str,
    update: Update,
    work: Work,
    start: Path,
    neurons: Mapping[int, int],
    settings: RoundSettings,
    masks: Sequence[Mask] = (),
    noise: Secret | None = None,
) -> Tensor:
    """(L,) int32: what a silo puts into a round's sum, with masks on it; but for those the same whenever it is asked.

    Args:
        update: the last one of `work`.
        start: file of the adapter that it started from.
        neurons: K of the layers whose inactivity was asked for.
        settings: of the federation, which has secure aggregation.
        noise: with silo_privacy, what the silo's share of it comes from.

    Raises:
        InvalidUpdate: a value is not finite, or the silo's weight or samples are more than was agreed on.
        ConfigError: no noise hides the silo.
    """
    terms, frozen_a = settings.secure_aggregation, settings.training.frozen_a
    assert terms is not None
    begun, trained = (
        {name: tensor for name, tensor in read_tensors(path, "adapter").items() if trains(name, frozen_a=frozen_a)}
        for path in (start, work.update_path)
    )
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in begun.items()}, neurons)
    contribution = Contribution(
        begun,
        trained,
        update.samples,
        update.weight,
        {name: value for name, value in update.metrics.items() if name in fixedpoint.SUMMED_METRICS},
        read_tensors(work.update_path, "inactivity") or None,
    )
    if terms.silo_privacy is not None:
        contribution = wholesilo.hidden(contribution, terms.silo_privacy.clip)
    key = fixedpoint.rounding_key(settings.seed, silo, update.round)
    words, cut = fixedpoint.encode(contribution, layout, terms, key, masks)
    if terms.silo_privacy is not None:
        assert noise is not None
        wholesilo.add_noise(words[: layout.entries], terms, noise)
    if cut:
        log.warning(
            "%s: round %d: %d values changed by more than secure_aggregation.max_entry, %g, and were cut to it",
            silo,
            update.round,
            cut,
            terms.max_entry,
        )
    return words


class Summing:
    """One attempt at a time."""

    def __init__(
        self,
        name: str,
        config: SiloConfig,
        work: Work,
        server: ServerConnection,
        neurons: Mapping[int, int],
    ) -> None:
        """Args:
            neurons: K of each compressed layer.

        Raises:
            CertificateError: the kit is not in order.
        """
        assert config.tls is not None, "as check_agreed found"
        self._name, self._config, self._work, self._server, self._neurons = name, config, work, server, neurons
        self._signer, self._verifier = Signer(config.tls), Verifier(config.tls.ca)
        self._attempt: SiloAttempt | None = None
        self._update: Update | None = None
        self._train: pb.Train | None = None
        self._vector: transfer.Payload | None = None
        self._entry: Entered | None = None
        self._settings = server.settings

    def check_round(self, round: int) -> None:
        """Raises PrivacyViolation if a later round's sum was opened already."""
        opened = self._work.opened(self._server.run_id)
        if opened is not None and round < opened.round:
            raise PrivacyViolation(
                f"the server asks for round {round} again, but has had the sum of round {opened.round}", _REMEDY
            )

    def _check_release(self, round: int, terms: SecureTerms) -> None:
        """Raises PrivacyViolation if a round is not one of those that the noise is made for."""
        entered, private = self._work.entered(self._server.run_id), terms.silo_privacy
        if private is not None and not 1 <= round <= private.rounds:
            raise PrivacyViolation(
                f"the server asks for round {round}, and silo_privacy is for {private.rounds}", _REMEDY
            )
        if entered is None:
            return
        if round < entered.round:
            raise PrivacyViolation(
                f"the server asks for round {round} again, but this silo was in round {entered.round}", _REMEDY
            )
        if private != entered.terms.silo_privacy:
            raise PrivacyViolation("the server has another silo_privacy than in the rounds before", _REMEDY)

    def begin(self, train: pb.Train, update: Update, settings: RoundSettings) -> None:
        """Shows new keys for an attempt at the sum of the update's round; RoundOver if that is over."""
        assert settings.secure_aggregation is not None
        self.check_round(train.round)
        self._check_release(train.round, settings.secure_aggregation)
        task = task_digest(train.adapter.sha256, train.proxy_version, count_inactivity=train.count_inactivity)
        context = Context(self._server.run_id, train.round, train.attempt, task, settings.secure_aggregation)
        if self._attempt is None or self._attempt.context != context:
            self._forget()
            self._attempt = SiloAttempt(
                context,
                self._name,
                self._signer.certificate,
                self._signer.sign,
                self._verify,
                smallest_sum=self._config.smallest_sum,
            )
            self._update, self._train, self._settings = update, train, settings
        shown = pb.ShownKeys(keys=message_of(self._attempt.keys()), proxy_version=train.proxy_version)
        self._server.answer(pb.AnswerStageRequest(round=train.round, attempt=train.attempt, keys=shown))

    def do(self, stage: pb.Stage) -> None:
        """What a stage asks for; RoundOver if that comes too late.

        Raises:
            PrivacyViolation: it asks for more than the protocol allows. Nothing is sent.
        """
        attempt = self._attempt
        place = stage.round, stage.attempt
        if attempt is None or (attempt.context.round, attempt.context.attempt) != place:
            self._withdraw(stage, "this silo was started again")
            return
        answer = pb.AnswerStageRequest(round=stage.round, attempt=stage.attempt)
        match stage.WhichOneof("asked"):
            case "roster":
                silos = [keys.silo for keys in map(_keys, stage.roster.keys)]
                reason = _BOUND if self._is_bound(stage.round, silos) else self._entering(attempt.context, silos)
                if reason:
                    self._withdraw(stage, reason, from_round=True)
                    return
                answer.shares.by_silo.update(attempt.shares([_keys(keys) for keys in stage.roster.keys]))
            case "sealed":
                self._send_vector(attempt, dict(stage.sealed.by_silo))
                return
            case "survivors":
                if self._is_bound(stage.round, stage.survivors.silos):
                    self._withdraw(stage, _BOUND, from_round=True)
                    return
                answer.signature = attempt.sign(frozenset(stage.survivors.silos))
            case "signatures":
                survivors = frozenset(stage.signatures.survivors.silos)
                revealed = attempt.reveal(survivors, dict(stage.signatures.by_silo))
                self._work.keep_opened(Opened(run_id=attempt.context.run, round=stage.round, survivors=survivors))
                answer.reveal.by_silo.update(revealed)
            case other:
                raise PrivacyViolation(f"the server asks for what this silo does not know ({other})", _REMEDY)
        self._server.answer(answer)

    def _send_vector(self, attempt: SiloAttempt, sealed: dict[str, bytes]) -> None:
        masks = attempt.masks(sealed)
        context, update, train = attempt.context, self._update, self._train
        assert update is not None
        assert train is not None
        if self._vector is None:
            noise = None
            if self._entry is not None:
                self._work.keep_entered(self._entry)
                noise = Secret(bytes.fromhex(self._entry.noise))
            start, neurons = self._work.start_path(update), self._neurons if train.count_inactivity else {}
            words = words_of(self._name, update, self._work, start, neurons, self._settings, masks, noise)
            self._vector = self._work.keep_vector(words)
        header = pb.UpdateHeader(
            round=context.round,
            attempt=context.attempt,
            proxy_version=train.proxy_version,
            file=self._vector.announcement(),
        )
        self._server.submit(header, self._vector)

    def _is_bound(self, round: int, silos: Iterable[str]) -> bool:
        """Whether this silo has helped to open the round's sum over other silos than these."""
        opened = self._work.opened(self._server.run_id)
        return opened is not None and opened.round == round and opened.survivors != frozenset(silos)

    def _entering(self, context: Context, silos: Collection[str]) -> str:
        """With silo_privacy settles what this silo puts into an attempt; why it does not, or nothing."""
        if context.terms.silo_privacy is None:
            return ""
        assert self._update is not None
        entered = self._work.entered(context.run)
        if entered is None or entered.round != context.round:
            entered = Entered(
                run_id=context.run,
                round=context.round,
                silos=frozenset(),
                update=self._update.sha256,
                terms=context.terms,
                noise=secrets.token_hex(KEY_BYTES),
            )
        if (entered.update, entered.terms) != (self._update.sha256, context.terms):
            return _ENTERED
        union = entered.silos.union(silos)
        if 2 * context.terms.min_silos <= len(union):
            return _APART
        if self._entry is None:
            self._entry = entered.model_copy(update={"silos": union})
        return ""

    def _withdraw(self, stage: pb.Stage, reason: str, *, from_round: bool = False) -> None:
        log.info("%s: round %d, attempt %d: cannot go on: %s", self._name, stage.round, stage.attempt, reason)
        self._server.record("withdrawn", round=stage.round, attempt=stage.attempt, reason=reason)
        withdrawal = pb.Withdrawal(from_round=from_round)
        request = pb.AnswerStageRequest(round=stage.round, attempt=stage.attempt, withdrawal=withdrawal)
        self._server.answer(request)

    def _forget(self) -> None:
        """The secrets of the attempt before; Python cannot overwrite them, but nothing leads to them any more."""
        self._attempt = self._update = self._train = self._vector = self._entry = None
        self._work.drop_vector()

    def _verify(self, certificate: bytes, message: bytes, signature: bytes) -> str:
        try:
            return self._verifier.name(certificate, message, signature)
        except CertificateError as error:
            raise PrivacyViolation(error.message, error.remedy) from None


def _keys(message: pb.Keys) -> Keys:
    try:
        return keys_of(message)
    except CertificateError as error:
        raise PrivacyViolation(f"the server shows what are no keys: {error.message}", _REMEDY) from None
