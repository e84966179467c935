"""All that a silo can fetch: the files of the proxy, the present adapter, the patches. Nothing else is ever read."""

import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fedpft.errors import ModelError, RoundOver, StaleProxy
from fedpft.wire import transfer
from fedpft.wire.federation_pb2 import Piece
from fedpft.wire.tensors import write_tensors

# Inert formats: no file of a proxy is ever executed or unpickled. Vocabularies are .txt, .json or sentencepiece .model.
BUNDLE_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


class Outbox:
    """Files as they were when they were put here; the server's memory holds only their names and digests.

    proxy: the bundle's files.
    bytes_down: payload bytes sent so far, to all silos together.
    """

    def __init__(self, bundle: Path, directory: Path) -> None:
        """Args:
            bundle: directory of plain files, each of which every silo gets.
            directory: for the adapter and the patches; emptied here.

        Raises:
            ModelError: the bundle is no directory, or holds something that must not be sent.
        """
        self.proxy = _bundle_files(bundle)
        self.proxy_digest = transfer.digest(self.proxy)
        self.bytes_down = 0
        self._directory = directory
        self._adapter: tuple[int, transfer.Payload] | None = None
        self._patches: list[transfer.Payload] = []
        self._lock = threading.Lock()
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    def put_adapter(self, round: int, tensors: Mapping[str, Tensor]) -> None:
        """The adapter that this round starts from; takes the place of the last round's."""
        path = self._directory / "adapter.safetensors"
        write_tensors(path, {"adapter": tensors})
        self._adapter = (round, transfer.payload(path))

    def put_patch(self, tensors: Mapping[str, Tensor]) -> None:
        """What leads from the last version of the proxy to the next."""
        path = self._directory / f"version-{len(self._patches) + 1}.safetensors"
        write_tensors(path, {"patch": tensors})
        self._patches.append(transfer.payload(path))

    def send_proxy(self) -> Iterator[Piece]:
        """The proxy as it was when the federation began."""
        return self._send(self.proxy)

    def send_patches(self, from_version: int) -> Iterator[Piece]:
        """The patches since a version, in order; StaleProxy for a version that never was."""
        if from_version > len(self._patches):
            raise StaleProxy(
                f"there is no version {from_version} of the proxy, the newest is {len(self._patches)}",
                "restart the silo: it fetches the present version",
            )
        return self._send(self._patches[from_version:])

    def send_adapter(self, round: int) -> Iterator[Piece]:
        """The adapter that this round starts from; RoundOver for any round but the present one."""
        if self._adapter is None or self._adapter[0] != round:
            raise RoundOver(f"round {round} is over", "the silo goes on with the next round")
        return self._send([self._adapter[1]])

    def _send(self, payloads: Iterable[transfer.Payload]) -> Iterator[Piece]:
        return transfer.send(payloads, self._count)

    def _count(self, chunk_bytes: int) -> None:
        with self._lock:
            self.bytes_down += chunk_bytes


def _bundle_files(bundle: Path) -> list[transfer.Payload]:
    if not bundle.is_dir():
        raise ModelError(f"{bundle}: no such directory", "build the proxy first")
    paths = sorted(bundle.iterdir())
    for path in paths:
        plain = path.is_file() and not path.is_symlink() and transfer.PLAIN_NAME.fullmatch(path.name)
        if not plain or path.suffix not in BUNDLE_SUFFIXES:
            raise ModelError(
                f"{path} is not a file of a proxy, but everything in this directory would be sent to the silos",
                f"leave only plain files there: {', '.join(BUNDLE_SUFFIXES)}",
            )
    return [transfer.payload(path) for path in paths]
