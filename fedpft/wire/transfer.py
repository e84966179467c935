"""Files as streams of Chunks, from any byte on; a file is there only when it is whole and right.

A receiver keeps what it has of a file in `<sha256>.part`, so that after a cut, or a restart of either side, a transfer
goes on where it stopped. A chunk carries the start of the SHA-256 of all bytes up to its end. The receiver hashes the
file anyway, so this checks each chunk before it is written, and what was there before it, at no cost.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from fedpft import atomic
from fedpft.errors import TransferCorrupt
from fedpft.wire.v1 import federation_pb2 as pb

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 4 << 20
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
SHA256_BYTES = 32
CHECK_BYTES = 8
AGAIN = "send it again; if it persists, check the disks and the network of both sides"


@dataclass(frozen=True)
class Payload:
    """A file that is ready to be sent.

    name: as the other side will call it.
    sha256: 32 bytes, of the file as it was when the payload was made.
    checks: for each chunk the start of the SHA-256 of all bytes up to its end.
    """

    name: str
    path: Path
    total_bytes: int
    sha256: bytes
    checks: tuple[bytes, ...]

    def announcement(self) -> pb.File:
        """What the other side is told of it."""
        return pb.File(name=self.name, total_bytes=self.total_bytes, sha256=self.sha256)

    def offer(self) -> pb.File:
        """The announcement, and along with it the content if that fits into one chunk."""
        file = self.announcement()
        if self.total_bytes <= CHUNK_BYTES:
            file.content = self.path.read_bytes()
        return file

    def frames(self, kind: type[Message], offset: int, sent: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
        """The file from a byte on, as serialised messages of a kind that has a field `chunk`, one in memory at a time.

        They are put together here because protobuf would copy each chunk several times, which halves the speed.

        Args:
            sent: is told each chunk's bytes when the next one is asked for.
        """
        tag = _tag(kind, "chunk")
        with self.path.open("rb", buffering=0) as file:
            file.seek(min(offset, self.total_bytes))
            for number in range(offset // CHUNK_BYTES, len(self.checks)):
                if not (data := file.read((number + 1) * CHUNK_BYTES - offset)):
                    return
                fields = pb.Chunk(offset=offset, check=self.checks[number]).SerializeToString()
                fields += _tag(pb.Chunk, "data") + _varint(len(data))
                yield b"".join((tag, _varint(len(fields) + len(data)), fields, data))
                offset += len(data)
                sent(len(data))


def payload(path: Path) -> Payload:
    """Describes a file under its own name; reads it once."""
    content, checks = hashlib.sha256(), []
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, os.fstat(file.fileno()).st_size)))
        while size := file.readinto(buffer):
            content.update(buffer[:size])
            checks.append(_check(content))
        return Payload(path.name, path, file.tell(), content.digest(), tuple(checks))


def check_announcement(file: pb.File) -> None:
    """Raises TransferCorrupt if no file could be like that, before anything is done with its name."""
    if not PLAIN_NAME.fullmatch(file.name) or len(file.sha256) != SHA256_BYTES:
        raise TransferCorrupt(
            f"{file.name!r} is no name for a file in a transfer", "run the same version of fedpft on both sides"
        )


def came_along(file: pb.File) -> bool:
    """Whether the announcement brought the whole file, undamaged."""
    return len(file.content) == file.total_bytes and hashlib.sha256(file.content).digest() == file.sha256


def digest(files: Iterable[pb.File]) -> str:
    """One hexadecimal SHA-256 for a set of files: names, lengths and contents, in any order."""
    lines = sorted(f"{each.name} {each.total_bytes} {each.sha256.hex()}\n" for each in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
        self._content, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
        self._file = self._path.open("ab+", buffering=0)
        if self._file.seek(0, os.SEEK_END) > file.total_bytes:
            self._file.truncate(0)
        self._file.seek(0)
        while size := self._file.readinto(buffer):
            self._content.update(buffer[:size])
        self.offset = self._file.tell()
        self._in_doubt = self.offset > 0  # until a chunk that follows on it was right

    def write(self, chunk: pb.Chunk) -> int:
        """Appends a chunk; returns its bytes. TransferCorrupt if it is damaged, out of order or too much."""
        name, data = self._announced.name, memoryview(chunk.data)
        if chunk.offset != self.offset:
            raise TransferCorrupt(f"{name} went on at byte {chunk.offset} instead of {self.offset}", AGAIN)
        if not 0 < len(data) <= CHUNK_BYTES or self.offset + len(data) > self._announced.total_bytes:
            raise TransferCorrupt(f"{len(data)} bytes at byte {self.offset} of {name} do not fit", AGAIN)
        content = self._content.copy()
        content.update(data)
        if _check(content) != chunk.check:
            if self._in_doubt:
                self._file.truncate(0)
            raise TransferCorrupt(
                f"{name} is not what was sent: it differs before byte {self.offset + len(data)}", AGAIN
            )
        self._content, self._in_doubt = content, False
        self.offset += len(data)
        size = len(data)
        while data:
            data = data[self._file.write(data) :]
        if self.offset % atomic.RELEASE_BYTES < size:
            atomic.release(self._file.fileno())
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


def serialised(message: Message | bytes) -> bytes:
    """What gRPC is told to serialise messages with where frames are among them."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _tag(kind: type[Message], field: str) -> bytes:
    """What stands before a field's length and bytes in protobuf's encoding."""
    return _varint(kind.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*groups, number))


def _check(content: "hashlib._Hash") -> bytes:
    return content.digest()[:CHECK_BYTES]
