"""Files by their content: the SHA-256 of what a path leads to, kept from one start to the next.

A run is known by what it was given, not by where that lay. To hash an FM takes seconds, so digests can be kept in a
JSON file, each with what the file system says of its file: size, time of change of content (mtime) and of anything
(ctime), inode. That much is trusted. An ordinary program can give a file any mtime (`cp -p`, `rsync -t`, a restored
backup), but not a former ctime: whatever was written or replaced is hashed again. Nothing is kept of a file that was
written in the last seconds: a file system's clock may tick too slowly to tell two such writes apart.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedpft import atomic

UNREADABLE = ""  # in place of a digest: there is no such file, or it cannot be read
SETTLED_NS = 2_000_000_000  # the slowest clock of a file system in use: FAT's
NAMED = 3  # differences in one message

Signature = tuple[int, ...]


class Digests:
    """Hexadecimal SHA-256 of files, each hashed once as long as the file system says that it is the same.

    Nothing here raises for a file that is missing or cannot be read: whoever needs it says so in better words.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """Args:
        cache: where an earlier process may have kept digests; one that is damaged is as good as none.
        """
        self._cache = cache
        self._files = {} if cache is None else _read(cache)
        self._asked: set[str] = set()

    def of_file(self, path: Path) -> str:
        """A file's; UNREADABLE."""
        name = str(path)
        self._asked.add(name)
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for a writer
                return UNREADABLE
            with path.open("rb") as file:
                signature = _signature(os.fstat(file.fileno()))  # from before: what is written meanwhile changes it
                if name in self._files and self._files[name][0] == signature:
                    return self._files[name][1]
                settled = time.time_ns() - max(signature[1:3]) > SETTLED_NS
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return UNREADABLE
        if settled:
            self._files[name] = signature, digest
        return digest

    def of_files(self, paths: Iterable[Path]) -> str:
        """One for many files, in their order: another if one is another, missing or added."""
        return combined({str(number): self.of_file(path) for number, path in enumerate(paths)})

    def of_directory(self, path: Path, wanted: Callable[[Path], bool] = lambda _: True) -> dict[str, str]:
        """Each file's in a directory, by its name from there; none if there is no such directory.

        Args:
            wanted: is told a name from there.
        """
        files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
        return {name.as_posix(): self.of_file(file) for name, file in files.items() if wanted(name)}

    def save(self) -> None:
        """Keeps what was asked for, and nothing else, for the next process."""
        if self._cache is None:
            return
        files = {name: self._files[name] for name in sorted(self._asked & self._files.keys())}
        atomic.write_text(self._cache, json.dumps({"files": files, "sha256": _seal(files)}))


def combined(files: Mapping[str, str]) -> str:
    """One digest for several by their names, hexadecimal."""
    lines = sorted(f"{digest} {name}\n" for name, digest in files.items())
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def differences(before: Mapping[str, str], after: Mapping[str, str], whole: str = "") -> str:
    """What became of files, for a message: the first few by name; empty if they are the same.

    Args:
        whole: what to call the file whose name is empty.
    """
    found = [
        f"{name or whole} {'was added' if name not in before else 'was changed' if after.get(name) else 'is gone'}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def _signature(status: os.stat_result) -> Signature:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read(cache: Path) -> dict[str, tuple[Signature, str]]:
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        files = {name: (tuple(signature), digest) for name, (signature, digest) in kept["files"].items()}
        return files if kept["sha256"] == _seal(files) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _seal(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
