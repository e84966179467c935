"""How often has a silo each label? Read from what became of the head's rows.

Each class's row of the head moves by how often the class occurs, so that an update's rows tell its labels (Wainakh et
al. 2022, arXiv 2105.09369; over several local steps: Chen and Vikalo 2024, arXiv 2405.00955). How far, depends on
optimizer, logit adjustment and noise: that is not worked out here but learned from shadows, by ridge regression of the
log of a class's share.

C classes; E features of a class.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from fedpft.leakage.scores import Finding, total_variation
from fedpft.leakage.shadows import Shadow
from fedpft.model.adapters import Adapter

RIDGE = 0.1  # in units of a feature's mean square
LEAST_SHARE = 0.005  # below which shares are not told apart


class LabelReader:
    """Reads label shares from an adapter that was trained from a known one."""

    def __init__(self, head: Sequence[str], start: Adapter, shadows: Sequence[Shadow]) -> None:
        """Learns to. head: names of the tensors with a row for each class."""
        self._head, self._start = head, start
        features = torch.cat([self._features(shadow.adapter) for shadow in shadows])
        shares = torch.cat([shadow.shares for shadow in shadows if shadow.shares is not None])
        wanted = (shares + LEAST_SHARE).log()
        self._usual, self._shift = wanted.mean(), features.mean(0)
        self._spread = features.std(0).clamp(min=1e-12)
        scaled = (features - self._shift) / self._spread
        ridge = RIDGE * len(scaled) * torch.eye(scaled.shape[1], dtype=scaled.dtype)
        self._weights = torch.linalg.solve(scaled.t() @ scaled + ridge, scaled.t() @ (wanted - self._usual))

    def read(self, adapter: Adapter) -> Tensor:
        """(C,) shares, float64."""
        scaled = (self._features(adapter) - self._shift) / self._spread
        shares: Tensor = (scaled @ self._weights + self._usual).softmax(0)
        return shares

    def _features(self, adapter: Adapter) -> Tensor:
        """(C, E): how far a class's row and bias moved beside those of the others, also if less, and both together."""
        changes = [(adapter[name] - self._start[name]).double() for name in self._head]
        moved = [change.flatten(1).norm(dim=1) if change.dim() > 1 else change for change in changes]
        columns = [(each - each.mean()) / each.std().clamp(min=1e-12) for each in moved]
        below = [each.clamp(max=0.0) for each in columns]
        return torch.stack([*columns, *below, *(a * b for a, b in combinations(columns, 2))], dim=1)


def findings(sees: str, read: Sequence[Tensor], truth: Sequence[Tensor], public: Tensor) -> list[Finding]:
    """Of what was read of each silo, (C,), beside the better of two guesses, which the server has anyway: all labels
    alike, and shares as in the owner's data. error: of the difference, by how it varies from silo to silo."""
    guesses = (torch.full_like(public, 1.0 / len(public)), public)
    distances = [[total_variation(shares, each) for each in truth] for shares in guesses]
    guess = min(distances, key=statistics.fmean)
    values = list(map(total_variation, read, truth))
    gains = [one - other for one, other in zip(guess, values, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    value, guessed = statistics.fmean(values), statistics.fmean(guess)
    return [Finding("the server", sees, "label shares of a silo", "total variation", value, guessed, error, more=False)]
