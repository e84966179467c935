"""Where updates arrive, each checked before it can count: OUT/updates/round-<r>/<silo>-....safetensors.

A file counts from the moment that the ledger names it. What has arrived of one that is not whole yet lies in
OUT/updates/incoming/<silo>/ and is gone on with.
"""

import collections
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpft import atomic, faults
from fedpft.config import TrainingSection
from fedpft.data.batches import round_window
from fedpft.errors import FedPFTError, InvalidUpdate, RoundOver, TransferCorrupt
from fedpft.model.adapters import trains
from fedpft.privacy.fixedpoint import Layout
from fedpft.proxy.bundle import compressed_neurons
from fedpft.server.ledger import Ledger, UpdateRow
from fedpft.server.updates import (
    Update,
    adapter_shapes,
    check_update,
    check_vector,
    largest_update_bytes,
    vector_bytes,
)
from fedpft.wire import transfer
from fedpft.wire.tensors import TensorFile
from fedpft.wire.v1.federation_pb2 import Chunk, File, UpdateHeader


@dataclass(frozen=True)
class Order:
    """What the present round's updates must be like.

    start: the adapter that the round starts from.
    neurons: of each compressed layer the K of its inactivity counts; empty if none are wanted.
    largest_bytes: no update's file is larger.
    layout: of the vectors of secure aggregation.
    """

    round: int
    start: TensorFile
    neurons: Mapping[int, int]
    largest_bytes: int
    layout: Layout


