"""Samples as a model takes them, one after the other: encoded, in batches by length, drawn.

n  samples in a dataset
M  samples in one batch
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedpft.seeding import derive_seed

BATCHES_IN_BUCKET = 16  # sorted by length among themselves: little padding, yet a batch's samples stay a random lot


class EncodedDataset(ABC):
    """Samples as a model takes them.

    labels: one for each sample, (n, ...), or None for unlabelled samples.
    lengths: (n,) int64, what a sample costs: its tokens, or 1 for an image.
    cut: how many of the texts are longer than the model takes, and were cut.
    skipped: rows of the data file that were left out because something is wrong with them.
    """

    labels: Tensor | None
    lengths: Tensor
    cut: int = 0
    skipped: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """What became of the file's rows, by the names of silo.yaml's `share.metrics`."""
        return {"skipped_rows": self.skipped, "cut_texts": self.cut}

    def describe_cut(self, name: object, max_tokens: int) -> str:
        """What to say of the texts that were cut."""
        return describe_cut(name, len(self), self.cut, max_tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Tensor, of: Tensor | None = None) -> dict[str, Tensor]:
        """The keyword arguments of the model for samples `indices`: (M,) int64, with `labels` if there are any.

        Args:
            of: the batch that these are part of, (m,) int64: they are padded as in it.
        """
        inputs = self._inputs(indices, int(self.lengths[indices if of is None else of].max()))
        return inputs if self.labels is None else {**inputs, "labels": self.labels[indices]}

    def ahead(self, lots: Iterable[Tensor]) -> Iterator[Tensor]:
        """The lots, (M,) int64 each, from one whose :meth:`batch` may begin with the next before it is asked for it."""
        return iter(lots)

    @abstractmethod
    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]: ...


def describe_cut(name: object, samples: int, cut: int, max_tokens: int) -> str:
    """What to say of texts that were, or will be, cut."""
    return f"{name}: {cut} of {samples} texts are longer than {max_tokens} tokens and are cut"


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
    """The samples of :func:`lots` as a model takes them."""
    return map(dataset.batch, dataset.ahead(lots(dataset, batch=batch, start=start, count=count, seed=seed)))


def lots(dataset: EncodedDataset, *, batch: int, start: int, count: int, seed: int) -> Iterator[Tensor]:
    """Which samples are in each batch of a training, (M,) int64; each position of the window is in exactly one.

    Within each run of BATCHES_IN_BUCKET * batch positions the samples are sorted by length, so that a batch holds
    little padding, and the batches are then shuffled, so that length says nothing about time. All of it depends on
    nothing but the arguments. Only one batch, in the last run, may hold fewer than `batch` samples.
    """
    order = training_order(len(dataset), start, count, seed)
    for number, bucket in enumerate(_split(order, BATCHES_IN_BUCKET * batch)):
        by_length = _split(bucket[dataset.lengths[bucket].argsort(stable=True)], batch)
        generator = torch.Generator().manual_seed(derive_seed(seed, "batches", start, number))
        for lot in torch.randperm(len(by_length), generator=generator).tolist():
            yield by_length[lot]


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
    for indices in dataset.ahead(by_length(dataset, batch, chosen)):
        yield indices, dataset.batch(indices)


def by_length(dataset: EncodedDataset, batch: int, chosen: Tensor) -> list[Tensor]:
    """The `chosen` samples, (m,) int64, in order of length, `batch` at a time."""
    return _split(chosen[dataset.lengths[chosen].argsort(stable=True)], batch)


def _split(indices: Tensor, size: int) -> list[Tensor]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
