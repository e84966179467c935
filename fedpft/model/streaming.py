"""A model whose layers are on disk and compute on a GPU: a copy of each is there while it does, and no longer.

All that is outside of the layers lies on the device for good, and so does of a layer what is no tensor of a file: LoRA,
buffers, values of another type than they are stored in.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpft.model.architectures import layers_of
from fedpft.model.checkpointing import checkpointing
from fedpft.model.mapped import MappedTensors, held
from fedpft.model.walk import keep_states


class Visits:
    """The weights of one layer that stay on disk, and how many want a copy of them on the device."""

    def __init__(self, layer: nn.Module, files: MappedTensors, device: torch.device) -> None:
        self._layer, self._files, self._device, self._wanted = layer, files, device, 0
        self._stay: list[tuple[nn.Module, str, nn.Parameter]] = []

    @contextmanager
    def here(self, *, writing: bool = False) -> Iterator[None]:
        """While open, the layer is on the device; what is written to it then is kept if that was said.

        The parameters themselves stay where they are, and others stand in for them, so that a backward pass has what
        its forward pass computed with.
        """
        if not self._wanted:
            self._arrive()
        self._wanted += 1
        try:
            yield
            if writing:
                with torch.no_grad():
                    for module, name, parameter in self._stay:
                        parameter.copy_(module.get_parameter(name))
        finally:
            self._wanted -= 1
            if not self._wanted:
                for module, name, parameter in self._stay:
                    module._parameters[name] = parameter
                self._stay = []
                self._files.release()

    def _arrive(self) -> None:
        self._stay = [
            (module, name, parameter)
            for module in self._layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter in self._files
        ]
        for module, name, parameter in self._stay:
            copy = parameter.detach().to(self._device, copy=True)
            module._parameters[name] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
        self._files.release()


def place(model: nn.Module, device: str, scratch: Path) -> None:
    """`model.to(device)`, but for the layers of a model that is on disk, which stay there. In place.

    Args:
        scratch: where such a model puts what it computes for many samples.
    """
    files = held(model)
    if files is None:
        model.to(device)
        return
    keep_states(model, scratch)
    if torch.device(device).type != "cpu":
        stream(model, files, torch.device(device))


def stream(model: nn.Module, files: MappedTensors, device: torch.device) -> None:
    """Lets the layers compute on the device by copies of what they have in these files, and moves all else there."""
    inside = {id(parameter) for parameter in layers_of(model).parameters() if parameter in files}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device, copy=True)
    visits = [Visits(layer, files, device) for layer in layers_of(model)]
    for layer, own in zip(layers_of(model), visits, strict=True):
        layer.forward = partial(_visiting, own, layer.forward)
    model.visits = visits  # type: ignore[assignment]


def streams(model: nn.Module) -> bool:
    """Whether layers of a model are copied to a device when they compute."""
    return _visits(model) is not None


@contextmanager
def at_hand(model: nn.Module, layers: Iterable[int], *, writing: bool = False) -> Iterator[None]:
    """While open, these layers are where the model computes, and are copied there once, whatever is done with them.

    Args:
        writing: what is written to them is kept.
    """
    with ExitStack() as stack:
        if (visits := _visits(model)) is not None:
            for layer in layers:
                stack.enter_context(visits[layer].here(writing=writing))
        yield


def leave(model: nn.Module) -> None:
    """Makes a copy of such a model's modules one that computes with what it has, wherever that is."""
    if streams(model):
        for layer in layers_of(model):
            del layer.forward  # the instance's
        model.visits = None  # type: ignore[assignment]


@contextmanager
def for_backward(model: nn.Module) -> Iterator[None]:
    """While open, a forward pass does not keep all the copies of its layers for backward, but makes them again."""
    with checkpointing(model) if streams(model) else nullcontext():
        yield


def _visits(model: nn.Module) -> list[Visits] | None:
    return getattr(model, "visits", None)


def _visiting(visits: Visits, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with visits.here():
        return forward(*arguments, **named)
