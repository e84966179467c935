"""Where the parts of each supported architecture live: one row of data a model type, and nothing else.

Paths in a row start at one layer, `layers` at the base model. The task head is whatever a model has beside its base
model. docs/models.md says how to add a row, and what was tried with each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedpft.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        layers: the `ModuleList` of transformer layers.
        ffn: the module whose place the SubFFN takes.
        input: the FFN's input projection ("up" of a gated FFN).
        output: the FFN's output projection.
        norm: the norm that belongs to the FFN (after it in a post-norm model, before it in a pre-norm one).
        attention: projections that carry LoRA: query, key, value and attention output.
        gate: the gate projection of a gated FFN, or None. If it is `input` too, the first half of that is the gate.
        experts: where a mixture of experts keeps their weights, as `gate_up_proj` (E, 2 F, D), gate first, and
            `down_proj` (E, D, F). A layer that lacks this module has one plain FFN, at the paths above.
        absorbed: modules that the SubFFN already computed and that become the identity.
        activation: the configuration's field that names the FFN's activation.
        post_norm: the norm comes after the FFN and its residual, not before the FFN.
        norm_first: the configuration's field that decides this, where one model type has both kinds.
        output_norm: a norm of the FFN's output alone, before it is added to the residual stream, or None.
        scale: a parameter that multiplies the FFN's output, or None.
        base: the base model, where it is not the one that `transformers` names; None: it is.
        config: the part of the configuration that is about this network; None: all of it.
        optional: modules between layers and head that a checkpoint may lack as a whole, from the base model on, because
            it was trained for something else. What is drawn in their place trains with the head.
        positions_after_padding: tokens are numbered from the padding token's id plus 1 on, not from 0.
        padding: the padding token's id, where the model's code does not ask the configuration for it.
        transposed: the projections are `Conv1D`, which hold the transpose of `nn.Linear`'s weight.
    """

    layers: str
    ffn: str
    input: str
    output: str
    norm: str
    attention: tuple[str, ...]
    gate: str | None = None
    experts: str | None = None
    absorbed: tuple[str, ...] = ()
    activation: str = "hidden_act"
    post_norm: bool = False
    norm_first: str | None = None
    output_norm: str | None = None
    scale: str | None = None
    base: str | None = None
    config: str | None = None
    optional: tuple[str, ...] = ()
    positions_after_padding: bool = False
    padding: int | None = None
    transposed: bool = False


