"""The audit log: JSON lines that are only ever added to, each bound to the one before by its hash.

    {"number": 2, "time": "2026-01-31T12:00:00.000+00:00", "event": "sent", ..., "previous": "<64>", "hash": "<64>"}

`hash` is the SHA-256 of the line up to it, `previous` the `hash` of the line before (zeros in the first), so that a
line that was changed, removed, inserted or moved is found. The event's own fields stand before them. These mean the
same in every event and are columns in `fedpft audit`: peer (to or from whom), round, file, bytes, sha256 (of the file).

What the chain cannot show: that lines are missing at the end, and that somebody with write access made the whole file
anew. Both are found by comparing with a copy of a hash that was noted elsewhere: each hash vouches for every line up to
its own.

Lines are handed to the operating system one by one and not forced to disk: a killed process loses none, a machine
that loses power may lose the last.
"""

import datetime
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fedpft.errors import CheckpointError

SENT, RECEIVED = "sent", "received"
COLUMNS = ("peer", "round", "file", "bytes", "sha256")
FIRST_PREVIOUS = "0" * 64
LONGEST_LINE_BYTES = 1 << 20

_LINE = re.compile(rb'(\{.*), "hash": "([0-9a-f]{64})"\}\n')
_ROW = "{:<29}  {:<12}  {:<16}  {:>5}  {:<28}  {:>12}  {:<16}  {}"
_CHAIN = ("number", "time", "event", "previous", "hash")


@dataclass(frozen=True)
class Entry:
    """One line of a log."""

    number: int
    time: str
    event: str
    fields: dict[str, Any]
    previous: str
    hash: str


@dataclass
class Summary:
    """A log whose every line is in order.

    head: hash of the last line; noted elsewhere, it vouches for all of them.
    sent, received: bytes by peer.
    """

    entries: int = 0
    head: str = FIRST_PREVIOUS
    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        """Takes the next line in."""
        self.entries, self.head = entry.number, entry.hash
        totals = {SENT: self.sent, RECEIVED: self.received}.get(entry.event)
        if totals is not None and "peer" in entry.fields:
            totals[str(entry.fields["peer"])] += int(entry.fields.get("bytes") or 0)


