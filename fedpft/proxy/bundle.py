"""The proxy as it is sent to the silos, a directory of plain files, and the patches that change it afterwards.

D hidden size, K neurons of a layer, U of them updated.
"""

import errno
import json
import logging
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft import machine
from fedpft.config import TaskName, Weights
from fedpft.errors import ModelError
from fedpft.finite import is_finite, not_finite
from fedpft.model import architectures, loading
from fedpft.model.adapters import frozen_state
from fedpft.model.mapped import MappedTensors, Shards, copies, hold_on_disk, release
from fedpft.model.precision import hold_wide
from fedpft.model.quantized import quantizable, quantized
from fedpft.model.sharding import put
from fedpft.model.subffn import NEURON_PARAMETERS, projections, replace_ffn, sub_ffns
from fedpft.proxy.corrections import Corrections

log = logging.getLogger(__name__)

_FORMAT = 3
DESCRIPTION = "proxy.json"
TURNS = "turns.safetensors"


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
        held: of a proxy that is only part of the one that was sent, the neurons that it has of the compressed layers,
            by the name of what stands for the FFN: (K',) int64, ascending, in the places that they have there.
        neurons: of each layer, as it was sent; none where nobody asks, because the proxy has all.
        corrections: of the output weights of one that is only part, if they were refitted for that part.
    """

    model: nn.Module
    processor: Any
    task: TaskName
    labels: tuple[str, ...]
    max_tokens: int
    compressed: tuple[int, ...]
    held: Mapping[str, Tensor] = field(default_factory=dict)
    neurons: tuple[int, ...] = ()
    corrections: Corrections | None = None

    @property
    def loaded_neurons(self) -> int:
        """Of all layers."""
        return sum(ffn.neurons for ffn in sub_ffns(self.model).values())


def save_bundle(
    proxy: Proxy, directory: Path, shards: Shards | None = None, *, turns: Mapping[int, Tensor] | None = None
) -> None:
    """Writes what is sent to the silos: weights, configuration, tokenizer or image processor, labels. Plain files.

    Args:
        turns: as of :class:`Selection`; without them every silo holds all of the proxy.
        shards: of the directory, if the weights are there already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    loading.save_config(proxy.model, directory)
    proxy.processor.save_pretrained(directory)
    if shards is not None:
        shards.finish()
    else:
        tensors = {name: tensor.contiguous() for name, tensor in frozen_state(proxy.model).items()}
        save_file(tensors, directory / loading.WEIGHTS, metadata={"format": "pt"})
    if turns:
        save_file({str(layer): places for layer, places in turns.items()}, directory / TURNS)
    description = {
        "format": _FORMAT,
        "task": proxy.task,
        "labels": proxy.labels,
        "max_tokens": proxy.max_tokens,
        "compressed": proxy.compressed,
        "trained": architectures.head_of(proxy.model),
        "neurons": [ffn.neurons for ffn in sub_ffns(proxy.model).values()],
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_proxy(
    directory: Path,
    work: Path | None = None,
    *,
    width: float = 1.0,
    weights: Weights = "full",
    device: str = "cpu",
    on_disk: bool = False,
) -> Proxy:
    """Reads what :func:`save_bundle` wrote; ModelError names the file that is missing or does not fit.

    Args:
        work: an empty directory for a copy of the weights that are loaded, if they are to stay on disk; what becomes of
            them in the model becomes of them there.
        width: share of each compressed layer's neurons that is loaded, rounded, but one at least: those that matter
            most. The others are as if the FM had never had them. With a width that the bundle announces, output weights
            are as they were refitted for these neurons.
        weights: how the matrices of the layers are held (`fedpft.model.quantized`). Not with `work`.
        device: where they are quantised, if they are, and stay; all else is on the CPU.
        on_disk: the weights stay in the directory's files, for :func:`fedpft.model.sharding.shard` to take them out;
            before that nothing can be written to them.
    """
    try:
        files = loading.weight_files(directory)
    except ModelError as error:
        raise _no_proxy(directory, error.message) from None
    try:
        description = _described(directory)
        counts, task = description["neurons"], description["task"]
        parts = _parts(directory, width)
        sent = tuple(counts) if parts else ()
        model = _empty(directory, description, parts)
        expected = frozen_state(model)
        modules = list(sub_ffns(model))
        held_neurons = {modules[layer]: places for layer, places in parts.items()}
        rows = {f"{module}.{part}": places for module, places in held_neurons.items() for part in NEURON_PARAMETERS}
        corrections = _corrections(directory, description, width)
        if corrections is not None:
            corrections.check(expected, held_neurons.keys())
        if work is None and not on_disk:
            few_bits = set[str]() if weights == "full" else quantizable(model)

            def made(name: str, tensor: Tensor) -> Tensor:
                if corrections is not None:
                    tensor = corrections.corrected(name, tensor)
                if weights == "full" or name not in few_bits:
                    return tensor
                if not is_finite(tensor):  # what NaN is quantised to need not be NaN
                    raise _not_finite(f"the proxy in {directory}", name)
                return quantized(tensor.to(device), weights)

            tensors = copies(files, rows, made)
            machine.trim_heap()  # of what quantising took
        else:
            if work is not None:
                files = [_copied(file, work, rows, corrections) for file in files]
            held = MappedTensors(files, writable=work is not None)
            tensors = held.tensors
        if odd := sorted(tensors.keys() ^ expected):
            raise ValueError(f"{files[0].name} {'lacks' if odd[0] in expected else 'has an unknown'} {odd[0]}")
        if odd := sorted(name for name, tensor in tensors.items() if tensor.dtype != expected[name].dtype):
            raise ValueError(f"{odd[0]} is {tensors[odd[0]].dtype}, not {expected[odd[0]].dtype}")
        # `assign`: the model has no parameters of its own so far. Second names of what is shared are not in the file.
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        if work is not None:
            hold_on_disk(model, held)
        elif on_disk:
            model.held = held
        check_finite(model, f"the proxy in {directory}")
        labels, compressed = tuple(description["labels"]), tuple(description["compressed"])
        processor = loading.load_processor(directory, task)
        length = description["max_tokens"]
        return Proxy(model, processor, task, labels, length, compressed, held_neurons, sent, corrections)
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # it is `work` that has no room
        raise _no_proxy(directory, loading.first_line(error)) from None


def width_within(directory: Path, room: int) -> float:
    """The largest width with which the proxy's frozen weights take no more than `room` bytes.

    Other than 1, one of those that the proxy was refitted for; if it was for none, a multiple of 1/16.

    Raises:
        ModelError: there is no proxy, it cannot be had in part, or not even the smallest width takes so little.
    """
    try:
        description = _described(directory)
        model = _empty(directory, description, {})
        sizes = {name: tensor.nbytes for name, tensor in frozen_state(model).items()}
        total, ffns = sum(sizes.values()), list(sub_ffns(model).items())
        if total <= room:
            return 1.0
        neurons = list[tuple[int, int]]()  # of each layer that can be had in part, and what they take
        for layer in _turns(directory):
            module, ffn = ffns[layer]
            neurons.append((ffn.neurons, sum(sizes.get(f"{module}.{part}", 0) for part in NEURON_PARAMETERS)))
        for width in _announced(description) or [sixteenths / 16 for sixteenths in range(15, 0, -1)]:
            taken = total - sum(whole * (count - _kept(count, width)) // count for count, whole in neurons)
            if taken <= room:
                return width
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise _no_proxy(directory, loading.first_line(error)) from None
    raise ModelError(
        f"limits.memory_gib: the proxy's weights take {total / 2**30:.3g} GiB, and {taken / 2**30:.3g} GiB with the "
        f"smallest width, {width:g}, not {room / 2**30:.3g}",
        "allow more, or hold them in few bits with limits.weights in its place",
    )


def _described(directory: Path) -> dict[str, Any]:
    """proxy.json, of this format."""
    description: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    if description["format"] != _FORMAT:
        raise ModelError(f"{directory}: proxy format {description['format']}", "install the server's fedpft version")
    return description


def _announced(description: Mapping[str, Any]) -> list[float]:
    """The widths that the proxy was refitted for, beside the whole one; none in one of an earlier version."""
    return sorted(map(float, description.get("widths", ())), reverse=True)


def _corrections(directory: Path, description: Mapping[str, Any], width: float) -> Corrections | None:
    announced = _announced(description)
    if width in announced:
        return Corrections(directory, width)
    if announced and width < 1.0:
        log.warning(
            "width %g: the proxy was refitted for %s, not for this one, of which it is less like the FM",
            width,
            ", ".join(f"{each:g}" for each in announced),
        )
    return None


def _copied(file: Path, work: Path, rows: Mapping[str, Tensor], corrections: Corrections | None) -> Path:
    """A file of weights in another directory, with no more than these rows of some."""
    if rows.keys().isdisjoint(MappedTensors([file]).tensors):
        return Path(shutil.copy(file, work))

    def made(name: str, tensor: Tensor) -> Tensor:
        return tensor if corrections is None else corrections.corrected(name, tensor)

    save_file(copies([file], rows, made), work / file.name)
    machine.trim_heap()
    return work / file.name


def _empty(directory: Path, description: Mapping[str, Any], parts: Mapping[int, Tensor]) -> Any:
    """The proxy's model without weights, with these neurons of some layers and all of the others."""
    counts = [len(parts.get(layer, range(count))) for layer, count in enumerate(description["neurons"])]
    model = loading.empty_model(directory, description["task"], len(counts))
    for layer, count in zip(architectures.layers_of(model), counts, strict=True):
        replace_ffn(model, layer, torch.arange(count // len(projections(model, layer))))
    model.trained_modules = tuple(description["trained"])  # type: ignore[assignment]
    hold_wide(model, architectures.head_of(model))
    return model


def _no_proxy(directory: Path, why: str) -> ModelError:
    return ModelError(f"{directory}: not a proxy ({why})", "build it again, or delete it to fetch it again")


def _parts(directory: Path, width: float) -> dict[int, Tensor]:
    """Which neurons of the compressed layers a proxy of that width has; nothing if it has all."""
    if width == 1.0:
        return {}
    return {
        layer: places[: _kept(len(places), width)].long().sort().values for layer, places in _turns(directory).items()
    }


def _turns(directory: Path) -> dict[int, Tensor]:
    """For each compressed layer its neurons, those first that matter most."""
    if not (directory / TURNS).exists():
        raise ModelError(
            f"{directory}: the proxy cannot be had in part (it has no {TURNS})",
            "leave limits.width and limits.memory_gib out; a mixture of experts, whole layers, or a proxy of an "
            "earlier version has no parts",
        )
    return {int(layer): places for layer, places in load_file(directory / TURNS).items()}


def _kept(neurons: int, width: float) -> int:
    return max(1, round(width * neurons))


def of_part(tensors: Mapping[str, Tensor], proxy: Proxy) -> dict[str, Tensor]:
    """What a patch is for a proxy that has only part of the neurons."""
    found, corrections = dict(tensors), proxy.corrections
    for key, rows in tensors.items():
        name, _, kind = key.partition("@")
        if kind == "rows" and (own := proxy.held.get(name.rpartition(".")[0])) is not None:
            there = torch.isin(rows.long(), own)
            places, values = torch.searchsorted(own, rows.long()[there]), tensors[f"{name}@values"][there]
            found[key] = places.int()
            found[f"{name}@values"] = values if corrections is None else corrections.corrected(name, values, places)
        elif not kind and corrections is not None:
            found[key] = corrections.corrected(name, rows)
    return found


def of_whole(inactivity: Mapping[str, Tensor], proxy: Proxy) -> dict[str, Tensor]:
    """What a proxy that has only part of the neurons has counted, for all: of the others 0 of 0 tokens.

    Returns:
        "<layer>" and "<layer>.tokens", both (K,) int64.
    """
    modules, found = list(sub_ffns(proxy.model)), dict[str, Tensor]()
    for layer in proxy.compressed:
        places = proxy.held[modules[layer]]
        for name in (str(layer), f"{layer}.tokens"):
            values = inactivity[name].expand(len(places))
            found[name] = torch.zeros(proxy.neurons[layer], dtype=torch.int64).index_copy(0, places, values)
    return found


def compressed_neurons(bundle: Path) -> dict[int, int]:
    """For each compressed layer of the proxy its K, from the bundle's proxy.json."""
    return _neurons(bundle)[1]


def mean_neurons(bundle: Path) -> int:
    """K of the compressed layers, in the mean; of a proxy without any, of all layers."""
    every, compressed = _neurons(bundle)
    return round(statistics.fmean(compressed.values() or every))


def _neurons(bundle: Path) -> tuple[list[int], dict[int, int]]:
    """Of each layer, and by number of those that are compressed."""
    try:
        description = json.loads((bundle / DESCRIPTION).read_text(encoding="utf-8"))
        every = [int(neurons) for neurons in description["neurons"]]
        return every, {int(layer): every[layer] for layer in description["compressed"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{bundle / 'proxy.json'}: cannot be read ({error})", "build the proxy again") from None


def task_of(directory: Path) -> TaskName | None:
    """The task of what :func:`save_bundle` wrote; None if it is not there yet."""
    try:
        task: TaskName = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))["task"]
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return task


def check_finite(model: nn.Module, what: str) -> None:
    """Raises ModelError, naming the tensor, if a proxy's frozen part holds NaN or infinity."""
    if (name := not_finite(frozen_state(model), partial(release, model))) is not None:
        raise _not_finite(what, name)


def _not_finite(what: str, name: str) -> ModelError:
    return ModelError(
        f"{what}: {name} holds NaN or infinity",
        "build the proxy again, with a lower distillation.learning_rate, and look at public_data",
    )


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
    ffns = sub_ffns(model)
    modules = list(ffns)
    whole = [*norms, *(f"{modules[layer]}.b_out" for layer in updated)]
    tensors = {name: state[name].clone() for name in whole if name in state}
    for layer, neurons in updated.items():
        for inside, rows in ffns[modules[layer]].places(neurons).items():
            for part in NEURON_PARAMETERS:
                if (name := f"{modules[layer]}{inside}.{part}") in state:
                    tensors[f"{name}@rows"] = rows.to(torch.int32)
                    tensors[f"{name}@values"] = state[name][rows].clone()
    return tensors


def apply_patch(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts a patch into a proxy's model, all of it or, with a ModelError that names the tensor, nothing."""
    state = frozen_state(model)
    changes: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for key, value in tensors.items():
        name, _, kind = key.partition("@")
        target, rows = state.get(name), tensors.get(f"{name}@rows")
        if kind == "rows" and f"{name}@values" in tensors:
            continue  # goes in with its values
        if kind == "" and target is not None and target.shape == value.shape:
            changes.append((target, None, value))
        elif kind == "values" and target is not None and rows is not None and _fits(target, rows, value):
            changes.append((target, rows.long(), value))
        else:
            raise ModelError(
                f"the patch's {key!r} does not fit the proxy", "delete the silo's work directory and start again"
            )
    with torch.no_grad():
        for target, place, value in changes:
            put(target, place, value)


def _fits(target: Tensor, rows: Tensor, values: Tensor) -> bool:
    """Whether `target[rows] = values` says one thing for each of the rows: (U,), (U, ...)."""
    inside = bool(((rows >= 0) & (rows < len(target))).all())
    return rows.dim() == 1 and inside and values.shape == (len(rows), *target.shape[1:])
