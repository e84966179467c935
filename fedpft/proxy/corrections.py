"""What a narrow proxy has of its own: output weights that were refitted for its neurons, less those of the whole one.

They lie in the bundle, in files of each width that the server announces. U updated neurons of a layer.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedpft.config import LimitsSection
from fedpft.model.mapped import MappedTensors
from fedpft.model.precision import wide

REFITTED = ("w_out", "b_out")
_FILES = "width-"


def save_correction(directory: Path, width: float, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes one of the files of a width, each with a number of its own."""
    save_file(dict(tensors), directory / f"{_files_of(width)}{number:05d}.safetensors")


def is_used(file: str, limits: LimitsSection) -> bool:
    """Whether a silo with these limits uses the file of a bundle that is called so."""
    every = limits.memory_gib is not None  # which width fits is known only when the proxy is there
    return every or not file.startswith(_FILES) or file.startswith(_files_of(limits.width))


class Corrections:
    """Those of one width. They stay in their files, and are read whenever something is to be corrected."""

    def __init__(self, directory: Path, width: float) -> None:
        """Raises what MappedTensors does."""
        self._width, self._held = width, MappedTensors(sorted(directory.glob(f"{_files_of(width)}*")))

    def check(self, proxy: Mapping[str, Tensor], modules: Collection[str]) -> None:
        """Raises ValueError unless there is one for every output weight and bias of these modules of a narrow proxy."""
        names = [name for name in proxy if name.rpartition(".")[0] in modules and name.endswith(REFITTED)]
        ours, theirs = _forms(self._held.tensors), _forms({name: proxy[name] for name in names})
        if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            raise ValueError(f"the files {_files_of(self._width)}* do not fit {odd[0]}")

    def corrected(self, name: str, tensor: Tensor, rows: Tensor | None = None) -> Tensor:
        """The sum of a tensor and its correction, rounded once; what has none, or one of another form, as it is.

        Args:
            rows: which of the correction's rows `tensor` (U, ...) is, (U,) int64; None: all of them.
        """
        own = self._held.tensors.get(name)
        if own is None or tensor.shape != ((len(own) if rows is None else len(rows)), *own.shape[1:]):
            return tensor
        found = (wide(tensor) + wide(own if rows is None else own[rows])).to(tensor.dtype)
        self._held.release()
        return found


def _files_of(width: float) -> str:
    return f"{_FILES}{width:g}-"


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
