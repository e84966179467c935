"""Files as streams of Pieces: a Header, then chunks; the receiver checks length and SHA-256 before a file exists."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpft import atomic
from fedpft.errors import TransferCorrupt
from fedpft.wire.federation_pb2 import Header, Piece

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 4 << 20
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
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


def payload(path: Path) -> Payload:
    """Describes a file under its own name; reads it once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return Payload(path.name, path, file.tell(), digest)


def digest(payloads: Iterable[Payload]) -> str:
    """One hexadecimal SHA-256 for a set of files: names, lengths and contents, in any order."""
    lines = sorted(f"{each.name} {each.total_bytes} {each.sha256.hex()}\n" for each in payloads)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def send(payloads: Iterable[Payload], sent: Callable[[int], None] = lambda _: None) -> Iterator[Piece]:
    """The pieces of some files, one after the other; holds one chunk in memory. `sent` is told each chunk's bytes."""
    for each in payloads:
        yield Piece(header=Header(name=each.name, total_bytes=each.total_bytes, sha256=each.sha256))
        with each.path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield Piece(chunk=chunk)
                sent(len(chunk))


def receive(
    pieces: Iterable[Piece],
    directory: Path,
    *,
    check: Callable[[Header], None],
    received: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Writes a stream of files into a directory, each atomically: a file is there only when it is whole and right.

    Args:
        check: raises if a file is not welcome, before any of it is stored.
        received: is told each chunk's bytes.

    Raises:
        TransferCorrupt: a name with a directory in it, a missing, surplus or changed byte, pieces out of order.
    """
    stream = iter(pieces)
    files: list[Path] = []
    piece = next(stream, None)
    while piece is not None:
        if piece.WhichOneof("piece") != "header":
            raise TransferCorrupt("a transfer began without a header", "run the same version of fedpft on both sides")
        header = piece.header
        if not PLAIN_NAME.fullmatch(header.name) or header.name in [file.name for file in files]:
            raise TransferCorrupt(f"{header.name!r} is no name for a file in a transfer", "rename the file")
        check(header)
        path = directory / header.name
        with atomic.replacing(path) as written:
            piece = _receive_file(header, stream, written, received)
        files.append(path)
    return files


def _receive_file(
    header: Header, stream: Iterator[Piece], written: Path, received: Callable[[int], None]
) -> Piece | None:
    """Writes one file; returns the piece after its last chunk."""
    total, content = 0, hashlib.sha256()
    with written.open("wb") as file:
        piece = next(stream, None)
        while piece is not None and piece.WhichOneof("piece") == "chunk":
            total += len(piece.chunk)
            if total > header.total_bytes or len(piece.chunk) > CHUNK_BYTES:
                raise TransferCorrupt(f"{header.name} has more bytes than its header says", AGAIN)
            content.update(piece.chunk)
            file.write(piece.chunk)
            received(len(piece.chunk))
            piece = next(stream, None)
    if total < header.total_bytes:
        raise TransferCorrupt(f"{header.name} stopped after {total} of {header.total_bytes} bytes", AGAIN)
    if content.digest() != header.sha256:
        raise TransferCorrupt(f"{header.name} is not what was sent: its SHA-256 differs", AGAIN)
    return piece
