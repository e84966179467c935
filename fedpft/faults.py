"""What becomes of an exception that no code foresaw: one line, an exit code, and a file with the traceback.

The line names the exception's class and the file. Its text may hold data, such as a cell of a table, and so stands in
the file alone, which only its owner can read.
"""

import contextlib
import datetime
import errno
import logging
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import fedpft
from fedpft.errors import FedPFTError, InternalFault, OutOfMemory

log = logging.getLogger(__name__)

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
DISK_FAULTS |= {errno.ESTALE, errno.ENOTCONN, errno.ENODEV}  # a file system over a network that went away
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
# torch has RuntimeErrors of many texts for it, and its own class has one of these texts too
NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "alloc_failed", "start new thread")

# What asks for less memory, by the key of YAML or command line that names the directory of the work.
LOWER = {
    "work": "lower limits.max_batch or `threads`, or set limits.checkpointing or limits.weights in silo.yaml",
    "out": "lower evaluation.batch, distillation.batch, alignment.batch or `threads` in server.yaml",
}
LOWER_ANYWHERE = "lower the batch sizes or `threads` in the YAML file"


@contextlib.contextmanager
def explaining(directory: Path, key: str = "") -> Iterator[None]:
    """Around a process's work in a directory: whatever it raises ends in a FedPFTError, of one line.

    Args:
        key: what the directory is called in the process's YAML file.

    Raises:
        FedPFTError: in place of any other Exception; see :func:`explained`.
    """
    try:
        yield
    except Exception as error:
        raise explained(error, directory, key) from error


def explained(error: Exception, directory: Path | None = None, key: str = "") -> FedPFTError:
    """The error of which a person reads one line; a FedPFTError is its own.

    Args:
        directory: where the process works, and where its traceback is put; None: in the system's temporary directory.
        key: as of :func:`explaining`.

    Returns:
        FedPFTError: a disk that is full, or was not to be written to.
        OutOfMemory, InternalFault: the traceback is in a file, which the message names.
    """
    if isinstance(error, FedPFTError):
        return error
    number, place = _number(error), getattr(error, "filename", None) or directory or "the disk"
    if is_of_the_disk(error):
        return FedPFTError(
            f"{place}: {os.strerror(number).lower()}",
            "make room there, or make it writable, and start the same command again: it goes on from there",
        )
    if number in TOO_MANY_FILES:
        return FedPFTError(f"{place}: {os.strerror(number).lower()}", "raise the limit: ulimit -n, or LimitNOFILE")
    kept = _keep_traceback(error, directory)
    if is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory: {type(error).__name__}; {kept}",
            f"{LOWER.get(key, LOWER_ANYWHERE)}, or end other programs, and start the same command again",
        )
    return InternalFault(
        f"a fault of fedpft itself: {type(error).__name__}; {kept}",
        "look into it for a cause on this machine; if there is none, report it, without lines that hold your data",
    )


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk is full, or was not to be used: once it is mended, the same command goes on."""
    return _number(error) in DISK_FAULTS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this machine, or a GPU of it, lacked memory."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or _number(error) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and any(part in text for part in NO_MEMORY))
    )


@contextlib.contextmanager
def tidying(what: object) -> Iterator[None]:
    """Around what is done after the work, whether that went well or not: a fault here must not hide one there."""
    try:
        yield
    except Exception as error:
        log.warning("%s: could not be tidied up (%s)", what, getattr(error, "strerror", None) or type(error).__name__)


def _number(error: BaseException) -> int:
    """The errno of an OSError, or of what safetensors and other code in Rust raise in its place; else 0."""
    if isinstance(error, OSError):
        return error.errno or 0
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return int(hidden[1]) if hidden else 0


def _keep_traceback(error: Exception, directory: Path | None) -> str:
    """Writes a file for its owner only; says where it is."""
    time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    about = f"fedpft {fedpft.__version__}, python {platform.python_version()}, {platform.platform()}\n{sys.argv}\n\n"
    for place in (directory, None):  # a disk that is full is no place for it
        with contextlib.suppress(OSError, MemoryError):
            number, name = tempfile.mkstemp(".txt", f"traceback-{time}-", place)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines([about, *traceback.format_exception(error)])
            return f"its traceback is in {name}"
    return "its traceback could not be written anywhere"
