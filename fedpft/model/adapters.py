"""The adapter: LoRA on the attention projections, or on the FFN's too, and the task head. All that the silos train.

An adapter is a `dict[str, Tensor]`. Its names are the same in proxy and FM, since attention is identical in both;
that is what makes the plug-in possible (method.md, sections 3 and 5). LoRA itself is `peft`'s, but for that on the
FFN of a proxy, a SubFFN's own, which has other names and only the kept neurons' part.

D hidden size, F FFN neurons of the FM, K of the proxy, R rank.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft.config import AdapterSection, TaskName
from fedpft.errors import InvalidUpdate, ModelError
from fedpft.finite import is_finite
from fedpft.model.architectures import (
    Architecture,
    architecture_of,
    computing_by,
    head_of,
    in_head,
    layers_of,
    layers_path,
)
from fedpft.model.lora import lora_linear
from fedpft.model.precision import dtype_of, name_of, narrow, wide
from fedpft.model.subffn import SubFFN, sub_ffns
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS

Adapter = dict[str, Tensor]

_CARD = """\
---
base_model: {base}
library_name: peft
---

"""
_LABELLED = """\
LoRA and task head of a federated fine-tuning with fedpft. The base model has labels of its own, or none; these go with
the adapter:

    from peft import {loader}

    labels = {labels}
    model = {loader}.from_pretrained(
        ".",
        id2label=dict(enumerate(labels)),
        label2id={{label: index for index, label in enumerate(labels)}},
        ignore_mismatched_sizes=True,  # the base model's own head, if it has one
    )
"""
_PLAIN = """\
LoRA of a federated fine-tuning with fedpft:

    from peft import {loader}

    model = {loader}.from_pretrained(".")
"""

PROBE_SIZE = 0.1  # of a probe, in units of what the projection itself passes on: see Probes

_REMEDY = "train it on this federation's proxy with this version of fedpft"


def attach(model: nn.Module, settings: AdapterSection, *, seed: int) -> None:
    """Puts an untrained adapter into a model: LoRA's A random from the seed, B zero, the head as it is. In place.

    Afterwards LoRA and head require gradients and nothing else does. Both are float32, whatever the model is.

    Raises:
        ModelError: LoRA is wanted on an FFN that is a mixture of experts.
    """
    if settings.rank > 0:
        _inject(model, settings, architecture_of(model).attention, derive_seed(seed, "adapter"))
        if settings.ffn:
            _attach_to_ffns(model, settings, derive_seed(seed, "adapter of the FFN"))
    model.eval()  # peft adds its dropout in training mode
    adapted, device = set(_parameters(model).values()), next(model.parameters()).device
    for parameter in adapted:  # where the layers compute, wherever their weights are
        parameter.data = parameter.data.to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in adapted)


def trains(name: str, *, frozen_a: bool) -> bool:
    """Whether training changes the adapter's tensor of this name: with `frozen_a` LoRA's A stays."""
    return not (frozen_a and ".lora_A." in name)


def trained_values(model: nn.Module, *, frozen_a: bool) -> int:
    """How many values of a model's adapter training changes, which are what a mean is of."""
    return sum(p.numel() for name, p in _parameters(model).items() if trains(name, frozen_a=frozen_a))


@contextmanager
def training(model: nn.Module, dropout: float, *, frozen_a: bool = False) -> Iterator[None]:
    """While open, peft's LoRA drops its input with this probability and computes by `lora_linear`.

    No module is put into training mode, so that nothing else drops. With `frozen_a` LoRA's A requires no gradient.
    """
    resting = [parameter for name, parameter in _parameters(model).items() if not trains(name, frozen_a=frozen_a)]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        with computing_by({layer: partial(_lora_forward, layer, dropout) for layer in layers}):
            yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """While open, a model, or one layer of it, computes as if it carried no LoRA. Not within :func:`training`."""
    layers = [inner for inner in module.modules() if isinstance(inner, LoraLayer)]
    ffns = [inner for inner in module.modules() if isinstance(inner, SubFFN)]

    def enable(wanted: bool) -> None:
        for layer in layers:
            layer.enable_adapters(wanted)
        for ffn in ffns:
            ffn.lora_enabled = wanted

    enable(False)
    try:
        yield
    finally:
        enable(True)


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """LoRA's A and B in a model, or in one layer of it."""
    return [parameter for name, parameter in module.named_parameters() if ".lora_" in name]


