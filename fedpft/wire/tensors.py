"""Tensors by name <-> safetensors files: no pickle, nothing that executes.

A file holds groups of tensors. An update's are "adapter" or "delta" and "scale" (see encoding.py), and "inactivity".
"""

import contextlib
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedpft import atomic
from fedpft.errors import TransferCorrupt

Group = Literal["adapter", "delta", "scale", "inactivity", "patch", "residual"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_REMEDY = "run the same version of fedpft on both sides"


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


def write_tensors(path: Path, groups: Mapping[Group, Mapping[str, Tensor]]) -> None:
    """Writes groups of tensors into one file, atomically; tensor `name` of group `group` is stored as "group/name".

    Any shape, dtype and device that safetensors knows (float32, bfloat16, float16, int64, ...); values are kept bit for
    bit.
    """
    stored = {
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    with atomic.replacing(path) as written:
        try:
            save_file(stored, written)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):  # safetensors hides a full disk in a text
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise


def read_specs(path: Path) -> dict[str, Spec]:
    """What a file holds, by the names "group/name"; reads its header alone.

    Raises:
        TransferCorrupt: the file is not safetensors, or holds a dtype that fedpft has no use for.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it has no iterator)
        return {name: Spec(_DTYPES[each.get_dtype()], tuple(each.get_shape())) for name, each in slices.items()}


def read_tensor(path: Path, group: Group, name: str) -> Tensor:
    """Reads one tensor, into memory of its own.

    Raises:
        TransferCorrupt: the file is not safetensors, or has no such tensor.
    """
    with _opened(path) as file:
        return _tensor(file, f"{group}/{name}")


def read_tensors(path: Path, group: Group) -> dict[str, Tensor]:
    """Reads one group; an absent group is empty.

    Raises:
        TransferCorrupt: the file is not safetensors.
    """
    prefix = f"{group}/"
    with _opened(path) as file:
        stored = file.keys()
        return {name.removeprefix(prefix): _tensor(file, name) for name in stored if name.startswith(prefix)}


def check_groups(path: Path, known: Collection[Group]) -> None:
    """Raises TransferCorrupt if the file is not safetensors or holds a tensor outside of the groups `known`."""
    strange = [name for name in read_specs(path) if name.partition("/")[0] not in known or "/" not in name]
    if strange:
        raise TransferCorrupt(f"unexpected tensor {strange[0]!r}", _REMEDY)


def _tensor(file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor.clone()  # what is mapped from a file can lie at any address, and ends with the file


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A header may say anything: whatever torch and safetensors then raise means a file that is not as it must be."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise TransferCorrupt(f"{path.name} is not a safetensors file as fedpft writes it ({error})", _REMEDY) from None
