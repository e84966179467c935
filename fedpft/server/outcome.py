"""What a round has led to, as the algorithm needs it: of single updates, or of their sum alone."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fedpft.config import AggregationSection, SecureTerms
from fedpft.model.adapters import Adapter
from fedpft.privacy import fixedpoint
from fedpft.privacy.fixedpoint import Layout, Total
from fedpft.server.updates import COUNTS, Update, adapter_shapes, aggregate
from fedpft.wire.tensors import TensorFile

log = logging.getLogger(__name__)


class Outcome(Protocol):
    """One round's."""

    @property
    def silos(self) -> int:
        """How many silos it is of."""

    def mean(self, section: AggregationSection, batch: int) -> Adapter:
        """Of the trained adapters; batch: samples of one of a silo's local steps."""

    def start_tensor(self, name: str) -> Tensor:
        """Of the adapter before the round."""

    def train_loss(self) -> float | None:
        """Mean over the silos that share it: by samples of single updates, each the same in a sum."""

    def silo_seconds(self) -> float | None:
        """Mean time that a silo trained, of those that share it."""

    def inactivity(self) -> list[dict[str, Tensor]]:
        """Counts, each of one silo or of all together; none if nobody was asked, or shares them."""

    def told(self) -> dict[str, dict[str, int]]:
        """Silo -> of COUNTS what it shares."""

    def summed(self) -> dict[str, int]:
        """What only a sum has to say of all silos together, in place of what each told."""


@dataclass(frozen=True)
class Single:
    """The updates, in the order of the silos' names."""

    updates: Sequence[Update]

    @property
    def silos(self) -> int:
        """How many."""
        return len(self.updates)

    def mean(self, section: AggregationSection, batch: int) -> Adapter:
        """As the section says."""
        return aggregate(self.updates, section, batch)

    def start_tensor(self, name: str) -> Tensor:
        """Of the adapter before the round."""
        return self.updates[0].start_tensor(name)

    def train_loss(self) -> float | None:
        """By samples."""
        shared = [update for update in self.updates if "train_loss" in update.metrics]
        total = sum(update.metrics["train_loss"] * update.samples for update in shared)
        return total / sum(update.samples for update in shared) if shared else None

    def silo_seconds(self) -> float | None:
        """Of those that share it."""
        shared = [update.metrics["seconds"] for update in self.updates if "seconds" in update.metrics]
        return sum(shared) / len(shared) if shared else None

    def inactivity(self) -> list[dict[str, Tensor]]:
        """Of each silo that shares them."""
        return [counts for update in self.updates if (counts := update.inactivity)]

    def told(self) -> dict[str, dict[str, int]]:
        """Of each silo."""
        return {
            update.silo: {name: int(update.metrics[name]) for name in sorted(COUNTS & update.metrics.keys())}
            for update in self.updates
        }

    def summed(self) -> dict[str, int]:
        """Nothing that does not follow."""
        return {}


class Sum:
    """The sum over the silos of a round, which is all that the server has of it."""

    def __init__(self, path: Path, start: TensorFile, layout: Layout, terms: SecureTerms, silos: int) -> None:
        """Args:
            path: file of its words; read each time that something is asked for.
            start: the adapter before the round.

        Raises:
            InvalidUpdate: it is none.
        """
        self._path, self._start, self._layout, self._terms = path, start, layout, terms
        self.silos = silos
        total = self._total()
        self._samples, self._weight, self._metrics = total.samples, total.weight, total.metrics

    def mean(self, section: AggregationSection, batch: int) -> Adapter:
        """A_r + sum of w_i (A_i - A_r) / sum of w_i; A_r if all weights are 0. The silos have weighed already."""
        change = self._total().change
        if not self._weight:
            log.warning("all silos weigh 0: the adapter stays as it was")
        mean = {}
        for name in adapter_shapes(self._start):
            start = mean[name] = self.start_tensor(name)
            if self._weight and name in change:  # or it does not train
                mean[name] = change.pop(name).div_(self._weight).add_(start).to(start.dtype)
        return mean

    def start_tensor(self, name: str) -> Tensor:
        """Of the adapter before the round."""
        return self._start.tensor("adapter", name)

    def train_loss(self) -> float | None:
        """Each silo counts the same."""
        return self._mean_of("train_loss")

    def silo_seconds(self) -> float | None:
        """Of those that share it."""
        return self._mean_of("seconds")

    def inactivity(self) -> list[dict[str, Tensor]]:
        """Of all silos that share them, together."""
        counts = self._total().inactivity
        return [] if counts is None else [counts]

    def told(self) -> dict[str, dict[str, int]]:
        """Nothing of one silo."""
        return {}

    def summed(self) -> dict[str, int]:
        """Samples, and of COUNTS what silos share; nothing where each puts in a 1."""
        if self._terms.silo_privacy is not None:
            return {}
        counts = {name: int(self._metrics[name][0]) for name in sorted(COUNTS & self._metrics.keys())}
        return {"samples": self._samples} | counts

    def _mean_of(self, metric: str) -> float | None:
        total, sharers = self._metrics.get(metric, (0.0, 0))
        return total / sharers if sharers else None

    def _total(self) -> Total:
        words = TensorFile(self._path).tensor("sum", "words")
        if words.shape != (self._layout.words,) or words.dtype != torch.int32:
            raise ValueError(f"{self._path}: holds another sum than this round's")
        return fixedpoint.decode(words, self._layout, self._terms, self.silos)
