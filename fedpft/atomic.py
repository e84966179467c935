"""Files that are there whole or not at all, whenever the process or the machine stops."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Forces a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
