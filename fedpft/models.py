"""Foundation models, their tokenizers and image processors, to and from disk. The only importer of transformers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from fedpft import architectures
from fedpft.config import Task
from fedpft.errors import ModelError
from fedpft.seeding import derive_seed

log = logging.getLogger(__name__)

# A checkpoint's new head is no news here; transformers would print a table for it.
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

_CLASSES: dict[str, Any] = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}
_PROCESSORS: dict[str, Any] = {
    "sequence-classification": transformers.AutoTokenizer,
    "image-classification": transformers.AutoImageProcessor,
}


def load_model(path: Path, task: Task, labels: Sequence[str], *, seed: int) -> nn.Module:
    """Loads an FM for a task, in eval mode and with every parameter frozen.

    Args:
        path: directory as `save_pretrained` writes it.
        labels: C label names in the order of their class indices.
        seed: draws the task head where the checkpoint has none of C rows.

    Raises:
        ModelError: no such directory, not a model, weights that do not fit config.json, or a model type without a row
            in architectures.py.
    """
    _config(path)
    names = dict(enumerate(labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "task head"))
        try:
            model, report = _CLASSES[task].from_pretrained(
                path,
                num_labels=len(names),
                id2label=names,
                label2id={name: index for index, name in names.items()},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"{path}: cannot be loaded for {task} ({_first_line(error)})", "check model.path"
            ) from None
    _check_layers(path, model, report)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # or it stays a map of its file, and changes with whatever is written there
    return prepare(model)


def load_processor(path: Path, task: Task) -> Any:
    """The tokenizer (text) or image processor (images) that lies in a model or proxy directory; ModelError."""
    try:
        processor = _PROCESSORS[task].from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: holds no tokenizer or image processor that can be loaded ({_first_line(error)})",
            "save it beside the model",
        ) from None
    if task == "sequence-classification":
        # Without these files transformers makes up a tokenizer that knows no word.
        files = {"tokenizer.json", *processor.vocab_files_names.values()}
        if not any((path / name).is_file() for name in files):
            raise ModelError(f"{path}: holds no tokenizer ({' or '.join(sorted(files))})", "save it beside the model")
        if processor.pad_token_id is None:
            processor.pad_token = processor.eos_token
    return processor


def empty_model(directory: Path, task: Task, num_layers: int) -> nn.Module:
    """A model of the FM's shape with `num_layers` layers and meaningless weights, from config.json alone."""
    config = _config(directory)
    set_depth(config, num_layers)
    model: nn.Module = _CLASSES[task].from_config(config, dtype=torch.float32)
    return prepare(model)


def set_depth(config: Any, num_layers: int) -> None:
    """Makes a model's configuration one of `num_layers` layers, fewer than before. In place."""
    config.num_hidden_layers = num_layers
    if hasattr(config, "stage_names"):  # a vision backbone's: the stem and each layer, and which of them it returns
        config.stage_names = config.stage_names[: num_layers + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def prepare(model: nn.Module) -> nn.Module:
    """Freezes every parameter and turns dropout and caches off. In place; returns the model."""
    config: Any = model.config
    config.use_cache = False
    if getattr(config, "pad_token_id", None) is None and hasattr(config, "eos_token_id"):
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return model.requires_grad_(False).eval()


def pad_alike(model: nn.Module, processor: Any) -> None:
    """Tells a model the tokenizer's padding token: a causal classifier reads the last token before the padding."""
    if hasattr(processor, "pad_token_id"):
        model.config.pad_token_id = processor.pad_token_id  # type: ignore[union-attr]


def save_config(model: nn.Module, directory: Path) -> None:
    """Writes config.json without the path that the FM was loaded from: it is nobody else's business."""
    config: Any = model.config
    config._name_or_path = ""
    config.save_pretrained(directory)


def save_model(model: nn.Module, processor: Any, directory: Path) -> None:
    """Writes a directory that plain `transformers` loads."""
    save_config(model, directory)
    model.save_pretrained(directory)  # type: ignore[operator]
    processor.save_pretrained(directory)


def _config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json there", "give the directory of a model saved by transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}/config.json: {_first_line(error)}", "check model.path") from None
    architectures.row(config.model_type)
    return config


def _check_layers(path: Path, model: nn.Module, report: dict[str, Any]) -> None:
    """transformers draws at random what it does not find: right for a head, never for a layer."""
    found_none = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    layers = architectures.layers_path(model)
    if lost := sorted(name for name in found_none if name.startswith(layers)):
        raise ModelError(
            f"{path}: cannot be loaded, it has no {lost[0]} of the size that config.json asks for",
            "save weights and config.json together",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
