"""Which neurons of the FM its proxy keeps: saliency, and the choice.

method.md, sections 0 and 1. D hidden size, F and K FFN neurons of FM and proxy, L layers of the FM.
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
        neurons: for each layer of the proxy, the kept neurons' indices in the FM, (K,) int64, ascending.
        saliency: (L, F) float32, the saliency of every neuron of the FM.
    """

    layers: tuple[int, ...]
    neurons: tuple[Tensor, ...]
    saliency: Tensor

    @property
    def matched(self) -> tuple[tuple[int, int], ...]:
        """(proxy layer, FM layer) pairs whose outputs the distillation brings together.

        A layer that lost neurons answers for itself. Where layers were dropped, each kept layer between the first
        and the last answers for the dropped ones that follow it too, as the emulator of offsite-tuning does.
        """
        total, last = self.saliency.shape[0], len(self.layers) - 1
        if len(self.layers) == total:
            full = self.saliency.shape[1]
            return tuple((layer, layer) for layer, kept in enumerate(self.neurons) if len(kept) < full)
        return tuple((layer, self.layers[layer + 1] - 1) for layer in range(1, last))

    @property
    def whole(self) -> bool:
        """Whether nothing of the FM's FFNs was left out: whoever has such a proxy has the FM."""
        total, full = self.saliency.shape
        return len(self.layers) == total and all(len(kept) == full for kept in self.neurons)

    @property
    def saliency_kept(self) -> list[float]:
        """For each FM layer, the share of the squared saliency that is in the proxy."""
        squared = self.saliency.double().square()
        kept = dict(zip(self.layers, self.neurons, strict=True))
        none = torch.empty(0, dtype=torch.int64)
        return [float(row[kept.get(layer, none)].sum() / row.sum()) for layer, row in enumerate(squared)]


def saliency(model: nn.Module) -> Tensor:
    """s_j of every FFN neuron of the FM, (L, F) float32 (method.md, section 0)."""
    ffns = [projections(model, layer) for layer in architectures.layers_of(model)]
    w_in, w_gate, w_out = ([ffn[name] for ffn in ffns if name in ffn] for name in ("w_in", "w_gate", "w_out"))
    return kernels.neuron_saliency(w_in, w_gate, [weight.t() for weight in w_out])


def most_salient(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of (F,) scores, ascending, (K,) int64; of equal scores the lower index wins."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def select(model: nn.Module, settings: ProxySection) -> Selection:
    """Chooses layers and neurons; ModelError if the FM has fewer than are asked for."""
    scores = saliency(model).cpu()
    total, full = scores.shape
    if settings.keep == "layers":
        if settings.layers is None or settings.layers > total:
            raise ModelError(f"proxy.layers is {settings.layers}, the FM has {total}", f"choose 2 to {total}")
        kept_layers = torch.linspace(0, total - 1, settings.layers, dtype=torch.float64).round().long().tolist()
        return Selection(tuple(kept_layers), tuple(torch.arange(full) for _ in kept_layers), scores)
    count = _neuron_count(model, settings, full)
    whole = set()
    for layer in settings.keep_layers:
        if not -total <= layer < total:
            raise ModelError(
                f"proxy.keep_layers names layer {layer}, the FM has {total}", f"use {-total} to {total - 1}"
            )
        whole.add(layer % total)
    neurons = tuple(
        torch.arange(full) if layer in whole else most_salient(scores[layer], count) for layer in range(total)
    )
    return Selection(tuple(range(total)), neurons, scores)


def save_selection(selection: Selection, path: Path) -> None:
    """Writes the server's own record of what was cut from where."""
    tensors = {f"neurons.{index}": neurons.contiguous() for index, neurons in enumerate(selection.neurons)}
    tensors |= {"layers": torch.tensor(selection.layers), "saliency": selection.saliency.contiguous()}
    save_file(tensors, path)


def load_selection(path: Path) -> Selection:
    """Reads what :func:`save_selection` wrote; ModelError."""
    try:
        tensors = load_file(path)
        layers = tuple(tensors["layers"].tolist())
        return Selection(layers, tuple(tensors[f"neurons.{i}"] for i in range(len(layers))), tensors["saliency"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error})", "build the proxy again") from None


def _neuron_count(model: nn.Module, settings: ProxySection, full: int) -> int:
    if settings.neurons == "all":
        return full
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    count = hidden if settings.neurons == "hidden" else settings.neurons
    if not 1 <= count <= full:
        raise ModelError(f"proxy.neurons is {count}, the FM has {full} in a layer", f"choose 1 to {full}")
    return count
