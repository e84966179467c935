"""Where the parts of each supported architecture live: one row of data a model type, and nothing else.

Paths in a row start at one layer, `layers` starts at the base model and `head` at the whole model. To support
another architecture, add a row here and a case in tests/test_architectures.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedpft.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        layers: the `ModuleList` of transformer layers.
        ffn: the module whose place the SubFFN takes.
        absorbed: a module that the SubFFN already computed and that becomes the identity, or None.
        input: the FFN's input projection ("up" of a gated FFN).
        gate: the gate projection of a gated FFN, or None.
        output: the FFN's output projection.
        norm: the norm that belongs to the FFN (after it in a post-norm model, before it in a pre-norm one).
        attention: projections that carry LoRA: query, key, value and attention output.
        head: the task head, trained in full.
        token_head: what it is called where each token has an answer, if not the same.
        activation: the configuration's field that names the FFN's activation.
        post_norm: the norm comes after the FFN and its residual, not before the FFN.
        scale: a parameter that multiplies the FFN's output, or None.
        optional: modules between layers and head that a checkpoint may lack as a whole, from the base model on, because
            it was trained for something else. What is drawn in their place trains with the head.
        positions_after_padding: tokens are numbered from the padding token's id plus 1 on, not from 0.
        transposed: the projections are `Conv1D`, which hold the transpose of `nn.Linear`'s weight.
    """

    layers: str
    ffn: str
    input: str
    output: str
    norm: str
    attention: tuple[str, ...]
    head: str
    token_head: str | None = None
    absorbed: str | None = None
    gate: str | None = None
    activation: str = "hidden_act"
    post_norm: bool = False
    scale: str | None = None
    optional: tuple[str, ...] = ()
    positions_after_padding: bool = False
    transposed: bool = False


_BERT = Architecture(
    layers="encoder.layer",
    ffn="intermediate",
    absorbed="output.dense",
    input="intermediate.dense",
    output="output.dense",
    norm="output.LayerNorm",
    post_norm=True,
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    head="classifier",
    optional=("pooler",),
)
_VIT = Architecture(
    layers="layers",
    ffn="mlp",
    input="mlp.fc1",
    output="mlp.fc2",
    norm="layernorm_after",
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    head="classifier",
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": replace(_BERT, optional=(), positions_after_padding=True),
    "vit": _VIT,
    "dinov2": replace(_VIT, layers="encoder.layer", norm="norm2", scale="layer_scale2.lambda1"),
    "gpt2": Architecture(
        layers="h",
        ffn="mlp",
        input="mlp.c_fc",
        output="mlp.c_proj",
        norm="ln_2",
        attention=("attn.c_attn", "attn.c_proj"),
        head="score",
        token_head="classifier",
        activation="activation_function",
        transposed=True,
    ),
    "llama": Architecture(
        layers="layers",
        ffn="mlp",
        input="mlp.up_proj",
        gate="mlp.gate_proj",
        output="mlp.down_proj",
        norm="post_attention_layernorm",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        head="score",
    ),
}

# transformers' names of the activations that the kernels know
ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def architecture_of(model: nn.Module) -> Architecture:
    """The row for a `transformers` model (its own `config.model_type`); ModelError where there is none."""
    return row(model.config.model_type)  # type: ignore[union-attr, arg-type]


def row(model_type: str) -> Architecture:
    """The row for a model type; ModelError where there is none."""
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"model type {model_type!r} is not supported",
            f"use one of {', '.join(ARCHITECTURES)}, or add a row to fedpft/model/architectures.py",
        )
    return ARCHITECTURES[model_type]


def layers_path(model: nn.Module) -> str:
    """What the names of the transformer layers' parameters start with, up to the layer's number."""
    return f"{model.base_model_prefix}.{architecture_of(model).layers}."


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer layers of a `transformers` model, with or without a task head."""
    layers = model.base_model.get_submodule(architecture_of(model).layers)  # type: ignore[union-attr]
    assert isinstance(layers, nn.ModuleList)
    return layers


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The modules that train in full: the task head, and what else was drawn because the FM's checkpoint lacks it."""
    drawn: tuple[str, ...] = getattr(model, "drawn_modules", ())
    row = architecture_of(model)
    head = row.token_head if row.token_head and hasattr(model, row.token_head) else row.head
    return (head, *drawn)


def in_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter of this name trains in full."""
    return name.startswith(tuple(f"{module}." for module in head_of(model)))


def longest_input(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; None: any number (or it takes no tokens)."""
    config = model.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and architecture_of(model).positions_after_padding:
        positions -= int(config.pad_token_id) + 1  # type: ignore[union-attr, arg-type]
    return positions


def activation_of(model: nn.Module) -> str:
    """The kernels' name of the FFN's activation; ModelError for one that they lack."""
    name = getattr(model.config, architecture_of(model).activation)
    if name not in ACTIVATION_NAMES:
        raise ModelError(f"activation {name!r} is not supported", f"use one of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


class _LastLayerReached(Exception):
    """Ends a forward pass whose rest nobody would look at."""


def layer_outputs(model: nn.Module, layers: Sequence[int], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Runs a model up to the last of `layers`; returns the hidden states after each of them, (B, T, D).

    Hooks see them as the layer leaves them; `output_hidden_states` would give the last one after the final norm.
    """
    found: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output
        if layer == last:
            raise _LastLayerReached

    modules = layers_of(model)
    hooks = [
        modules[layer].register_forward_hook(lambda _module, _inputs, output, layer=layer: keep(layer, output))
        for layer in set(layers)
    ]
    try:
        model.base_model(**{name: value for name, value in inputs.items() if name != "labels"})  # type: ignore[operator]
    except _LastLayerReached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers]
