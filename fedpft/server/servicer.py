"""The RPCs of protos/fedpft/wire/federation.proto: who asks, for what, and the answer; nothing is decided here."""

# ruff: noqa: N802, D102  (the methods are named and described in the proto)

import logging
from collections.abc import Callable, Iterator

import grpc

import fedpft
from fedpft import federation
from fedpft.errors import CertificateError, InvalidUpdate, RefusedByServer, TransferCorrupt
from fedpft.federation import UpdateArrived
from fedpft.server.inbox import Inbox
from fedpft.server.live import LiveFederation
from fedpft.server.outbox import Outbox
from fedpft.wire import federation_pb2 as pb
from fedpft.wire.channel import SILO_KEY
from fedpft.wire.status import answering, sanitised
from fedpft.wire.transfer import AGAIN

log = logging.getLogger(__name__)

POLL_SECONDS = 20.0


class FederationServicer:
    """Every silo has a thread in here while it waits for its next task, and one more for a transfer."""

    def __init__(
        self, live: LiveFederation, inbox: Inbox, outbox: Outbox, settings_json: str, *, certified: bool
    ) -> None:
        """Args:
        certified: silos prove who they are by certificate; else they merely say so, in metadata.
        """
        self._live, self._inbox, self._outbox = live, inbox, outbox
        self._settings_json = settings_json
        self._certified = certified

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolReply:
        with answering(context):
            silo = self._sender(context)
            if _series(request.package_version) != _series(fedpft.__version__):
                log.warning("%s: refused: it runs fedpft %s", silo, sanitised(request.package_version))
                raise RefusedByServer(
                    f"{silo} runs fedpft {request.package_version}, the server {fedpft.__version__}",
                    f"install fedpft {fedpft.__version__} at the silo",
                )
            self._live.enrol(silo, request.samples)
            size = sum(file.total_bytes for file in self._outbox.proxy)
            return pb.EnrolReply(
                settings_json=self._settings_json, proxy_digest=self._outbox.proxy_digest, proxy_bytes=size
            )

    def FetchProxy(self, request: pb.FetchProxyRequest, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
        return self._stream(context, self._outbox.send_proxy)

    def FetchPatches(self, request: pb.FetchPatchesRequest, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
        return self._stream(context, lambda: self._outbox.send_patches(request.from_version))

    def FetchAdapter(self, request: pb.FetchAdapterRequest, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
        return self._stream(context, lambda: self._outbox.send_adapter(request.round))

    def NextTask(self, request: pb.NextTaskRequest, context: grpc.ServicerContext) -> pb.Task:
        with answering(context):
            silo = self._enrolled(context)
            context.add_callback(self._live.wake)
            task = self._live.await_task(silo, POLL_SECONDS, context.is_active)
            if isinstance(task, federation.Finished | federation.Aborted):
                self._live.tell(silo)
            match task:
                case federation.Train(round):
                    version, counts = self._live.proxy_version, self._inbox.counts_inactivity
                    return pb.Task(train=pb.Train(round=round, proxy_version=version, count_inactivity=counts))
                case federation.Wait():
                    return pb.Task(wait=pb.Wait())
                case federation.Finished():
                    return pb.Task(finished=pb.Finished())
                case federation.Aborted(reason):
                    return pb.Task(aborted=pb.Aborted(reason=sanitised(reason)))

    def SubmitUpdate(self, parts: Iterator[pb.UpdatePart], context: grpc.ServicerContext) -> pb.UpdateReply:
        with answering(context):
            silo = self._enrolled(context)
            first = next(parts, None)
            if first is None or first.WhichOneof("part") != "update":
                raise TransferCorrupt("an update began without its header", AGAIN)
            header = first.update
            update = UpdateArrived(silo, header.round, header.proxy_version)
            if not isinstance(self._live.judge(update), federation.Accept):  # then none of its bytes are wanted
                return _reply(self._live.take(update, keep=lambda: None))
            try:
                with self._inbox.receive(silo, header, (part.piece for part in parts)) as keep:
                    return _reply(self._live.take(update, keep))
            except InvalidUpdate as error:
                self._live.fail(silo, error.message, header.round)
                raise

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveReply:
        with answering(context):
            self._live.fail(self._enrolled(context), "it left; its own log says why")
            return pb.LeaveReply()

    def _stream(self, context: grpc.ServicerContext, pieces: Callable[[], Iterator[pb.Piece]]) -> Iterator[pb.Piece]:
        with answering(context):
            self._enrolled(context)
            yield from pieces()

    def _enrolled(self, context: grpc.ServicerContext) -> str:
        silo = self._sender(context)
        self._live.check_enrolled(silo)
        return silo

    def _sender(self, context: grpc.ServicerContext) -> str:
        if self._certified:
            names = [str(name, "utf-8") for name in context.auth_context().get("x509_common_name", ())]
        else:
            names = [str(value) for key, value in context.invocation_metadata() if key == SILO_KEY]
        if len(names) != 1:
            raise CertificateError("the silo's certificate has no common name", "ask for a new kit")
        return names[0]


def _reply(verdict: federation.Verdict) -> pb.UpdateReply:
    match verdict:
        case federation.Accept():
            return pb.UpdateReply(outcome=pb.UpdateReply.ACCEPTED)
        case federation.Duplicate():
            return pb.UpdateReply(outcome=pb.UpdateReply.DUPLICATE)
        case federation.Refuse(_, error):
            raise error


def _series(version: str) -> list[str]:
    """Major and minor number."""
    return version.split(".")[:2]
