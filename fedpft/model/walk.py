"""Batches on their way through a model, a layer at a time, and what they are between two layers."""

import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpft.model.architectures import base_of, computing_by, layers_of

Get = Callable[[], Tensor]


class Scratch:
    """A file without a name, for tensors that are in memory only while somebody computes with them.

    size: bytes.
    """

    def __init__(self, directory: Path) -> None:
        """Raises OSError: no file can be made there."""
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (it ends with this)
        self.size, self._free = 0, dict[int, list[int]]()

    def put(self, tensor: Tensor) -> Get:
        """Writes a tensor; it is there, on its device, whenever it is got, as long as somebody holds what is returned.

        Raises:
            OSError: the disk is full.
        """
        data = tensor.detach().cpu().contiguous()
        free = self._free.setdefault(data.nbytes, [])
        if not free:
            free.append(self.size)
            self.size += data.nbytes
        offset = free.pop()
        self._file.seek(offset)
        self._file.write(_bytes(data))
        get = partial(self._get, offset, data.shape, data.dtype, tensor.device)
        weakref.finalize(get, free.append, offset)
        return get

    def _get(self, offset: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        data = torch.empty(tuple(shape), dtype=dtype)
        self._file.seek(offset)
        self._file.readinto(_bytes(data))
        return data.to(device)


def keep_states(model: nn.Module, scratch: Path) -> None:
    """From here on the states of this model's walks are in a file in that directory, and not in memory."""
    model.scratch = Scratch(scratch)  # type: ignore[assignment]


class LayerWalk:
    """One batch on its way through the layers of a model, each computed when it is asked for, and never again.

    position: how many layers it has left behind.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Sees what else each layer is given: masks and positions, the same at any time.

        Of the layers only the first is run, to see in what form they leave the states; the others pass them on.
        """
        self._layers = layers_of(model)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.position = 0
        scratch: Scratch | None = getattr(model, "scratch", None)
        self._keep: Callable[[Tensor], Get] = _in_memory if scratch is None else scratch.put
        self._get: Get
        first, *others = self._layers
        # What the first layer is given, and in what form the layers leave it.
        given: list[Tensor] = []
        form: list[Tensor | tuple[Tensor, ...]] = []
        hook = first.register_forward_hook(lambda _layer, _given, output: form.append(output))
        noting = first.register_forward_pre_hook(partial(self._note, given), with_kwargs=True)
        passed = partial(self._pass, given, form)
        try:
            with computing_by(dict.fromkeys(others, passed)):
                base_of(model)(**{name: value for name, value in inputs.items() if name != "labels"})
        finally:
            hook.remove()
            noting.remove()
        self._get = self._keep(given[0])

    @property
    def hidden(self) -> Tensor:
        """The states after the layers that are left behind, (B, T, D)."""
        return self._get()

    def output(self) -> Tensor:
        """What the next layer makes of the states, (B, T, D), which stay where they are."""
        arguments, named = self._calls[self.position]
        found: Tensor | tuple[Tensor, ...] = self._layers[self.position](self.hidden, *arguments, **named)
        return found[0] if isinstance(found, tuple) else found

    def advance(self, hidden: Tensor | None = None) -> None:
        """Leaves the next layer behind, whose output is `hidden`, if that is known."""
        self._get = self._keep(self.output() if hidden is None else hidden)
        self.position += 1

    def _pass(
        self, given: list[Tensor], form: Sequence[Tensor | tuple[Tensor, ...]], *arguments: Any, **named: Any
    ) -> Any:
        self._note(given, self._layers[0], arguments, named)
        return (given[0], *form[0][1:]) if isinstance(form[0], tuple) else given[0]

    def _note(self, states: list[Tensor], _layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        others = dict(named)
        hidden, *positional = arguments if arguments else (others.pop("hidden_states"),)
        states[:] = states or [hidden]
        self._calls.append((tuple(positional), others))


def _bytes(data: Tensor) -> memoryview:
    array: Any = data.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _in_memory(tensor: Tensor) -> Get:
    return lambda: tensor
