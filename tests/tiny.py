"""A small random model of every supported architecture, as transformers itself writes it, and data for it.

D = 32 hidden, F = 64 FFN neurons, L = 4 layers, C = 3 classes, T tokens. Every tensor is random, biases and norms
included: a test that mixed two of them up would notice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fedpft.config import TaskName
from fedpft.data.batches import EncodedDataset
from fedpft.data.images import ImageDataset
from fedpft.data.text import TextDataset

D, F, L = 32, 64, 4
LABELS = ("earth", "sea", "sky")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "red", "green", "blue", "cold", "warm", "stone", "water"]
WORDS += ["cloud", "bird", "fish", "tree", "moves", "rests", "falls"]
PADDING = WORDS.index("[PAD]")
IMAGE_SIDE = 8

_COMMON = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4}
_TEXT = {"vocab_size": len(WORDS), "pad_token_id": PADDING, "max_position_embeddings": 40}
_BERT = {**_COMMON, **_TEXT, "intermediate_size": F}
_IMAGE = {"image_size": IMAGE_SIDE, "patch_size": 4}
# Dropout is on in every configuration that has it: the tests would show a frozen module that drops.
CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(**_BERT, hidden_dropout_prob=0.3),
    "roberta": lambda: transformers.RobertaConfig(**_BERT, hidden_dropout_prob=0.3),
    "vit": lambda: transformers.ViTConfig(**_COMMON, **_IMAGE, intermediate_size=F, hidden_dropout_prob=0.3),
    "dinov2": lambda: transformers.Dinov2Config(**_COMMON, **_IMAGE, mlp_ratio=F // D, drop_path_rate=0.3),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=D, n_layer=L, n_head=4, n_inner=F, n_positions=40, vocab_size=len(WORDS), pad_token_id=PADDING
    ),
    "llama": lambda: transformers.LlamaConfig(**_COMMON, **_TEXT, intermediate_size=F, num_key_value_heads=2),
}
AUTO: dict[TaskName, Any] = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}


@dataclass(frozen=True)
class Names:
    """What transformers calls the parts of layer `{}`, written down once more, by hand, to check the table against.

    Each of a neuron's weights is (name, True if the FM holds it as (F, D) and not as (D, F)).
    """

    layer: str
    w_in: tuple[str, bool]
    w_out: tuple[str, bool]
    norm: str
    biases: bool = True
    w_gate: tuple[str, bool] | None = None


NAMES = {
    "bert": Names("bert.encoder.layer.{}.", ("intermediate.dense", True), ("output.dense", False), "output.LayerNorm"),
    "roberta": Names(
        "roberta.encoder.layer.{}.", ("intermediate.dense", True), ("output.dense", False), "output.LayerNorm"
    ),
    "vit": Names("vit.layers.{}.", ("mlp.fc1", True), ("mlp.fc2", False), "layernorm_after"),
    "dinov2": Names("dinov2.encoder.layer.{}.", ("mlp.fc1", True), ("mlp.fc2", False), "norm2"),
    "gpt2": Names("transformer.h.{}.", ("mlp.c_fc", False), ("mlp.c_proj", True), "ln_2"),
    "llama": Names(
        "model.layers.{}.",
        ("mlp.up_proj", True),
        ("mlp.down_proj", False),
        "post_attention_layernorm",
        biases=False,
        w_gate=("mlp.gate_proj", True),
    ),
}


def task_of(model_type: str) -> TaskName:
    return "image-classification" if model_type in ("vit", "dinov2") else "sequence-classification"


def write_model(model_type: str, directory: Path, *, layers: int = L, labels: int = len(LABELS), seed: int = 0) -> Path:
    """Writes a random model with tokenizer or image processor; returns the directory."""
    config = CONFIGS[model_type]()
    config.num_hidden_layers, config.num_labels = layers, labels
    model = AUTO[task_of(model_type)].from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1.0 + noise if is_norm else noise)
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


def ffn(state: dict[str, Tensor], model_type: str, layer: int) -> dict[str, Tensor]:
    """The FFN of one of the FM's layers, out of its state dict: w_in, w_gate, w_out (F, D), b_in (F,), b_out (D,)."""
    names, found = NAMES[model_type], {}
    prefix = names.layer.format(layer)
    for name in ("w_in", "w_gate", "w_out"):
        if (place := getattr(names, name)) is not None:
            weight = state[f"{prefix}{place[0]}.weight"]
            found[name] = weight if place[1] else weight.t()
    if names.biases:
        found["b_in"] = state[f"{prefix}{names.w_in[0]}.bias"]
        found["b_out"] = state[f"{prefix}{names.w_out[0]}.bias"]
    return found


def ffn_names(model_type: str, layer: int) -> set[str]:
    """The FM's names of everything in `ffn`."""
    names = NAMES[model_type]
    projections = [place[0] for place in (names.w_in, names.w_gate, names.w_out) if place is not None]
    kinds = ("weight", "bias") if names.biases else ("weight",)
    return {f"{names.layer.format(layer)}{projection}.{kind}" for projection in projections for kind in kinds}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )
