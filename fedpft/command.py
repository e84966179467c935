"""How every command of fedpft starts and ends: logging to stderr, one line for an error, the exit code of its class."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from fedpft import faults

# as a shell reports a command ended by a signal
INTERRUPTED = 130
NOBODY_READS = 141
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command in the same places and by the same ways as Ctrl-C."""


def run_command(function: Callable[[], None], *, level: int = logging.INFO) -> int:
    """Runs a command and returns its exit code (docs/errors.md).

    An error becomes one line on stderr; the traceback of one that fedpft did not foresee goes to a file, which the line
    names.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # or a name that the terminal cannot show would end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        with _terminable():
            function()
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return NOBODY_READS
    except Exception as error:
        told = faults.explained(error)
        print(f"error: {' '.join(str(told).split())}", file=sys.stderr)
        return told.exit_code
    except Terminated:
        print("error: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread only
        yield
        return
    former = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
