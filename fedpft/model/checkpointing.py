"""Gradient checkpointing: of each layer only the input is kept for backward, and the layer computed again there.

It costs another forward pass of the layers, and the result is the same bit for bit on a device that computes the same
twice: what dropout drew is drawn again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedpft.model.architectures import computing_by, layers_of
from fedpft.model.subffn import uncounted


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """While open, a proxy's layers keep nothing but their input. What is computed again counts no inactive neuron."""
    with computing_by({layer: partial(_forward, layer, layer.forward) for layer in layers_of(model)}):
        yield


def _forward(layer: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    if not arguments:  # the first is where `checkpoint` sees on which device random numbers are drawn
        arguments, forward = (named.pop("hidden_states"),), partial(_by_name, forward)
    contexts = partial(_contexts, layer)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)


def _by_name(forward: Callable[..., Any], hidden: Any, **named: Any) -> Any:
    return forward(hidden_states=hidden, **named)


def _contexts(layer: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), uncounted(layer)
