"""Federated averaging: A_{r+1} = sum_i (n_i / n) A_i (method.md, section 3)."""

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightedMean:
    """A mean that takes one update at a time, so that memory does not grow with the number of silos.

    Sums in float64: exact for one silo, and of no consequence for the next round's float32. Sums still depend on
    their order, so callers add in the order of the silos' names.
    """

    def __init__(self) -> None:
        self._total: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        """Adds one silo's tensors with its number of samples."""
        if weight < 1:
            raise ValueError(f"weight must be a positive number of samples, got {weight}")
        if self._total and self._total.keys() != tensors.keys():
            raise ValueError("every update must have the same tensors")
        for name, tensor in tensors.items():
            term = tensor.double() * weight
            self._total[name] = self._total[name] + term if name in self._total else term
            self._dtypes[name] = tensor.dtype
        self._weight += weight

    def result(self) -> dict[str, Tensor]:
        """The weighted mean in the updates' own dtypes."""
        if not self._weight:
            raise ValueError("no update was added")
        return {name: (total / self._weight).to(self._dtypes[name]) for name, total in self._total.items()}
