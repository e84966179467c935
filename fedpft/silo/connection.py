"""The server as a silo sees it: one method for each RPC, each patient with a server that is away for a while."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grpc
from pydantic import ValidationError
from torch import Tensor

import fedpft
from fedpft import atomic
from fedpft.config import RoundSettings, SiloConfig
from fedpft.errors import RefusedByServer, TransferCorrupt
from fedpft.training import LocalResult
from fedpft.wire import federation_pb2 as pb
from fedpft.wire import transfer
from fedpft.wire.channel import SILO_KEY, dial, persist
from fedpft.wire.federation_pb2_grpc import FederationStub
from fedpft.wire.tensors import Group, read_tensors, write_tensors

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

REPLY_SECONDS = 60.0  # for a reply without a transfer; the server answers NextTask well within it
LEAVE_SECONDS = 2.0


@dataclass(frozen=True)
class Enrolment:
    """What the server says to a silo that enrols.

    run_id: of the federation; the same after a restart of the server.
    proxy: the files of the proxy.
    """

    settings: RoundSettings
    run_id: str
    proxy: tuple[pb.File, ...]


class ServerConnection:
    """Each method raises ServerUnreachable, CertificateError, TransferCorrupt or what the server answered."""

    def __init__(self, config: SiloConfig) -> None:
        """Does not connect yet: the first call does."""
        self._config = config
        self._channel = dial(config.server, config.tls)
        self._stub = FederationStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = () if config.insecure_name is None else ((SILO_KEY, config.insecure_name),)

    def enrol(self, samples: int) -> Enrolment:
        """Says that this silo is here with so many labelled samples."""
        request = pb.EnrolRequest(samples=samples, package_version=fedpft.__version__)
        reply = self._ask(self._stub.Enrol, request)
        try:
            settings = RoundSettings.model_validate_json(reply.settings_json)
        except ValidationError as error:
            raise RefusedByServer(
                f"the server's settings cannot be read: {error.errors()[0]['msg']}",
                f"run the same version of fedpft on both sides; here it is {fedpft.__version__}",
            ) from None
        return Enrolment(settings, reply.run_id, tuple(reply.proxy))

    def fetch_proxy(self, enrolment: Enrolment) -> Path:
        """The bundle's directory under `work`; what lies there already, whole and unchanged, is not fetched again."""
        directory = self._config.work / f"proxy-{transfer.digest(enrolment.proxy)[:16]}"
        directory.mkdir(exist_ok=True)
        missing = [file for file in enrolment.proxy if not _is_there(directory / file.name, file)]
        if missing:
            log.info("fetching the proxy (%.1f MB)", sum(file.total_bytes for file in missing) / 1e6)
        for file in missing:
            self.fetch(file, directory / file.name)
        for stranger in {path.name for path in directory.iterdir()} - {file.name for file in enrolment.proxy}:
            (directory / stranger).unlink()
        return directory

    def fetch(self, file: pb.File, path: Path) -> Path:
        """Fetches an announced file, from where an earlier attempt stopped; RoundOver if it is withdrawn."""
        transfer.check_announcement(file)

        def attempt() -> None:
            with transfer.Incoming(self._config.work / "incoming", file) as incoming:
                request = pb.FetchFileRequest(sha256=file.sha256, offset=incoming.offset)
                if incoming.offset < file.total_bytes:
                    for response in self._stub.FetchFile(request, metadata=self._metadata):
                        incoming.write(response.chunk)
                incoming.finish(path)

        self._persist(attempt)
        return path

    def next_task(self) -> pb.Task:
        """Blocks until the server has something to say."""
        while True:
            task: pb.Task = self._ask(self._stub.NextTask, pb.NextTaskRequest())
            if task.WhichOneof("task") != "wait":
                return task

    def fetch_patches(self, from_version: int) -> list[dict[str, Tensor]]:
        """The patches to the proxy since that version, in the order in which they apply."""
        request = pb.FetchPatchesRequest(from_version=from_version)
        return self._fetch_tensors(self._stub.FetchPatches, request, "patch")

    def fetch_adapter(self, round: int) -> dict[str, Tensor]:
        """The adapter that a round starts from; RoundOver if it has ended."""
        adapters = self._fetch_tensors(self._stub.FetchAdapter, pb.FetchAdapterRequest(round=round), "adapter")
        if len(adapters) != 1:
            raise TransferCorrupt(f"the server sent {len(adapters)} adapters for a round, not one", transfer.AGAIN)
        return adapters[0]

    def submit(self, round: int, proxy_version: int, result: LocalResult) -> bool:
        """Sends a round's result, which stays in `work` until the next; False if the server already had one.

        Raises:
            RoundOver: it came too late.
            InvalidUpdate, StaleProxy: the server cannot use it.
        """
        path = self._config.work / "update.safetensors"
        write_tensors(path, {"adapter": result.adapter, "inactivity": result.inactivity or {}})
        header = pb.UpdateHeader(
            round=round, proxy_version=proxy_version, samples=result.samples, metrics=result.metrics
        )

        def parts() -> Iterator[pb.UpdatePart]:
            yield pb.UpdatePart(update=header)
            for piece in transfer.send([transfer.payload(path)]):
                yield pb.UpdatePart(piece=piece)

        reply = self._persist(lambda: self._stub.SubmitUpdate(parts(), metadata=self._metadata))
        return bool(reply.outcome == pb.UpdateReply.ACCEPTED)

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
        if error is not None:
            self.leave()
        self._channel.close()

    def _ask(self, rpc: Callable[..., Answer], request: object) -> Answer:
        return self._persist(lambda: rpc(request, metadata=self._metadata, timeout=REPLY_SECONDS))

    def _fetch(self, rpc: Callable[..., Iterator[pb.Piece]], request: object, directory: Path) -> list[Path]:
        return transfer.receive(rpc(request, metadata=self._metadata), directory, check=lambda header: None)

    def _fetch_tensors(
        self, rpc: Callable[..., Iterator[pb.Piece]], request: object, group: Group
    ) -> list[dict[str, Tensor]]:
        def fetch() -> list[dict[str, Tensor]]:
            with tempfile.TemporaryDirectory(prefix="incoming-", dir=self._config.work) as place:
                return [read_tensors(path, group) for path in self._fetch(rpc, request, Path(place))]

        return self._persist(fetch)

    def _persist(self, attempt: Callable[[], Answer]) -> Answer:
        config = self._config
        return persist(attempt, config.server, config.tls, timeout_seconds=config.connect_timeout_seconds)


def _digest(directory: Path) -> str:
    return transfer.digest(transfer.payload(path) for path in directory.iterdir())
