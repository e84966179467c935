"""Silo data and public corpora: read, check, encode, batch by length, partition.

A data file is CSV, TSV (both UTF-8 with a header line) or JSON lines. Whatever is wrong with it is one DataError that
names file and line, so that an institution can mend its own data without seeing anybody else's.

    n  samples in a dataset
    M  samples in one batch
    T  tokens of the longest sample in one batch
    C, H, W  channels, height and width of an image
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedpft.config import ColumnsSection, Task
from fedpft.datafiles import closest, listed, one_line, read_rows, read_text
from fedpft.errors import DataError, ModelError
from fedpft.seeding import derive_seed

TOKENIZED_AT_ONCE = 1024  # a fast tokenizer keeps offsets and more for each text: this bounds its memory
BATCHES_IN_BUCKET = 16  # sorted by length among themselves: little padding, yet a batch's samples stay a random lot
PARTITION_DRAWS = 1000
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledSamples:
    """The rows of a labelled data file.

    inputs: n texts, or n image paths.
    label_names: n labels as the file has them.
    lines: n line numbers, where each row begins.
    labels: (n,) int64, index of each label in the label list; None until the list is known.
    """

    path: Path
    inputs: list[str]
    label_names: list[str]
    lines: list[int]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def resolve(self, labels: Sequence[str]) -> "LabelledSamples":
        """The same samples with class indices; raises DataError at the first label that is not in `labels`."""
        index = {name: number for number, name in enumerate(labels)}
        for name, line in zip(self.label_names, self.lines, strict=True):
            if name not in index:
                raise DataError(
                    f"{self.path}:{line}: label {name!r} is not in the server's label list",
                    closest(name, labels, f"use one of its {len(labels)} labels: {listed(labels)}"),
                )
        return replace(self, labels=torch.tensor([index[name] for name in self.label_names], dtype=torch.int64))


def read_labelled(path: Path, columns: ColumnsSection, task: Task, labels: Sequence[str] | None) -> LabelledSamples:
    """Reads and checks a labelled data file.

    Args:
        path: .csv, .tsv or .jsonl.
        columns: which columns hold what.
        task: decides between texts and images; images must be there and readable.
        labels: the label list; None leaves the labels unresolved, see :meth:`LabelledSamples.resolve`.

    Raises:
        DataError: naming file and line.
    """
    inputs, names, lines = [], [], []
    for line, (value, name) in read_rows(path, [_input_column(columns, task), ("label", columns.label)]):
        inputs.append(_checked_input(path, line, value, task))
        if not name.strip():
            raise DataError(f"{path}:{line}: the label is empty", "give the row a label, or remove the row")
        names.append(name.strip())
        lines.append(line)
    samples = LabelledSamples(path, inputs, names, lines)
    return samples if labels is None else samples.resolve(labels)


def read_unlabelled(path: Path, columns: ColumnsSection, task: Task) -> list[str]:
    """Reads the texts or image paths of a public corpus; a label column is not looked at. Raises as read_labelled."""
    return [
        _checked_input(path, line, value, task) for line, (value,) in read_rows(path, [_input_column(columns, task)])
    ]


def image_paths(path: Path, columns: ColumnsSection) -> list[Path]:
    """The images that a data file names, which may be missing. Raises DataError if the file itself cannot be read."""
    return [path.parent / value for _, (value,) in read_rows(path, [("image", columns.image)])]


def read_label_list(path: Path) -> tuple[str, ...]:
    """Reads the server's label list: one label a line, whose order gives the class indices.

    Raises:
        DataError: no such file, no label, an empty line between labels, or a label that is there twice.
    """
    labels = [line.strip() for line in read_text(path).rstrip().split("\n")]
    seen: dict[str, int] = {}
    for number, label in enumerate(labels, 1):
        if not label:
            raise DataError(f"{path}:{number}: empty line in the label list", "put one label on each line")
        if label in seen:
            raise DataError(f"{path}:{number}: label {label!r} is in line {seen[label]} too", "keep one of the two")
        seen[label] = number
    return tuple(labels)


def _input_column(columns: ColumnsSection, task: Task) -> tuple[str, str]:
    return ("image", columns.image) if task == "image-classification" else ("text", columns.text)


def _checked_input(path: Path, line: int, value: str, task: Task) -> str:
    if not value.strip():
        what = "image path" if task == "image-classification" else "text"
        raise DataError(f"{path}:{line}: the {what} is empty", "fill it in, or remove the row")
    if task != "image-classification":
        return value
    image = path.parent / value
    if not image.is_file():
        raise DataError(f"{path}:{line}: no image {image}", "image paths are relative to the data file's directory")
    try:
        with _opened(image) as opened:
            opened.verify()
    except UNREADABLE_IMAGE as error:
        raise DataError(
            f"{path}:{line}: image {image} cannot be read ({one_line(error)})", "replace it or remove the row"
        ) from None
    return str(image)


# --- encoding ---------------------------------------------------------------------------------------------------------


class EncodedDataset(ABC):
    """Samples as a model takes them.

    labels: (n,) int64, or None for unlabelled samples.
    lengths: (n,) int64, what a sample costs: its tokens, or 1 for an image.
    """

    labels: Tensor | None
    lengths: Tensor

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


def encode(inputs: Sequence[str], labels: Tensor | None, processor: Any, task: Task, max_tokens: int) -> EncodedDataset:
    """Turns texts or image paths into what the model takes.

    Args:
        inputs: n texts, or n image paths.
        labels: (n,) int64, or None.
        processor: the FM's tokenizer or image processor, as transformers has them.
        max_tokens: texts are cut after this many tokens, special ones included.

    Raises:
        DataError: a text without a token, an image that cannot be decoded.
        ModelError: a tokenizer without a padding token.
    """
    if task == "image-classification":
        return ImageDataset(_pixel_values(inputs, processor), labels)
    if processor.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in the model's tokenizer_config.json")
    pieces, lengths = [], []
    for start in range(0, len(inputs), TOKENIZED_AT_ONCE):
        texts = list(inputs[start : start + TOKENIZED_AT_ONCE])
        for offset, ids in enumerate(processor(texts, truncation=True, max_length=max_tokens)["input_ids"]):
            if not ids:
                raise DataError(
                    f"sample {start + offset + 1}: the tokenizer finds no token in {texts[offset][:40]!r}",
                    "remove the sample",
                )
            pieces.append(torch.tensor(ids, dtype=torch.int32))
            lengths.append(len(ids))
    return TextDataset(torch.cat(pieces), torch.tensor(lengths), processor.pad_token_id, labels)


def _opened(path: Path | str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def _pixel_values(paths: Sequence[str], processor: Any) -> Tensor:
    values = []
    for path in paths:
        try:
            with _opened(path) as opened:
                image = opened.convert("RGB")
        except UNREADABLE_IMAGE as error:
            raise DataError(
                f"image {path} cannot be read ({one_line(error)})", "replace it or remove its row"
            ) from None
        values.append(processor(images=image, return_tensors="pt")["pixel_values"][0].float())
    return torch.stack(values)


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


def evaluation_batches(
    dataset: EncodedDataset, batch: int, samples: int | None = None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(indices, batch) over the first `samples` samples (default: all), in order of length."""
    lengths = dataset.lengths[:samples]
    for indices in _split(lengths.argsort(stable=True), batch):
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
