"""A silo against a server of the test's own, which forgets, cuts, stalls, lies and refuses on command."""

# ruff: noqa: N802  (the methods of the service have the names of its RPCs)

import collections
import errno
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fedpft.wire  # noqa: F401  isort: skip  (sets gRPC's environment before grpc is imported)
import grpc
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

from fedpft import audit
from fedpft.config import (
    AdapterSection,
    RoundSettings,
    ShareSection,
    SiloConfig,
    SiloDataSection,
    TlsSection,
    TrainingSection,
)
from fedpft.errors import (
    CertificateError,
    DataError,
    FedPFTError,
    InvalidUpdate,
    ModelError,
    NotEnrolled,
    PrivacyViolation,
    RefusedByServer,
    RoundOver,
    StaleProxy,
    TransferCorrupt,
)
from fedpft.model import adapters
from fedpft.model.subffn import sub_ffns
from fedpft.provision import provision
from fedpft.proxy.bundle import Proxy, load_proxy, patch, save_bundle
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select
from fedpft.silo import __main__ as command
from fedpft.silo import data as silo_data
from fedpft.silo import learner as silo_learner
from fedpft.silo import run as silo_run
from fedpft.silo.connection import ServerConnection
from fedpft.silo.explain import explain
from fedpft.silo.ondisk import DataOnDisk
from fedpft.silo.run import run
from fedpft.wire import channel, transfer
from fedpft.wire.status import CODES, answering
from fedpft.wire.tensors import TensorFile, write_tensors
from fedpft.wire.v1 import federation_pb2 as pb
from fedpft.wire.v1.federation_pb2_grpc import FederationServiceServicer, add_FederationServiceServicer_to_server

CHUNK = 1000
LONG_SECONDS = 60.0  # no test waits so long unless it fails
MISCHIEF = Callable[[grpc.ServicerContext], None]


def settings(encoding: str = "exact") -> RoundSettings:
    training = TrainingSection(rounds=3, batch=4, learning_rate=0.01, update_encoding=encoding)
    return RoundSettings(seed=1, adapter=AdapterSection(rank=2), training=training, inactive_below=0.01)


class Killed(BaseException):
    """As `kill -9`: nothing of the silo runs after it."""


class Server(FederationServiceServicer):
    """Announces what it is given and takes what is offered; keeps what has arrived, as the real one does.

    calls: (RPC, what was asked), in order.
    mischief: RPC -> what to do before the next answers, one each; the first thing in a stream is the second argument.
    bend: what to do with a file's chunks on their way out, one for each fetch.
    tasks: to be set, in order; then the federation is finished.
    updates: round -> (header, content) of those that count.
    """

    def __init__(self, encoding: str = "exact") -> None:
        self.settings, self.run_id = settings(encoding), "first run"
        self.known = False
        self.files: dict[bytes, Path] = {}
        self.proxy: list[pb.File] = []
        self.tasks: list[pb.NextTaskResponse] = []
        self.calls: list[tuple[str, Any]] = []
        self.mischief: dict[str, list[MISCHIEF]] = collections.defaultdict(list)
        self.bend: list[Callable[[Iterator[pb.Chunk]], Iterator[pb.Chunk]]] = []
        self.parts: dict[bytes, bytes] = collections.defaultdict(bytes)
        self.updates: dict[int, tuple[pb.UpdateHeader, bytes]] = {}
        self.labels, self.task = list(tiny.LABELS), "sequence-classification"
        self.address = ""

    def announce(self, path: Path) -> pb.File:
        file = transfer.payload(path).announcement()
        self.files[file.sha256] = path
        return file

    def asked(self, rpc: str) -> list[Any]:
        return [what for name, what in self.calls if name == rpc]

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloResponse:
        if self.mischief["Hello"]:
            self.mischief["Hello"].pop(0)(context)
        terms = {"task": self.task, "labels": self.labels, "max_tokens": 12, "characters_per_token": 4.0}
        return pb.HelloResponse(package_version=request.package_version, **terms)

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolResponse:
        self._begin("Enrol", request.samples, context)
        self.known = True
        return pb.EnrolResponse(settings_json=self.settings.model_dump_json(), run_id=self.run_id, proxy=self.proxy)

    def NextTask(self, request: pb.NextTaskRequest, context: grpc.ServicerContext) -> pb.NextTaskResponse:
        self._begin("NextTask", None, context)
        open_tasks = [task for task in self.tasks if task.train.round not in self.updates]
        return open_tasks[0] if open_tasks else pb.NextTaskResponse(finished=pb.Finished())

    def FetchFile(self, request: pb.FetchFileRequest, context: grpc.ServicerContext) -> Iterator[pb.FetchFileResponse]:
        self._begin("FetchFile", (request.sha256, request.offset), context)
        chunks = chunks_of(self.files[request.sha256], request.offset)
        for chunk in self.bend.pop(0)(chunks) if self.bend else chunks:
            if chunk is None:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            yield pb.FetchFileResponse(chunk=chunk)

    def OfferUpdate(self, request: pb.OfferUpdateRequest, context: grpc.ServicerContext) -> pb.OfferUpdateResponse:
        header = request.update
        self._begin("OfferUpdate", header, context)
        if header.round in self.updates:
            counted = self.updates[header.round][0].file.sha256
            return pb.OfferUpdateResponse(verdict="VERDICT_COUNTED", counted_sha256=counted)
        return pb.OfferUpdateResponse(verdict="VERDICT_SEND", offset=len(self.parts[header.file.sha256]))

    def SendUpdate(self, parts: Iterator[pb.SendUpdateRequest], context: grpc.ServicerContext) -> pb.SendUpdateResponse:
        header = next(parts).update
        sha256 = header.file.sha256
        self._begin("SendUpdate", len(self.parts[sha256]), context)
        for part in parts:
            assert part.chunk.offset == len(self.parts[sha256])
            self.parts[sha256] += part.chunk.data
            self._begin("part", part.chunk.offset, context)
        self.updates[header.round] = (header, self.parts[sha256])
        self._begin("acknowledgement", header.round, context)
        return pb.SendUpdateResponse()

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        self._begin("Leave", None, context)
        return pb.LeaveResponse()

    def _begin(self, rpc: str, what: Any, context: grpc.ServicerContext) -> None:
        self.calls.append((rpc, what))
        if self.mischief[rpc]:
            self.mischief[rpc].pop(0)(context)
        if not self.known and rpc != "Enrol":
            context.abort(CODES[NotEnrolled], "who are you?")

    def forget(self, context: grpc.ServicerContext) -> None:
        """As after a restart: what is on disk is there, who had enrolled is not known."""
        self.known = False
        context.abort(CODES[NotEnrolled], "who are you?")


