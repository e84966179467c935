"""Silo data and public corpora as a model takes them: encode, batch by length, draw, partition.

n  samples in a dataset
M  samples in one batch
T  tokens of the longest sample in one batch
C, H, W  channels, height and width of an image
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpft.config import BadRows
from fedpft.data.images import open_image
from fedpft.data.rows import RowFaults, shown
from fedpft.data.samples import Kind, Samples
from fedpft.errors import DataError, ModelError
from fedpft.seeding import derive_seed

TOKENIZED_AT_ONCE = 1024  # a fast tokenizer keeps offsets and more for each text: this bounds its memory
BATCHES_IN_BUCKET = 16  # sorted by length among themselves: little padding, yet a batch's samples stay a random lot
PARTITION_DRAWS = 1000
MEASURED_TEXTS = 256  # that characters_per_token looks at
MEASURED_CHARACTERS = 4096  # of each


# --- encoding ---------------------------------------------------------------------------------------------------------


class EncodedDataset(ABC):
    """Samples as a model takes them.

    labels: (n,) int64, or None for unlabelled samples.
    lengths: (n,) int64, what a sample costs: its tokens, or 1 for an image.
    cut: how many of the texts are longer than the model takes, and were cut.
    skipped: rows of the data file that were left out because something is wrong with them.
    """

    labels: Tensor | None
    lengths: Tensor
    cut: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The keyword arguments of the model for samples `indices`: (M,) int64, with `labels` if there are any."""
        inputs = self._inputs(indices)
        return inputs if self.labels is None else {**inputs, "labels": self.labels[indices]}

    @abstractmethod
    def _inputs(self, indices: Tensor) -> dict[str, Tensor]: ...


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


class ImageDataset(EncodedDataset):
    """Images as the model's image processor prepares them."""

    def __init__(self, pixel_values: Tensor, labels: Tensor | None) -> None:
        """Args:
        pixel_values: (n, C, H, W) float32. labels: (n,) int64.
        """
        self.pixel_values, self.labels = pixel_values, labels
        self.lengths = torch.ones(len(pixel_values), dtype=torch.int64)

    def _inputs(self, indices: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[indices]}


def encode(
    samples: Samples,
    processor: Any,
    kind: Kind,
    max_tokens: int,
    *,
    bad_rows: BadRows = "refuse",
    way_out: str = "",
) -> EncodedDataset:
    """Turns texts or images into what the model takes.

    Args:
        processor: the FM's tokenizer or image processor, as transformers has them.
        max_tokens: texts are cut after this many tokens, special ones included.
        bad_rows, way_out: as of :meth:`Examination.samples`, for texts without a token.

    Raises:
        DataError: texts without a token, or an image that has changed since it was looked at.
        ModelError: a tokenizer without a padding token.
    """
    if kind == "image":
        dataset: EncodedDataset = ImageDataset(_pixel_values(samples.inputs, processor), samples.labels)
        dataset.skipped = samples.skipped
        return dataset
    if processor.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in the model's tokenizer_config.json")
    kept: list[int] = []
    pieces: list[Tensor] = []
    faults, cut = RowFaults(samples.path), 0
    for start in range(0, len(samples), TOKENIZED_AT_ONCE):
        texts = samples.inputs[start : start + TOKENIZED_AT_ONCE]
        tokens = _tokens(texts, processor, max_tokens)
        cut += _longer(
            [text for text, ids in zip(texts, tokens, strict=True) if len(ids) >= max_tokens], processor, max_tokens
        )
        for number, ids in enumerate(tokens, start):
            if ids:
                kept.append(number)
                pieces.append(torch.tensor(ids, dtype=torch.int32))
            else:
                what = f"the tokenizer finds no token in {shown(samples.inputs[number])}"
                faults.add(samples.lines[number], what, "remove the row")
    if faults and (bad_rows == "refuse" or not kept):
        raise faults.error(len(samples), way_out if kept else "")
    labels = None if samples.labels is None else samples.labels[kept]
    lengths = torch.tensor([len(piece) for piece in pieces])
    dataset = TextDataset(torch.cat(pieces), lengths, processor.pad_token_id, labels)
    dataset.cut, dataset.skipped = cut, samples.skipped + len(faults)
    return dataset


def characters_per_token(texts: Sequence[str], processor: Any, *, seed: int) -> float:
    """Measured on a sample of the texts, so that whoever has no tokenizer can tell how long a text is."""
    chosen = [
        texts[number][:MEASURED_CHARACTERS]
        for number in sample(len(texts), MEASURED_TEXTS, seed, "token length").tolist()
    ]
    tokens = _tokens(chosen, processor, MEASURED_CHARACTERS)  # a token has a character at least, hardly ever less
    return sum(map(len, chosen)) / max(1, sum(map(len, tokens)))


def describe_cut(name: object, samples: int, cut: int, max_tokens: int) -> str:
    """What to say of texts that were, or will be, cut."""
    return f"{name}: {cut} of {samples} texts are longer than {max_tokens} tokens and are cut"


