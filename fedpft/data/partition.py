"""One labelled file dealt out to silos, as unevenly as real ones have it.

n  samples in the file
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedpft.errors import DataError
from fedpft.seeding import derive_seed

PARTITION_DRAWS = 1000


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
