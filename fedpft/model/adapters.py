"""The adapter: LoRA on the attention projections and the task head. The one thing that the silos train.

An adapter is a `dict[str, Tensor]`. Its names are the same in proxy and FM, since attention is identical in both;
that is what makes the plug-in possible (method.md, sections 3 and 5). LoRA itself is `peft`'s.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from fedpft.model.architectures import architecture_of, head_of, in_head, layers_of, layers_path
from fedpft.model.lora import lora_linear
from fedpft.model.precision import dtype_of, name_of, narrow, wide
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

_REMEDY = "train it on this federation's proxy with this version of fedpft"


def attach(model: nn.Module, settings: AdapterSection, *, seed: int) -> None:
    """Puts an untrained adapter into a model: LoRA's A random from the seed, B zero, the head as it is. In place.

    Afterwards LoRA and head require gradients and nothing else does. Both are float32, whatever the model is.
    """
    if settings.rank > 0:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(derive_seed(seed, "adapter"))
            # peft still asks transformers by an older name whether checkpoints of activations are on
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            inject_adapter_in_model(_lora_config(model, settings), model)
        for parameter in _parameters(model).values():  # peft gives LoRA the model's type
            parameter.data = wide(parameter.data)
    model.eval()  # peft adds its dropout in training mode
    adapted = set(_parameters(model).values())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in adapted)


@contextmanager
def training(model: nn.Module, dropout: float, *, frozen_a: bool = False) -> Iterator[None]:
    """While open, LoRA drops its input with this probability, and peft's layers compute by `lora_linear`.

    No module is put into training mode, so that nothing else drops. With `frozen_a` LoRA's A requires no gradient.
    """
    resting = [parameter for name, parameter in _parameters(model).items() if frozen_a and ".lora_A." in name]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = partial(_lora_forward, layer, dropout)
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the instance's; the class's is peft's own
        for parameter in resting:
            parameter.requires_grad_(True)


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """While open, a model, or one layer of it, computes as if it carried no LoRA. Not within :func:`training`."""
    layers = [inner for inner in module.modules() if isinstance(inner, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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


def plug_in(model: nn.Module, adapter: Adapter, layers: Sequence[int]) -> None:
    """Puts the silos' adapter into the FM (method.md, section 5).

    Args:
        model: the FM with an adapter attached.
        layers: for each layer of the proxy, the FM's layer it was cut from; LoRA on the FM's other layers stays 0.

    Raises:
        InvalidUpdate: the adapter is not one of a proxy with these layers.
    """
    path, own = layers_path(model), extract(model)
    position = {str(layer): str(index) for index, layer in enumerate(layers)}
    on_proxy: dict[str, str] = {}  # the FM's name of a tensor -> the proxy's
    for name in own:
        layer, _, rest = name.removeprefix(path).partition(".")
        if not name.startswith(path):
            on_proxy[name] = name
        elif layer in position:
            on_proxy[name] = f"{path}{position[layer]}.{rest}"
    check(adapter, {proxy_name: own[name] for name, proxy_name in on_proxy.items()}, "the adapter")
    dropped = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in own.items()}
    load(model, dropped | {name: adapter[proxy_name] for name, proxy_name in on_proxy.items()})


def merge(model: nn.Module) -> None:
    """Adds B A alpha / R to each weight that carries LoRA and takes LoRA away. In place.

    Afterwards all of the model has one type, that of the FM; each sum was rounded to it once.

    Raises:
        ModelError: a weight is too large for the type.
    """
    dtype = dtype_of(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            base, (active,) = cast(nn.Linear, module.get_base_layer()), module.active_adapters
            change: Tensor = module.get_delta_weight(active)  # type: ignore[attr-defined]
            base.weight.data = (base.weight.data + change).to(dtype)
            if not is_finite(base.weight.data):
                raise ModelError(
                    f"{name}: its weight with LoRA is too large for {name_of(dtype)}", "set model.dtype: bfloat16"
                )
            model.set_submodule(name, base)
    narrow(model.requires_grad_(False), dtype)


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as if no LoRA were attached; the tensors are the model's own.

    A parameter that two modules share, as embeddings and `lm_head` of many decoders do, is there by its first name.
    """
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    again = set(every) - {name for name, _ in model.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in again}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def save_peft(model: nn.Module, settings: AdapterSection, directory: Path, *, base: str, task: TaskName) -> None:
    """Writes the adapter in a model so that peft's `AutoPeftModel...` finds the FM and puts it there.

    Args:
        base: where the FM is loaded from: a directory, or a name on a hub.
        task: decides which class of peft's loads it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = _lora_config(model, settings)
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


def _lora_forward(layer: Any, dropout: float, x: Tensor) -> Tensor:
    """What peft's layer computes, with its parameters."""
    base, (name,) = layer.get_base_layer(), layer.active_adapters
    weight = base.weight.t() if layer.fan_in_fan_out else base.weight
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, weight, base.bias, a, b, scale=layer.scaling[name], dropout=dropout)


def _lora_config(model: nn.Module, settings: AdapterSection) -> LoraConfig:
    row, depth = architecture_of(model), len(layers_of(model))
    targets = [f"{layers_path(model)}{layer}.{path}" for layer in range(depth) for path in row.attention]
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