def scale_lora(module: nn.Module, factor: float) -> None:
    """Multiplies what LoRA adds to each weight of a model, or of one layer of it. In place."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(factor)


def extract(model: nn.Module) -> Adapter:
    """A copy of the adapter that is in a model, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _parameters(model).items()}


def load(model: nn.Module, adapter: Adapter) -> None:
    """Puts an adapter's values into a model that has one attached; InvalidUpdate if it does not fit."""
    parameters = _parameters(model)
    check(adapter, {name: parameter.detach() for name, parameter in parameters.items()}, "the adapter")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])


def read(path: Path) -> Adapter:
    """Reads an adapter.safetensors of a run; ModelError if there is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: not an adapter ({error})", "give the adapter.safetensors of a finished run"
        ) from None


def check(adapter: Adapter, like: Adapter, sender: str) -> None:
    """Raises InvalidUpdate, naming sender and tensor, unless names, shapes and dtypes agree and all is finite."""
    if odd := sorted(adapter.keys() ^ like.keys()):
        fault = "has an unknown" if odd[0] in adapter else "lacks the"
        raise InvalidUpdate(f"{sender} {fault} tensor {odd[0]!r}", _REMEDY)
    for name, tensor in adapter.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            given, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like[name]))
            raise InvalidUpdate(f"{sender}: {name!r} is {given}, not {wanted}", _REMEDY)
        if not is_finite(tensor):
            raise InvalidUpdate(
                f"{sender}: {name!r} holds NaN or infinity", "lower the learning rate, look at the data"
            )


def plug_in(model: nn.Module, adapter: Adapter, layers: Sequence[int], neurons: Sequence[Tensor]) -> None:
    """Puts the silos' adapter into the FM (method.md, section 5).

    Args:
        model: the FM with an adapter attached.
        layers: for each layer of the proxy, the FM's layer it was cut from; LoRA on the FM's other layers stays 0.
        neurons: for each layer of the proxy, the FM's neurons that it kept, (K,) int64; LoRA on the others stays 0.

    Raises:
        InvalidUpdate: the adapter is not one of a proxy with these layers and neurons.
    """
    path, row, own = layers_path(model), architecture_of(model), extract(model)
    position = {str(layer): index for index, layer in enumerate(layers)}
    plugged = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in own.items()}
    places: dict[str, _Place] = {}
    for name, tensor in own.items():
        layer, _, inside = name.removeprefix(path).partition(".")
        if not name.startswith(path):
            places[name] = _Place(name)
        elif layer in position:
            index = position[layer]
            place = _place(row, inside, tensor, neurons[index])
            places[name] = replace(place, name=f"{path}{index}.{place.name}")
    check(adapter, {place.name: place.part(own[name]) for name, place in places.items()}, "the adapter")
    load(model, plugged | {name: place.whole(adapter[place.name], own[name]) for name, place in places.items()})


class Probes:
    """Random changes of LoRA's B, the same in an FM and in its proxy: directions in which training can move both.

    The change of a hidden state under one is a Jacobian-vector product, by finite difference. On inputs without a
    direction of their own s B A then passes on PROBE_SIZE of what its projection does, in any model: little enough for
    the change to be nearly linear, and far above the rounding of bfloat16, 1/256.
    """

    def __init__(self, proxy: nn.Module, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        """Takes the sizes of what is there now.

        Args:
            proxy, model: both with the same adapter.
            layers: for each layer of the proxy, the FM's layer it was cut from; None: the proxy has every layer. LoRA
                on the FM's other layers is not moved: no silo trains it.

        Raises:
            ValueError: there is no LoRA, or the proxy has fewer layers and nothing says which.
        """
        paths = tuple(f".{path}" for path in architecture_of(model).attention)  # on the FFN each has its own shape
        layered = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
        carriers = {name: module for name, module in layered if name.endswith(paths)}
        if not carriers:
            raise ValueError("model: has no LoRA that a probe could move")
        layers = range(len(layers_of(model))) if layers is None else layers
        if len(layers) != len(layers_of(proxy)):
            raise ValueError(f"layers: must be one for each of the proxy's {len(layers_of(proxy))}")
        on_proxy = _names_on_proxy(model, carriers, layers)
        self._moved: list[tuple[nn.Module, nn.Module, float]] = []  # both models' modules that hold B, and its spread
        for name, proxy_name in on_proxy.items():
            theirs, ours = carriers[name], cast(LoraLayer, proxy.get_submodule(proxy_name))
            (active,) = theirs.active_adapters
            base = cast(nn.Linear, theirs.get_base_layer())
            a, b = (part[active].get_parameter("weight").detach() for part in (theirs.lora_A, theirs.lora_B))
            passed_on = theirs.scaling[active] * len(b) ** 0.5 * a.norm().clamp(min=1e-12)
            own = wide(base.weight.detach()).norm().to(passed_on.device)
            spread = float(PROBE_SIZE * own / passed_on)
            self._moved.append((theirs.lora_B[active], ours.lora_B[active], spread))

    @contextmanager
    def drawn(self, seed: int) -> Iterator[None]:
        """While open, B has a probe drawn with the seed added to it.

        The parameters themselves are not written on: others stand in their place, so that a backward pass finds what
        its forward pass has seen, and what comes back is bit for bit what was there.
        """
        generator, stood = torch.Generator().manual_seed(seed), list[tuple[nn.Module, nn.Parameter]]()
        try:
            for theirs, ours, spread in self._moved:
                noise = spread * torch.randn(theirs.get_parameter("weight").shape, generator=generator)
                for module in (theirs, ours):
                    b = module.get_parameter("weight")
                    stood.append((module, b))
                    module.weight = nn.Parameter(b.detach() + noise.to(b.device), requires_grad=False)
            yield
        finally:
            for module, b in stood:
                module.weight = b


def merge(model: nn.Module) -> None:
    """Adds B A alpha / R to each weight that carries LoRA and takes LoRA away. In place.

    Afterwards all of the model has one type, that of the FM; each sum was rounded to it once.

    Raises:
        ModelError: a weight is too large for the type.
    """
    dtype = dtype_of(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            base = cast(nn.Linear, module.get_base_layer())
            base.weight.data = _merged(name, module, dtype)
            model.set_submodule(name, base)
    narrow(model.requires_grad_(False), dtype)


def merged_parts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The state dict that :func:`merge` would leave, part by part: what is outside of the layers, then each layer.

    The model stays as it is.

    Raises:
        ModelError: a weight is too large for the type.
    """
    dtype, path, parameters = dtype_of(model), layers_path(model), {id(each) for each in model.parameters()}
    carriers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    parts: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in frozen_state(model, keep_vars=True).items():
        layer = name.removeprefix(path).partition(".")[0] if name.startswith(path) else ""
        parts.setdefault(layer, {})[name] = tensor
    for part in parts.values():
        yield {
            name: _merged(name.removesuffix(".weight"), carriers[name], dtype)
            if name in carriers
            else tensor.detach().to(dtype if id(tensor) in parameters else tensor.dtype)
            for name, tensor in part.items()
        }