def chunks_of(path: Path, offset: int) -> Iterator[pb.Chunk]:
    for frame in transfer.payload(path).frames(pb.FetchFileResponse, offset):
        yield pb.FetchFileResponse.FromString(frame).chunk


def well(context: grpc.ServicerContext) -> None:
    pass


def away(context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


def refusing(error: FedPFTError) -> MISCHIEF:
    def refuse(context: grpc.ServicerContext) -> None:
        with answering(context):
            raise error

    return refuse


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers."""
    running = []

    def started(encoding: str = "exact") -> Server:
        server, grpc_server = Server(encoding), grpc.server(ThreadPoolExecutor(8))
        add_FederationServiceServicer_to_server(server, grpc_server)
        server.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        running.append(grpc_server)
        return server

    yield started
    for each in running:
        each.stop(None).wait()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


@pytest.fixture(autouse=True)
def _small_chunks_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(channel, "LONGEST_PAUSE_SECONDS", 0.1)


def silo_config(tmp_path: Path, address: str, **changes: Any) -> SiloConfig:
    values = {
        "server": address,
        "insecure_loopback": True,
        "insecure_name": "north",
        "data": SiloDataSection(path=tmp_path / "data.csv"),
        "work": tmp_path / "work",
        "connect_timeout_seconds": LONG_SECONDS,
    }
    return SiloConfig.model_validate(values | changes)


@pytest.fixture
def connection(server: Server, tmp_path: Path) -> Iterator[ServerConnection]:
    """Enrolled."""
    (tmp_path / "work").mkdir()
    with ServerConnection(silo_config(tmp_path, server.address), idle_seconds=LONG_SECONDS) as connected:
        connected.enrol(7)
        yield connected


@pytest.fixture
def file(server: Server, tmp_path: Path) -> pb.File:
    """Ten chunks and a half."""
    path = tmp_path / "sent.safetensors"
    path.write_bytes(bytes(index * 7 % 251 for index in range(10 * CHUNK + CHUNK // 2)))
    return server.announce(path)


@pytest.fixture
def offered(tmp_path: Path) -> tuple[pb.UpdateHeader, transfer.Payload]:
    """An update of several chunks."""
    path = tmp_path / "update.safetensors"
    write_tensors(path, {"adapter": {"a": torch.arange(1000.0)}})
    file = transfer.payload(path)
    return pb.UpdateHeader(round=1, samples=7, metrics={"train_loss": 0.5}, file=file.announcement()), file


def events(config_or_work: Path) -> list[audit.Entry]:
    return list(audit.read(config_or_work / "audit.jsonl"))


# --- fetching ---------------------------------------------------------------------------------------------------------


def cut_after(count: int) -> Callable[[Iterator[pb.Chunk]], Iterator[Any]]:
    def bend(chunks: Iterator[pb.Chunk]) -> Iterator[Any]:
        for _ in range(count):
            yield next(chunks)
        yield None

    return bend


def flip(number: int) -> Callable[[Iterator[pb.Chunk]], Iterator[pb.Chunk]]:
    def bend(chunks: Iterator[pb.Chunk]) -> Iterator[pb.Chunk]:
        for index, chunk in enumerate(chunks):
            if index == number:
                chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            yield chunk

    return bend


def offsets(server: Server) -> list[int]:
    return [offset for _, offset in server.asked("FetchFile")]


@pytest.mark.parametrize(
    ("bend", "asked"),
    [
        ([cut_after(3), cut_after(0), cut_after(5)], [0, 3, 3, 8]),
        ([flip(3), flip(1), flip(5)], [0, 3, 4, 9]),
    ],
)
def test_a_fetch_goes_on_where_it_stopped(
    bend: Any, asked: list[int], connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    server.bend = bend
    path = connection.fetch(file, tmp_path / "there")
    assert path.read_bytes() == server.files[file.sha256].read_bytes()
    assert offsets(server) == [number * CHUNK for number in asked]
    (received,) = [entry for entry in events(tmp_path / "work") if entry.event == "received"]
    assert received.fields == {
        "peer": server.address,
        "file": "sent.safetensors",
        "bytes": file.total_bytes,
        "sha256": file.sha256.hex(),
    }


def test_a_fetch_goes_on_from_what_an_earlier_process_received(
    connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    content = server.files[file.sha256].read_bytes()
    part = tmp_path / "work" / "incoming" / f"{file.sha256.hex()}.part"
    part.parent.mkdir()
    part.write_bytes(content[:1234])
    assert connection.fetch(file, tmp_path / "there").read_bytes() == content
    assert offsets(server) == [1234]


def test_a_link_that_breaks_for_ever_but_moves_on_is_good_enough(
    connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    server.bend = [flip(1)] * 10  # far more than CORRUPT_ATTEMPTS, but each brings one chunk
    assert connection.fetch(file, tmp_path / "there").is_file()
    assert offsets(server) == [number * CHUNK for number in range(11)]


def test_a_chunk_that_is_always_damaged_ends_the_fetch(
    connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    server.bend = [flip(2)] + [flip(0)] * 10
    with pytest.raises(TransferCorrupt, match=r"sent\.safetensors is not what was sent"):
        connection.fetch(file, tmp_path / "there")
    assert len(offsets(server)) == channel.CORRUPT_ATTEMPTS


def test_a_file_that_is_not_the_announced_one_is_not_fetched_for_ever(
    connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    path = server.files[file.sha256]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(TransferCorrupt, match="SHA-256"):
        connection.fetch(file, tmp_path / "there")
    assert offsets(server) == [0] * channel.CORRUPT_ATTEMPTS
    assert list((tmp_path / "work" / "incoming").iterdir()) == []
    assert list((tmp_path / "there").iterdir()) == []


def test_what_is_there_unchanged_is_not_fetched_again(
    connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    server.proxy = [file]
    directory = connection.fetch_proxy(connection.enrol(7))
    connection.fetch_proxy(connection.enrol(7))
    assert len(offsets(server)) == 1
    (directory / "sent.safetensors").write_bytes(b"changed")
    (directory / "stranger.json").write_bytes(b"from elsewhere")
    assert connection.fetch_proxy(connection.enrol(7)) == directory
    assert len(offsets(server)) == 2
    assert [path.name for path in directory.iterdir()] == ["sent.safetensors"]


def test_a_stalled_stream_is_given_up_and_goes_on(server: Server, file: pb.File, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    woken = threading.Event()

    def stall(chunks: Iterator[pb.Chunk]) -> Iterator[pb.Chunk]:
        yield next(chunks)
        woken.wait(LONG_SECONDS)

    server.bend = [stall]
    with ServerConnection(silo_config(tmp_path, server.address), idle_seconds=0.2) as connection:
        connection.enrol(7)
        assert connection.fetch(file, tmp_path / "there").is_file()
    woken.set()
    assert offsets(server) == [0, CHUNK]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_came_along_is_fetched_only_if_it_is_damaged(
    damaged: bool, connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    content = server.files[file.sha256].read_bytes()
    file.content = content[:-1] if damaged else content
    assert connection.fetch(file, tmp_path / "there").read_bytes() == content
    assert len(offsets(server)) == damaged


def test_a_withdrawn_file_ends_the_round_only(
    connection: ServerConnection, server: Server, file: pb.File, tmp_path: Path
) -> None:
    server.mischief["FetchFile"] = [refusing(RoundOver("gone", "ask for the next task"))]
    with pytest.raises(RoundOver, match="gone"):
        connection.fetch(file, tmp_path / "there")


def test_a_file_of_no_plain_name_is_not_asked_for(connection: ServerConnection, server: Server, tmp_path: Path) -> None:
    with pytest.raises(TransferCorrupt, match="no name"):
        connection.fetch(pb.File(name="../escape", sha256=bytes(32)), tmp_path / "there")
    assert not offsets(server)


# --- a server that was restarted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rpc", ["NextTask", "FetchFile", "OfferUpdate", "SendUpdate", "part"])
def test_a_server_that_forgot_the_silo_is_told_again(
    rpc: str, connection: ServerConnection, server: Server, file: pb.File, offered: Any, tmp_path: Path
) -> None:
    server.mischief[rpc] = [server.forget, well, server.forget]
    assert connection.fetch(file, tmp_path / "there").is_file()
    assert connection.submit(*offered)
    assert connection.next_assignment().WhichOneof("task") == "finished"
    assert set(server.asked("Enrol")) == {7}
    assert len(server.asked("Enrol")) > 1
    assert server.updates[1][1] == offered[1].path.read_bytes()


def test_a_new_federation_is_not_this_one(connection: ServerConnection, server: Server) -> None:
    server.run_id = "second run"
    server.mischief["NextTask"] = [server.forget]
    with pytest.raises(RefusedByServer, match="began a new federation") as caught:
        connection.next_assignment()
    assert caught.value.remedy.startswith("restart the silo")


def test_a_message_that_makes_no_sense_is_tried_again_but_not_for_ever(
    connection: ServerConnection, server: Server
) -> None:
    server.mischief["NextTask"] = [lambda context: context.abort(grpc.StatusCode.INTERNAL, "flipped bit")] * 2
    assert connection.next_assignment().WhichOneof("task") == "finished"
    server.mischief["NextTask"] = [lambda context: context.abort(grpc.StatusCode.INTERNAL, "failed")] * 9
    with pytest.raises(RefusedByServer, match="INTERNAL: failed"):
        connection.next_assignment()


# --- sending ----------------------------------------------------------------------------------------------------------


def test_an_update_is_sent_from_where_it_was_cut(connection: ServerConnection, server: Server, offered: Any) -> None:
    server.mischief["part"] = [well, away, away]
    assert connection.submit(*offered)
    assert server.asked("SendUpdate") == [0, 2 * CHUNK, 3 * CHUNK]
    assert server.updates[1] == (offered[0], offered[1].path.read_bytes())


def test_every_sending_is_on_record(connection: ServerConnection, server: Server, offered: Any, tmp_path: Path) -> None:
    server.mischief["part"] = [well, away]
    connection.submit(*offered)
    header, file = offered
    sent = [entry.fields for entry in events(tmp_path / "work") if entry.event == "sent"]
    assert [(entry["from_byte"], entry["bytes"]) for entry in sent] == [
        (0, header.file.total_bytes),
        (2 * CHUNK, header.file.total_bytes - 2 * CHUNK),
    ]
    same = {"peer": server.address, "round": 1, "file": file.name, "sha256": header.file.sha256.hex(), "samples": 7}
    for entry in sent:
        assert entry.items() >= (same | {"tensors": {"adapter": 1}, "metrics": ["train_loss"]}).items()


def test_a_lost_acknowledgement_does_not_send_twice(
    connection: ServerConnection, server: Server, offered: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.mischief["acknowledgement"] = [away]
    assert not connection.submit(*offered)
    assert server.asked("SendUpdate") == [0]
    assert "another update" not in caplog.text
    server.updates[1][0].file.sha256 = bytes(32)
    assert not connection.submit(*offered)
    assert "another update" in caplog.text


def test_an_update_that_counts_already_is_not_sent(connection: ServerConnection, server: Server, offered: Any) -> None:
    connection.submit(*offered)
    assert not connection.submit(*offered)
    assert len(server.asked("SendUpdate")) == 1


def test_a_damaged_update_is_sent_again_but_not_for_ever(
    connection: ServerConnection, server: Server, offered: Any
) -> None:
    def damaged(context: grpc.ServicerContext) -> None:
        server.parts.clear()
        server.updates.clear()
        refusing(TransferCorrupt("the update differs", "send it again"))(context)

    server.mischief["acknowledgement"] = [damaged]
    assert connection.submit(*offered)
    assert server.asked("SendUpdate") == [0, 0]
    server.updates.clear()
    server.parts.clear()
    server.mischief["acknowledgement"] = [damaged] * 10
    with pytest.raises(TransferCorrupt, match="the update differs"):
        connection.submit(*offered)


def test_a_stalled_sending_is_given_up_and_goes_on(server: Server, offered: Any, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    woken = threading.Event()
    server.mischief["part"] = [well, lambda context: woken.wait(LONG_SECONDS) and away(context)]
    with ServerConnection(silo_config(tmp_path, server.address), idle_seconds=0.5) as connection:
        connection.enrol(7)
        assert connection.submit(*offered)
    woken.set()
    assert server.asked("SendUpdate") == [0, 2 * CHUNK]
    assert server.updates[1][1] == offered[1].path.read_bytes()


@pytest.mark.parametrize("kind", [RoundOver, StaleProxy, InvalidUpdate, RefusedByServer, CertificateError])
def test_a_refused_update_is_not_offered_again(
    kind: type[FedPFTError], connection: ServerConnection, server: Server, offered: Any
) -> None:
    server.mischief["OfferUpdate"] = [refusing(kind("no", "never"))]
    with pytest.raises(kind, match="no"):
        connection.submit(*offered)
    assert len(server.asked("OfferUpdate")) == 1
    assert not server.asked("SendUpdate")


@pytest.mark.parametrize("end", [ModelError("x", "y"), ValueError(), KeyboardInterrupt(), SystemExit()])
def test_only_a_silo_with_an_error_leaves(end: BaseException, server: Server, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    connection = ServerConnection(silo_config(tmp_path, server.address))
    connection.enrol(7)
    connection.__exit__(type(end), end, None)
    assert bool(server.asked("Leave")) == isinstance(end, Exception)


def test_what_fails_when_a_silo_leaves_does_not_hide_why_it_left(
    connection: ServerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("Cannot invoke RPC on closed channel!")

    def work() -> None:
        with connection:
            raise ModelError("x", "y")

    monkeypatch.setattr(connection, "leave", fail)
    with pytest.raises(ModelError):
        work()


# --- whole silos ------------------------------------------------------------------------------------------------------

TEXTS = [f"the {color} {thing} moves" for color in ("red", "green", "blue") for thing in ("bird", "fish", "tree")]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, _loaded: Callable[[str], torch.nn.Module]) -> Path:
    """A proxy with two compressed layers."""
    directory, fm = tmp_path_factory.mktemp("bundle"), _loaded("bert")
    model = cut(fm, select(fm, tiny.by_weights(neurons=8)))
    save_bundle(Proxy(model, tiny.processor("bert"), "sequence-classification", tiny.LABELS, 12, (1, 2)), directory)
    return directory


@pytest.fixture(scope="session")
def wire_files(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """adapter-<r>, from which round r starts; patch-<n> and snapshot-<n> to version n of the proxy."""
    directory = tmp_path_factory.mktemp("files")
    model = load_proxy(bundle).model
    adapters.attach(model, settings().adapter, seed=1)
    for round in (1, 2, 3):
        adapter = {name: tensor + 0.01 * round for name, tensor in adapters.extract(model).items()}
        write_tensors(directory / f"adapter-{round}.safetensors", {"adapter": adapter})
    ffns, changed = list(sub_ffns(model).values()), {}
    for version, rows in ((1, [0, 2]), (2, [5])):
        ffns[version].w_in.data += 1.0
        changed[version] = torch.tensor(rows)
        write_tensors(directory / f"snapshot-{version}.safetensors", {"patch": patch(model, changed, [])})
        own = {version: changed[version]}
        write_tensors(directory / f"patch-{version}.safetensors", {"patch": patch(model, own, [])})
    return directory


Made = tuple[Server, SiloConfig]


@pytest.fixture
def federation(serve: Callable[..., Server], bundle: Path, wire_files: Path, tmp_path: Path) -> Callable[..., Made]:
    """A server of three rounds, each on the next version of the proxy, and a silo's configuration."""
    rows = [f"{text},{tiny.LABELS[index % 3]}\n" for index, text in enumerate(TEXTS)]
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))

    def made(encoding: str = "exact", rounds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Made:
        server = serve(encoding)
        server.proxy = [server.announce(path) for path in sorted(bundle.iterdir())]
        for round in rounds:
            version = round - 1
            task = pb.Train(round=round, proxy_version=version, count_inactivity=True)
            task.adapter.CopyFrom(server.announce(wire_files / f"adapter-{round}.safetensors"))
            if version > 0:
                task.snapshot.CopyFrom(server.announce(wire_files / f"snapshot-{version}.safetensors"))
                task.patch.CopyFrom(server.announce(wire_files / f"patch-{version}.safetensors"))
            server.tasks.append(pb.NextTaskResponse(train=task))
        work = tmp_path / f"work-{server.address.rpartition(':')[2]}"
        return server, silo_config(tmp_path, server.address, work=work, **changes)

    return made


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds that were trained, by any silo."""
    trained: list[int] = []
    train_round = silo_learner.train_round

    def counting(*arguments: Any, **named: Any) -> Any:
        trained.append(named["round"])
        return train_round(*arguments, **named)

    monkeypatch.setattr(silo_learner, "train_round", counting)
    return trained


def contents(server: Server) -> dict[int, bytes]:
    return {round: content for round, (_, content) in server.updates.items()}


def tensors(server: Server, round: int, tmp_path: Path) -> Path:
    path = tmp_path / "looked-at.safetensors"
    path.write_bytes(server.updates[round][1])
    return path


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


def run_killed_before_the_offer(config: SiloConfig) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ServerConnection, "submit", killed)
        with pytest.raises(Killed):
            run(config)


def test_a_silo_takes_part_until_the_end(federation: Any, trainings: list[int], tmp_path: Path) -> None:
    server, config = federation()
    run(config)
    assert trainings == [1, 2, 3]
    assert [header.proxy_version for header, _ in server.updates.values()] == [0, 1, 2]
    header = server.updates[3][0]
    assert header.samples == len(TEXTS)
    assert set(header.metrics) == {"train_loss", "seconds", "tokens", "skipped_rows", "cut_texts"}
    groups = {name.partition("/")[0] for name in TensorFile(tensors(server, 3, tmp_path)).specs}
    assert groups == {"adapter", "inactivity"}
    assert not server.asked("Leave")


def test_a_silo_fetches_one_patch_or_the_snapshot_and_keeps_what_the_round_needs(federation: Any) -> None:
    server, config = federation()
    run(config)
    names = [server.files[sha256].name for sha256, _ in server.asked("FetchFile")]
    assert [name for name in names if name.startswith(("adapter", "patch", "snapshot"))] == [
        *("adapter-1.safetensors", "adapter-2.safetensors", "patch-1.safetensors"),
        *("adapter-3.safetensors", "patch-2.safetensors"),
    ]
    train = server.tasks[2].train
    kept = {path.name for path in (config.work / "received").iterdir()}
    assert kept == {f"{file.sha256.hex()}.safetensors" for file in (train.adapter, train.patch)}

    late, config = federation(rounds=(3,))
    run(config)
    assert "snapshot-2.safetensors" in [late.files[sha256].name for sha256, _ in late.asked("FetchFile")]
    assert late.updates[3][1] == server.updates[3][1], "both ways lead to the same proxy"


@pytest.mark.parametrize("adjustment", ["none", "own"])
def test_a_silo_shifts_its_loss_by_its_own_label_shares_if_the_server_says_so(
    adjustment: str, federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts, train_round = [], silo_learner.train_round
    monkeypatch.setattr(
        silo_learner, "train_round", lambda *a, **named: shifts.append(named["shift"]) or train_round(*a, **named)
    )
    server, config = federation(rounds=(1,))
    rows = [f"{text},{label}\n" for text, label in zip(TEXTS, ["earth"] * 7 + ["sea"] * 2, strict=True)]
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))
    training = server.settings.training.model_copy(update={"logit_adjustment": adjustment})
    server.settings = server.settings.model_copy(update={"training": training})
    run(config)
    assert sorted(server.updates) == [1]
    if adjustment == "none":
        assert shifts == [None]
    else:
        assert shifts[0].tolist() == pytest.approx([math.log(3 * 7 / 9), math.log(3 * 2 / 9), -30.0])


@pytest.mark.parametrize("asked", [False, True])
def test_a_silo_tells_how_far_its_labels_differ_only_if_it_is_asked_and_shares_it(
    asked: bool, federation: Any, tmp_path: Path
) -> None:
    server, config = federation(rounds=(1,))
    rows = [f"{text},{label}\n" for text, label in zip(TEXTS, ["earth"] * 6 + ["sea"] * 3, strict=True)]
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))
    server.settings = server.settings.model_copy(update={"label_diversity": asked})
    run(config)
    header, _ = server.updates[1]
    assert header.metrics.get("label_diversity") == (pytest.approx(1 - (4 + 1) / 9) if asked else None)


def test_a_killed_silo_offers_its_update_again_without_training(federation: Any, trainings: list[int]) -> None:
    server, config = federation()
    run_killed_before_the_offer(config)
    assert (trainings, server.updates) == ([1], {})
    run(config)
    assert trainings == [1, 2, 3]
    undisturbed, config = federation()
    run(config)
    assert contents(server) == contents(undisturbed)


@pytest.mark.parametrize("name", ["update.safetensors", "update.json"])
@pytest.mark.parametrize("damage", ["changed", "torn", "gone"])
def test_a_damaged_update_is_dropped_and_the_round_trained_again(
    name: str, damage: str, federation: Any, trainings: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    server, config = federation(rounds=(1,))
    run_killed_before_the_offer(config)
    path = config.work / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-20] if damage == "torn" else content[:-20] + b"!" + content[-19:])
    run(config)
    assert trainings == [1, 1]
    assert ("not as it was written" in caplog.text) == ((name, damage) != ("update.json", "gone"))
    undisturbed, config = federation(rounds=(1,))
    run(config)
    assert contents(server) == contents(undisturbed)


def test_an_update_that_came_too_late_stops_nothing(federation: Any, trainings: list[int]) -> None:
    server, config = federation()
    run_killed_before_the_offer(config)
    server.mischief["OfferUpdate"] = [refusing(RoundOver("round 1 is over", "go on"))]
    del server.tasks[0]
    run(config)
    assert (trainings, sorted(server.updates)) == ([1, 2, 3], [2, 3])


@pytest.mark.parametrize("kind", [StaleProxy, InvalidUpdate])
def test_an_update_that_can_never_count_is_not_offered_for_ever(
    kind: type[FedPFTError], federation: Any, trainings: list[int]
) -> None:
    server, config = federation(rounds=(1,))
    server.mischief["OfferUpdate"] = [refusing(kind("no", "never"))]
    with pytest.raises(kind):
        run(config)
    assert server.asked("Leave")
    run(config)
    assert (trainings, sorted(server.updates)) == ([1, 1], [1])


def test_a_round_that_is_taken_up_again_is_not_trained_again(federation: Any, trainings: list[int]) -> None:
    server, config = federation(rounds=(1,))
    server.mischief["OfferUpdate"] = [refusing(RoundOver("the server is going down", "wait"))]
    server.tasks[0].train.attempt = 1
    run(config)
    assert trainings == [1]
    assert server.updates[1][0].attempt == 1


def test_a_new_federation_finds_nothing_of_the_old_one(
    federation: Any, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, config = federation("int8", rounds=(1,))
    run(config)
    assert {path.name for path in config.work.glob("residual-*")} == {"residual-1.safetensors"}
    record = config.work / "audit.jsonl"
    before = record.read_bytes()
    server.run_id = "second run"
    server.updates.clear()
    (config.work / "update.json").write_text((config.work / "update.json").read_text().replace("true", "false"))
    monkeypatch.setattr(silo_run.Participant, "take_part", killed)
    with pytest.raises(Killed):
        run(config)
    assert trainings == [1]
    assert len(server.asked("OfferUpdate")) == 1
    left = {path.name.partition("-")[0] for path in config.work.iterdir()}
    assert left == {"lock", "id", "audit.jsonl", "federation.json", "proxy", "cache"}
    assert record.read_bytes().startswith(before)


# --- data that changes ------------------------------------------------------------------------------------------------

FEWER = "text,label\n" + "".join(f"{text},{tiny.LABELS[0]}\n" for text in TEXTS[:4])


def data_changes(config: SiloConfig) -> list[dict[str, Any]]:
    return [entry.fields for entry in events(config.work) if entry.event == "data changed"]


def writing(path: Path, content: str | None) -> MISCHIEF:
    def write(context: grpc.ServicerContext) -> None:
        path.unlink() if content is None else path.write_text(content)

    return write


@pytest.mark.parametrize("content", [FEWER, None])
def test_data_that_changes_between_rounds_is_said_once_and_changes_nothing(
    content: str | None, federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed, config = federation()
    run(config)
    server, config = federation()
    before = hashlib.sha256(config.data.path.read_bytes()).hexdigest()
    server.mischief["OfferUpdate"] = [writing(config.data.path, content)]
    run(config)
    assert contents(server) == contents(undisturbed)
    assert caplog.text.count("changed since it was read: takes effect when this silo is started again") == 1
    (change,) = data_changes(config)
    assert (change["round"], change["before"], change["effect"]) == (2, before, "at the next start")
    assert change["sha256"] == ("" if content is None else hashlib.sha256(content.encode()).hexdigest())


def test_data_that_was_merely_touched_has_not_changed(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, config = federation()
    server.mischief["OfferUpdate"] = [lambda _: os.utime(config.data.path, (1, 1))]
    run(config)
    assert data_changes(config) == []
    assert "changed" not in caplog.text


def test_data_that_changed_between_two_starts_counts_from_then_on(
    federation: Any, trainings: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    server, config = federation()
    before = hashlib.sha256(config.data.path.read_bytes()).hexdigest()
    run_killed_before_the_offer(config)
    config.data.path.write_text(FEWER)
    run(config)
    assert trainings == [1, 2, 3]
    assert server.asked("Enrol") == [len(TEXTS), 4]
    assert [server.updates[round][0].samples for round in (1, 2, 3)] == [len(TEXTS), 4, 4]
    assert caplog.text.count("from now on it trains on 4 samples") == 1
    after = hashlib.sha256(FEWER.encode()).hexdigest()
    assert data_changes(config) == [{"sha256": after, "before": before, "samples": 4, "effect": "from now on"}]
    run(config)
    assert len(data_changes(config)) == 1, "said once"
    assert not [call for call in server.calls if after in repr(call) or before in repr(call)], "it stays here"


def test_another_federation_has_no_former_data(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, config = federation()
    run(config)
    config.data.path.write_text(FEWER)
    server.run_id, server.tasks = "second run", []
    run(config)
    assert data_changes(config) == []


def test_a_work_directory_of_an_earlier_version_is_gone_on_with(federation: Any, trainings: list[int]) -> None:
    _, config = federation()
    run_killed_before_the_offer(config)
    path = config.work / "federation.json"
    joined = json.loads(path.read_text())
    assert joined.pop("name") == "north"
    assert joined.pop("data")
    path.write_text(json.dumps(joined))
    config.data.path.write_text(FEWER)
    run(config)
    assert trainings == [1, 2, 3]
    assert data_changes(config) == []
    assert json.loads(path.read_text())["data"] == hashlib.sha256(FEWER.encode()).hexdigest()


def test_data_that_changes_while_the_silo_starts_is_named(federation: Any) -> None:
    server, config = federation()
    server.mischief["Enrol"] = [writing(config.data.path, FEWER)]
    with pytest.raises(DataError, match=r"data\.csv: changed while it was read"):
        run(config)
    assert server.asked("Leave")
    assert server.updates == {}


def test_a_silo_does_not_send_what_another_silo_trained(
    federation: Any, trainings: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    server, config = federation(rounds=(1,))
    run_killed_before_the_offer(config)
    run(config.model_copy(update={"insecure_name": "south"}))
    assert trainings == [1, 1]
    assert len(server.asked("OfferUpdate")) == 1
    assert "was the work directory of north" in caplog.text


def test_images_are_part_of_the_data(tmp_path: Path) -> None:
    path, image = tmp_path / "data.csv", tmp_path / "a.png"
    path.write_text("image,label\na.png,1\n")
    image.write_bytes(b"an image")
    data = DataOnDisk(path)
    data.add_images([image])
    data.check_read()
    assert data.changed() is None
    image.write_bytes(b"another!")
    with pytest.raises(DataError, match="changed while it was read"):
        data.check_read()
    change = data.changed()
    assert change not in (None, data.read)
    assert data.changed() is None, "said once"
    image.write_bytes(b"an image")
    assert data.changed() is None
    image.unlink()
    assert data.changed() not in (None, change)


@pytest.mark.parametrize("held", [False, True])
def test_an_image_that_changes_between_rounds_ends_the_silo_unless_it_is_held_and_counts_when_it_is_started_again(
    server: Server,
    make_fm: Callable[[str], torch.nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: bool,
) -> None:
    monkeypatch.setattr("fedpft.data.images.HELD_BYTES", 1 << 20 if held else 0)
    for name, grey in (("a.png", 0), ("b.png", 200)):
        Image.new("RGB", (8, 8), (grey, 0, 0)).save(tmp_path / name)
    (tmp_path / "data.csv").write_text("image,label\na.png,sea\nb.png,sky\n")
    fm = make_fm("vit")
    proxy = Proxy(
        cut(fm, select(fm, tiny.by_weights())), tiny.processor("vit"), "image-classification", tiny.LABELS, 1, ()
    )
    save_bundle(proxy, tmp_path / "bundle")
    adapters.attach(proxy.model, server.settings.adapter, seed=1)
    write_tensors(tmp_path / "start.safetensors", {"adapter": adapters.extract(proxy.model)})
    server.task = "image-classification"
    server.proxy = [server.announce(path) for path in sorted((tmp_path / "bundle").iterdir())]
    start = server.announce(tmp_path / "start.safetensors")
    server.tasks = [pb.NextTaskResponse(train=pb.Train(round=round, adapter=start)) for round in (1, 2)]
    server.mischief["OfferUpdate"] = [lambda _: Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")]
    config = silo_config(tmp_path, server.address)
    if not held:
        with pytest.raises(DataError, match=r"image .*a\.png changed since it was looked at"):
            run(config)
    else:
        run(config)
        server.tasks = [pb.NextTaskResponse(finished=pb.Finished())]
    run(config)
    between, later = data_changes(config)
    assert (between["round"], between["effect"]) == (2, "at the next start")
    assert (later["samples"], later["effect"]) == (2, "from now on")
    assert later["sha256"] == between["sha256"]


# --- error feedback ---------------------------------------------------------------------------------------------------


def test_what_was_rounded_off_goes_into_the_next_update_that_counts(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    encode = silo_learner.encode

    def watching(trained: Any, start: Any, encoding: Any, residual: Any) -> Any:
        seen.append(residual)
        return encode(trained, start, encoding, residual)

    monkeypatch.setattr(silo_learner, "encode", watching)
    server, config = federation("int8")

    def too_late(context: grpc.ServicerContext) -> None:
        server.tasks.pop(1)
        refusing(RoundOver("too late", "go on"))(context)

    server.mischief["OfferUpdate"] = [well, too_late]
    run(config)
    first, second, third = seen
    assert first == {}
    assert second
    assert second.keys() == third.keys()
    assert all(torch.equal(second[name], third[name]) for name in second), "round 2 did not count"
    assert {path.name for path in config.work.glob("*residual*")} == {"residual-3.safetensors"}


def kill_at(count: int, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    """Of all renamings and deletions under `work`, the one of this number does not happen, nor anything after it."""
    left = [count]

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if str(arguments[0]).startswith(str(work)):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.hours
def test_a_silo_killed_at_any_point_sends_the_same_bytes(federation: Any) -> None:
    undisturbed, config = federation("int8")
    run(config)
    point, survived = 0, False
    while not survived:
        server, config = federation("int8")
        with pytest.MonkeyPatch.context() as patched:
            kill_at(point, patched, config.work)
            try:
                run(config)
                survived = True
            except Killed:
                point += 1
        run(config)
        assert contents(server) == contents(undisturbed), f"killed at {point}"
    assert point > 30


def test_a_silo_with_coarse_weights_that_is_killed_sends_the_same_bytes(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the second version by a patch after a patch, and has it by a snapshot then."""
    coarse = {"limits": {"weights": "int4"}}
    plain, config = federation()
    run(config)
    undisturbed, config = federation(**coarse)
    run(config)
    server, config = federation(**coarse)
    train_round = silo_learner.train_round
    with monkeypatch.context() as patched:
        patched.setattr(
            silo_learner, "train_round", lambda *a, **n: killed() if n["round"] == 3 else train_round(*a, **n)
        )
        with pytest.raises(Killed):
            run(config)
    run(config)
    assert contents(server).keys() == {1, 2, 3}
    assert contents(server) == contents(undisturbed)
    assert all(contents(server)[round] != contents(plain)[round] for round in (1, 2, 3))


# --- share ------------------------------------------------------------------------------------------------------------


def test_only_what_is_shared_leaves(federation: Any, tmp_path: Path) -> None:
    server, config = federation(rounds=(1,), share=ShareSection(metrics=("tokens",), inactivity=False))
    run(config)
    assert server.updates[1][0].metrics.keys() == {"tokens"}
    assert {name.partition("/")[0] for name in TensorFile(tensors(server, 1, tmp_path)).specs} == {"adapter"}


@pytest.mark.parametrize("share", [{"metrics": ()}, {"inactivity": False}])
def test_an_update_that_is_no_longer_approved_is_not_sent(share: Any, federation: Any, trainings: list[int]) -> None:
    server, config = federation(rounds=(1,))
    run_killed_before_the_offer(config)
    run(config.model_copy(update={"share": ShareSection(**share)}))
    assert trainings == [1, 1]
    (header,) = server.asked("OfferUpdate")
    assert bool(header.metrics) == ("metrics" not in share)


# --- what goes wrong on this side -------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place",
    ["fedpft.wire.transfer.Incoming.write", "fedpft.wire.tensors.save_file", "fedpft.silo.work.atomic.write_text"],
)
def test_a_full_disk_is_named_and_loses_nothing(place: str, federation: Any) -> None:
    server, config = federation()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(place, full)
        with pytest.raises(FedPFTError, match="no space left on device") as caught:
            run(config)
    assert type(caught.value) is FedPFTError
    assert str(config.work) in caught.value.message
    assert "start the same command again" in caught.value.remedy
    assert server.asked("Leave")
    assert not list(config.work.rglob(".*"))
    run(config)
    undisturbed, config = federation()
    run(config)
    assert contents(server) == contents(undisturbed)


