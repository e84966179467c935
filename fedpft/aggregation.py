"""Federated averaging: A_{r+1} = sum_i (n_i / n) A_i (method.md, section 3)."""

from collections.abc import Iterable

import torch
from torch import Tensor


def weighted_mean(terms: Iterable[tuple[Tensor, int]]) -> Tensor:
    """The mean of one tensor over the silos, in the tensors' own dtype; one term at a time is in memory.

    Sums in float64: exact for one silo, and of no consequence for the next round's float32. Sums still depend on
    their order, so callers pass the terms in the order of the silos' names.

    Args:
        terms: tensors of one shape and dtype, each with its number of samples.
    """
    total: Tensor | None = None
    dtype: torch.dtype | None = None
    samples = 0
    for tensor, weight in terms:
        if weight < 1:
            raise ValueError(f"weight must be a positive number of samples, got {weight}")
        if total is not None and (tensor.shape, tensor.dtype) != (total.shape, dtype):
            raise ValueError("every term must have the same shape and dtype")
        term = tensor.double() * weight
        total = term if total is None else total.add_(term)
        samples, dtype = samples + weight, tensor.dtype
    if total is None:
        raise ValueError("there is no term")
    return total.div_(samples).to(dtype)
