"""Means that a few lying silos cannot move at will.

None of them weighs by samples: how many a silo has is its own claim. What they resist is a minority; and silos that
are merely unlike the others lose their say too, which costs accuracy on skewed data.

N silos, n values of a tensor.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COLUMNS = 1 << 16  # taken at a time: what is needed beside the N tensors stays small


def trimmed_mean(tensors: Sequence[Tensor], trimmed: int) -> Tensor:
    """Of each value the mean without the `trimmed` largest and smallest (Yin et al. 2018, arXiv 1803.01498).

    Sums in float64 and in the order of size: the same bits in whatever order the tensors stand.

    Args:
        tensors: of one shape and dtype, which is the result's too.
    """
    kept = len(tensors) - 2 * trimmed
    if trimmed < 0 or kept < 1:
        raise ValueError(f"of {len(tensors)} tensors, {trimmed} cannot be left out on each side")
    mean = torch.zeros(tensors[0].numel(), dtype=torch.float64)
    for columns, total in zip(_columns(tensors), mean.split(COLUMNS), strict=True):
        for row in columns.sort(dim=0).values[trimmed : trimmed + kept]:
            total.add_(row)
    return mean.div_(kept).to(tensors[0].dtype).view(tensors[0].shape)


def median(tensors: Sequence[Tensor]) -> Tensor:
    """Of each value the median (Yin et al. 2018); of an even number of tensors the mean of the middle two."""
    return trimmed_mean(tensors, (len(tensors) - 1) // 2)


def squared_distances(tensors: Sequence[Tensor]) -> Tensor:
    """(N, N) float64, between each two; those of an adapter are the sum over its tensors."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for columns in _columns(tensors):
        values = columns.double()
        # By differences: updates of one round are alike, and products of them would cancel.
        total += torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total


def krum(distances: Tensor, byzantine: int) -> list[int]:
    """Which updates multi-Krum keeps (Blanchard et al. 2017), ascending; the mean of those is the round's result.

    An update's score is the sum of its squared distances to the N - byzantine - 2 others that are nearest. The
    N - byzantine updates of lowest score are kept; among equals the first.

    Args:
        distances: (N, N), squared; N at least 2 byzantine + 3.
        byzantine: how many of the silos may lie.
    """
    silos = len(distances)
    if silos < 2 * byzantine + 3:
        raise ValueError(f"{silos} updates are too few for Krum with {byzantine} that may lie")
    near = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values[:, : silos - byzantine - 2]
    order: list[int] = near.sum(dim=1).argsort(stable=True).tolist()
    return sorted(order[: silos - byzantine])


def _columns(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """(N, COLUMNS) and, at the end, what is left of the n values."""
    for parts in zip(*(tensor.flatten().split(COLUMNS) for tensor in tensors), strict=True):
        yield torch.stack(parts)
