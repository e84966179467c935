"""Where updates arrive: OUT/updates/round-<r>/<silo>.safetensors, each checked before it is there."""

import collections
import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fedpft import atomic
from fedpft.errors import InvalidUpdate, RoundOver, TransferCorrupt
from fedpft.server.updates import Update, check_update, compressed_neurons, largest_update_bytes
from fedpft.wire import transfer
from fedpft.wire.v1.federation_pb2 import Chunk, UpdateHeader


@dataclasses.dataclass(frozen=True)
class Order:
    """What the present round's updates must be like: an adapter, and the compressed layers' K if counts are wanted."""

    round: int
    like: dict[str, Tensor]
    neurons: Mapping[int, int]


class Inbox:
    """Receives, checks and keeps the updates of one round at a time.

    bytes_up: payload bytes received so far, from all silos together.
    """

    def __init__(self, bundle: Path, directory: Path) -> None:
        """Args:
            bundle: its proxy.json says what inactivity counts must be like.
            directory: for the updates; emptied here.

        Raises:
            ModelError: no proxy.json, or one that cannot be read.
        """
        self.bytes_up = 0
        self._directory = directory
        self._neurons = compressed_neurons(bundle)
        self._order: Order | None = None
        self._kept: dict[str, Update] = {}
        self._lock = threading.Lock()
        self._streams: dict[str, object] = {}  # of each silo the newest; older ones end
        self._receiving: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._checking = threading.Lock()  # one at a time: a check has a whole update in memory
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    def open_round(self, round: int, like: dict[str, Tensor], *, count_inactivity: bool) -> None:
        """From now on updates of this round are welcome; those of the last are deleted."""
        self.clear()
        self._order = Order(round, like, self._neurons if count_inactivity else {})

    def clear(self) -> None:
        """Deletes all updates: once the mean is taken, what one silo sent is nobody's to keep."""
        self._order, self._kept = None, {}
        for path in self._directory.glob("round-*"):
            shutil.rmtree(path)

    @property
    def counts_inactivity(self) -> bool:
        """Whether the present round's updates bring inactivity counts."""
        return self._order is not None and bool(self._order.neurons)

    def updates(self, silos: Iterable[str]) -> list[Update]:
        """The kept updates of these silos."""
        return [self._kept[silo] for silo in silos]

    def offered(self, silo: str, header: UpdateHeader) -> int:
        """The bytes of an offered update that are here already, from an earlier attempt.

        Raises:
            RoundOver: in the meantime.
            InvalidUpdate: no update is that large.
            TransferCorrupt: it is announced as no file could be.
        """
        self._check_size(silo, header)
        with self._incoming(silo, header) as incoming:
            return incoming.offset

    @contextlib.contextmanager
    def receive(self, silo: str, header: UpdateHeader, chunks: Iterable[Chunk]) -> Iterator[Callable[[], None]]:
        """Receives and checks an update; yields the call that keeps it. Otherwise it is gone after the body.

        What has arrived of an update that stops halfway stays. A second stream of one silo ends the first, whose
        connection has most likely broken without anybody's noticing.

        Raises:
            RoundOver: in the meantime.
            InvalidUpdate: it cannot be used, naming silo and tensor.
            TransferCorrupt: it did not arrive as it was sent.
        """
        order = self._check_size(silo, header)
        stream = object()
        with self._lock:
            self._streams[silo] = stream
        with tempfile.TemporaryDirectory(prefix="checking-", dir=self._directory) as place:
            path = Path(place) / "update.safetensors"
            with self._receiving[silo], self._incoming(silo, header) as incoming:
                for chunk in chunks:
                    if self._streams[silo] is not stream:
                        raise TransferCorrupt(f"{silo} began to send its update anew", transfer.AGAIN)
                    self._count(incoming.write(chunk))
                incoming.finish(path)
            update = Update(silo, header.samples, dict(header.metrics), path)
            with self._checking:
                check_update(update, order.like, order.neurons)
            yield lambda: self._keep(update, order.round)

    def _check_size(self, silo: str, header: UpdateHeader) -> Order:
        order = self._order
        if order is None or order.round != header.round:
            raise RoundOver(f"round {header.round} is over", "the silo goes on with the next round")
        largest = largest_update_bytes(order.like, order.neurons)
        if header.file.total_bytes > largest:
            raise InvalidUpdate(
                f"{silo}: the update has {header.file.total_bytes} bytes, at most {largest} make sense",
                "train on this federation's proxy with this version of fedpft",
            )
        return order

    def _incoming(self, silo: str, header: UpdateHeader) -> transfer.Incoming:
        return transfer.Incoming(self._directory / "incoming" / silo, header.file)

    def _keep(self, update: Update, round: int) -> None:
        path = self._directory / f"round-{round}" / f"{update.silo}.safetensors"
        path.parent.mkdir(exist_ok=True)
        os.replace(update.path, path)
        atomic.sync(path.parent)
        self._kept[update.silo] = dataclasses.replace(update, path=path)

    def _count(self, chunk_bytes: int) -> None:
        with self._lock:
            self.bytes_up += chunk_bytes
