"""Texts as token ids, without padding until they are in a batch.

n  texts in a dataset
M  texts in one batch
T  tokens of the longest text in one batch
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
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
        tokens: (sum of lengths,) int32. lengths: (n,) int64. padding: id that fills a batch. labels: (n, ...).
        """
        self.tokens, self.lengths, self.padding, self.labels = tokens, lengths, padding, labels
        self.starts = lengths.cumsum(0) - lengths

    def _inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """input_ids, attention_mask: (M, T) int64, padded on the right."""
        return {
            "input_ids": self._padded(self.tokens, indices, self.padding),
            "attention_mask": self._real(indices).long(),
        }

    def _padded(self, values: Tensor, indices: Tensor, filling: int) -> Tensor:
        """Those of (sum of lengths,) values that belong to the samples: (M, T) int64."""
        real = self._real(indices)
        source = (self.starts[indices][:, None] + torch.arange(real.shape[1])).where(real, 0)
        return values[source].long().where(real, filling)

    def _real(self, indices: Tensor) -> Tensor:
        """Where no padding is: (M, T) bool."""
        lengths = self.lengths[indices]
        return torch.arange(int(lengths.max())) < lengths[:, None]


@dataclass
class Tokenized:
    """Texts as token ids.

    rows: which of the samples have a token.
    ids: the token ids of each.
    words: for each token of each the number of the word that begins there, or -1; nothing if nobody asked.
    cut: how many texts were too long.
    faults: of the other rows.
    """

    faults: RowFaults
    rows: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    words: list[list[int]] = field(default_factory=list)
    cut: int = 0

    @property
    def tokens(self) -> Tensor:
        """All end to end: (sum of lengths,) int32."""
        return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in self.ids])

    @property
    def lengths(self) -> Tensor:
        """(n,) int64."""
        return torch.tensor([len(ids) for ids in self.ids])


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
        labels: one for each sample, (n, ...).

    Other arguments and errors as of :func:`tokenize`.
    """
    found = tokenize(samples, tokenizer, max_tokens, bad_rows=bad_rows, way_out=way_out)
    kept_labels = None if labels is None else labels[found.rows]
    dataset = TextDataset(found.tokens, found.lengths, tokenizer.pad_token_id, kept_labels)
    dataset.cut, dataset.skipped = found.cut, samples.skipped + len(found.faults)
    return dataset


def tokenize(
    samples: Samples,
    tokenizer: Any,
    max_tokens: int,
    *,
    find_words: bool = False,
    bad_rows: BadRows = "refuse",
    way_out: str = "",
) -> Tokenized:
    """Turns texts, or words with a blank after each, into token ids.

    Args:
        tokenizer: the FM's, as transformers has it.
        max_tokens: texts are cut after this many tokens, special ones included.
        find_words: whether the samples have `words`, and it is asked where those begin; of a fast tokenizer.
        bad_rows, way_out: as of :meth:`Examination.samples`, for texts without a token.

    Raises:
        DataError: texts without a token.
        ModelError: a tokenizer without a padding token.
    """
    check_padding(tokenizer)
    found, every_text = Tokenized(RowFaults(samples.path)), samples.texts()
    places = {"return_offsets_mapping": True} if find_words else {}
    for start in range(0, len(samples), TOKENIZED_AT_ONCE):
        texts = every_text[start : start + TOKENIZED_AT_ONCE]
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens, **places)
        tokens: list[list[int]] = encoded["input_ids"]
        found.cut += _longer(
            [text for text, ids in zip(texts, tokens, strict=True) if len(ids) >= max_tokens], tokenizer, max_tokens
        )
        for number, (text, ids) in enumerate(zip(texts, tokens, strict=True), start):
            words: list[int] = []
            if find_words:
                words = _beginnings(samples["words"][number], encoded["offset_mapping"][number - start])
            if not ids or (find_words and max(words) < 0):
                what = f"the tokenizer finds no token in {shown(text)}"
                found.faults.add(samples.lines[number], what, "remove the row")
                continue
            found.rows.append(number)
            found.ids.append(ids)
            found.words.append(words)
    if (fault := found.faults.against(len(samples), bad_rows, way_out)) is not None:
        raise fault
    return found


def check_padding(tokenizer: Any) -> None:
    """Raises ModelError for a tokenizer without a padding token."""
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in the model's tokenizer_config.json")


def characters_per_token(texts: Sequence[str], tokenizer: Any, *, seed: int) -> float:
    """Measured on a sample of the texts, so that whoever has no tokenizer can tell how long a text is."""
    chosen = [
        texts[number][:MEASURED_CHARACTERS]
        for number in sample(len(texts), MEASURED_TEXTS, seed, "token length").tolist()
    ]
    tokens = _tokens(chosen, tokenizer, MEASURED_CHARACTERS)  # a token has a character at least, hardly ever less
    return sum(map(len, chosen)) / max(1, sum(map(len, tokens)))


def _beginnings(words: Sequence[str], places: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the number of the word whose first piece it is, or -1.

    Args:
        places: for each token where it begins and ends among the characters of the words with a blank after each. It
            may begin with that blank, and ends where it begins if it is none of the text's.
    """
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))
    found, last = [], -1
    for begin, end in places:
        word = bisect_right(starts, end - 1) - 1
        is_first = begin < end and word > last and end - 1 < starts[word] + len(words[word])
        found.append(word if is_first else -1)
        last = word if is_first else last
    return found


def _tokens(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    found: list[list[int]] = (
        tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    )
    return found


def _longer(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> int:
    """A text was cut if it has more tokens where it may have one more."""
    return sum(len(ids) > max_tokens for ids in _tokens(texts, tokenizer, max_tokens + 1))
