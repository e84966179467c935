"""Tensors by name <-> safetensors files: no pickle, nothing that executes.

A file holds groups of tensors. Three groups are all that ever crosses the wire in a round.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedpft import atomic
from fedpft.errors import TransferCorrupt

Group = Literal["adapter", "inactivity", "patch"]


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
        save_file(stored, written)


def read_tensors(path: Path, group: Group) -> dict[str, Tensor]:
    """Reads one group; an absent group is empty.

    Raises:
        TransferCorrupt: the file is not safetensors.
    """
    prefix = f"{group}/"
    with _opened(path) as file:
        stored = file.keys()
        return {name.removeprefix(prefix): file.get_tensor(name) for name in stored if name.startswith(prefix)}


def check_groups(path: Path, known: Collection[Group]) -> None:
    """Raises TransferCorrupt if the file is not safetensors or holds a tensor outside of the groups `known`."""
    with _opened(path) as file:
        stored = file.keys()
    strange = [name for name in stored if name.partition("/")[0] not in known or "/" not in name]
    if strange:
        raise TransferCorrupt(f"unexpected tensor {strange[0]!r}", "run the same version of fedpft on both sides")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise TransferCorrupt(
            f"{path.name} is not a safetensors file ({error})", "run the same version of fedpft on both sides"
        ) from None
