"""Files that are there whole or not at all, whenever the process or the machine stops."""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fedpft.errors import ConfigError, FedPFTError

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
RELEASE_BYTES = 8 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields an empty file beside `path` to write to; on success it is synced to disk and takes the place of `path`.

    If the body raises, the new file is removed and `path` stays as it was. The directory of `path` is made if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    written.touch(exist_ok=False)
    try:
        yield written
        sync(written)
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """Makes a directory and keeps other processes that ask for it out; the lock ends with the process.

    A directory into which nothing else was put is removed again.

    Args:
        key: what the directory is called in the process's YAML file.

    Raises:
        ConfigError: another process has it, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written to ({error.strerror})", f"change `{key}`") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{directory} is in use by another process", f"stop that one, or give each its own `{key}`"
            ) from None
        try:
            with explaining_faults(directory):
                yield
        finally:
            if [path.name for path in directory.iterdir()] == ["lock"]:
                (directory / "lock").unlink()
                directory.rmdir()


@contextlib.contextmanager
def explaining_faults(directory: Path) -> Iterator[None]:
    """Around a process's work: a disk that is full, or has become unwritable, ends in a line that names the directory.

    Raises:
        FedPFTError: in place of the OSError of such a disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise FedPFTError(
            f"{directory}: {os.strerror(error.errno).lower()}",
            "make room there, or make it writable, and start the same command again: it goes on from there",
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


def release(descriptor: int) -> None:
    """Sends a file's new bytes to the disk and lets memory go of those that are there; does not wait.

    Called every RELEASE_BYTES it makes a large file's sync short, and keeps the file from pushing others out of memory.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Forces a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