def test_a_full_disk_under_safetensors_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedpft.wire.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors(tmp_path / "x", {"adapter": {"a": torch.ones(1)}})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_silo_says_that_it_can_go_on(
    federation: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server, config = federation()

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(silo_learner, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert caplog.messages[-1] == "north: stopped in round 1; run it again, it goes on from there"
    assert not server.asked("Leave")


# --- data that does not fit -------------------------------------------------------------------------------------------


@pytest.fixture
def with_data(federation: Any, tmp_path: Path) -> Callable[..., Made]:
    """A federation, and a silo whose data file holds these rows beside the good ones."""

    def made(rows: str, rounds: tuple[int, ...] = (1,), **settings: Any) -> Made:
        server, config = federation(rounds=rounds)
        with (tmp_path / "data.csv").open("a", encoding="utf-8") as file:
            file.write(rows)
        data = SiloDataSection(path=tmp_path / "data.csv", **settings)
        return server, config.model_copy(update={"data": data})

    return made


def test_all_faults_of_the_data_are_named_before_the_server_hears_of_the_silo(with_data: Any) -> None:
    server, config = with_data("a bird,\n\u200b,earth\na fish,fire\na tree\n")
    with pytest.raises(DataError) as raised:
        run(config)
    message = raised.value.message
    assert "4 of 13 rows cannot be used: data.csv:11: the label is empty; data.csv:12: the text is empty; " in message
    assert "data.csv:13: label 'fire' is not in the server's label list; data.csv:14: the row has 1 fields" in message
    assert "bad_rows: skip" in raised.value.remedy
    assert not server.calls


def test_faults_that_are_known_without_the_server_are_named_when_it_is_away(
    with_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silo_data, "REPORT_SECONDS", 0.05)
    _, config = with_data("a bird,\na fish,fire\n")
    with pytest.raises(DataError, match=r"data\.csv:11: the label is empty -> "):
        run(config.model_copy(update={"server": "127.0.0.1:1"}))


def test_a_fault_of_the_whole_file_needs_no_server(with_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silo_data, "greet", killed)
    _, config = with_data('"a bird,earth\n', bad_rows="skip")
    with pytest.raises(DataError, match=r"data\.csv:11: malformed row"):
        run(config)


def test_a_silo_waits_for_a_server_that_is_away_before_it_enrols(federation: Any) -> None:
    server, config = federation(rounds=(1,))
    server.mischief["Hello"] = [away, away]
    run(config)
    assert not server.mischief["Hello"]
    assert list(server.updates) == [1]


def test_bad_rows_are_left_out_on_request_and_counted(with_data: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server, config = with_data("a bird,\na fish,fire\n", bad_rows="skip")
    run(config)
    assert server.asked("Enrol") == [len(TEXTS)]
    header = server.updates[1][0]
    assert header.samples == len(TEXTS)
    assert header.metrics["skipped_rows"] == 2
    assert "skipped: " in caplog.text
    assert "2 of 11 rows" in caplog.text


def test_texts_that_are_cut_are_counted(with_data: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    long = " ".join(["bird"] * 11)  # and two special tokens: one more than 12
    server, config = with_data(f"{long},earth\n{long[:-5]},earth\n")
    run(config)
    assert server.updates[1][0].metrics["cut_texts"] == 1
    assert "north: 1 of 11 texts are longer than 12 tokens and are cut" in caplog.text


def test_what_is_counted_of_the_data_is_only_told_if_it_is_shared(with_data: Any) -> None:
    server, config = with_data("a bird,\n", bad_rows="skip")
    run(config.model_copy(update={"share": ShareSection(metrics=("cut_texts",))}))
    assert dict(server.updates[1][0].metrics) == {"cut_texts": 0.0}


def test_another_task_than_the_datas_is_named_before_enrolment(federation: Any) -> None:
    server, config = federation()
    server.task = "image-classification"
    with pytest.raises(DataError, match=r"data\.csv:1: no column 'image' among text, label"):
        run(config)
    assert not server.calls


def test_a_file_that_fits_both_tasks_is_read_for_the_servers(federation: Any, tmp_path: Path) -> None:
    server, config = federation(rounds=(1,))
    (tmp_path / "data.csv").write_text("image,text,label\nx.png,the bird,earth\ny.png,,sea\nz.png,a tree,sky\n")
    with pytest.raises(DataError, match=r"data\.csv:3: the text is empty"):
        run(config)
    server.task = "image-classification"
    with pytest.raises(DataError, match=r"3 of 3 rows .*data\.csv:2: no image"):
        run(config)
    assert not server.calls


def test_a_server_that_does_not_say_what_it_wants_is_of_another_version(federation: Any) -> None:
    server, config = federation()
    server.task = ""
    with pytest.raises(RefusedByServer, match="does not say what the data must be like"):
        run(config)


def test_a_proxy_for_other_labels_than_were_named_is_not_trained(federation: Any, trainings: list[int]) -> None:
    server, config = federation()
    server.labels = [*reversed(tiny.LABELS)]
    with pytest.raises(RefusedByServer, match="other labels than the server named before"):
        run(config)
    assert server.asked("Leave")
    assert not trainings


@pytest.mark.parametrize(
    "row", ['{"text": "\\ud800", "label": "\\udfff"}', '{"\\ud800": "\\u0000", "label": NaN}', "{}", "NaN"]
)
def test_odd_json_ends_in_one_line(
    row: str, federation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, config = federation()
    (tmp_path / "data.jsonl").write_text(f'{{"text": "a bird", "label": "sea"}}\n{row}\n')
    values = {"server": config.server, "insecure_loopback": True, "insecure_name": "north"}
    (tmp_path / "silo.yaml").write_text(yaml.safe_dump({**values, "data": {"path": "data.jsonl"}}))
    assert command.main(["--config", str(tmp_path / "silo.yaml")]) == DataError.exit_code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "data.jsonl:2: " in line
    assert not server.calls


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_says_what_is_known_before_anything_was_received(federation: Any) -> None:
    server, config = federation()
    text = explain(config)
    assert f"server          {config.server}" in text
    assert "known there as  north" in text
    assert f"samples         {len(TEXTS)}\n" in text
    assert "No proxy was received yet" in text
    assert str(config.work / "audit.jsonl") in text
    assert "metrics         train_loss, seconds, tokens, skipped_rows, cut_texts, cut_completions, label_div" in text
    assert not server.calls
    assert not config.work.exists()


@pytest.mark.parametrize("encoding", ["exact", "bfloat16", "int8"])
def test_explain_lists_every_tensor_that_is_sent(encoding: str, federation: Any, tmp_path: Path) -> None:
    server, config = federation(encoding, rounds=(1,))
    run(config)
    text = explain(config)
    sizes: collections.Counter[str] = collections.Counter()
    for name, spec in TensorFile(tensors(server, 1, tmp_path)).specs.items():
        group, _, tensor = name.partition("/")
        sizes[f"layer {tensor.removesuffix('.tokens')}" if group == "inactivity" else tensor] += spec.nbytes
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for name, size in sizes.items():
        assert [line for line in lines if line.startswith(f"{name} ") and line.endswith(f" {size} bytes")], name
    assert text.count(" bytes\n") == len(sizes)
    assert f"encoding        {encoding}: " in text


def test_explain_counts_the_rows_that_can_be_used(with_data: Any) -> None:
    _, config = with_data("a bird,\n")
    with pytest.raises(DataError, match=r"data\.csv:11: the label is empty"):
        explain(config)
    data = config.data.model_copy(update={"bad_rows": "skip"})
    assert f"samples         {len(TEXTS)}\n" in explain(config.model_copy(update={"data": data}))


def test_explain_names_the_certificate(federation: Any, tmp_path: Path) -> None:
    provision(tmp_path / "kits", ["north"])
    kit = tmp_path / "kits" / "silos" / "north"
    _, config = federation()
    section = TlsSection(ca=kit / "ca.pem", certificate=kit / "certificate.pem", key=kit / "key.pem")
    changes = {"tls": section, "insecure_loopback": False, "insecure_name": None}
    text = explain(config.model_copy(update=changes))
    assert f"known there as  north, by {section.certificate}\n" in text
    assert f"over TLS 1.3, with a certificate that {section.ca} signed" in text


def test_explain_of_a_silo_that_demands_secure_aggregation_tells_no_count(federation: Any) -> None:
    _, config = federation()
    text = explain(config.model_copy(update={"require": ("secure_aggregation",), "smallest_sum": 5}))
    assert f"samples         {len(TEXTS)}" not in text
    assert "samples         not how many there are: secure aggregation" in text
    assert "in a sum over 5 silos or more" in text
    assert "metrics         train_loss, seconds, tokens, skipped_rows, cut_texts, cut_completions\n" in text
    assert "encoding " not in text


def test_a_federation_without_what_the_silo_demands_is_not_joined(federation: Any) -> None:
    server, config = federation()
    with pytest.raises(PrivacyViolation, match="has no secure aggregation, which `require`"):
        run(config.model_copy(update={"require": ("secure_aggregation",)}))
    assert "Enrol" not in str(server.calls)


def test_explain_says_what_is_held_back(federation: Any) -> None:
    _, config = federation(share=ShareSection(metrics=(), inactivity=False))
    text = explain(config)
    assert "metrics         none\n" in text
    assert "inactivity      nothing" in text


def test_the_command_explains(federation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, config = federation()
    values = {
        "server": config.server,
        "insecure_loopback": True,
        "insecure_name": "north",
        "data": {"path": "data.csv"},
    }
    (tmp_path / "silo.yaml").write_text(yaml.safe_dump(values))
    assert command.main(["--config", str(tmp_path / "silo.yaml"), "--explain"]) == 0
    assert capsys.readouterr().out.startswith("What leaves this institution")
    assert not server.calls
