"""The server's optimizer: what it makes of the mean of a round's updates.

    D = mean - A_r                                             the round's change, in place of a gradient
    none         A_{r+1} = A_r + rate D
    momentum     m = beta1 m + D                               FedAvgM (Hsu et al. 2019, arXiv 1909.06335)
                 A_{r+1} = A_r + rate m
    adam, yogi   m = beta1 m + (1 - beta1) D                   FedAdam, FedYogi (Reddi et al. 2021, arXiv 2003.00295)
                 v = v + (1 - beta2) (D^2 - v)                 adam
                 v = v + (1 - beta2) D^2 sign(D^2 - v)         yogi
                 A_{r+1} = A_r + rate m / (sqrt(v) + epsilon)

m begins at 0, v at epsilon^2; as in the papers neither is corrected for how it began.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fedpft.config import AggregationSection

Moment = Literal["first_moment", "second_moment"]
Moments = dict[Moment, dict[str, Tensor]]  # m and v, float64: the squares of a hostile update still fit

KEPT: dict[str, tuple[Moment, ...]] = {
    "none": (),
    "momentum": ("first_moment",),
    "adam": ("first_moment", "second_moment"),
    "yogi": ("first_moment", "second_moment"),
}


def beginning(like: Mapping[str, Tensor], settings: AggregationSection) -> Moments:
    """The state before the first round, for an adapter with tensors of these shapes."""
    values: dict[Moment, float] = {"first_moment": 0.0, "second_moment": settings.epsilon**2}
    return {
        moment: {name: torch.full(tensor.shape, values[moment], dtype=torch.float64) for name, tensor in like.items()}
        for moment in KEPT[settings.optimizer]
    }


def step(
    start: Callable[[str], Tensor], mean: Mapping[str, Tensor], moments: Moments, settings: AggregationSection
) -> tuple[dict[str, Tensor], Moments]:
    """The adapter that the next round begins with, and the state that goes with it; nothing is changed in place.

    Args:
        start: gives a tensor of A_r by name.
        mean: of the round's updates, the same names, shapes and dtypes.
        moments: the state after the round before, or :func:`beginning`.
    """
    if settings.optimizer == "none" and settings.rate == 1.0:
        return dict(mean), {}  # not A_r + D, which is rounded
    adapter: dict[str, Tensor] = {}
    after: Moments = {moment: {} for moment in KEPT[settings.optimizer]}
    for name, tensor in mean.items():
        begun = start(name).double()
        change = tensor.double() - begun
        moved = {moment: _moved(moment, moments[moment][name], change, settings) for moment in after}
        direction = moved.get("first_moment", change)
        if "second_moment" in moved:
            direction = direction / (moved["second_moment"].sqrt() + settings.epsilon)
        adapter[name] = (begun + settings.rate * direction).to(tensor.dtype)
        for moment, value in moved.items():
            after[moment][name] = value
    return adapter, after


def _moved(moment: Moment, before: Tensor, change: Tensor, settings: AggregationSection) -> Tensor:
    if moment == "first_moment":
        share = 1.0 if settings.optimizer == "momentum" else 1.0 - settings.beta1
        return settings.beta1 * before + share * change
    square = change.square()
    towards = square - before if settings.optimizer == "adam" else square * (square - before).sign()
    return before + (1.0 - settings.beta2) * towards
