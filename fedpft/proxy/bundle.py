"""From the FM to its proxy: saliency, the choice of neurons, the proxy, and the directory that is sent to the silos.

method.md, sections 0 and 1. D hidden size, F and K FFN neurons of FM and proxy, L layers of the FM.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import ProxySection, Task
from fedpft.errors import ModelError
from fedpft.finite import not_finite
from fedpft.model import architectures, loading
from fedpft.model.adapters import frozen_state
from fedpft.model.subffn import NEURON_PARAMETERS, projections, replace_ffn, sub_ffns

_FORMAT = 2
PARTS = ("embeddings", "attention", "ffn", "norms")


@dataclass(frozen=True)
class Proxy:
    """A proxy with all that a silo needs to train on it.

    Attributes:
        model: the FM with a SubFFN in each of its layers.
        processor: tokenizer or image processor.
        task: what the labels are for.
        labels: label names in the order of their class indices.
        max_tokens: texts are cut after this many tokens.
        compressed: the layers, by their index in the proxy, that differ from the FM's and are aligned with them.
    """

    model: nn.Module
    processor: Any
    task: Task
    labels: tuple[str, ...]
    max_tokens: int
    compressed: tuple[int, ...]


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


def cut(model: nn.Module, selection: Selection) -> nn.Module:
    """The proxy's model: a copy of the FM with the selected layers, and in each a SubFFN of the selected neurons."""
    proxy = copy.deepcopy(model)
    layers = architectures.layers_of(proxy)
    chosen = [layers[layer] for layer in selection.layers]
    del layers[:]
    layers.extend(chosen)
    loading.set_depth(proxy.config, len(chosen))
    for layer, neurons in zip(chosen, selection.neurons, strict=True):
        replace_ffn(proxy, layer, neurons)
    return proxy


def save_bundle(proxy: Proxy, directory: Path) -> None:
    """Writes what is sent to the silos: weights, configuration, tokenizer or image processor, labels. Plain files."""
    directory.mkdir(parents=True, exist_ok=True)
    loading.save_config(proxy.model, directory)
    proxy.processor.save_pretrained(directory)
    tensors = {name: tensor.contiguous() for name, tensor in frozen_state(proxy.model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    description = {
        "format": _FORMAT,
        "task": proxy.task,
        "labels": proxy.labels,
        "max_tokens": proxy.max_tokens,
        "compressed": proxy.compressed,
        "drawn": architectures.head_of(proxy.model)[1:],
        "neurons": [ffn.neurons for ffn in sub_ffns(proxy.model).values()],
    }
    (directory / "proxy.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_proxy(directory: Path) -> Proxy:
    """Reads what :func:`save_bundle` wrote; ModelError names the file that is missing or does not fit."""
    try:
        description = json.loads((directory / "proxy.json").read_text(encoding="utf-8"))
        if description["format"] != _FORMAT:
            raise ModelError(
                f"{directory}: proxy format {description['format']}", "install the server's fedpft version"
            )
        counts, task = description["neurons"], description["task"]
        model = loading.empty_model(directory, task, len(counts))
        for layer, count in zip(architectures.layers_of(model), counts, strict=True):
            replace_ffn(model, layer, torch.arange(count))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        check_finite(model, f"the proxy in {directory}")
        model.drawn_modules = tuple(description["drawn"])  # type: ignore[assignment]
        labels, compressed = tuple(description["labels"]), tuple(description["compressed"])
        return Proxy(
            model, loading.load_processor(directory, task), task, labels, description["max_tokens"], compressed
        )
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{directory}: not a proxy ({reason})", "build it again, or delete it to fetch it again"
        ) from None


def task_of(directory: Path) -> Task | None:
    """The task of what :func:`save_bundle` wrote; None if it is not there yet."""
    try:
        task: Task = json.loads((directory / "proxy.json").read_text(encoding="utf-8"))["task"]
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return task


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


def patch(model: nn.Module, updated: Mapping[int, Tensor], norms: Sequence[str]) -> dict[str, Tensor]:
    """The frozen part that an alignment changed, as it is sent to the silos (the paper's W_fro).

    Args:
        model: the proxy's model, aligned.
        updated: proxy layer -> (U,) int64 neurons that were updated; their layers' output biases go along.
        norms: names of the norms' parameters.

    Returns:
        Whole tensors by their names, and rows as `<name>@rows`, (U,) int32, with `<name>@values`, (U, ...).
    """
    state = frozen_state(model)
    modules = list(sub_ffns(model))
    whole = [*norms, *(f"{modules[layer]}.b_out" for layer in updated)]
    tensors = {name: state[name].clone() for name in whole if name in state}
    for layer, neurons in updated.items():
        for part in NEURON_PARAMETERS:
            if (name := f"{modules[layer]}.{part}") in state:
                tensors[f"{name}@rows"] = neurons.to(torch.int32)
                tensors[f"{name}@values"] = state[name][neurons].clone()
    return tensors


def apply_patch(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts a patch into a proxy's model, all of it or, with a ModelError that names the tensor, nothing."""
    state = frozen_state(model)
    changes: list[tuple[Tensor, Tensor | slice, Tensor]] = []
    for key, value in tensors.items():
        name, _, kind = key.partition("@")
        target, rows = state.get(name), tensors.get(f"{name}@rows")
        if kind == "rows" and f"{name}@values" in tensors:
            continue  # goes in with its values
        if kind == "" and target is not None and target.shape == value.shape:
            changes.append((target, slice(None), value))
        elif kind == "values" and target is not None and rows is not None and _fits(target, rows, value):
            changes.append((target, rows.long(), value))
        else:
            raise ModelError(
                f"the patch's {key!r} does not fit the proxy", "delete the silo's work directory and start again"
            )
    with torch.no_grad():
        for target, place, value in changes:
            target[place] = value.to(target)


def _fits(target: Tensor, rows: Tensor, values: Tensor) -> bool:
    """Whether `target[rows] = values` says one thing for each of the rows: (U,), (U, ...)."""
    inside = bool(((rows >= 0) & (rows < len(target))).all())
    return rows.dim() == 1 and inside and values.shape == (len(rows), *target.shape[1:])


def check_finite(model: nn.Module, what: str) -> None:
    """Raises ModelError, naming the tensor, if a proxy's frozen part holds NaN or infinity."""
    if (name := not_finite(frozen_state(model))) is not None:
        raise ModelError(
            f"{what}: {name} holds NaN or infinity",
            "build the proxy again, with a lower distillation.learning_rate, and look at public_data",
        )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """For each of PARTS how many parameters an FM or a proxy has there, without task head and LoRA.

    "embeddings" is all that is outside of the layers, "norms" all that is in them and in no other part.
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
            part = next(within, "norms")
        counts[part] += parameter.numel()
    return counts


def _neuron_count(model: nn.Module, settings: ProxySection, full: int) -> int:
    if settings.neurons == "all":
        return full
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    count = hidden if settings.neurons == "hidden" else settings.neurons
    if not 1 <= count <= full:
        raise ModelError(f"proxy.neurons is {count}, the FM has {full} in a layer", f"choose 1 to {full}")
    return count