class AuditLog:
    """Adds to a log, from any thread; one process at a time.

    A line that a crash left unfinished is cut off, and the cut is the next event, with the text that was cut.
    """

    def __init__(self, path: Path) -> None:
        """Goes on with an existing log, of which only the last line is looked at, or begins one.

        Raises:
            CheckpointError: it cannot be opened, or the last line is not one that this class wrote.
        """
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror})", "let this user write there; nothing goes out unrecorded"
            ) from None
        try:
            self._number, self._head, torn = self._resume()
        except BaseException:
            self.close()
            raise
        if torn:
            self.append("cut off", bytes=len(torn), text=torn.decode("ascii", "backslashreplace"))

    def append(self, event: str, **fields: Any) -> None:
        """Adds an event that happened now; its fields are of types that JSON knows.

        Raises:
            CheckpointError: the line could not be written. Nothing of it is left.
        """
        if reserved := fields.keys() & set(_CHAIN):
            raise ValueError(f"field {min(reserved)!r}: every line has one of its own")
        with self._lock:
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            entry = {"number": self._number + 1, "time": time, "event": event, **fields, "previous": self._head}
            body = json.dumps(entry, allow_nan=False)[:-1].encode("ascii")
            digest = hashlib.sha256(body).hexdigest()
            line = b'%b, "hash": "%b"}\n' % (body, digest.encode("ascii"))
            if len(line) > LONGEST_LINE_BYTES:
                raise ValueError(f"{event!r} has {len(line)} bytes, a line may have {LONGEST_LINE_BYTES}")
            self._write(line)
            self._number, self._head = self._number + 1, digest

    def close(self) -> None:
        """May be called more than once."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            fault = None if written == len(line) else "the disk is full"
        except OSError as error:
            fault = str(error.strerror)
        if fault is not None:
            try:
                os.ftruncate(self._file, before)
            except OSError:
                self.close()  # no line may follow on a piece of one; the next start cuts it off
            raise CheckpointError(
                f"{self._path}: cannot be written ({fault})", "make room on the disk; nothing goes out unrecorded"
            )

    def _resume(self) -> tuple[int, str, bytes]:
        """Number and hash of the last whole line, and what stands behind it, which is cut off."""
        size = os.fstat(self._file).st_size
        start = max(0, size - 2 * LONGEST_LINE_BYTES)
        end = os.pread(self._file, size - start, start)
        whole, newline, torn = end.rpartition(b"\n")
        number, head = 0, FIRST_PREVIOUS
        if newline:
            last = _parse(whole.rpartition(b"\n")[2] + newline)
            if last is None:
                raise _broken(self._path, "the last line", "is not what was written")
            number, head = last.number, last.hash
        elif start:
            raise _broken(self._path, "the last line", "has no end")
        if torn:
            os.ftruncate(self._file, size - len(torn))
        return number, head, torn


def read(path: Path) -> Iterator[Entry]:
    """A log's lines, each verified before it is yielded; holds one in memory.

    Raises:
        CheckpointError: naming the first line that is not as it was written, or not in its place.
    """
    number, head = 0, FIRST_PREVIOUS
    try:
        with path.open("rb") as file:
            for line in _lines(file):
                number += 1
                entry = _parse(line)
                if entry is None and not line.endswith(b"\n") and not file.read(1):
                    raise CheckpointError(
                        f"{path}: line {number}, the last, is torn: it is being written, or was when its process died",
                        "start that process again, which cuts the line off and records that",
                    )
                if entry is None:
                    raise _broken(path, f"line {number}", "is not what was written")
                if (entry.number, entry.previous) != (number, head):
                    raise _broken(path, f"line {number}", "does not follow from the line before")
                head = entry.hash
                yield entry
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", "name an audit.jsonl") from None


def verify(path: Path) -> Summary:
    """Reads a whole log; raises as :func:`read` does."""
    summary = Summary()
    for entry in read(path):
        summary.add(entry)
    return summary


def format_entry(entry: Entry) -> str:
    """One line of a table under :func:`format_heading`; digests are cut to their first 16 digits."""
    columns = {name: str(entry.fields.get(name, "")) for name in COLUMNS}
    columns["sha256"] = columns["sha256"][:16]
    rest = " ".join(f"{name}={value}" for name, value in entry.fields.items() if name not in COLUMNS)
    row = _ROW.format(entry.time, entry.event, *columns.values(), rest)
    return "".join(letter if letter.isprintable() else "?" for letter in row).rstrip()


def format_heading() -> str:
    """Names of the columns of :func:`format_entry`."""
    return _ROW.format("time", "event", *COLUMNS, "").rstrip()


def format_summary(summary: Summary) -> str:
    """Totals of each peer, and the head."""
    peers = sorted(summary.sent.keys() | summary.received.keys())
    lines = [f"{peer}: {summary.sent[peer]} bytes sent, {summary.received[peer]} received" for peer in peers]
    return "\n".join([*lines, f"{summary.entries} lines, all in order", f"head: {summary.head}"])


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        yield line


def _parse(line: bytes) -> Entry | None:
    """None if the line is not one that was written; its place in the chain is not looked at."""
    match = _LINE.fullmatch(line)
    if match is None or hashlib.sha256(match[1]).hexdigest().encode("ascii") != match[2]:
        return None
    try:
        fields = json.loads(line)
        chain = {name: fields.pop(name) for name in _CHAIN}
    except (ValueError, KeyError, RecursionError):
        return None
    return Entry(**chain, fields=fields)


def _broken(path: Path, place: str, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {place} {fault}",
        "find out who changed it; keep the file as evidence and move it away to begin a new one",
    )
