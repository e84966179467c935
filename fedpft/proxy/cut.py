"""The proxy's model: a copy of the FM with some of its layers and neurons (method.md, section 1)."""

import copy

from torch import nn

from fedpft.model import architectures, loading
from fedpft.model.subffn import replace_ffn
from fedpft.proxy.selection import Selection

PARTS = ("embeddings", "attention", "ffn", "norms")


def cut(model: nn.Module, selection: Selection) -> nn.Module:
    """The proxy's model: a copy of the FM with the selected layers, and in each a SubFFN of the selected neurons."""
    proxy = copy.deepcopy(model)
    layers = architectures.layers_of(proxy)
    chosen = [layers[layer] for layer in selection.layers]
    del layers[:]
    layers.extend(chosen)
    loading.set_layers(proxy.config, selection.layers)
    for index, (layer, neurons) in enumerate(zip(chosen, selection.neurons, strict=True)):
        replace_ffn(proxy, layer, neurons)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in a cache
                module.layer_idx = index  # type: ignore[assignment]
    return proxy


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
