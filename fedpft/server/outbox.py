"""All that a silo can fetch: the proxy's files, the present adapter, the way to the proxy's present version.

A silo asks for a file by its SHA-256, so what was not announced here cannot be asked for.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fedpft.errors import ModelError, RoundOver
from fedpft.wire import transfer
from fedpft.wire.v1.federation_pb2 import FetchFileResponse, File

# Inert formats: no file of a proxy is ever executed or unpickled. Vocabularies are .txt, .json or sentencepiece .model.
BUNDLE_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


class Outbox:
    """Files as they were when they were put here; the server's memory holds only their names and digests.

    proxy: the bundle's files.
    adapter: the one that the present round starts from.
    patch, snapshot: to the present version of the proxy, from the one before and from any.
    bytes_down: payload bytes sent so far, to all silos together.
    """

    def __init__(self, bundle: Path, sent: Callable[[str, transfer.Payload, int], None]) -> None:
        """Args:
            bundle: directory of plain files, each of which every silo gets.
            sent: called with (silo, file, offset) each time that a file goes out from there to its end.

        Raises:
            ModelError: the bundle is no directory, or holds something that must not be sent.
        """
        self.proxy = _bundle_files(bundle)
        self.adapter: transfer.Payload | None = None
        self._announced = File()
        self.patch: transfer.Payload | None = None
        self.snapshot: transfer.Payload | None = None
        self.bytes_down = 0
        self._sent = sent
        self._lock = threading.Lock()

    def put_adapter(self, adapter: transfer.Payload) -> None:
        """The next round starts from this one."""
        self.adapter, self._announced = adapter, adapter.offer()

    def announced_adapter(self, silo: str) -> File:
        """What a silo is told of the adapter; one that fits into a chunk goes along."""
        assert self.adapter is not None  # a round begins with one
        if self._announced.content:
            self._sent(silo, self.adapter, 0)
            self._count(self.adapter.total_bytes)
        return self._announced

    def send(self, silo: str, sha256: bytes, offset: int) -> Iterator[bytes]:
        """An announced file from a byte on, as serialised FetchFileResponses; RoundOver if it is not announced."""
        for file in (*self.proxy, self.adapter, self.patch, self.snapshot):
            if file is not None and file.sha256 == sha256:
                yield from file.frames(FetchFileResponse, offset, self._count)
                self._sent(silo, file, offset)
                return
        raise RoundOver("no such file is offered now", "ask for the next assignment")

    def _count(self, chunk_bytes: int) -> None:
        with self._lock:
            self.bytes_down += chunk_bytes


def sendable(path: Path) -> bool:
    """Whether a file of a bundle may go to the silos."""
    plain = path.is_file() and not path.is_symlink() and transfer.PLAIN_NAME.fullmatch(path.name) is not None
    return plain and path.suffix in BUNDLE_SUFFIXES


def _bundle_files(bundle: Path) -> list[transfer.Payload]:
    if not bundle.is_dir():
        raise ModelError(f"{bundle}: no such directory", "build the proxy first")
    paths = sorted(bundle.iterdir())
    for path in paths:
        if not sendable(path):
            raise ModelError(
                f"{path} is not a file of a proxy, but everything in this directory would be sent to the silos",
                f"leave only plain files there: {', '.join(BUNDLE_SUFFIXES)}",
            )
    return [transfer.payload(path) for path in paths]
