"""Whether the FM, its tokenizer or image processor, and `max_tokens` go together: asked once, before a silo is there.

B batch, T tokens, C classes.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fedpft.config import TaskName
from fedpft.errors import ModelError
from fedpft.finite import is_finite
from fedpft.model import architectures, loading
from fedpft.tasks import TASKS

PROBE = "The quick brown fox jumps over the lazy dog. 0123456789"
PROBE_SIDE = 64  # pixels


def make_fit(model: nn.Module, processor: Any, task: TaskName, max_tokens: int) -> None:
    """Tells the FM the tokenizer's padding token, and tries both on the longest input that there can be.

    Raises:
        ModelError: they are not of one model, or the FM cannot take `max_tokens` tokens.
    """
    if not TASKS[task].has_tokens:
        inputs = dict(processor(images=Image.new("RGB", (PROBE_SIDE, PROBE_SIDE)), return_tensors="pt"))
    else:
        _check_tokens(model, processor, max_tokens)
        # A causal classifier reads the last token before the padding.
        model.config.pad_token_id = processor.pad_token_id  # type: ignore[union-attr]
        inputs = _longest_text(processor, max_tokens)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            logits: Tensor = model(**{name: value.to(device) for name, value in inputs.items()}).logits
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ModelError(
            f"the FM cannot take what its own processor makes ({shapes}): {loading.first_line(error)}",
            "put tokenizer or image processor of this FM beside it in model.path",
        ) from None
    if not is_finite(logits):
        raise ModelError("the FM's answer to a first input holds NaN or infinity", "check the FM's weights")


def check_travels(processor: Any, task: TaskName, directory: Path) -> None:
    """Whether a processor is the same after it was written to `directory` and read again, as every silo will.

    Raises:
        ModelError: it is not.
    """
    processor.save_pretrained(directory)
    received = loading.load_processor(directory, task)
    if not TASKS[task].has_tokens:
        image = Image.linear_gradient("L").convert("RGB")
        ours, theirs = (each(images=image, return_tensors="pt")["pixel_values"][0] for each in (processor, received))
        same = bool(torch.equal(ours, theirs))
    else:
        same = processor(PROBE)["input_ids"] == received(PROBE)["input_ids"]
    if not same:
        raise ModelError(
            "the tokenizer or image processor is another one after it was saved and loaded again",
            "save it with the transformers that is installed here, beside the model",
        )


def _check_tokens(model: nn.Module, tokenizer: Any, max_tokens: int) -> None:
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    largest = max([tokenizer.pad_token_id, *tokenizer.get_vocab().values()])
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"the tokenizer's token {token!r} has the id {largest}, the FM's embedding has {rows} rows",
            "put this FM's own tokenizer beside it, or extend its embedding with resize_token_embeddings and save it",
        )
    after = architectures.architecture_of(model).positions_after_padding
    if after and (padding := architectures.padding_of(model)) != tokenizer.pad_token_id:
        raise ModelError(
            f"the tokenizer pads with {tokenizer.pad_token_id}, the FM counts positions from its padding id {padding}",
            "give config.json the tokenizer's pad_token_id, or put this FM's own tokenizer beside it",
        )
    longest, added = architectures.longest_input(model), int(tokenizer.num_special_tokens_to_add())
    if longest is not None and max_tokens > longest:
        raise ModelError(
            f"model.max_tokens is {max_tokens}, the FM has positions for {longest} tokens",
            f"set model.max_tokens to at most {longest}",
        )
    if max_tokens <= added:
        raise ModelError(
            f"model.max_tokens is {max_tokens}, of which the tokenizer needs {added} for tokens of its own",
            f"set model.max_tokens to at least {added + 1}",
        )


def _longest_text(tokenizer: Any, max_tokens: int) -> dict[str, Tensor]:
    """Two texts, of `max_tokens` tokens and of few: input_ids, attention_mask (2, T) int64."""
    texts = [" ".join([PROBE] * max_tokens), PROBE]
    ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    longest = max(len(encoded) for encoded in ids)
    padded = [encoded + [tokenizer.pad_token_id] * (longest - len(encoded)) for encoded in ids]
    real = [[1] * len(encoded) + [0] * (longest - len(encoded)) for encoded in ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(real)}
