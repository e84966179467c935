"""The RPCs of protos/fedpft/wire/v1/federation.proto: who asks, for what, and the answer; nothing is decided here."""

# ruff: noqa: N802, D102  (the methods are named and described in the proto)

import contextlib
import functools
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc

import fedpft
from fedpft import faults, federation
from fedpft.audit import AuditLog
from fedpft.errors import (
    CheckpointError,
    InvalidUpdate,
    RefusedByServer,
    RoundOver,
    ServerUnreachable,
    TransferCorrupt,
)
from fedpft.federation import Stage, StageAnswered, UpdateArrived, Verdict
from fedpft.server.admission import Admission, place_of
from fedpft.server.inbox import Inbox
from fedpft.server.live import LiveFederation
from fedpft.server.outbox import Outbox
from fedpft.server.summing import ANSWERS, Summing
from fedpft.server.updates import Update
from fedpft.wire.channel import Watchdog
from fedpft.wire.hello import Terms, series
from fedpft.wire.status import answering, sanitised
from fedpft.wire.transfer import AGAIN, serialised
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

POLL_SECONDS = 20.0
VERDICTS = {
    federation.Accept: pb.OfferUpdateResponse.VERDICT_ACCEPTED,
    federation.Duplicate: pb.OfferUpdateResponse.VERDICT_COUNTED,
}


