"""The server as a silo sees it: one method for each RPC, each patient with a server that is away for a while."""

import collections
import hashlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
from pydantic import ValidationError

import fedpft
from fedpft import atomic, faults
from fedpft.audit import AuditLog
from fedpft.config import RoundSettings, SiloConfig
from fedpft.errors import NotEnrolled, PrivacyViolation, RankLost, RefusedByServer
from fedpft.proxy.corrections import is_used
from fedpft.wire import transfer
from fedpft.wire.channel import (
    ID_BYTES,
    IDLE_SECONDS,
    SILO_KEY,
    WORK_KEY,
    Progress,
    Watchdog,
    dial,
    pauses,
    persist,
)
from fedpft.wire.tensors import TensorFile
from fedpft.wire.v1 import federation_pb2 as pb
from fedpft.wire.v1.federation_pb2_grpc import FederationServiceStub

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

REPLY_SECONDS = 150.0  # for a reply: NextTask may wait for 20 s, and a chunk that comes along for IDLE_SECONDS
LEAVE_SECONDS = 2.0
SEND_UPDATE = f"/{pb.DESCRIPTOR.services_by_name['FederationService'].full_name}/SendUpdate"
LARGE_BYTES = 16 << 20  # what takes long enough to be worth a line
SAME_VERSION = f"run the same version of fedpft on both sides; here it is {fedpft.__version__}"


@dataclass(frozen=True)
class Enrolment:
    """What the server says to a silo that enrols.

    run_id: of the federation; the same after a restart of the server.
    proxy: the files of the proxy's version 0.
    """

    settings: RoundSettings
    run_id: str
    proxy: tuple[pb.File, ...]

    @property
    def proxy_digest(self) -> str:
        """Names the proxy among others."""
        return transfer.digest(self.proxy)[:16]


