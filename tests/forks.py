"""Processes of the product, forked from one that has imported what is heavy: they start in a tenth of the time."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_forks = multiprocessing.get_context("forkserver")

# All third-party, and nothing of grpc: its threads would not survive the fork.
PRELOADED = ["torch", "transformers", "transformers.models.bert.modeling_bert", "peft", "safetensors.torch", "pydantic"]
PRELOADED += ["matplotlib.figure", "cryptography.x509", "yaml", "sqlite3", "tqdm"]


def start(
    module: str, *arguments: str | Path, stdout: Path, stderr: Path | None, before: Callable[[], None] | None = None
) -> Any:
    """`python -m MODULE ARGUMENTS`, as a process of multiprocessing's.

    Args:
        stdout, stderr: files to add to; without the second its log goes to this process's.
        before: called in the new process first. It goes there by name.
    """
    _forks.set_forkserver_preload(PRELOADED)
    words = [module, *map(str, arguments)]
    process = _forks.Process(target=_run, args=(words, stdout, stderr, before), daemon=True)
    process.start()
    return process


def _run(words: list[str], stdout: Path, stderr: Path | None, before: Callable[[], None] | None) -> None:
    """The forked process: from here on it is `python -m MODULE ARGUMENTS`."""
    for stream, path in ((1, stdout), (2, stderr)):
        if path is not None:
            os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    sys.argv = words
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is started without
    if before is not None:
        before()
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class Forked:
    """What fedpft.demo.run asks of a process of its own, of a forked one."""

    def __init__(self, module: str, config: Path, log_file: Path | None) -> None:
        self.args = [sys.executable, "-m", module, "--config", str(config)]
        self._process = start(module, "--config", config, stdout=Path(os.devnull), stderr=log_file)
        self.pid: int = self._process.pid
        self.terminate = self._process.terminate

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self) -> None:
        self._process.join()


@contextmanager
def process(module: str, config: Path, log_file: Path | None) -> Iterator[Forked]:
    """In place of fedpft.demo.run's own."""
    forked = Forked(module, config, log_file)
    try:
        yield forked
    finally:
        forked.terminate()
        forked.wait()
