"""How every command of fedpft starts and ends: logging to stderr, one line for an error, the exit code of its class."""

import logging
import sys
from collections.abc import Callable

from fedpft.errors import FedPFTError

INTERRUPTED = 130  # as a shell reports a command ended by Ctrl-C


def run_command(function: Callable[[], None], *, level: int = logging.INFO) -> int:
    """Runs a command and returns its exit code (docs/errors.md).

    A FedPFTError becomes one line on stderr. Any other exception is a fault of fedpft itself and keeps its traceback.
    """
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        function()
    except FedPFTError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
