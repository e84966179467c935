"""Files that are there whole or not at all, whenever the process or the machine stops."""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedpft import faults
from fedpft.errors import ConfigError

# what a file system answers to a call that it does not know
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTTY}
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
        with faults.tidying(written):
            written.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """As :func:`made`, and keeps other processes that ask for it out; the lock ends with the process.

    Raises:
        ConfigError: another process has it, it cannot be written to, or its file system lacks what is needed.
    """
    with made(directory, key):
        with _writing(directory, key):
            file = (directory / "lock").open("w")
        with file:
            try:
                _lock(file, directory, key)
                yield
            finally:
                with faults.tidying(directory):
                    if [path.name for path in directory.iterdir()] == ["lock"]:
                        (directory / "lock").unlink()


@contextlib.contextmanager
def made(directory: Path, key: str) -> Iterator[Path]:
    """Makes a directory and tries it out; one into which nothing was put is removed again, if it was made here.

    What the body raises that is no FedPFTError becomes one (:func:`fedpft.faults.explained`).

    Args:
        key: what the directory is called in the process's YAML file, or on its command line.

    Raises:
        ConfigError: it cannot be written to, or its file system lacks what is needed.
    """
    new = standing(directory, key) != directory
    with _writing(directory, key):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        with faults.explaining(directory, key):
            try_out(directory, key)
            yield directory
    finally:
        if new:
            with faults.tidying(directory):
                if not any(directory.iterdir()):
                    directory.rmdir()


def standing(directory: Path, key: str) -> Path:
    """The directory itself, or the nearest above it that is there; ConfigError if a file or a dead link is in the way.

    Args:
        key: what the directory is called in the process's YAML file.
    """
    for place in (directory, *directory.parents):
        if os.path.isdir(place):
            return place
        if os.path.lexists(place):
            what = "is a link to nowhere" if place.is_symlink() else "is not a directory"
            raise ConfigError(f"{place}: {what}", f"change `{key}`, or move that away")
    raise ConfigError(f"{directory}: there is no directory above it", f"change `{key}`")


def try_out(directory: Path, key: str) -> None:
    """Does once, in a directory that is there, all that files in it must stand later, and leaves nothing.

    Args:
        key: what the directory is called in the process's YAML file.

    Raises:
        ConfigError: it cannot be written to, or its file system cannot lock, rename or sync.
    """
    tried = (
        directory / f".tried-{secrets.token_hex(4)}.part"
    )  # as what a killed process leaves: swept at the next start
    try:
        with _writing(directory, key):
            with tried.open("w") as file:
                _lock(file, directory, key)
            with replacing(tried) as written:
                written.write_text(key)
    finally:
        with faults.tidying(tried):
            tried.unlink(missing_ok=True)


def _lock(file: IO[str], directory: Path, key: str) -> None:
    try:
        with _writing(directory, key):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{directory} is in use by another process",
            f"stop that one; if the two are to run at the same time, give each its own `{key}`",
        ) from None


@contextlib.contextmanager
def _writing(directory: Path, key: str) -> Iterator[None]:
    """Names the directory in what its file system refuses; a disk that is full is none of it."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise ConfigError(
                f"{directory}: its file system lacks what is needed to lock and sync files ({error.strerror})",
                f"give `{key}` a directory on a local disk",
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise faults.explained(error, directory) from None
        raise ConfigError(
            f"{directory}: cannot be written to ({error.strerror})", f"let this user write there, or change `{key}`"
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
        with contextlib.suppress(OSError):  # an advice, which some file systems do not take
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Forces a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