class Inbox:
    """Receives, checks and keeps the updates of one round at a time.

    bytes_up: payload bytes received so far, from all silos together.
    """

    def __init__(
        self,
        bundle: Path,
        ledger: Ledger,
        *,
        training: TrainingSection,
        max_norm: float | None,
        secure: bool = False,
    ) -> None:
        """Args:
            bundle: its proxy.json says what inactivity counts must be like.
            training: what the silos were told to do.
            max_norm: largest L2 norm of an update's change to the adapter.
            secure: updates are vectors of secure aggregation, and say nothing else.

        Raises:
            ModelError: no proxy.json, or one that cannot be read.
        """
        self.bytes_up = 0
        self._ledger, self._directory = ledger, ledger.out / "updates"
        self._neurons = compressed_neurons(bundle)
        self._training, self._max_norm, self._secure = training, max_norm, secure
        self._order: Order | None = None
        # A silo whose data has shrunk may still offer an update that it trained before.
        self._samples = {each["silo"]: each["samples"] for each in ledger.recorded("enrolled")}
        self._lock = threading.Lock()
        self._streams: dict[str, object] = {}  # of each silo the newest; older ones end
        self._receiving: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._checking = threading.Lock()  # one at a time: a check has a tensor of an update in memory

    def open_round(self, round: int, start: Path, *, count_inactivity: bool) -> None:
        """From now on updates of this round are welcome; what is left of others is deleted."""
        for path in self._directory.glob("round-*"):
            if path != self._place(round):
                shutil.rmtree(path)
        self._place(round).mkdir(parents=True, exist_ok=True)
        if self._secure:  # vectors of an attempt that a former process began
            counted = {self._ledger.out / row.file for row in self._ledger.updates(round)}
            for path in set(self._place(round).iterdir()) - counted:
                path.unlink()
        file, neurons = TensorFile(start), self._neurons if count_inactivity else {}
        frozen_a = self._training.frozen_a
        trained = {name: shape for name, shape in adapter_shapes(file).items() if trains(name, frozen_a=frozen_a)}
        layout = Layout.of(trained, neurons)
        largest = vector_bytes(layout) if self._secure else largest_update_bytes(file, neurons)
        self._order = Order(round, file, neurons, largest, layout)

    def opened_with(self) -> tuple[TensorFile, Layout]:
        """The adapter that the open round starts from, and what is where in its silos' vectors."""
        assert self._order is not None
        return self._order.start, self._order.layout

    def close_round(self) -> None:
        """Deletes all updates: once the mean is taken, what one silo sent is nobody's to keep."""
        self._order = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def enrolled(self, silo: str, samples: int) -> None:
        """A silo has so many samples now; the most that it had in this run is remembered, over restarts too."""
        with self._lock:
            if samples > self._samples.get(silo, 0):
                self._samples[silo] = samples
                self._ledger.record("enrolled", None, {"silo": silo, "samples": samples})

    @property
    def counts_inactivity(self) -> bool:
        """Whether the present round's updates bring inactivity counts."""
        return self._order is not None and bool(self._order.neurons)

    def updates(self, round: int, start: Path) -> list[Update]:
        """The updates that a round counts, in the order of the silos' names; CheckpointError if a file was changed."""
        file, encoding = TensorFile(start), self._training.update_encoding
        return [
            Update(row.silo, row.samples, row.metrics, self._ledger.verified_update(row), file, encoding)
            for row in self._ledger.updates(round)
        ]

    def offered(self, silo: str, header: UpdateHeader) -> int:
        """The bytes of an offered update that are here already, from an earlier attempt.

        Raises:
            RoundOver: in the meantime.
            InvalidUpdate: no update is that large.
            TransferCorrupt: it is announced as no file could be.
        """
        self._check_size(silo, header)
        self._supersede(silo)
        with self._receiving[silo], self._incoming(silo, header) as incoming:
            return incoming.offset

    def receive(self, silo: str, header: UpdateHeader, chunks: Iterable[Chunk]) -> Update:
        """Receives and checks an update of a silo that has enrolled. It is on disk then, but does not count.

        What has arrived of an update that stops halfway stays. A second stream of one silo ends the first, whose
        connection has most likely broken without anybody's noticing. One whose header brings its content has no chunks.

        Raises:
            RoundOver: in the meantime.
            InvalidUpdate: it cannot be used, naming silo and tensor.
            TransferCorrupt: it did not arrive as it was sent.
        """
        order, path = self._check_size(silo, header), self._path(silo, header)
        if header.file.content:
            self._write(path, header.file)
        else:
            self._receive(path, silo, header, chunks)
        return self._checked(silo, header, path, order)

    def take_in(self, silo: str, header: UpdateHeader, file: Path) -> Update:
        """The same of a file on this machine, of which a copy is taken; raises InvalidUpdate or RoundOver."""
        order, path = self._check_size(silo, header), self._path(silo, header)
        with atomic.replacing(path) as written:
            shutil.copyfile(file, written)
        self._count(header.file.total_bytes)
        return self._checked(silo, header, path, order)

    def _path(self, silo: str, header: UpdateHeader) -> Path:
        """Of its own: what counts is neither written over nor deleted."""
        name = f"{silo}-{header.file.sha256.hex()[:16]}-{secrets.token_hex(4)}.safetensors"
        return self._place(header.round) / name

    def _checked(self, silo: str, header: UpdateHeader, path: Path, order: Order) -> Update:
        """The update in a file, which is deleted if it cannot be used."""
        update = Update(silo, header.samples, dict(header.metrics), path, order.start, self._training.update_encoding)
        _, most_samples = round_window(self._samples.get(silo, 0), self._training.local_epochs, order.round - 1)
        try:
            with self._checking:
                if self._secure:
                    check_vector(update, order.layout.words)
                else:
                    check_update(update, order.neurons, self._max_norm, most_samples)
        except FedPFTError:
            with faults.tidying(path):
                path.unlink()
            raise
        return update

    def _write(self, path: Path, file: File) -> None:
        transfer.check_announcement(file)
        if not transfer.came_along(file):
            raise TransferCorrupt(f"{file.name} is not what was sent: its SHA-256 differs", transfer.AGAIN)
        with atomic.replacing(path) as written:
            written.write_bytes(file.content)
        self._count(file.total_bytes)

    def _receive(self, path: Path, silo: str, header: UpdateHeader, chunks: Iterable[Chunk]) -> None:
        stream = self._supersede(silo)
        with self._receiving[silo], self._incoming(silo, header) as incoming:
            for chunk in chunks:
                if self._streams[silo] is not stream:
                    raise TransferCorrupt(f"{silo} began to send its update anew", transfer.AGAIN)
                self._count(incoming.write(chunk))
            incoming.finish(path)

    def counted(self, silo: str, header: UpdateHeader) -> bytes:
        """SHA-256 of the update that the round counts of this silo."""
        row = self._ledger.update(header.round, silo)
        return b"" if row is None else bytes.fromhex(row.sha256)

    def keep(self, update: Update, header: UpdateHeader) -> None:
        """The update counts from now on, whatever happens to this process; after `sync`, to this machine."""
        self._ledger.enter_update(
            UpdateRow(
                round=header.round,
                silo=update.silo,
                attempt=header.attempt,
                file=update.path.relative_to(self._ledger.out).as_posix(),
                sha256=header.file.sha256.hex(),
                bytes=header.file.total_bytes,
                samples=update.samples,
                metrics=update.metrics,
            )
        )

    def sync(self) -> None:
        """What counts is on disk. Nobody is told that an update counts before that."""
        self._ledger.sync()

    def _check_size(self, silo: str, header: UpdateHeader) -> Order:
        order = self._order
        if order is None or order.round != header.round:
            raise RoundOver(f"round {header.round} is over", "the silo goes on with the next round")
        if header.file.total_bytes > order.largest_bytes:
            raise InvalidUpdate(
                f"{silo}: the update has {header.file.total_bytes} bytes, at most {order.largest_bytes} make sense",
                "train on this federation's proxy with this version of fedpft",
            )
        return order

    def _supersede(self, silo: str) -> object:
        stream = object()
        with self._lock:
            self._streams[silo] = stream
        return stream

    def _place(self, round: int) -> Path:
        return self._directory / f"round-{round}"

    def _incoming(self, silo: str, header: UpdateHeader) -> transfer.Incoming:
        directory = self._directory / "incoming" / silo
        for started in directory.glob("*.part"):
            if started.stem != header.file.sha256.hex():
                started.unlink()  # or a silo could fill the disk with beginnings
        return transfer.Incoming(directory, header.file)

    def _count(self, chunk_bytes: int) -> None:
        with self._lock:
            self.bytes_up += chunk_bytes
