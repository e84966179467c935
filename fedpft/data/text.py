"""Texts as token ids, without padding until they are in a batch.

n  texts in a dataset
M  texts in one batch
T  tokens of the longest text in one batch
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpft.config import BadRows
from fedpft.data.batches import EncodedDataset, sample
from fedpft.data.cache import Add, Kept, keep, key_of
from fedpft.data.rows import RowFaults, shown
from fedpft.data.samples import Samples
from fedpft.errors import ModelError
from fedpft.progress import progress

AT_ONCE = 1024  # a fast tokenizer keeps offsets and more for each text: this bounds its memory
SHOWN_CHUNKS = 64  # so many of these take long enough to show progress
UNTAGGED = -100  # in place of a tag's index, where torch's cross entropy looks away
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

    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]:
        """input_ids, attention_mask: (M, T) int64, padded on the right."""
        return {
            "input_ids": self._padded(self.tokens, indices, longest, self.padding),
            "attention_mask": self._real(indices, longest).long(),
        }

    def _padded(self, values: Tensor, indices: Tensor, longest: int, filling: int) -> Tensor:
        """Those of (sum of lengths,) values that belong to the samples: (M, T) int64."""
        real = self._real(indices, longest)
        source = (self.starts[indices][:, None] + torch.arange(longest)).where(real, 0)
        return values[source].long().where(real, filling)

    def _real(self, indices: Tensor, longest: int) -> Tensor:
        """Where no padding is: (M, T) bool."""
        return torch.arange(longest) < self.lengths[indices][:, None]


TENSORS = {"rows": torch.int64, "lengths": torch.int64, "tokens": torch.int32}


def encode_texts(
    samples: Samples,
    tokenizer: Any,
    max_tokens: int,
    labels: Tensor | None,
    *,
    bad_rows: BadRows = "refuse",
    way_out: str = "",
    cache: Path | None = None,
) -> TextDataset:
    """Turns the texts of samples into token ids.

    Args:
        labels: one for each sample, (n, ...).

    Other arguments and errors as of :func:`tokenize`.
    """
    found = tokenize(samples, tokenizer, max_tokens, bad_rows=bad_rows, way_out=way_out, cache=cache)
    kept_labels = None if labels is None else labels[found["rows"]]
    dataset = TextDataset(found["tokens"], found["lengths"], tokenizer.pad_token_id, kept_labels)
    dataset.cut, dataset.skipped = found.counts["cut"], samples.skipped + found.counts["faults"]
    return dataset


def tokenize(
    samples: Samples,
    tokenizer: Any,
    max_tokens: int,
    *,
    tag_words: bool = False,
    bad_rows: BadRows = "refuse",
    way_out: str = "",
    cache: Path | None = None,
) -> Kept:
    """Turns texts, or words with a blank after each, into token ids.

    Args:
        tokenizer: the FM's, as transformers has it.
        max_tokens: texts are cut after this many tokens, special ones included.
        tag_words: whether the samples have `words`, and as targets a tag for each; of a fast tokenizer.
        bad_rows, way_out: as of :meth:`Examination.samples`, for texts without a token.
        cache: the file that keeps what comes out; None: none does.

    Returns:
        `tokens`: of all texts end to end, (sum of lengths,) int32. `lengths`: (n,) int64. `rows`: (n,) int64, which of
        the samples have a token. With `tag_words` `tags`: (sum of lengths,) int32, that of the word which begins there,
        or UNTAGGED. The counts `cut`, how many texts were too long, and `faults`, of the other rows.

    Raises:
        DataError: texts without a token.
        ModelError: a tokenizer without a padding token.
    """
    check_padding(tokenizer)
    places = {"return_offsets_mapping": True} if tag_words else {}

    def make(add: Add) -> dict[str, int]:
        faults, cut, every_text = RowFaults(samples.path), 0, samples.texts()
        for numbers in in_chunks(len(samples)):
            texts = every_text[numbers.start : numbers.stop]
            encoded = tokenizer(texts, truncation=True, max_length=max_tokens, **places)
            tokens: list[list[int]] = encoded["input_ids"]
            cut += _longer(
                [text for text, ids in zip(texts, tokens, strict=True) if len(ids) >= max_tokens], tokenizer, max_tokens
            )
            rows: list[int] = []
            tags: list[list[int]] = []
            for place, (number, text, ids) in enumerate(zip(numbers, texts, tokens, strict=True)):
                words: list[int] = []
                if tag_words:
                    words = _beginnings(samples["words"][number], encoded["offset_mapping"][place])
                if not ids or (tag_words and max(words) < 0):
                    what = f"the tokenizer finds no token in {shown(text)}"
                    faults.add(samples.lines[number], what, "remove the row")
                    continue
                rows.append(place)
                if tag_words:
                    assert samples.targets is not None
                    given = samples.targets[number]
                    tags.append([given[word] if word >= 0 else UNTAGGED for word in words])
            add(rows=torch.tensor(rows, dtype=torch.int64) + numbers.start, **end_to_end([tokens[row] for row in rows]))
            if tag_words:
                add(tags=torch.tensor([tag for each in tags for tag in each], dtype=torch.int32))
        if (fault := faults.against(len(samples), bad_rows, way_out)) is not None:
            raise fault
        return {"cut": cut, "faults": len(faults)}

    def key() -> str:
        settings = {"max_tokens": max_tokens, "tag_words": tag_words, "bad_rows": bad_rows}
        return key_of(samples.contents(), tokenizer, **settings)

    return keep(cache, key, TENSORS | ({"tags": torch.int32} if tag_words else {}), make)


def in_chunks(samples: int) -> Iterator[range]:
    """The numbers of all samples, as many at a time as are tokenised at once; with progress if that takes a while."""
    chunks = [range(start, min(start + AT_ONCE, samples)) for start in range(0, samples, AT_ONCE)]
    if len(chunks) < SHOWN_CHUNKS:
        yield from chunks
        return
    with progress("tokenising", len(chunks), f"{AT_ONCE} texts") as show:
        for done, chunk in enumerate(chunks, 1):
            yield chunk
            show(done)


def end_to_end(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`tokens`: (sum of lengths,) int32 and `lengths`: (m,) int64 of the token ids of m texts."""
    return {
        "tokens": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64),
    }


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
