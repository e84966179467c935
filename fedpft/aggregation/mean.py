"""Means that weigh the silos: federated averaging (method.md, section 3), and FedNova's for unlike numbers of steps."""

from collections.abc import Iterable

import torch
from torch import Tensor


def weighted_mean(terms: Iterable[tuple[Tensor, int]]) -> Tensor:
    """A_{r+1} = sum_i (n_i / n) A_i of one tensor, in the tensors' own dtype; one term at a time is in memory.

    Sums in float64: exact for one silo, and of no consequence for the next round's float32. Sums still depend on
    their order, so callers pass the terms in the order of the silos' names.

    Args:
        terms: tensors of one shape and dtype, each with its number of samples.
    """
    total: Tensor | None = None
    dtype: torch.dtype | None = None
    samples = 0
    for tensor, weight in terms:
        _check_weight(weight)
        if total is not None and (tensor.shape, tensor.dtype) != (total.shape, dtype):
            raise ValueError("every term must have the same shape and dtype")
        term = tensor.double() * weight
        total = term if total is None else total.add_(term)
        samples, dtype = samples + weight, tensor.dtype
    if total is None:
        raise ValueError("there is no term")
    return total.div_(samples).to(dtype)


def normalized_mean(start: Tensor, terms: Iterable[tuple[Tensor, int]], batch: int) -> Tensor:
    """FedNova (Wang et al. 2020, arXiv 2007.07481) of one tensor, in its own dtype; one term at a time is in memory.

        A_{r+1} = A_r + t sum_i (n_i / n) (A_i - A_r) / t_i        t = sum_i (n_i / n) t_i        t_i = ceil(n_i / M)

    t_i are the local steps of silo i with batches of M samples. Under :func:`weighted_mean` a silo of many samples
    counts twice over: it weighs more, and has gone farther. Here it goes as far as the others for each step. If all
    silos took the same number of steps, this is the weighted mean, but for the rounding. The more unlike they are, the
    more the factors of the changes add up to: from 1 to nearly the number of silos, if one has most of the samples.

    Args:
        start: A_r, what the silos began with.
        terms: the trained tensors, of its shape and dtype, each with its number of samples, in the order of the
            silos' names.
        batch: M.
    """
    begun = start.double()
    total, samples, sample_steps = torch.zeros_like(begun), 0, 0
    for tensor, weight in terms:
        _check_weight(weight)
        if (tensor.shape, tensor.dtype) != (start.shape, start.dtype):
            raise ValueError("every term must have the same shape and dtype")
        steps = -(-weight // batch)
        total.add_(tensor.double().sub_(begun).mul_(weight / steps))
        samples, sample_steps = samples + weight, sample_steps + weight * steps
    if not samples:
        raise ValueError("there is no term")
    return total.mul_(sample_steps / samples / samples).add_(begun).to(start.dtype)


def _check_weight(weight: int) -> None:
    if weight < 1:
        raise ValueError(f"weight must be a positive number of samples, got {weight}")
