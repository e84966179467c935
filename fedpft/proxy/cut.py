"""The proxy's model: a copy of the FM with some of its layers and neurons (method.md, section 1)."""

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fedpft.model import architectures, loading
from fedpft.model.mapped import held, release
from fedpft.model.streaming import leave
from fedpft.model.subffn import replace_ffn
from fedpft.proxy.selection import Selection

PARTS = ("embeddings", "attention", "ffn", "norms")

Put = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def in_memory(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Copies."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def cut(model: nn.Module, selection: Selection, put: Put = in_memory) -> nn.Module:
    """The proxy's model: a copy of the FM with the selected layers, and in each a SubFFN of the selected neurons.

    Args:
        put: is given the frozen weights of one layer, or of all that is outside of the layers, by their names, and
            returns them as the proxy shall have them.
    """
    proxy = _sharing(model)
    layers = architectures.layers_of(proxy)
    chosen = [layers[layer] for layer in selection.layers]
    del layers[:]
    loading.set_layers(proxy.config, selection.layers)
    _settle(proxy, "", put)
    layers.extend(chosen)
    for index, (layer, neurons) in enumerate(zip(chosen, selection.neurons, strict=True)):
        replace_ffn(proxy, layer, neurons)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in a cache
                module.layer_idx = index  # type: ignore[assignment]
        _settle(layer, f"{architectures.layers_path(proxy)}{index}.", put)
        release(model)
    return proxy


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's modules, with the model's own tensors in them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = (held(model), getattr(model, "scratch", None))
    sharing = copy.deepcopy(model, {**shared, **{id(each): None for each in kept}})
    leave(sharing)
    return sharing


def _settle(part: nn.Module, prefix: str, put: Put) -> None:
    """Gives a part of the proxy tensors of its own. In place.

    Args:
        prefix: of its names in the proxy.
    """
    frozen = {
        f"{prefix}{name.replace('.base_layer.', '.')}": parameter
        for name, parameter in part.named_parameters()
        if ".lora_" not in name
    }
    placed = put({name: parameter.detach() for name, parameter in frozen.items()})
    own = {id(parameter): placed[name] for name, parameter in frozen.items()}
    made = {
        id(parameter): nn.Parameter(
            own[id(parameter)] if id(parameter) in own else parameter.detach().clone(), parameter.requires_grad
        )
        for parameter in part.parameters()
    }
    for module in part.modules():
        module._parameters.update({n: made[id(p)] for n, p in module._parameters.items() if p is not None})
        module._buffers.update({n: b.clone() for n, b in module._buffers.items() if b is not None})


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """For each of PARTS how many parameters an FM or a proxy has there, without task head and LoRA.

    "embeddings" is all that is outside of the layers. Of what is in them a router of experts belongs to "ffn", every
    other matrix to "attention", and the rest to "norms".
    """
    row, layers = architectures.architecture_of(model), architectures.layers_path(model)
    places = {"ffn": (row.ffn, row.input, row.gate, row.output), "attention": row.attention}
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or architectures.in_head(model, name):
            continue
        part = "embeddings"
        if name.startswith(layers):
            inside = name.removeprefix(layers).partition(".")[2]
            within = (key for key, paths in places.items() if inside.startswith(tuple(f"{p}." for p in paths if p)))
            part = next(within, "attention" if parameter.dim() > 1 else "norms")
        counts[part] += parameter.numel()
    return counts