def _tokens(texts: Sequence[str], processor: Any, max_tokens: int) -> list[list[int]]:
    found: list[list[int]] = (
        processor(list(texts), truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    )
    return found


def _longer(texts: Sequence[str], processor: Any, max_tokens: int) -> int:
    """A text was cut if it has more tokens where it may have one more."""
    return sum(len(ids) > max_tokens for ids in _tokens(texts, processor, max_tokens + 1))


def _pixel_values(paths: Sequence[str], processor: Any) -> Tensor:
    images = (open_image(path).image for path in paths)
    return torch.stack([processor(images=image, return_tensors="pt")["pixel_values"][0].float() for image in images])


# --- batching ---------------------------------------------------------------------------------------------------------


def round_window(samples: int, local_epochs: float, round: int) -> tuple[int, int]:
    """(start, count) of the positions that a silo trains on in a round; the same count in every round.

    Args:
        samples: samples the silo has.
        local_epochs: share of them that it goes through in a round.
        round: rounds before this one.
    """
    count = max(1, int(samples * local_epochs + 0.5))
    return round * count, count


def training_order(samples: int, start: int, count: int, seed: int) -> Tensor:
    """Which sample stands at each of the positions start, ..., start + count - 1: (count,) int64.

    Position p belongs to epoch p // samples, and each epoch is a permutation of all samples: a silo that stops in the
    middle of an epoch goes on there in the next round.
    """
    first, last = start // samples, (start + count - 1) // samples
    epochs = []
    for epoch in range(first, last + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        epochs.append(torch.randperm(samples, generator=generator))
    return torch.cat(epochs)[start - first * samples :][:count]


def batches(dataset: EncodedDataset, *, batch: int, start: int, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches for training, each position of the window in exactly one of them.

    Within each run of BATCHES_IN_BUCKET * batch positions the samples are sorted by length, so that a batch holds
    little padding, and the batches are then shuffled, so that length says nothing about time. All of it depends on
    nothing but the arguments. Only one batch, in the last run, may hold fewer than `batch` samples.
    """
    order = training_order(len(dataset), start, count, seed)
    for number, bucket in enumerate(_split(order, BATCHES_IN_BUCKET * batch)):
        lots = _split(bucket[dataset.lengths[bucket].argsort(stable=True)], batch)
        generator = torch.Generator().manual_seed(derive_seed(seed, "batches", start, number))
        for lot in torch.randperm(len(lots), generator=generator).tolist():
            yield dataset.batch(lots[lot])


def sample(count: int, samples: int | None, seed: int, purpose: str) -> Tensor:
    """Which samples stand for all of a dataset, whatever its order: (min(count, samples),) int64, ascending.

    Args:
        count: samples that there are.
        samples: that are wanted; None: all.
        purpose: what for; another one draws others.
    """
    if samples is None or samples >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample", purpose))
    return torch.randperm(count, generator=generator)[:samples].sort().values


def evaluation_batches(
    dataset: EncodedDataset, batch: int, chosen: Tensor | None = None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(indices, batch) over the `chosen` samples, (m,) int64 (default: all), in order of length."""
    chosen = torch.arange(len(dataset)) if chosen is None else chosen
    for indices in _split(chosen[dataset.lengths[chosen].argsort(stable=True)], batch):
        yield indices, dataset.batch(indices)


def _split(indices: Tensor, size: int) -> list[Tensor]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


# --- partitioning -----------------------------------------------------------------------------------------------------


def dirichlet_partition(labels: Tensor | Sequence[int], silos: int, concentration: float, seed: int) -> list[Tensor]:
    """Deals samples out to silos so that each class is spread unevenly: its shares are drawn from a Dirichlet.

    Args:
        labels: (n,) class indices.
        concentration: of the symmetric Dirichlet; near 0 one silo gets nearly all of a class, large is even.

    Returns:
        For each silo the sorted indices of its samples, int64; each sample is in exactly one, and none is empty.

    Raises:
        DataError: if there is no such partition, or none was drawn in PARTITION_DRAWS draws.
    """
    classes = np.asarray(labels)
    if not 0 < silos <= len(classes) or concentration <= 0:
        raise DataError(
            f"{len(classes)} samples cannot be dealt out to {silos} silos with concentration {concentration}",
            "take at least one silo, a sample for each, and a concentration above 0",
        )
    for draw in range(PARTITION_DRAWS):
        generator = np.random.default_rng(derive_seed(seed, "dirichlet", draw))
        parts: list[list[np.ndarray]] = [[] for _ in range(silos)]
        for label in np.unique(classes):
            members = generator.permutation(np.flatnonzero(classes == label))
            shares = generator.dirichlet(np.full(silos, concentration))
            cuts = (np.cumsum(shares[:-1]) * len(members)).round().astype(int)
            for part, dealt in zip(parts, np.split(members, cuts), strict=True):
                part.append(dealt)
        dealt_out = [np.sort(np.concatenate(part)) for part in parts]
        if all(len(part) for part in dealt_out):
            return [torch.from_numpy(part.astype(np.int64)) for part in dealt_out]
    raise DataError(
        f"no draw of {PARTITION_DRAWS} gave each of {silos} silos one of {len(classes)} samples",
        "take fewer silos, more samples or a larger concentration",
    )
