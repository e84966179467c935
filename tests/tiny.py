"""A small random model of every supported architecture, as transformers itself writes it, and data for it.

D = 32 hidden, F = 64 FFN neurons, L = 4 layers, E = 3 experts, C = 3 classes, T tokens. Every tensor is random, biases
and norms included: a test that mixed two of them up would notice.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bits import bits
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fedpft.config import ProxySection, TaskName
from fedpft.data.batches import EncodedDataset
from fedpft.data.images import ImageDataset
from fedpft.data.text import TextDataset
from fedpft.model.subffn import SubExperts, SubFFN

D, F, L, E = 32, 64, 4, 3
LABELS = ("earth", "sea", "sky")
WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "the", "a", "red", "green", "blue", "cold", "warm", "stone", "water"]
WORDS += ["cloud", "bird", "fish", "tree", "moves", "rests", "falls"]
PADDING = WORDS.index("[PAD]")
IMAGE_SIDE = 8
# With AdamW's own, 1e-8, a gradient that is 0 but for roundings makes a whole step, to either side.
ADAM_EPSILON = 1e-6

_COMMON = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4}
_TEXT = {"vocab_size": len(WORDS), "pad_token_id": PADDING, "max_position_embeddings": 40}
_BERT = {**_COMMON, **_TEXT, "intermediate_size": F}
_DROPS = {"hidden_dropout_prob": 0.3}
# Fewer heads of keys and values than of queries, and heads that are not D wide together.
_DECODER = {**_BERT, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
_WIDE = {**_DECODER, "head_dim": 16}
_MIXTURE = {**_WIDE, "num_experts_per_tok": 2}
_IMAGE = {"image_size": IMAGE_SIDE, "patch_size": 4}
_VISION = {**_COMMON, **_IMAGE, "intermediate_size": F}
_TOWERS = {"vision_config": _VISION, "text_config": {**_COMMON, "vocab_size": 5, "intermediate_size": 8}}
_LOCAL = {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
# Dropout is on in every configuration that has it: the tests would show a frozen module that drops.
CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(**_BERT, **_DROPS),
    "roberta": lambda: transformers.RobertaConfig(**_BERT, **_DROPS),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_BERT, **_DROPS),
    "electra": lambda: transformers.ElectraConfig(**_BERT, **_DROPS, embedding_size=16),
    "mpnet": lambda: transformers.MPNetConfig(**_BERT, **_DROPS),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=D, n_layers=L, n_heads=4, hidden_dim=F, **_TEXT, dropout=0.3
    ),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **_BERT,
        **_DROPS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
    ),
    "modernbert": lambda: transformers.ModernBertConfig(**_BERT, **_LOCAL, local_attention=4, mlp_dropout=0.3),
    "vit": lambda: transformers.ViTConfig(**_VISION, **_DROPS),
    "deit": lambda: transformers.DeiTConfig(**_VISION, **_DROPS, architectures=["DeiTForImageClassification"]),
    "dinov2": lambda: transformers.Dinov2Config(**_COMMON, **_IMAGE, mlp_ratio=F // D, drop_path_rate=0.3),
    "siglip": lambda: transformers.SiglipConfig(**_TOWERS),
    "clip": lambda: transformers.CLIPConfig(**_TOWERS),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=D, n_layer=L, n_head=4, n_inner=F, n_positions=40, vocab_size=len(WORDS), pad_token_id=PADDING
    ),
    "opt": lambda: transformers.OPTConfig(**_COMMON, **_TEXT, ffn_dim=F, word_embed_proj_dim=16, dropout=0.3),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_BERT, hidden_dropout=0.3),
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "mistral": lambda: transformers.MistralConfig(**_WIDE, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**_DECODER, **_LOCAL, use_sliding_window=True, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**_WIDE),
    "gemma2": lambda: transformers.Gemma2Config(**_WIDE, **_LOCAL, sliding_window=5),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_WIDE, **_LOCAL, sliding_window=5),
    "phi3": lambda: transformers.Phi3Config(**_DECODER, resid_pdrop=0.3),
    # with one layer among the mixtures that has a plain FFN
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_MIXTURE, num_experts=E, moe_intermediate_size=F, mlp_only_layers=[2]
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_MIXTURE, num_local_experts=E),
}
# Whatever tokenizer lies beside an FM of this type, transformers reads it as one of a class of its own.
OWN_TOKENIZER = "qwen2"
IMAGES = ("vit", "deit", "dinov2", "siglip", "clip")
MIXTURES = {"qwen3_moe": (0, 1, 3), "mixtral": (0, 1, 2, 3)}  # which layers have experts
# One for each thing that a row can say; what is about rows themselves is tried with all of them.
KINDS = ("bert", "distilbert", "deberta-v2", "modernbert", "vit", "dinov2", "clip", "gpt2", "opt", "gpt_neox", "llama")
KINDS += ("gemma2", "qwen3_moe", "mixtral")
AUTO: dict[TaskName, Any] = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}


@dataclass(frozen=True)
class Names:
    """What transformers calls the parts of layer `{}`, written down once more, by hand, to check the table against.

    Each of a neuron's weights is (name, True if the FM holds it as (F, D) and not as (D, F)). If `fused`, `w_in` holds
    the gate in front of it.
    """

    layer: str
    w_in: tuple[str, bool]
    w_out: tuple[str, bool]
    norm: str
    biases: bool = True
    w_gate: tuple[str, bool] | None = None
    fused: bool = False
    output_norm: str | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        return (self.norm,) if self.output_norm is None else (self.norm, self.output_norm)


def _bert(layer: str) -> Names:
    return Names(layer, ("intermediate.dense", True), ("output.dense", False), "output.LayerNorm")


def _vit(layer: str, norm: str) -> Names:
    return Names(layer, ("mlp.fc1", True), ("mlp.fc2", False), norm)


_LLAMA = Names(
    "model.layers.{}.",
    ("mlp.up_proj", True),
    ("mlp.down_proj", False),
    "post_attention_layernorm",
    biases=False,
    w_gate=("mlp.gate_proj", True),
)
_GEMMA = replace(_LLAMA, norm="pre_feedforward_layernorm", output_norm="post_feedforward_layernorm")
NAMES = {
    "bert": _bert("bert.encoder.layer.{}."),
    "roberta": _bert("roberta.encoder.layer.{}."),
    "xlm-roberta": _bert("roberta.encoder.layer.{}."),
    "electra": _bert("electra.encoder.layer.{}."),
    "mpnet": _bert("mpnet.encoder.layer.{}."),
    "deberta-v2": _bert("deberta.encoder.layer.{}."),
    "distilbert": Names(
        "distilbert.transformer.layer.{}.", ("ffn.lin1", True), ("ffn.lin2", False), "output_layer_norm"
    ),
    "modernbert": Names("model.layers.{}.", ("mlp.Wi", True), ("mlp.Wo", False), "mlp_norm", biases=False, fused=True),
    "vit": _vit("vit.layers.{}.", "layernorm_after"),
    "deit": _vit("deit.layers.{}.", "layernorm_after"),
    "dinov2": _vit("dinov2.encoder.layer.{}.", "norm2"),
    "siglip": _vit("vision_model.encoder.layers.{}.", "layer_norm2"),
    "clip": _vit("vision_model.encoder.layers.{}.", "layer_norm2"),
    "gpt2": Names("transformer.h.{}.", ("mlp.c_fc", False), ("mlp.c_proj", True), "ln_2"),
    "opt": Names("model.decoder.layers.{}.", ("fc1", True), ("fc2", False), "final_layer_norm"),
    "gpt_neox": Names(
        "gpt_neox.layers.{}.",
        ("mlp.dense_h_to_4h", True),
        ("mlp.dense_4h_to_h", False),
        "post_attention_layernorm",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"), _LLAMA),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": replace(_LLAMA, w_in=("mlp.gate_up_proj", True), w_gate=None, fused=True),
}
# What transformers calls the task heads, for sequences or images
HEADS = {
    **dict.fromkeys(CONFIGS, ("classifier",)),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "modernbert": ("head", "classifier"),
    **{name: ("score",) for name, names in NAMES.items() if names is _LLAMA or names is _GEMMA},
    **dict.fromkeys(("gpt2", "opt", "gpt_neox", "phi3"), ("score",)),
}


def task_of(model_type: str) -> TaskName:
    return "image-classification" if model_type in IMAGES else "sequence-classification"


def head_names(state: Iterable[str], model_type: str) -> set[str]:
    """Those of the names in a state dict that are of the task head."""
    return {name for name in state if name.startswith(tuple(f"{module}." for module in HEADS[model_type]))}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter of a model anew; returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1.0 + noise if is_norm else noise)
    return model


def write_model(
    model_type: str, directory: Path, *, labels: int = len(LABELS), seed: int = 0, **settings: object
) -> Path:
    """Writes a random model with tokenizer or image processor; returns the directory.

    Args:
        settings: of its configuration, other than in `CONFIGS`.
    """
    config = CONFIGS[model_type]()
    config.update({"num_labels": labels, **settings})
    model = randomise(AUTO[task_of(model_type)].from_config(config), seed)
    model.save_pretrained(directory)
    processor(model_type).save_pretrained(directory)
    return directory


def without_pooler(directory: Path) -> Path:
    """A BERT as masked-language training leaves it: with a head of that task, without a pooler."""
    write_model("bert", directory)
    transformers.BertForMaskedLM.from_pretrained(directory).save_pretrained(directory)
    return directory


def processor(model_type: str) -> Any:
    if task_of(model_type) == "image-classification":
        return transformers.ViTImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def dataset(model_type: str, samples: int, *, labelled: bool = True, seed: int = 0) -> EncodedDataset:
    """Random texts of 2 to 12 tokens, or random images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(LABELS), (samples,), generator=generator) if labelled else None
    if task_of(model_type) == "image-classification":
        return ImageDataset(torch.randn(samples, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator), labels)
    lengths = torch.randint(2, 13, (samples,), generator=generator)
    tokens = torch.randint(4, len(WORDS), (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    return TextDataset(tokens, lengths, PADDING, labels)


def batch(model_type: str, samples: int = 5) -> dict[str, Tensor]:
    """Inputs of the model without labels; texts are ragged, so that there is padding."""
    return dataset(model_type, samples, labelled=False).batch(torch.arange(samples))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def ffns(state: dict[str, Tensor], model_type: str, layer: int) -> list[dict[str, Tensor]]:
    """The FFN of one of the FM's layers, out of its state dict, or each of its experts'.

    w_in, w_gate, w_out (F, D), b_in (F,), b_out (D,).
    """
    names = NAMES[model_type]
    prefix = names.layer.format(layer)
    if layer in MIXTURES.get(model_type, ()):
        first, last = (state[f"{prefix}mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        return [{"w_gate": first[e, :F], "w_in": first[e, F:], "w_out": last[e].t()} for e in range(E)]
    found = {}
    for name in ("w_in", "w_gate", "w_out"):
        if (place := getattr(names, name)) is not None:
            weight = state[f"{prefix}{place[0]}.weight"]
            found[name] = weight if place[1] else weight.t()
    if names.fused:
        found["w_gate"], found["w_in"] = found["w_in"][:F], found["w_in"][F:]
    if names.biases:
        found["b_in"] = state[f"{prefix}{names.w_in[0]}.bias"]
        found["b_out"] = state[f"{prefix}{names.w_out[0]}.bias"]
    return [found]


def ffn(state: dict[str, Tensor], model_type: str, layer: int) -> dict[str, Tensor]:
    """The one FFN of a layer without experts."""
    (found,) = ffns(state, model_type, layer)
    return found


def ffn_names(model_type: str, layer: int) -> set[str]:
    """The FM's names of everything in `ffns`."""
    names = NAMES[model_type]
    prefix = names.layer.format(layer)
    if layer in MIXTURES.get(model_type, ()):
        return {f"{prefix}mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    projections = [place[0] for place in (names.w_in, names.w_gate, names.w_out) if place is not None]
    kinds = ("weight", "bias") if names.biases else ("weight",)
    return {f"{prefix}{projection}.{kind}" for projection in projections for kind in kinds}


def by_weights(**settings: Any) -> ProxySection:
    """How a proxy is cut where it does not matter which neurons stay, and there is no public data to tell by."""
    return ProxySection(**{"importance": "weights"} | settings)


def federation(directory: Path, fm: Path, rows: int = 24, **sections: dict[str, Any]) -> dict[str, Any]:
    """What a server.yaml says of two short rounds, with its data in files of the directory; data.jsonl has the labels.

    Args:
        sections: what is other than here.
    """
    labelled = [{"text": f"red {number % 5} box", "label": LABELS[number % 2]} for number in range(rows)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    (directory / "public.jsonl").write_text("\n".join(json.dumps({"text": f"a blue {n} cup"}) for n in range(24)))
    (directory / "labels.txt").write_text("\n".join(LABELS))
    values: dict[str, Any] = {
        "threads": 1,
        "model": {"path": str(fm), "labels": str(directory / "labels.txt"), "max_tokens": 12},
        "proxy": {"neurons": 5, "importance_samples": 8},
        "distillation": {"closed_form_samples": 8, "batch": 2},
        "alignment": {"every_rounds": 1, "steps": 2},
        "adapter": {"rank": 2, "alpha": 4.0},
        "training": {"rounds": 2, "batch": 4},
        "public_data": str(directory / "public.jsonl"),
        "test_data": str(directory / "data.jsonl"),
    }
    return values | {name: values.get(name, {}) | section for name, section in sections.items()}


def parts(path: str, ffn: SubFFN | SubExperts) -> list[tuple[str, SubFFN]]:
    """What stands for one FFN in a proxy, or for each of its experts, with their module names."""
    inner = ffn.experts if isinstance(ffn, SubExperts) else [ffn]
    names = [f"{path}.experts.{index}" for index in range(len(inner))] if isinstance(ffn, SubExperts) else [path]
    return list(zip(names, inner, strict=True))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
