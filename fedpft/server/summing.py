"""What the server has of the present attempt at a round's sum (fedpft/privacy/secagg.py), and what it asks silos for.

It is in memory, but for the vectors under their masks: after a restart the round begins a new attempt. Each stage is in
the ledger's journal and in the audit log. The files of the vectors are deleted with the attempt.

L words of the vector.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpft import faults
from fedpft.audit import AuditLog
from fedpft.config import SecureTerms
from fedpft.errors import CertificateError, InvalidUpdate, RoundOver
from fedpft.federation import AttemptFailed, Open, Stage, StartStage, SumKept
from fedpft.privacy import fixedpoint
from fedpft.privacy.masking import add_masks
from fedpft.privacy.secagg import SEALED_BYTES, SIGNATURE_BYTES, Context, Keys, Roster, masks_of_sum
from fedpft.privacy.shares import SHARE_BYTES
from fedpft.server.roundfiles import RoundFiles
from fedpft.wire.messages import keys_of, message_of
from fedpft.wire.signatures import Verifier
from fedpft.wire.tensors import TensorFile
from fedpft.wire.v1 import federation_pb2 as pb

_REMEDY = "run the same version of fedpft on both sides"
_NEXT = "ask for the next task again"
ANSWERS = {"shares": Stage.SHARES, "signature": Stage.SIGNATURES, "reveal": Stage.REVEALS}


@dataclass
class _Attempt:
    """What silos have said so far; whose answers a stage goes on with: roster, sharers, survivors, signatures."""

    context: Context
    keys: dict[str, Keys] = field(default_factory=dict)
    roster: Roster | None = None
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sharers: tuple[str, ...] = ()
    vectors: dict[str, Path] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    signatures: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def known_roster(self) -> Roster:
        """RoundOver before the first stage."""
        if self.roster is None:
            raise RoundOver("the attempt has not come so far", _NEXT)
        return self.roster


class Summing:
    """Thread-safe. What `begin`, `keep_...` and `staged` change, they change under the lock of the state machine."""

    def __init__(
        self,
        run_id: str,
        terms: SecureTerms,
        files: RoundFiles,
        audit: AuditLog,
        verifier: Verifier,
        stage_seconds: float,
    ) -> None:
        self._run_id, self._terms, self._files, self._audit = run_id, terms, files, audit
        self._verifier = verifier
        self.stage_seconds = stage_seconds
        self._lock = threading.RLock()
        self._attempt: _Attempt | None = None

    @property
    def arrived_bytes(self) -> int:
        """Of vectors, so far."""
        return self._files.inbox.bytes_up

    def begin(self, round: int, attempt: int, task: bytes) -> None:
        """A new attempt; nothing of the one before is of use."""
        with self._lock:
            self._forget()
            self._attempt = _Attempt(Context(self._run_id, round, attempt, task, self._terms))

    def staged(self, action: StartStage) -> None:
        """A stage begins."""
        with self._lock:
            now = self._present(action.round, action.attempt)
            match action.stage:
                case Stage.SHARES:
                    now.roster = Roster(now.context, (now.keys[silo] for silo in action.silos))
                case Stage.VECTORS:
                    now.sharers = action.silos
                case Stage.SIGNATURES:
                    now.survivors = action.silos
                case Stage.REVEALS:
                    now.signatures = {silo: now.signatures[silo] for silo in action.silos}
        self._files.record_stage(action)
        self._record(action, action.stage.name.lower(), silos=list(action.silos))

    def asked(self, silo: str, round: int, attempt: int, stage: Stage) -> pb.Stage:
        """What a silo is to answer; RoundOver if the attempt is over meanwhile."""
        with self._lock:
            now = self._present(round, attempt)
            asked, survivors = pb.Stage(round=round, attempt=attempt), pb.Survivors(silos=now.survivors)
            match stage:
                case Stage.SHARES:
                    asked.roster.keys.extend(message_of(each) for each in now.known_roster.keys.values())
                case Stage.VECTORS:
                    asked.sealed.SetInParent()
                    for sender in now.sharers:
                        if sender != silo:
                            asked.sealed.by_silo[sender] = now.sealed[sender][silo]
                case Stage.SIGNATURES:
                    asked.survivors.CopyFrom(survivors)
                case Stage.REVEALS:
                    asked.signatures.survivors.CopyFrom(survivors)
                    asked.signatures.by_silo.update(now.signatures)
            return asked

    def check_keys(self, silo: str, round: int, attempt: int, shown: pb.Keys) -> Keys:
        """A silo's keys; InvalidUpdate if no other silo could believe them, RoundOver if they come too late."""
        with self._lock:
            context = self._present(round, attempt).context
        try:
            keys = keys_of(shown)
        except CertificateError as error:
            raise InvalidUpdate(f"{silo}: {error.message}", error.remedy) from None
        if keys.silo != silo:
            raise InvalidUpdate(f"{silo}: shows keys of {keys.silo}", _REMEDY)
        keys.check_form()
        self._check_signed(silo, keys, keys.message(context), keys.signature)
        return keys

    def keep_keys(self, keys: Keys, round: int, attempt: int) -> None:
        """They count."""
        with self._lock:
            self._present(round, attempt).keys[keys.silo] = keys

    def check(self, silo: str, answer: pb.AnswerStageRequest) -> None:
        """Looks at an answer's form; InvalidUpdate if it cannot be used, RoundOver if it comes too late."""
        with self._lock:
            now = self._present(answer.round, answer.attempt)
            roster, survivors, sharers = now.known_roster, now.survivors, set(now.sharers)
        match answer.WhichOneof("answer"):
            case "shares":
                _check_parts(silo, answer.shares.by_silo, roster.keys.keys() - {silo}, SEALED_BYTES)
            case "signature":
                if len(answer.signature) > SIGNATURE_BYTES:
                    raise InvalidUpdate(f"{silo}: its signature is none", _REMEDY)
                self._check_signed(silo, roster.keys[silo], roster.survivors_message(survivors), answer.signature)
            case "reveal":
                _check_parts(silo, answer.reveal.by_silo, sharers, SHARE_BYTES)

    def keep(self, silo: str, answer: pb.AnswerStageRequest) -> None:
        """An answer counts."""
        with self._lock:
            now = self._present(answer.round, answer.attempt)
            match answer.WhichOneof("answer"):
                case "shares":
                    now.sealed[silo] = dict(answer.shares.by_silo)
                case "signature":
                    now.signatures[silo] = answer.signature
                case "reveal":
                    now.reveals[silo] = dict(answer.reveal.by_silo)

    def keep_vector(self, silo: str, round: int, attempt: int, path: Path) -> None:
        """A silo's vector counts; the file is there as long as the attempt is."""
        with self._lock:
            self._present(round, attempt).vectors[silo] = path

    def opened(self, action: Open) -> SumKept | AttemptFailed:
        """Takes the masks off the sum, and puts it on disk; nothing of a single silo is left then."""
        with self._lock:
            now = self._present(action.round, action.attempt)
        try:
            words = sum_of([now.vectors[silo] for silo in action.silos])
            add_masks(words, masks_of_sum(now.known_roster, now.sharers, action.silos, now.reveals), -1)
            fixedpoint.decode(words, self._files.layout, self._terms, len(action.silos))
        except InvalidUpdate as error:
            self._record(action, "failed", reason=error.message)
            return AttemptFailed(action.round, action.attempt, error.message)
        self._files.keep_sum(action, words)
        self._record(action, "opened", silos=list(action.silos))
        with self._lock:
            self._forget()
        return SumKept(action.round)

    def _forget(self) -> None:
        if self._attempt is not None:
            for path in self._attempt.vectors.values():
                with faults.tidying(path):
                    path.unlink(missing_ok=True)
        self._attempt = None

    def _present(self, round: int, attempt: int) -> _Attempt:
        now = self._attempt
        if now is None or (now.context.round, now.context.attempt) != (round, attempt):
            raise RoundOver(f"attempt {attempt} at the sum of round {round} is over", _NEXT)
        return now

    def _check_signed(self, silo: str, keys: Keys, message: bytes, signature: bytes) -> None:
        try:
            name = self._verifier.name(keys.certificate, message, signature)
        except CertificateError as error:
            raise InvalidUpdate(f"{silo}: {error.message}", error.remedy) from None
        if name != silo:
            raise InvalidUpdate(f"{silo}: signs as {name}", _REMEDY)

    def _record(self, action: StartStage | Open, stage: str, **fields: Any) -> None:
        self._audit.append("stage", round=action.round, attempt=action.attempt, stage=stage, **fields)


def sum_of(vectors: list[Path]) -> Tensor:
    """(L,) int32, modulo 2^32; one vector at a time is in memory."""
    total: Tensor | None = None
    for path in vectors:
        words = TensorFile(path).tensor("masked", "words")
        total = words if total is None else total.add_(words)
    return torch.empty(0, dtype=torch.int32) if total is None else total


def _check_parts(silo: str, parts: Mapping[str, bytes], wanted: set[str], size: int) -> None:
    if parts.keys() != wanted or any(len(part) != size for part in parts.values()):
        raise InvalidUpdate(f"{silo}: its shares are not one of {size} bytes for each silo that is meant", _REMEDY)