def _inside(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


_BERT = Architecture(
    layers="encoder.layer",
    ffn="intermediate",
    absorbed=("output.dense",),
    input="intermediate.dense",
    output="output.dense",
    norm="output.LayerNorm",
    post_norm=True,
    attention=_inside("attention", "self.query", "self.key", "self.value", "output.dense"),
)
_ROBERTA = replace(_BERT, positions_after_padding=True)
_VIT = Architecture(
    layers="layers",
    ffn="mlp",
    input="mlp.fc1",
    output="mlp.fc2",
    norm="layernorm_after",
    attention=_inside("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
)
_CLIP = replace(
    _VIT,
    base="vision_model",
    config="vision_config",
    layers="encoder.layers",
    norm="layer_norm2",
    attention=_inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
)
_LLAMA = Architecture(
    layers="layers",
    ffn="mlp",
    input="mlp.up_proj",
    gate="mlp.gate_proj",
    output="mlp.down_proj",
    norm="post_attention_layernorm",
    attention=_inside("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
)
_GEMMA = replace(
    _LLAMA,
    activation="hidden_activation",
    norm="pre_feedforward_layernorm",
    output_norm="post_feedforward_layernorm",
)
_MIXTURE = replace(_LLAMA, experts="mlp.experts")

ARCHITECTURES: dict[str, Architecture] = {
    "bert": replace(_BERT, optional=("pooler",)),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": _BERT,
    "mpnet": replace(_ROBERTA, padding=1, attention=_inside("attention.attn", "q", "k", "v", "o")),
    "distilbert": Architecture(
        layers="transformer.layer",
        ffn="ffn",
        input="ffn.lin1",
        output="ffn.lin2",
        norm="output_layer_norm",
        post_norm=True,
        attention=_inside("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        activation="activation",
    ),
    "deberta-v2": replace(
        _BERT, attention=_inside("attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense")
    ),
    "modernbert": Architecture(
        layers="layers",
        ffn="mlp",
        input="mlp.Wi",
        gate="mlp.Wi",
        output="mlp.Wo",
        norm="mlp_norm",
        attention=_inside("attn", "Wqkv", "Wo"),
        activation="hidden_activation",
    ),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": replace(_VIT, layers="encoder.layer", norm="norm2", scale="layer_scale2.lambda1"),
    "siglip": _CLIP,
    "clip": _CLIP,
    "gpt2": Architecture(
        layers="h",
        ffn="mlp",
        input="mlp.c_fc",
        output="mlp.c_proj",
        norm="ln_2",
        attention=_inside("attn", "c_attn", "c_proj"),
        activation="activation_function",
        transposed=True,
    ),
    "opt": Architecture(
        layers="decoder.layers",
        ffn="fc1",
        absorbed=("activation_fn", "fc2"),
        input="fc1",
        output="fc2",
        norm="final_layer_norm",
        norm_first="do_layer_norm_before",
        attention=_inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        activation="activation_function",
    ),
    "gpt_neox": Architecture(
        layers="layers",
        ffn="mlp",
        input="mlp.dense_h_to_4h",
        output="mlp.dense_4h_to_h",
        norm="post_attention_layernorm",
        attention=_inside("attention", "query_key_value", "dense"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": replace(
        _LLAMA,
        input="mlp.gate_up_proj",
        gate="mlp.gate_up_proj",
        attention=_inside("self_attn", "qkv_proj", "o_proj"),
    ),
    "qwen3_moe": _MIXTURE,
    "mixtral": _MIXTURE,
}

# transformers' names of the activations that the kernels know
ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


def architecture_of(model: nn.Module) -> Architecture:
    """The row for a `transformers` model (its own `config.model_type`); ModelError where there is none."""
    return row(model.config.model_type)  # type: ignore[union-attr, arg-type]


def row(model_type: str) -> Architecture:
    """The row for a model type; ModelError where there is none."""
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"model type {model_type!r} is not supported",
            f"use one of {', '.join(ARCHITECTURES)}, or add a row to fedpft/model/architectures.py, as docs/models.md "
            "shows: where its layers are, and in a layer the FFN, its projections, its norm and those of attention",
        )
    return ARCHITECTURES[model_type]


def config_of(config: Any) -> Any:
    """The part of a model's configuration that has hidden size, number of layers and activation."""
    part = row(config.model_type).config
    return config if part is None else getattr(config, part)


def base_name(model: nn.Module) -> str:
    """What a `transformers` model with a head calls its base model."""
    return architecture_of(model).base or str(model.base_model_prefix)


def base_of(model: nn.Module) -> nn.Module:
    """The model without whatever stands on top of it."""
    return model.get_submodule(base_name(model))


def is_post_norm(model: nn.Module) -> bool:
    """Whether an FFN's norm comes after its residual sum."""
    found = architecture_of(model)
    if found.norm_first is not None:
        return not getattr(config_of(model.config), found.norm_first)
    return found.post_norm


def layers_path(model: nn.Module) -> str:
    """What the names of the transformer layers' parameters start with, up to the layer's number."""
    return f"{base_name(model)}.{architecture_of(model).layers}."


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer layers of a `transformers` model that has something on top of its base model."""
    layers = base_of(model).get_submodule(architecture_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def on_top(model: nn.Module) -> tuple[str, ...]:
    """The modules with parameters that a `transformers` model has beside its base model."""
    modules = {name: module for name, module in model.named_children() if name != base_name(model)}
    return tuple(name for name, module in modules.items() if any(True for _ in module.parameters()))


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The modules that train in full: the task head, if the task has one, and what else was drawn for it."""
    trained: tuple[str, ...] = model.trained_modules  # type: ignore[assignment]
    return trained


def in_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter of this name trains in full."""
    return name.startswith(tuple(f"{module}." for module in head_of(model)))


def longest_input(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; None: any number (or it takes no tokens)."""
    positions: int | None = getattr(config_of(model.config), "max_position_embeddings", None)
    if positions is not None and architecture_of(model).positions_after_padding:
        positions -= (padding_of(model) or 0) + 1
    return positions


def padding_of(model: nn.Module) -> int | None:
    """The padding token's id by which the model itself knows padding, if it has one."""
    fixed = architecture_of(model).padding
    return model.config.pad_token_id if fixed is None else fixed  # type: ignore[union-attr, return-value]


def activation_of(model: nn.Module) -> str:
    """The kernels' name of the FFN's activation; ModelError for one that they lack."""
    name = getattr(config_of(model.config), architecture_of(model).activation)
    if name not in ACTIVATION_NAMES:
        raise ModelError(f"activation {name!r} is not supported", f"use one of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


@contextmanager
def computing_by(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While open, modules compute by these functions, and not by what they did before."""
    stood = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in stood.items():
            if before is None:
                del module.forward  # the instance's; the class's is the module's own
            else:
                module.forward = before


class _LastLayerReached(Exception):
    """Ends a forward pass whose rest nobody would look at."""


def layer_outputs(
    model: nn.Module,
    layers: Sequence[int],
    inputs: Mapping[str, Tensor],
    *,
    to_the_end: bool = False,
    given: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Runs a model up to the last of `layers`; returns the hidden states after each of them, (B, T, D).

    Hooks see them as the layer leaves them; `output_hidden_states` would give the last one after the final norm.

    Args:
        to_the_end: run all of it, and return what its head is given too, (B, T, D), as the last one.
        given: layers that go on from these states, (B, T, D), and not from what the layer before them leaves.
    """
    found: dict[int, Tensor] = {}
    last = None if to_the_end else max(layers)

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output
        if layer == last:
            raise _LastLayerReached

    modules = layers_of(model)
    hooks = [
        modules[layer].register_forward_hook(lambda _module, _inputs, output, layer=layer: keep(layer, output))
        for layer in set(layers)
    ]
    for layer, hidden in (given or {}).items():
        replace_states = partial(_with_states, hidden)
        hooks.append(modules[layer].register_forward_pre_hook(replace_states, with_kwargs=True))
    end: list[Tensor] = []
    try:
        end = [base_of(model)(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state]
    except _LastLayerReached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers] + end


def _with_states(
    hidden: Tensor, _layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with, but for its hidden states."""
    return ((hidden, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": hidden})
