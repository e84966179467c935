"""All that a silo can fetch: the files of the proxy, the present adapter, the patches. Nothing else is ever read.

A silo asks for a file by its SHA-256, so what was not announced here cannot be asked for.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fedpft.errors import ModelError, RoundOver
from fedpft.wire import transfer
from fedpft.wire.tensors import write_tensors
from fedpft.wire.v1.federation_pb2 import Chunk

# Inert formats: no file of a proxy is ever executed or unpickled. Vocabularies are .txt, .json or sentencepiece .model.
BUNDLE_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


class Outbox:
    """Files as they were when they were put here; the server's memory holds only their names and digests.

    proxy: the bundle's files.
    patches: file n leads from version n of the proxy to n + 1.
    adapter: the one that the present round starts from.
    bytes_down: payload bytes sent so far, to all silos together.
    """

    def __init__(self, bundle: Path, directory: Path) -> None:
        """Args:
            bundle: directory of plain files, each of which every silo gets.
            directory: for the adapter and the patches; patches that a former process left there are taken up.

        Raises:
            ModelError: the bundle is no directory, or holds something that must not be sent.
        """
        self.proxy = _bundle_files(bundle)
        self.patches: list[transfer.Payload] = []
        self.adapter: transfer.Payload | None = None
        self.bytes_down = 0
        self._directory = directory
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        while (patch := self._patch_path(len(self.patches) + 1)).exists():
            self.patches.append(transfer.payload(patch))

    def put_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """The adapter that a round starts from; takes the place of the last round's."""
        path = self._directory / "adapter.safetensors"
        write_tensors(path, {"adapter": tensors})
        self.adapter = transfer.payload(path)

    def put_patch(self, tensors: Mapping[str, Tensor]) -> None:
        """What leads from the last version of the proxy to the next."""
        path = self._patch_path(len(self.patches) + 1)
        write_tensors(path, {"patch": tensors})
        self.patches.append(transfer.payload(path))

    def send(self, sha256: bytes, offset: int) -> Iterator[Chunk]:
        """An announced file from a byte on; RoundOver if it is not announced (any more)."""
        for each in (*self.proxy, *self.patches, self.adapter):
            if each is not None and each.sha256 == sha256:
                return transfer.chunks(each.path, offset, self._count)
        raise RoundOver("no such file is offered now", "ask for the next task")

    def _patch_path(self, version: int) -> Path:
        return self._directory / f"version-{version}.safetensors"

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
