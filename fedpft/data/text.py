"""Texts as token ids, without padding until they are in a batch.

n  texts in a dataset
M  texts in one batch
T  tokens of the longest text in one batch
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpft.config import BadRows
from fedpft.data.batches import EncodedDataset, sample
from fedpft.data.rows import RowFaults, shown
from fedpft.data.samples import Samples
from fedpft.errors import ModelError

TOKENIZED_AT_ONCE = 1024  # a fast tokenizer keeps offsets and more for each text: this bounds its memory
MEASURED_TEXTS = 256  # that characters_per_token looks at
MEASURED_CHARACTERS = 4096  # of each


class TextDataset(EncodedDataset):
    """Token ids of all samples end to end, without padding."""

    def __init__(self, tokens: Tensor, lengths: Tensor, padding: int, labels: Tensor | None) -> None:
        """Args:
        tokens: (sum of lengths,) int32. lengths: (n,) int64. padding: id that fills a batch. labels: (n,) int64.
        """
        self.tokens, self.lengths, self.padding, self.labels = tokens, lengths, padding, labels
        self.starts = lengths.cumsum(0) - lengths

    def _inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """input_ids, attention_mask: (M, T) int64, padded on the right."""
        lengths = self.lengths[indices]
        position = torch.arange(int(lengths.max()))
        real = position < lengths[:, None]
        source = (self.starts[indices][:, None] + position).where(real, 0)
        input_ids = self.tokens[source].long().where(real, self.padding)
        return {"input_ids": input_ids, "attention_mask": real.long()}


def encode_texts(
    samples: Samples,
    tokenizer: Any,
    max_tokens: int,
    labels: Tensor | None,
    *,
    bad_rows: BadRows = "refuse",
    way_out: str = "",
) -> TextDataset:
    """Turns the texts of samples into token ids.

    Args:
        tokenizer: the FM's, as transformers has it.
        max_tokens: texts are cut after this many tokens, special ones included.
        labels: one for each sample, (n, ...).
        bad_rows, way_out: as of :meth:`Examination.samples`, for texts without a token.

    Raises:
        DataError: texts without a token.
        ModelError: a tokenizer without a padding token.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in the model's tokenizer_config.json")
    kept: list[int] = []
    pieces: list[Tensor] = []
    faults, cut = RowFaults(samples.path), 0
    for start in range(0, len(samples), TOKENIZED_AT_ONCE):
        texts = samples["text"][start : start + TOKENIZED_AT_ONCE]
        tokens = _tokens(texts, tokenizer, max_tokens)
        cut += _longer(
            [text for text, ids in zip(texts, tokens, strict=True) if len(ids) >= max_tokens], tokenizer, max_tokens
        )
        for number, ids in enumerate(tokens, start):
            if ids:
                kept.append(number)
                pieces.append(torch.tensor(ids, dtype=torch.int32))
            else:
                what = f"the tokenizer finds no token in {shown(samples['text'][number])}"
                faults.add(samples.lines[number], what, "remove the row")
    if faults and (bad_rows == "refuse" or not kept):
        raise faults.error(len(samples), way_out if kept else "")
    lengths = torch.tensor([len(piece) for piece in pieces])
    kept_labels = None if labels is None else labels[kept]
    dataset = TextDataset(torch.cat(pieces), lengths, tokenizer.pad_token_id, kept_labels)
    dataset.cut, dataset.skipped = cut, samples.skipped + len(faults)
    return dataset


def characters_per_token(texts: Sequence[str], tokenizer: Any, *, seed: int) -> float:
    """Measured on a sample of the texts, so that whoever has no tokenizer can tell how long a text is."""
    chosen = [
        texts[number][:MEASURED_CHARACTERS]
        for number in sample(len(texts), MEASURED_TEXTS, seed, "token length").tolist()
    ]
    tokens = _tokens(chosen, tokenizer, MEASURED_CHARACTERS)  # a token has a character at least, hardly ever less
    return sum(map(len, chosen)) / max(1, sum(map(len, tokens)))


def _tokens(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    found: list[list[int]] = (
        tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    )
    return found


def _longer(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> int:
    """A text was cut if it has more tokens where it may have one more."""
    return sum(len(ids) > max_tokens for ids in _tokens(texts, tokenizer, max_tokens + 1))
