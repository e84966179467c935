"""Which neurons of the FM its proxy keeps: the choice, by how much they matter (importance.py).

method.md, sections 0 and 1. D hidden size, F and K FFN neurons of FM and proxy, L layers of the FM. In a mixture of E
experts each is an FFN of its own, of F neurons, K of which stay.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft.config import ProxySection
from fedpft.data.batches import EncodedDataset
from fedpft.errors import ModelError
from fedpft.model import architectures
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.importance import Ranking, by_activations, by_chance, by_weights
from fedpft.proxy.journal import Journal


@dataclass(frozen=True)
class Selection:
    """What of the FM is in the proxy. Only the server knows it.

    Attributes:
        layers: for each layer of the proxy, the FM's layer it was cut from.
        neurons: for each layer of the proxy, the kept neurons' indices in the FM's FFN, (K,) int64, ascending; those in
            each of its experts, (E, K).
        saliency: for each layer of the FM, that of every neuron by which the choice was made, (F,) or (E, F) float32;
            where all of them stay, the size of its weights.
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
    def turns(self) -> dict[int, Tensor]:
        """For each layer of the proxy that lost neurons those that it has, by their places in it, the one that matters
        most first: (K,) int32. None for mixtures.
        """
        found = {}
        for layer, (kept, whole) in enumerate(zip(self.neurons, self._complete, strict=True)):
            if not whole and kept.dim() == 1:
                saliency = self.saliency[self.layers[layer]][kept]
                found[layer] = torch.sort(saliency, descending=True, stable=True).indices.int()
        return found

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


def select(
    model: nn.Module,
    settings: ProxySection,
    public: EncodedDataset | None = None,
    *,
    seed: int = 0,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> Selection:
    """Chooses layers and neurons; ModelError if the FM has fewer than are asked for.

    Args:
        public: unlabelled samples; `variance` and `leverage` look at some of them, the others need none.
        seed: what draws those, and the order of `random`.
        journal: keeps what was found of each layer.
        ranks: that share the samples, and all choose the same.
    """
    rankings = by_weights(model)
    everything = [torch.arange(ranking.order.shape[-1]).expand(ranking.order.shape) for ranking in rankings]
    total = len(rankings)
    if settings.keep == "layers":
        if settings.layers is None or settings.layers > total:
            raise ModelError(f"proxy.layers is {settings.layers}, the FM has {total}", f"choose 2 to {total}")
        layers = torch.linspace(0, total - 1, settings.layers, dtype=torch.float64).round().long().tolist()
        return _selection(layers, [everything[layer] for layer in layers], rankings)
    whole = set()
    for layer in settings.keep_layers:
        if not -total <= layer < total:
            raise ModelError(
                f"proxy.keep_layers names layer {layer}, the FM has {total}", f"use {-total} to {total - 1}"
            )
        whole.add(layer % total)
    if settings.neurons == "all":
        return _selection(range(total), everything, rankings)
    count = _neuron_count(model, settings, min(each.shape[-1] for each in everything))
    compressed = [layer for layer in range(total) if layer not in whole]
    for layer, ranking in _ranked(model, rankings, compressed, settings, public, seed, journal, ranks).items():
        rankings[layer] = ranking
    counts = dict.fromkeys(compressed, count)
    if settings.spread == "global":
        counts = _spread({layer: rankings[layer] for layer in compressed}, count)
    neurons = [rankings[layer].kept(counts[layer]) if layer in counts else everything[layer] for layer in range(total)]
    return _selection(range(total), neurons, rankings)


def select_for_size(model: nn.Module, settings: ProxySection) -> Selection:
    """Other neurons than :func:`select` may choose, but as many in all: for whoever counts, and has no public data."""
    return select(model, settings.model_copy(update={"importance": "weights", "spread": "equal"}))


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


def _selection(layers: Sequence[int], neurons: Sequence[Tensor], rankings: Sequence[Ranking]) -> Selection:
    return Selection(tuple(layers), tuple(neurons), tuple(ranking.saliency for ranking in rankings))


def _ranked(
    model: nn.Module,
    by_size: Sequence[Ranking],
    layers: Sequence[int],
    settings: ProxySection,
    public: EncodedDataset | None,
    seed: int,
    journal: Journal | None,
    ranks: Ranks,
) -> dict[int, Ranking]:
    if settings.importance == "weights" or not layers:
        return {}
    if settings.importance == "random":
        return {layer: by_chance(by_size[layer], seed, layer) for layer in layers}
    if public is None:
        raise TypeError(f"proxy.importance {settings.importance} needs public samples")
    return by_activations(model, layers, public, settings, seed=seed, journal=journal, ranks=ranks)


def _spread(rankings: Mapping[int, Ranking], count: int) -> dict[int, int]:
    """How many neurons each layer keeps: `count` on average, more where one more is worth more.

    At least a quarter of `count`, and all but one at most. Among layers whose FFNs are alike, so that the proxy has the
    same size.
    """
    counts: dict[int, int] = {}
    for shape in {ranking.order.shape for ranking in rankings.values()}:
        layers = [layer for layer, ranking in rankings.items() if ranking.order.shape == shape]
        least, most = math.ceil(count / 4), max(count, shape[-1] - 1)
        worth = torch.stack([rankings[layer].worth()[least:most] for layer in layers])
        best = torch.sort(worth.flatten(), descending=True, stable=True).indices[: (count - least) * len(layers)]
        more = torch.bincount(best // (most - least), minlength=len(layers)).tolist()
        counts |= {layer: least + own for layer, own in zip(layers, more, strict=True)}
    return counts


def _neuron_count(model: nn.Module, settings: ProxySection, full: int) -> int:
    count = int(architectures.config_of(model.config).hidden_size if settings.neurons == "hidden" else settings.neurons)
    if not 1 <= count <= full:
        raise ModelError(f"proxy.neurons is {count}, the FM has {full} in a layer", f"choose 1 to {full}")
    return count
