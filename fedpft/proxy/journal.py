"""What the making of a proxy has come to so far, a file a step: after a `kill -9` the next process goes on there.

Each step follows from what went before it and nothing else, so that a proxy whose making was broken off is, bit for
bit, the one that would have come of it in one go.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedpft import atomic

Found = dict[str, Tensor]


class Journal:
    """The files, in a directory of their own; without one nothing is kept."""

    def __init__(self, directory: Path | None = None, about: str = "", *, is_own: bool = True) -> None:
        """Args:
        is_own: of another process it is only read.
        about: a digest of all that the steps follow from. What was kept about anything else is as good as not there.
        """
        self._directory, self._about, self._is_own = directory, about, is_own

    def kept(self, step: str, make: Callable[[], Found]) -> Found:
        """What a step has come to: as it was kept, else as it is made now."""
        if (found := self.recall(step)) is None:
            self.note(step, found := make())
        return found

    def recall(self, step: str) -> Found | None:
        """What was last noted of a step; None if nothing was."""
        if self._directory is None:
            return None
        try:
            with safe_open(self._file(step), "pt") as opened:
                if opened.metadata() == {"about": self._about}:
                    return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # not there, or damaged: then it is made again
            pass
        return None

    def note(self, step: str, found: Mapping[str, Tensor]) -> None:
        """Keeps what a step has come to, in place of what it had come to before."""
        if self._directory is not None and self._is_own:
            with atomic.replacing(self._directory / f"{step}.safetensors") as written:
                save_file(
                    {name: tensor.contiguous() for name, tensor in found.items()}, written, {"about": self._about}
                )

    def within(self, name: str) -> "Journal":
        """One for steps that are called as others are."""
        directory = None if self._directory is None else self._directory / name
        return Journal(directory, self._about, is_own=self._is_own)

    def clear(self) -> None:
        """The proxy is there; nothing of this is needed any more."""
        if self._directory is not None and self._is_own:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, step: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{step}.safetensors"