class ServerConnection:
    """Each method raises ServerUnreachable, CertificateError, TransferCorrupt or what the server answered.

    What leaves or arrives is written to `work`/audit.jsonl. A server that was restarted, and so has forgotten this
    silo, is told of it again in the middle of whatever is going on.
    """

    def __init__(self, config: SiloConfig, *, idle_seconds: float = IDLE_SECONDS) -> None:
        """Does not connect yet: the first call does. `config.work` must be there."""
        self._config = config
        self._idle_seconds = idle_seconds
        self._audit = AuditLog(config.work / "audit.jsonl")
        self._channel = dial(config.server, config.tls)
        self._stub = FederationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        # The method that was generated cannot send frames that are serialised already.
        self._stub.SendUpdate = self._channel.stream_unary(
            SEND_UPDATE, transfer.serialised, pb.SendUpdateResponse.FromString
        )
        place = _work_id(config.work) + secrets.token_bytes(ID_BYTES)
        self._metadata: tuple[tuple[str, str | bytes], ...] = ((WORK_KEY, place),)
        if config.insecure_name is not None:
            self._metadata += ((SILO_KEY, config.insecure_name),)
        self._samples = 0
        self._run_id: str | None = None
        self._settings: RoundSettings | None = None

    def enrol(self, samples: int) -> Enrolment:
        """Says that this silo is here with so many labelled samples.

        Raises:
            RefusedByServer: among other reasons, it is another federation than at this connection's first enrolment.
        """
        request = pb.EnrolRequest(samples=samples, package_version=fedpft.__version__)
        reply = self._persist(lambda _: self._stub.Enrol(request, metadata=self._metadata, timeout=REPLY_SECONDS))
        self._audit.append("enrolled", peer=self._config.server, samples=samples, version=fedpft.__version__)
        if self._run_id not in (None, reply.run_id):
            raise RefusedByServer(
                f"the server at {self._config.server} began a new federation", "restart the silo to take part in it"
            )
        try:
            settings = RoundSettings.model_validate_json(reply.settings_json)
        except ValidationError as error:
            raise RefusedByServer(
                f"the server's settings cannot be read: {error.errors()[0]['msg']}", SAME_VERSION
            ) from None
        if self._settings is not None:
            before, now = self._settings.secure_aggregation, settings.secure_aggregation
            if (before is None) != (now is None):
                raise PrivacyViolation(
                    f"{self._config.server} began with{'out' if before is None else ''} secure aggregation, and "
                    "changed that",
                    "nothing was sent since; ask the server's operator, then restart the silo",
                )
            if before is not None and now is not None and before.silo_privacy != now.silo_privacy:
                raise PrivacyViolation(
                    f"{self._config.server} has another silo_privacy than it began with",
                    "nothing was sent since; ask the server's operator, then restart the silo",
                )
        self._samples, self._run_id, self._settings = samples, reply.run_id, settings
        return Enrolment(settings, reply.run_id, tuple(reply.proxy))

    @property
    def run_id(self) -> str:
        """Of the federation that this silo has enrolled in."""
        assert self._run_id is not None
        return self._run_id

    @property
    def settings(self) -> RoundSettings:
        """As the server said at the last enrolment: one that was restarted may say something else."""
        assert self._settings is not None
        return self._settings

    def answer(self, request: pb.AnswerStageRequest) -> None:
        """Says what a stage of secure aggregation asks for; RoundOver if it comes too late."""
        kind = str(request.WhichOneof("answer"))
        self._audit.append(
            "sent",
            peer=self._config.server,
            round=request.round,
            file=kind,
            attempt=request.attempt,
            bytes=request.ByteSize(),
            sha256=hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest(),
        )
        self._ask(self._stub.AnswerStage, request)

    def fetch_proxy(self, enrolment: Enrolment) -> Path:
        """The bundle's directory under `work`, with what the limits make use of.

        What lies there already, whole and unchanged, is not fetched again.
        """
        directory = self._config.work / f"proxy-{enrolment.proxy_digest}"
        used = [file for file in enrolment.proxy if is_used(file.name, self._config.limits)]
        for file in used:
            self.fetch(file, directory)
        for stranger in {path.name for path in directory.glob("*")} - {file.name for file in used}:
            (directory / stranger).unlink()
        return directory

    def fetch(self, file: pb.File, directory: Path, name: str | None = None) -> Path:
        """Puts an announced file into a directory, unless it is there: as it came along, or from where a fetch stopped.

        Args:
            name: to be called there; default: as announced.

        Raises:
            RoundOver: the server has withdrawn the file.
        """
        transfer.check_announcement(file)
        directory.mkdir(exist_ok=True)
        path, reached = directory / (name or file.name), 0
        if path.is_file() and transfer.payload(path).sha256 == file.sha256:
            return path
        if file.total_bytes >= LARGE_BYTES:
            log.info("fetching %s (%.1f MB)", file.name, file.total_bytes / 1e6)

        def attempt(progress: Progress) -> None:
            nonlocal reached
            with transfer.Incoming(self._config.work / "incoming", file) as incoming:
                if incoming.offset < file.total_bytes:
                    request = pb.FetchFileRequest(sha256=file.sha256, offset=incoming.offset)
                    watchdog = Watchdog(self._idle_seconds)
                    call = self._stub.FetchFile(request, metadata=self._metadata)
                    try:
                        with watchdog.guarding(call):
                            for response in call:
                                watchdog.rearm()
                                incoming.write(response.chunk)
                                if incoming.offset > reached:  # a file that is fetched anew gets no new patience
                                    reached = incoming.offset
                                    progress()
                    finally:
                        call.cancel()  # if the fault was on this side, the server would go on sending
                incoming.finish(path)

        if transfer.came_along(file):
            path.write_bytes(file.content)  # not synced: if a crash tears it, the next look at its SHA-256 shows that
        else:
            self._call(attempt)
        self._audit.append(
            "received", peer=self._config.server, file=file.name, bytes=file.total_bytes, sha256=file.sha256.hex()
        )
        return path

    def next_assignment(self) -> pb.NextTaskResponse:
        """Blocks until the server has something to say."""
        while True:
            request = pb.NextTaskRequest()
            assignment: pb.NextTaskResponse = self._ask(self._stub.NextTask, request)
            if assignment.WhichOneof("task") != "wait":
                return assignment

    def submit(self, update: pb.UpdateHeader, file: transfer.Payload) -> bool:
        """Sends a round's result: with the offer if it fits into a chunk, else from the byte that the server asks for.

        Args:
            update: its `file` announces `file`.

        Returns:
            True if the update counts from now on, False if the server said that it, or another one of this silo, did.

        Raises:
            RoundOver: it came too late.
            InvalidUpdate, StaleProxy: the server cannot use it.
        """
        request, reached = pb.OfferUpdateRequest(update=update), 0
        request.update.file.CopyFrom(file.offer())
        comes_along = bool(request.update.file.content)

        def attempt(progress: Progress) -> bool:
            if comes_along:
                self._record_sending(update, file, 0)
            offer = self._stub.OfferUpdate(request, metadata=self._metadata, timeout=REPLY_SECONDS)
            if offer.verdict == pb.OfferUpdateResponse.VERDICT_ACCEPTED:
                return True
            if offer.verdict == pb.OfferUpdateResponse.VERDICT_COUNTED:
                if offer.counted_sha256 not in (b"", update.file.sha256):
                    log.warning("round %d counts another update of this silo than the present one", update.round)
                return False
            send = pb.OfferUpdateResponse.VERDICT_SEND
            if comes_along or offer.verdict != send or offer.offset > file.total_bytes:
                raise RefusedByServer(f"the server's answer to an update cannot be read: {offer}", SAME_VERSION)
            self._record_sending(update, file, offer.offset)
            watchdog, position = Watchdog(self._idle_seconds), offer.offset

            def sent(chunk_bytes: int) -> None:
                nonlocal position, reached
                watchdog.rearm()
                position += chunk_bytes
                if position > reached:
                    reached = position
                    progress()

            parts = itertools.chain(
                [pb.SendUpdateRequest(update=update)], file.frames(pb.SendUpdateRequest, offer.offset, sent)
            )
            call = self._stub.SendUpdate.future(parts, metadata=self._metadata)
            with watchdog.guarding(call):
                call.result()
            return True

        return self._call(attempt)

    def record(self, event: str, **fields: Any) -> None:
        """Adds to the audit log what happened on this side; sends nothing."""
        self._audit.append(event, **fields)

    def leave(self) -> None:
        """Tells the server not to wait for this silo; a server that does not hear it will find out by itself."""
        try:
            self._stub.Leave(pb.LeaveRequest(), metadata=self._metadata, timeout=LEAVE_SECONDS)
        except grpc.RpcError as error:
            log.debug("the server did not hear that this silo leaves: %s", error)

    def __enter__(self) -> "ServerConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with faults.tidying("the connection"):
            # a silo that was merely stopped, or lost one of its processes, comes back, and stays expected
            if isinstance(error, Exception) and not isinstance(error, RankLost):
                self.leave()
            self._channel.close()
            self._audit.close()

    def _ask(self, rpc: Callable[..., Answer], request: object) -> Answer:
        return self._call(lambda _: rpc(request, metadata=self._metadata, timeout=REPLY_SECONDS))

    def _call(self, attempt: Callable[[Progress], Answer]) -> Answer:
        """Calls the server until it answers, and enrols again whenever it has forgotten this silo."""
        waiting = pauses()
        while True:
            try:
                return self._persist(attempt)
            except NotEnrolled:
                if self._run_id is None:
                    raise
                log.info("the server was restarted: enrolling again")
                time.sleep(next(waiting))
                self.enrol(self._samples)

    def _persist(self, attempt: Callable[[Progress], Answer]) -> Answer:
        config = self._config
        return persist(attempt, config.server, config.tls, timeout_seconds=config.connect_timeout_seconds)

    def _record_sending(self, update: pb.UpdateHeader, file: transfer.Payload, offset: int) -> None:
        """Before the first byte: nothing leaves without an entry."""
        groups = collections.Counter(name.partition("/")[0] for name in TensorFile(file.path).specs)
        self._audit.append(
            "sent",
            peer=self._config.server,
            round=update.round,
            file=file.name,
            from_byte=offset,
            bytes=file.total_bytes - offset,
            sha256=file.sha256.hex(),
            samples=update.samples,
            tensors=dict(groups),
            metrics=sorted(update.metrics),
        )


def _work_id(work: Path) -> bytes:
    """Tells this work directory from others; made up once."""
    path = work / "id"
    known = path.read_bytes() if path.exists() else b""
    if len(known) != ID_BYTES:
        known = secrets.token_bytes(ID_BYTES)
        with atomic.replacing(path) as written:
            written.write_bytes(known)
    return known
