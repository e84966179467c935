"""DP-SGD's gradient: the sum of the samples' own, each cut to a norm, with noise (Abadi et al. 2016, arXiv 1607.00133).

    g = ( sum_i g_i min(1, C / ||g_i||) + z C N(0, I) ) / (q n)

g_i over all parameters that train together; q n samples are expected in a step, however many it has.

S samples of a part of a step
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpft.privacy.noise import Secret


class ClippedSum:
    """The sum so far, of one step."""

    def __init__(self, parameters: Sequence[nn.Parameter], clip: float) -> None:
        self._sums = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        self._clip = clip

    def add(self, gradients: Mapping[nn.Parameter, Tensor], factors: Tensor) -> None:
        """Adds those of S samples, (S, ...) each, every sample's multiplied by its factor, (S,), before it is cut."""
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()]).sum(0)
        norms = squares.sqrt() * factors
        # a factor of 0 or a gradient that is not finite adds nothing, whatever the others are
        shares = factors * (self._clip / norms.clamp(min=1e-12)).clamp(max=1.0)
        shares = torch.where(norms.isfinite() & (factors > 0), shares, 0.0)
        for parameter, gradient in gradients.items():
            kept = gradient if bool(norms.isfinite().all()) else gradient.nan_to_num(0.0, 0.0, 0.0)
            self._sums[parameter] += torch.tensordot(shares, kept, dims=1)

    def noised(self, noise: float, secret: Secret, expected: float) -> dict[nn.Parameter, Tensor]:
        """g of each parameter, with z = `noise` and q n = `expected`."""
        found = {}
        for parameter, total in self._sums.items():
            drawn = secret.normal(total.numel()).view(total.shape).to(total)
            found[parameter] = (total + noise * self._clip * drawn) / expected
        return found
