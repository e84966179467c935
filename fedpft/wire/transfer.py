"""Files as streams of Chunks, from any byte on; a file is there only when it is whole and right.

A receiver keeps what it has of a file in `<sha256>.part`, so that after a cut, or a restart of either side, a transfer
goes on where it stopped. Every chunk is checked by CRC-32 before it is written, the whole by SHA-256.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpft import atomic
from fedpft.errors import TransferCorrupt
from fedpft.wire.v1 import federation_pb2 as pb

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 4 << 20
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
SHA256_BYTES = 32
AGAIN = "send it again; if it persists, check the disks and the network of both sides"


@dataclass(frozen=True)
class Payload:
    """A file that is ready to be sent.

    name: as the other side will call it.
    sha256: 32 bytes, of the file as it was when the payload was made.
    """

    name: str
    path: Path
    total_bytes: int
    sha256: bytes

    def announcement(self) -> pb.File:
        """What the other side is told of it."""
        return pb.File(name=self.name, total_bytes=self.total_bytes, sha256=self.sha256)


def payload(path: Path) -> Payload:
    """Describes a file under its own name; reads it once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return Payload(path.name, path, file.tell(), digest)


def check_announcement(file: pb.File) -> None:
    """Raises TransferCorrupt if no file could be like that, before anything is done with its name."""
    if not PLAIN_NAME.fullmatch(file.name) or len(file.sha256) != SHA256_BYTES:
        raise TransferCorrupt(
            f"{file.name!r} is no name for a file in a transfer", "run the same version of fedpft on both sides"
        )


def digest(files: Iterable[pb.File]) -> str:
    """One hexadecimal SHA-256 for a set of files: names, lengths and contents, in any order."""
    lines = sorted(f"{each.name} {each.total_bytes} {each.sha256.hex()}\n" for each in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def chunks(path: Path, offset: int, sent: Callable[[int], None] = lambda _: None) -> Iterator[pb.Chunk]:
    """A file from a byte on; holds one chunk in memory. `sent` is told each chunk's bytes."""
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(CHUNK_BYTES):
            yield pb.Chunk(offset=offset, data=data, crc32=zlib.crc32(data))
            offset += len(data)
            sent(len(data))


class Incoming:
    """A file on its way in. What has arrived survives the process; two of the same file must not be open at once.

    offset: bytes that are there; the next chunk must start with it.
    """

    def __init__(self, directory: Path, file: pb.File) -> None:
        """Takes up what an earlier attempt left in the directory; reads that once.

        Raises:
            TransferCorrupt: the announcement is no file's.
        """
        check_announcement(file)
        self._announced = file
        self._path = directory / f"{file.sha256.hex()}.part"
        directory.mkdir(parents=True, exist_ok=True)
        self._content = hashlib.sha256()
        self._file = self._path.open("ab+")
        if self._file.seek(0, os.SEEK_END) > file.total_bytes:
            self._file.truncate(0)
        self._file.seek(0)
        while data := self._file.read(CHUNK_BYTES):
            self._content.update(data)
        self.offset = self._file.tell()

    def write(self, chunk: pb.Chunk) -> int:
        """Appends a chunk; returns its bytes. TransferCorrupt if it is damaged, out of order or too much."""
        name, size = self._announced.name, len(chunk.data)
        if chunk.offset != self.offset:
            raise TransferCorrupt(f"{name} went on at byte {chunk.offset} instead of {self.offset}", AGAIN)
        if not 0 < size <= CHUNK_BYTES or self.offset + size > self._announced.total_bytes:
            raise TransferCorrupt(f"{name} has more bytes than were announced", AGAIN)
        if zlib.crc32(chunk.data) != chunk.crc32:
            raise TransferCorrupt(f"{name} is not what was sent: the chunk at byte {self.offset} differs", AGAIN)
        self._file.write(chunk.data)
        self._content.update(chunk.data)
        self.offset += size
        return size

    def finish(self, path: Path) -> None:
        """Moves the file to its place, synced.

        Raises:
            TransferCorrupt: it stopped early, and stays to be gone on with; or its SHA-256 differs, and it is deleted.
        """
        file = self._announced
        if self.offset < file.total_bytes:
            raise TransferCorrupt(f"{file.name} stopped after {self.offset} of {file.total_bytes} bytes", AGAIN)
        self._file.close()
        if self._content.digest() != file.sha256:
            self._path.unlink()
            raise TransferCorrupt(f"{file.name} is not what was sent: its SHA-256 differs", AGAIN)
        atomic.sync(self._path)
        os.replace(self._path, path)
        atomic.sync(path.parent)

    def close(self) -> None:
        """Lets go of the file; what has arrived stays for the next attempt."""
        self._file.close()

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
