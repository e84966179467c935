"""Tensors that stay in their safetensors files: read where they are touched, and given back when they were used.

The operating system reads a page of a mapped file when somebody looks at it. What this file adds is to say when it may
have the page back, so that a process never holds more of a model than it is computing with.
"""

import json
import math
import mmap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpft import atomic, machine
from fedpft.model.architectures import layers_of

DTYPES = {  # by safetensors' names
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
INDEX = "model.safetensors.index.json"  # what transformers calls it
_METADATA = {"format": "pt"}


class MappedTensors:
    """The tensors of some files.

    tensors: by their names. What is written to one that is writable is in its file at once; to write to any other ends
        the process.
    """

    def __init__(self, files: Sequence[Path] = (), *, writable: bool = False) -> None:
        """Raises what :meth:`add` does."""
        self.tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap] = []
        self._addresses: set[int] = set()
        self._access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        for file in files:
            self.add(file)

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return sum(map(len, self._maps))

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of these, and no copy."""
        return tensor.data_ptr() in self._addresses

    def release(self) -> None:
        """Gives back the memory that they take by now; who looks at one reads it again."""
        for each in self._maps:
            each.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: what was written stays

    def flush(self) -> None:
        """Brings what was written to disk, beyond the reach of a power failure."""
        for each in self._maps:
            each.flush()

    def add(self, file: Path) -> None:
        """One file more.

        Raises:
            OSError, SafetensorError: it cannot be read, or is no safetensors file.
            ValueError: it holds an unknown type.
        """
        with safe_open(file, "pt") as opened:  # which looks at the header as a whole
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            known = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
        with file.open("r+b" if self._access == mmap.ACCESS_WRITE else "rb") as read:
            mapped = mmap.mmap(read.fileno(), 0, access=self._access)
        offset = 8 + int.from_bytes(mapped[:8], "little")
        for name, (kind, shape) in known.items():
            if kind not in DTYPES:
                raise ValueError(f"{file}: {name} is stored as {kind}")
            tensor = self.tensors[name] = _view(mapped, offset, DTYPES[kind], shape)
            self._addresses.add(tensor.data_ptr())
            offset += tensor.nbytes
        self._maps.append(mapped)


class Shards:
    """A model's files, written part by part, so that only the part at hand is in memory.

    held: what has been written, mapped and writable.
    """

    def __init__(self, directory: Path) -> None:
        self.held = MappedTensors(writable=True)
        self._directory, self._places = directory, dict[str, str]()
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Writes a file of these tensors; returns them as they are there."""
        name = f"model-{len(set(self._places.values())) + 1:05d}.safetensors"
        save_file({key: each.contiguous() for key, each in tensors.items()}, self._directory / name, _METADATA)
        machine.trim_heap()
        self.held.add(self._directory / name)
        self._places |= dict.fromkeys(tensors, name)
        return {key: self.held.tensors[key] for key in tensors}

    def finish(self) -> None:
        """Writes the index, as transformers has it, once every part is there."""
        total = sum(self.held.tensors[name].nbytes for name in self._places)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._places.items()))}
        self.held.flush()
        atomic.write_text(self._directory / INDEX, json.dumps(index, indent=1))


def held(model: nn.Module) -> MappedTensors | None:
    """The files that a model's weights are in; None if they are in memory."""
    return getattr(model, "held", None)


def release(model: nn.Module) -> None:
    """Gives back the memory that weights take which are on disk; without any it does nothing."""
    if (files := held(model)) is not None:
        files.release()


def copies(
    files: Sequence[Path],
    rows: Mapping[str, Tensor] | None = None,
    made: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor,
) -> dict[str, Tensor]:
    """The tensors of some files in memory, with no more than one of them there twice; raises as MappedTensors.

    Args:
        rows: of some tensors those that are wanted, (n,) int64.
        made: what to keep of each.
    """
    stored, found = MappedTensors(files), dict[str, Tensor]()
    for name, tensor in stored.tensors.items():
        found[name] = made(name, tensor[rows[name]] if rows and name in rows else tensor.clone())
        stored.release()
    return found


def hold_on_disk(model: nn.Module, files: MappedTensors) -> None:
    """Says that a model's weights are those; each layer's forward pass, and its backward pass, then gives them back."""
    model.held = files  # type: ignore[assignment]

    def give_back(_layer: nn.Module, _given: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        files.release()
        machine.trim_heap()
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _gradient: files.release())  # the layers above are through

    for layer in layers_of(model):
        layer.register_forward_hook(give_back)


def _view(mapped: mmap.mmap, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(tuple(shape))