class ReadyFrames(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets FetchFile answer with serialised messages, which the generated code knows nothing of."""

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        handler = continuation(details)
        if handler is None or not details.method.endswith("/FetchFile"):
            return handler
        return grpc.unary_stream_rpc_method_handler(handler.unary_stream, handler.request_deserializer, serialised)


class FederationServicer:
    """Every silo has a thread in here while it waits for its next assignment, and one more for a transfer."""

    def __init__(
        self,
        live: LiveFederation,
        inbox: Inbox,
        outbox: Outbox,
        audit: AuditLog,
        settings_json: str,
        run_id: str,
        admission: Admission,
        terms: Terms,
        summing: Summing | None = None,
    ) -> None:
        self._live, self._inbox, self._outbox, self._audit = live, inbox, outbox, audit
        self._settings_json, self._run_id = settings_json, run_id
        self._sender, self._terms, self._summing = admission.sender, terms, summing

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloResponse:
        with self._answering(context):
            silo, terms = self._sender(context), self._terms
            if request.package_version:  # without it nobody means to take part
                _check_version(silo, request.package_version)
            return pb.HelloResponse(
                package_version=fedpft.__version__,
                time_ms=time.time_ns() // 1_000_000,
                task=terms.task,
                labels=terms.labels,
                max_tokens=terms.max_tokens,
                characters_per_token=terms.characters_per_token,
                secure_aggregation=terms.secure_aggregation,
                silo_privacy=None if (private := terms.silo_privacy) is None else pb.SiloPrivacy(**dict(private)),
            )

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolResponse:
        with self._answering(context):
            silo = self._sender(context)
            _check_version(silo, request.package_version)
            if self._summing is not None and request.samples:
                raise RefusedByServer(f"{silo} tells its samples, which only a sum should", "update fedpft there")
            try:
                self._live.enrol(silo, request.samples, place_of(context))
            except RefusedByServer as error:
                self._audit.append("refused", peer=silo, reason=error.message)
                raise
            if self._summing is None:
                self._inbox.enrolled(silo, request.samples)
                self._audit.append("enrolled", peer=silo, samples=request.samples)
            else:
                self._audit.append("enrolled", peer=silo)
            return pb.EnrolResponse(
                settings_json=self._settings_json,
                run_id=self._run_id,
                proxy=[file.announcement() for file in self._outbox.proxy],
            )

    def NextTask(self, request: pb.NextTaskRequest, context: grpc.ServicerContext) -> pb.NextTaskResponse:
        with self._answering(context):
            silo = self._enrolled(context)
            context.add_callback(lambda: self._live.wake(silo))
            assignment = self._live.await_assignment(silo, POLL_SECONDS, context.is_active)
            if isinstance(assignment, federation.Finished | federation.Aborted):
                self._live.tell(silo)
            match assignment:
                case federation.Train(round, attempt):
                    return pb.NextTaskResponse(train=self._train(silo, round, attempt))
                case federation.Answer(round, attempt, stage):
                    return self._stage(silo, round, attempt, stage)
                case federation.Wait():
                    return pb.NextTaskResponse(wait=pb.Wait())
                case federation.Finished():
                    return pb.NextTaskResponse(finished=pb.Finished())
                case federation.Aborted(reason):
                    return pb.NextTaskResponse(aborted=pb.Aborted(reason=sanitised(reason)))

    def FetchFile(self, request: pb.FetchFileRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._answering(context):
            silo = self._enrolled(context)
            watchdog = Watchdog()
            with watchdog.guarding(context):
                for frame in self._outbox.send(silo, request.sha256, request.offset):
                    watchdog.rearm()
                    yield frame

    def OfferUpdate(self, request: pb.OfferUpdateRequest, context: grpc.ServicerContext) -> pb.OfferUpdateResponse:
        with self._answering(context):
            silo, header = self._enrolled(context), request.update
            match self._judge(silo, header):
                case federation.Accept() if header.file.content:
                    return pb.OfferUpdateResponse(verdict=self._take(silo, header, ()))
                case federation.Accept():
                    with self._out_of_the_round(silo, header.round):
                        offset = self._inbox.offered(silo, header)
                    return pb.OfferUpdateResponse(verdict=pb.OfferUpdateResponse.VERDICT_SEND, offset=offset)
                case federation.Duplicate():
                    self._inbox.sync()
                    counted = self._inbox.counted(silo, header)
                    return pb.OfferUpdateResponse(verdict=VERDICTS[federation.Duplicate], counted_sha256=counted)
                case federation.Refuse(_, error):
                    if self._summing is None:
                        self._live.take(_arrival(silo, header), keep=lambda: None)
                    raise error

    def SendUpdate(self, parts: Iterator[pb.SendUpdateRequest], context: grpc.ServicerContext) -> pb.SendUpdateResponse:
        with self._answering(context):
            silo, first = self._enrolled(context), next(parts, None)
            if first is None or first.WhichOneof("part") != "update":
                raise TransferCorrupt("an update began without its header", AGAIN)
            header = first.update
            match self._judge(silo, header):
                case federation.Refuse(_, refusal):
                    raise refusal
                case federation.Duplicate():
                    self._inbox.sync()
                    return pb.SendUpdateResponse()
            watchdog = Watchdog()

            def chunks() -> Iterator[pb.Chunk]:
                with watchdog.guarding(context):  # and not the check that follows, which may have to wait
                    for part in parts:
                        watchdog.rearm()
                        yield part.chunk

            self._take(silo, header, chunks())
            return pb.SendUpdateResponse()

    def AnswerStage(self, request: pb.AnswerStageRequest, context: grpc.ServicerContext) -> pb.AnswerStageResponse:
        with self._answering(context):
            silo, round, kind = self._enrolled(context), request.round, request.WhichOneof("answer")
            if self._summing is None or kind is None:
                raise RefusedByServer("this federation has no such stage", "restart the silo")
            if kind == "withdrawal":
                self._audit.append("withdrawn", peer=silo, round=round, attempt=request.attempt)
                if request.withdrawal.from_round:
                    self._live.fail(silo, "it may be in no other sum of this round", round)
                else:
                    self._live.withdraw(silo, round, request.attempt)
                return pb.AnswerStageResponse()
            with self._out_of_the_round(silo, round):
                verdict = self._take_keys(silo, request) if kind == "keys" else self._take_answer(silo, request, kind)
            self._audit.append(
                "received",
                peer=silo,
                file=kind,
                round=round,
                attempt=request.attempt,
                bytes=request.ByteSize(),
            )
            if isinstance(verdict, federation.Refuse):
                raise verdict.error
            return pb.AnswerStageResponse()

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        with self._answering(context):
            self._live.fail(self._enrolled(context), "it left; its own log says why")
            return pb.LeaveResponse()

    def _judge(self, silo: str, header: pb.UpdateHeader) -> Verdict:
        """Of an update, or of a vector of secure aggregation."""
        if self._summing is None:
            return self._live.judge(_arrival(silo, header))
        return self._live.judge_answer(_vector(silo, header))

    def _take_keys(self, silo: str, request: pb.AnswerStageRequest) -> Verdict:
        assert self._summing is not None
        summing, shown = self._summing, request.keys
        arrived = UpdateArrived(silo, request.round, shown.proxy_version, request.attempt)
        verdict = self._live.judge(arrived)
        if isinstance(verdict, federation.Duplicate):
            return verdict
        if isinstance(verdict, federation.Refuse):
            return self._live.take(arrived, keep=lambda: None)
        keys = summing.check_keys(silo, request.round, request.attempt, shown.keys)
        return self._live.take(arrived, keep=lambda: summing.keep_keys(keys, request.round, request.attempt))

    def _take_answer(self, silo: str, request: pb.AnswerStageRequest, kind: str) -> Verdict:
        assert self._summing is not None
        summing, answered = self._summing, StageAnswered(silo, request.round, request.attempt, ANSWERS[kind])
        verdict = self._live.judge_answer(answered)
        if not isinstance(verdict, federation.Accept):
            return verdict
        summing.check(silo, request)
        return self._live.answer(answered, keep=lambda: summing.keep(silo, request))

    def _take(self, silo: str, header: pb.UpdateHeader, chunks: Iterable[pb.Chunk]) -> pb.OfferUpdateResponse.Verdict:
        """Receives an update and, if it is the first, lets it count."""
        with self._out_of_the_round(silo, header.round):
            update = self._inbox.receive(silo, header, chunks)
        if (summing := self._summing) is not None:
            return self._take_vector(silo, header, update, summing)
        verdict = self._live.take(_arrival(silo, header), lambda: self._inbox.keep(update, header))
        self._inbox.sync()
        self._audit.append(
            "received",
            peer=silo,
            file="update",
            round=header.round,
            bytes=header.file.total_bytes,
            sha256=header.file.sha256.hex(),
            verdict=type(verdict).__name__.lower(),
        )
        if not isinstance(verdict, federation.Accept):
            update.path.unlink(missing_ok=True)
        if isinstance(verdict, federation.Refuse):
            raise verdict.error
        return VERDICTS[type(verdict)]

    def _take_vector(
        self, silo: str, header: pb.UpdateHeader, update: Update, summing: Summing
    ) -> pb.OfferUpdateResponse.Verdict:
        keep = functools.partial(summing.keep_vector, silo, header.round, header.attempt, update.path)
        verdict = self._live.answer(_vector(silo, header), keep)
        self._audit.append(
            "received",
            peer=silo,
            file="vector",
            round=header.round,
            attempt=header.attempt,
            bytes=header.file.total_bytes,
            sha256=header.file.sha256.hex(),
        )
        if not isinstance(verdict, federation.Accept):
            update.path.unlink(missing_ok=True)
        if isinstance(verdict, federation.Refuse):
            raise verdict.error
        return VERDICTS[type(verdict)]

    def _stage(self, silo: str, round: int, attempt: int, stage: Stage) -> pb.NextTaskResponse:
        assert self._summing is not None
        try:
            return pb.NextTaskResponse(stage=self._summing.asked(silo, round, attempt, stage))
        except RoundOver:  # in the meantime
            return pb.NextTaskResponse(wait=pb.Wait())

    @contextlib.contextmanager
    def _answering(self, context: grpc.ServicerContext) -> Iterator[None]:
        """As `answering`; a fault of the server's own files ends the server, and no silo for it."""
        with answering(context):
            try:
                yield
            except (CheckpointError, OSError) as error:
                if isinstance(error, OSError) and not faults.is_of_the_disk(error):
                    raise
                log.error("the server ends: %s", error)
                self._live.break_off(error)
                raise ServerUnreachable("the server cannot use its own files", "its operator mends them") from None

    @contextlib.contextmanager
    def _out_of_the_round(self, silo: str, round: int) -> Iterator[None]:
        """A silo whose update cannot be used is not waited for."""
        try:
            yield
        except InvalidUpdate as error:
            self._audit.append("refused", peer=silo, round=round, reason=error.message)
            self._live.fail(silo, error.message, round)
            raise

    def _train(self, silo: str, round: int, attempt: int) -> pb.Train:
        outbox = self._outbox
        return pb.Train(
            round=round,
            attempt=attempt,
            adapter=outbox.announced_adapter(silo),
            proxy_version=self._live.proxy_version,
            patch=outbox.patch.announcement() if outbox.patch else None,
            snapshot=outbox.snapshot.announcement() if outbox.snapshot else None,
            count_inactivity=self._inbox.counts_inactivity,
        )

    def _enrolled(self, context: grpc.ServicerContext) -> str:
        silo = self._sender(context)
        self._live.check_enrolled(silo, place_of(context))
        return silo


def _check_version(silo: str, version: str) -> None:
    if series(version) != series(fedpft.__version__):
        log.warning("%s: refused: it runs fedpft %s", silo, sanitised(version))
        raise RefusedByServer(
            f"{silo} runs fedpft {version}, the server {fedpft.__version__}",
            f"install fedpft {fedpft.__version__} at the silo",
        )


def _arrival(silo: str, header: pb.UpdateHeader) -> UpdateArrived:
    return UpdateArrived(silo, header.round, header.proxy_version, header.attempt)


def _vector(silo: str, header: pb.UpdateHeader) -> StageAnswered:
    return StageAnswered(silo, header.round, header.attempt, Stage.VECTORS)
