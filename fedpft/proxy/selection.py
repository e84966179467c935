"""Which neurons of the FM its proxy keeps: saliency, and the choice.

method.md, sections 0 and 1. D hidden size, F and K FFN neurons of FM and proxy, L layers of the FM. In a mixture of E
experts each is an FFN of its own, of F neurons, K of which stay.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import ProxySection
from fedpft.errors import ModelError
from fedpft.model import architectures
from fedpft.model.subffn import projections


@dataclass(frozen=True)
class Selection:
    """What of the FM is in the proxy. Only the server knows it.

    Attributes:
        layers: for each layer of the proxy, the FM's layer it was cut from.
        neurons: for each layer of the proxy, the kept neurons' indices in the FM's FFN, (K,) int64, ascending; those in
            each of its experts, (E, K).
        saliency: for each layer of the FM, that of every neuron, (F,) or (E, F) float32.
    """

    layers: tuple[int, ...]
    neurons: tuple[Tensor, ...]
    saliency: tuple[Tensor, ...]

    @property
    def matched(self) -> tuple[tuple[int, int], ...]:
        """(proxy layer, FM layer) pairs whose outputs the distillation brings together.

        A layer that lost neurons answers for itself. Where layers were dropped, each kept layer between the first
        and the last answers for the dropped ones that follow it too, as the emulator of offsite-tuning does.
        """
        if len(self.layers) == len(self.saliency):
            return tuple((layer, layer) for layer, whole in enumerate(self._complete) if not whole)
        return tuple((layer, self.layers[layer + 1] - 1) for layer in range(1, len(self.layers) - 1))

    @property
    def whole(self) -> bool:
        """Whether nothing of the FM's FFNs was left out: whoever has such a proxy has the FM."""
        return len(self.layers) == len(self.saliency) and all(self._complete)

    @property
    def saliency_kept(self) -> list[float]:
        """For each FM layer, the share of the squared saliency that is in the proxy."""
        kept = dict(zip(self.layers, self.neurons, strict=True))
        shares = []
        for layer, scores in enumerate(self.saliency):
            squared = scores.double().square()
            shares.append(float(squared.gather(-1, kept[layer]).sum() / squared.sum()) if layer in kept else 0.0)
        return shares

    @property
    def _complete(self) -> list[bool]:
        """For each layer of the proxy, whether it has all neurons."""
        pairs = zip(self.layers, self.neurons, strict=True)
        return [kept.shape[-1] == self.saliency[layer].shape[-1] for layer, kept in pairs]


def saliency(model: nn.Module) -> list[Tensor]:
    """s_j of every FFN neuron of the FM, for each layer (F,) or (E, F) float32 (method.md, section 0)."""
    scores = []
    for layer in architectures.layers_of(model):
        ffns = projections(model, layer)
        w_in, w_gate, w_out = ([ffn[name] for ffn in ffns if name in ffn] for name in ("w_in", "w_gate", "w_out"))
        found = kernels.neuron_saliency(w_in, w_gate, [weight.t() for weight in w_out])
        scores.append(found if len(ffns) > 1 else found[0])
    return scores


def most_salient(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of (..., F) scores, ascending, (..., K) int64; of equal scores the lower wins."""
    return torch.sort(scores, descending=True, stable=True).indices[..., :count].sort().values


def select(model: nn.Module, settings: ProxySection) -> Selection:
    """Chooses layers and neurons; ModelError if the FM has fewer than are asked for."""
    scores = tuple(layer.cpu() for layer in saliency(model))
    everything = [torch.arange(layer.shape[-1]).expand(layer.shape) for layer in scores]
    total = len(scores)
    if settings.keep == "layers":
        if settings.layers is None or settings.layers > total:
            raise ModelError(f"proxy.layers is {settings.layers}, the FM has {total}", f"choose 2 to {total}")
        kept_layers = torch.linspace(0, total - 1, settings.layers, dtype=torch.float64).round().long().tolist()
        return Selection(tuple(kept_layers), tuple(everything[layer] for layer in kept_layers), scores)
    whole = set()
    for layer in settings.keep_layers:
        if not -total <= layer < total:
            raise ModelError(
                f"proxy.keep_layers names layer {layer}, the FM has {total}", f"use {-total} to {total - 1}"
            )
        whole.add(layer % total)
    if settings.neurons == "all":
        return Selection(tuple(range(total)), tuple(everything), scores)
    count = _neuron_count(model, settings, min(layer.shape[-1] for layer in scores))
    neurons = tuple(
        everything[layer] if layer in whole else most_salient(scores[layer], count) for layer in range(total)
    )
    return Selection(tuple(range(total)), neurons, scores)


def save_selection(selection: Selection, path: Path) -> None:
    """Writes the server's own record of what was cut from where."""
    tensors = {f"neurons.{index}": neurons.contiguous() for index, neurons in enumerate(selection.neurons)}
    tensors |= {f"saliency.{layer}": scores.contiguous() for layer, scores in enumerate(selection.saliency)}
    save_file(tensors | {"layers": torch.tensor(selection.layers)}, path)


def load_selection(path: Path) -> Selection:
    """Reads what :func:`save_selection` wrote; ModelError."""
    try:
        tensors = load_file(path)
        layers, total = tuple(tensors["layers"].tolist()), sum(name.startswith("saliency.") for name in tensors)
        neurons = tuple(tensors[f"neurons.{index}"] for index in range(len(layers)))
        return Selection(layers, neurons, tuple(tensors[f"saliency.{layer}"] for layer in range(total)))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error})", "build the proxy again") from None


def _neuron_count(model: nn.Module, settings: ProxySection, full: int) -> int:
    count = int(architectures.config_of(model.config).hidden_size if settings.neurons == "hidden" else settings.neurons)
    if not 1 <= count <= full:
        raise ModelError(f"proxy.neurons is {count}, the FM has {full} in a layer", f"choose 1 to {full}")
    return count
