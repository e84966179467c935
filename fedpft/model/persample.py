"""The gradient of each sample by itself, in one forward and one backward pass.

LoRA's factors and the head get a copy for each sample, which takes no memory: it is a view of the one that there is.
What a copy's gradient is, is that of its sample.

S samples of a batch
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from fedpft.errors import ModelError
from fedpft.model.architectures import computing_by, head_of

Copies = dict[nn.Parameter, Tensor]


@contextmanager
def per_sample(model: nn.Module, samples: int) -> Iterator[Copies]:
    """While open, a forward pass of so many samples computes with copies; after backward each has its `grad`, (S, ...).

    Within :func:`fedpft.model.adapters.training`, and for models whose LoRA is on attention alone. Yields the copy of
    each parameter that trains.

    Raises:
        ModelError: in the forward pass, if LoRA is given something else than the samples.
    """
    copies: Copies = {}
    carriers = [module for module in model.modules() if "lora_A" in dict(module.named_children())]
    heads = [model.get_submodule(name) for name in head_of(model)]
    inside = {id(parameter) for head in heads for parameter in head.parameters()}
    stood: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            copies[parameter] = parameter.detach().expand(samples, *parameter.shape).requires_grad_()
            if id(parameter) not in inside:
                stood.append((module, name, parameter))
    whole = {
        head: partial(_by_sample, head.forward, head, {name: copies[p] for name, p in head.named_parameters()})
        for head in heads
    }
    checked = {module: partial(_checked, module.forward, samples) for module in carriers}
    try:
        for module, name, parameter in stood:
            module._parameters[name] = copies[parameter]  # type: ignore[assignment]
        with computing_by(whole | checked):
            yield copies
    finally:
        for module, name, parameter in stood:
            module._parameters[name] = parameter


def _checked(forward: Callable[[Tensor], Tensor], samples: int, x: Tensor) -> Tensor:
    if len(x) != samples:
        raise ModelError(
            "privacy: LoRA of this model is given something that is of no single sample (relative positions, say)",
            "set limits.max_batch: 1 in silo.yaml, where every step's samples come one by one",
        )
    return forward(x)


def _by_sample(forward: Callable[..., Any], head: nn.Module, own: dict[str, Tensor], *given: Any, **named: Any) -> Any:
    """A head's output of each sample with the sample's own parameters."""

    def of_one(parameters: dict[str, Tensor], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return functional_call(head, parameters, given, named)

    alone = partial(tree_map_only, Tensor, lambda tensor: tensor.unsqueeze(1))
    with computing_by({head: forward}):
        found = torch.vmap(of_one)(own, alone(given), alone(named))
    return tree_map_only(Tensor, lambda tensor: tensor.squeeze(1), found)
