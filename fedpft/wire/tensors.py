"""Tensors by name <-> safetensors files: no pickle, nothing that executes.

A file holds groups of tensors. An update's are "adapter" or "delta" and "scale" (see encoding.py), and "inactivity";
or, with secure aggregation, "masked".
"""

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedpft import atomic
from fedpft.errors import TransferCorrupt
from fedpft.model.mapped import DTYPES

Group = Literal[
    "adapter",
    "delta",
    "scale",
    "inactivity",
    "masked",
    "sum",
    "patch",
    "residual",
    "first_moment",
    "second_moment",
]

LARGEST_HEADER_BYTES = 4 << 20  # some 40,000 tensors

_REMEDY = "run the same version of fedpft on both sides"


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        """A tensor's own."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class TensorFile:
    """A safetensors file, from which tensors are read one at a time, each into memory of its own.

    The library would map the file: pages of every file that is being read would count as memory of this process, and a
    tensor would lie at whatever address a hostile header gives it. Between two reads the file is not open.

    specs: what it holds, by the names "group/name".
    """

    def __init__(self, path: Path) -> None:
        """Reads the header alone.

        Raises:
            TransferCorrupt: the file is not safetensors, or not as fedpft writes it.
        """
        self._path = path
        self.specs: dict[str, Spec] = {}
        self._starts: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                for name, spec, start in _entries(file, path.stat().st_size):
                    self.specs[name], self._starts[name] = spec, start
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TransferCorrupt(f"{path.name} is not safetensors as fedpft writes it ({error})", _REMEDY) from None

    def tensor(self, group: Group, name: str) -> Tensor:
        """Reads one; TransferCorrupt if there is none of that name."""
        stored = f"{group}/{name}"
        if stored not in self.specs:
            raise TransferCorrupt(f"{self._path.name} has no tensor {stored!r}", _REMEDY)
        spec = self.specs[stored]
        content = torch.empty(spec.nbytes, dtype=torch.uint8)
        with self._path.open("rb") as file:
            file.seek(self._starts[stored])
            if file.readinto(content.numpy().data) < spec.nbytes:
                raise TransferCorrupt(f"{self._path.name} was cut while it was read", _REMEDY)
        return content.view(spec.dtype).view(spec.shape)


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


def read_tensors(path: Path, group: Group) -> dict[str, Tensor]:
    """Reads one group; an absent group is empty.

    Raises:
        TransferCorrupt: the file is not safetensors.
    """
    file, prefix = TensorFile(path), f"{group}/"
    names = [stored.removeprefix(prefix) for stored in file.specs if stored.startswith(prefix)]
    return {name: file.tensor(group, name) for name in names}


def check_groups(path: Path, known: Collection[Group]) -> None:
    """Raises TransferCorrupt if the file is not safetensors or holds a tensor outside of the groups `known`."""
    strange = [name for name in TensorFile(path).specs if name.partition("/")[0] not in known or "/" not in name]
    if strange:
        raise TransferCorrupt(f"unexpected tensor {strange[0]!r}", _REMEDY)


def _entries(file: BinaryIO, size: int) -> list[tuple[str, Spec, int]]:
    """Name, spec and first byte of each tensor; ValueError and its like unless they fill the file one after another."""
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > LARGEST_HEADER_BYTES:
        raise ValueError(f"its header would have {header_bytes} bytes")
    text = file.read(header_bytes)
    header = json.loads(text, object_pairs_hook=_unique)
    if len(text) < header_bytes or not isinstance(header, dict):
        raise ValueError("its header is cut, or no list of tensors")
    place, entries = file.tell(), []
    content = place
    described = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    for name, entry in sorted(described, key=lambda each: each[1]["data_offsets"]):
        spec, (start, end) = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"])), entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*spec.shape, start, end)):
            raise ValueError(f"{name!r} has a shape or place that cannot be")
        if content + start != place or end - start != spec.nbytes:
            raise ValueError(
                f"{name!r} does not lie right behind the tensor before, or has another size than its shape"
            )
        entries.append((name, spec, place))
        place += spec.nbytes
    if place != size:
        raise ValueError(f"it has {size} bytes instead of {place}")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found