def _merged(name: str, module: LoraLayer, dtype: torch.dtype) -> Tensor:
    base, (active,) = cast(nn.Linear, module.get_base_layer()), module.active_adapters
    change: Tensor = module.get_delta_weight(active)  # type: ignore[attr-defined]
    merged = (base.weight.detach() + change.to(base.weight.device)).to(dtype)
    if not is_finite(merged):
        raise ModelError(f"{name}: its weight with LoRA is too large for {name_of(dtype)}", "set model.dtype: bfloat16")
    return merged


def frozen_state(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict of a model as if no LoRA were attached; the tensors are the model's own.

    A parameter that two modules share, as embeddings and `lm_head` of many decoders do, is there by its first name.
    """
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    again = set(every) - {name for name, _ in model.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=keep_vars).items() if name not in again}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def save_peft(model: nn.Module, settings: AdapterSection, directory: Path, *, base: str, task: TaskName) -> None:
    """Writes the adapter in a model so that peft's `AutoPeftModel...` finds the FM and puts it there.

    Args:
        base: where the FM is loaded from: a directory, or a name on a hub.
        task: decides which class of peft's loads it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    row = architecture_of(model)
    config = _lora_config(model, settings, (*row.attention, *(_ffn_projections(row) if settings.ffn else ())))
    config.inference_mode = True
    config.base_model_name_or_path = base
    config.modules_to_save = list(head_of(model)) or None
    config.task_type = TASKS[task].peft
    if config.task_type is None:  # peft has no class of its own for the task: it takes that of the model
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(directory))
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in extract(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    labels = json.dumps(list(model.config.id2label.values()), ensure_ascii=False)  # type: ignore[union-attr, operator]
    card = _CARD + (_LABELLED if TASKS[task].label_list else _PLAIN)
    filled = card.format(base=json.dumps(base), loader=TASKS[task].peft_loader, labels=labels)
    (directory / "README.md").write_text(filled, "utf-8")


def _names_on_proxy(model: nn.Module, names: Iterable[str], layers: Sequence[int]) -> dict[str, str]:
    """The FM's name of a tensor or module -> the proxy's, without those in layers that the proxy lacks.

    Args:
        layers: for each layer of the proxy, the FM's layer it was cut from.
    """
    path, position = layers_path(model), {str(layer): str(index) for index, layer in enumerate(layers)}
    on_proxy: dict[str, str] = {}
    for name in names:
        layer, _, rest = name.removeprefix(path).partition(".")
        if not name.startswith(path):
            on_proxy[name] = name
        elif layer in position:
            on_proxy[name] = f"{path}{position[layer]}.{rest}"
    return on_proxy


def _lora_forward(layer: Any, dropout: float, x: Tensor) -> Tensor:
    """What peft's layer computes, with its parameters."""
    base, (name,) = layer.get_base_layer(), layer.active_adapters
    weight = base.weight.t() if layer.fan_in_fan_out else base.weight
    a, b = (part[name]._parameters["weight"] for part in (layer.lora_A, layer.lora_B))  # or one of each sample
    return lora_linear(x, weight, base.bias, a, b, scale=layer.scaling[name], dropout=dropout)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the FM's adapter is in the proxy's.

    name: there.
    dim: along which the proxy has only `rows` of it; None: it has all.
    """

    name: str
    dim: int | None = None
    rows: Tensor | None = None

    def part(self, whole: Tensor) -> Tensor:
        """What the proxy has of the FM's tensor."""
        return whole if self.dim is None or self.rows is None else whole.index_select(self.dim, self.rows)

    def whole(self, part: Tensor, like: Tensor) -> Tensor:
        """The proxy's tensor in the FM's shape, 0 where the proxy has nothing."""
        if self.dim is None or self.rows is None:
            return part
        return torch.zeros_like(like).index_copy(self.dim, self.rows, part)


def _place(row: Architecture, inside: str, tensor: Tensor, neurons: Tensor) -> _Place:
    """Of a tensor of LoRA, by its name inside of a layer; `neurons`, (K,) int64, are those that the proxy kept."""
    path, _, factor = inside.rpartition(".lora_")  # "A.weight" or "B.weight"
    projection = _ffn_projections(row).get(path)
    if projection is None:
        return _Place(inside)
    name = f"{row.ffn}.lora_{factor[0]}.{projection}"
    if (factor[0] == "A") != (projection == "w_out"):
        return _Place(name)  # the side of D
    if path == row.gate and path == row.input:
        neurons = torch.cat([neurons, neurons + len(tensor) // 2])
    return _Place(name, 1 if projection == "w_out" else 0, neurons)


def _attach_to_ffns(model: nn.Module, settings: AdapterSection, seed: int) -> None:
    """On an FM peft's LoRA, on a proxy that of its SubFFNs. Drawn apart: that on attention is the same without it."""
    row, ffns = architecture_of(model), list(sub_ffns(model).values())
    if row.experts is not None:
        raise ModelError(
            f"adapter.ffn: the FFN of {model.config.model_type} is a mixture of experts",  # type: ignore[union-attr]
            "set adapter.ffn: false",
        )
    if not ffns:
        _inject(model, settings, tuple(_ffn_projections(row)), seed)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for ffn in ffns:
            assert isinstance(ffn, SubFFN)
            ffn.attach_lora(settings.rank, settings.alpha / settings.rank, one_gated=row.gate == row.input)


def _inject(model: nn.Module, settings: AdapterSection, paths: Sequence[str], seed: int) -> None:
    """peft's LoRA on these modules of each layer, drawn from the seed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft still asks transformers by an older name whether checkpoints of activations are on
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that on attention
        inject_adapter_in_model(_lora_config(model, settings, paths), model)
    for parameter in _parameters(model).values():  # peft gives LoRA the model's type
        parameter.data = wide(parameter.data)


def _ffn_projections(row: Architecture) -> dict[str, str]:
    """The FM's path to each projection of an FFN -> the SubFFN's name of it. Of two in one it is the second's."""
    paths = {row.gate: "w_gate", row.input: "w_in", row.output: "w_out"}
    return {path: name for path, name in paths.items() if path is not None}


def _lora_config(model: nn.Module, settings: AdapterSection, paths: Sequence[str]) -> LoraConfig:
    row, depth = architecture_of(model), len(layers_of(model))
    targets = [f"{layers_path(model)}{layer}.{path}" for layer in range(depth) for path in paths]
    return LoraConfig(
        r=max(settings.rank, 1),
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=row.transposed,
    )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that peft writes to disk."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or in_head(model, name)
    }
