"""What a silo has spent of its samples' privacy, and how much noise leaves enough of it.

Neighbouring datasets differ in one sample, in whose place one has nothing (its gradient is 0); how many samples a silo
has is no secret. One step in which each sample takes part with probability q, and the sum of clipped gradients gets
Gaussian noise of z clip norms, is the Poisson-sampled Gaussian mechanism; steps compose as privacy loss distributions
(Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380), all by dp-accounting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpft.config import MOST_NOISE
from fedpft.errors import ConfigError, PrivacySpent

LEAST_NOISE = 0.3  # z: below it steps hide next to nothing
INTERVAL = 1e-3  # between two losses that are told apart, rounded to the side of caution: ten times as fast as 1e-4


@dataclass(frozen=True)
class Steps:
    """Steps of one kind.

    Attributes:
        rate: q.
        noise: z.
        count: how many.
    """

    rate: float
    noise: float
    count: int


def epsilon(spent: Sequence[Steps], delta: float) -> float:
    """Of all these steps together, at this delta; 0.0 for none."""
    if not spent:
        return 0.0
    accountant = _accountant()
    accountant.compose(_event(spent))
    found: float = accountant.get_epsilon(delta)
    return found


def noise_for(target: float, delta: float, spent: Sequence[Steps], rate: float, count: int) -> float:
    """The least z with which so many steps more, at this rate, come to `target` with what is spent already.

    Raises:
        PrivacySpent: no noise is enough.
    """

    def event(noise: float) -> Any:
        return _event([*spent, Steps(rate, noise, count)])

    if epsilon([*spent, Steps(rate, LEAST_NOISE, count)], delta) <= target:
        return LEAST_NOISE
    if epsilon([*spent, Steps(rate, MOST_NOISE, count)], delta) > target:
        raise PrivacySpent(
            f"privacy: {epsilon(spent, delta):.2f} of epsilon {target:g} is spent, too much for {count} steps more",
            "raise privacy.epsilon in silo.yaml if your institution may, or take part with other data",
        )
    bracket = _library().LowerEndpointAndGuess(LEAST_NOISE, 1.0)
    found: float = _library().calibrate_dp_mechanism(_accountant, event, target, delta, bracket, tol=1e-3)
    return found


def _accountant() -> Any:
    return _library().pld.PLDAccountant(value_discretization_interval=INTERVAL)


def _event(spent: Sequence[Steps]) -> Any:
    accounting = _library()
    return accounting.ComposedDpEvent(
        [
            accounting.SelfComposedDpEvent(
                accounting.PoissonSampledDpEvent(each.rate, accounting.GaussianDpEvent(each.noise)), each.count
            )
            for each in spent
        ]
    )


def _library() -> Any:
    try:
        import dp_accounting  # type: ignore[import-untyped]
        import dp_accounting.pld  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("privacy: needs the package dp-accounting", "pip install 'fedpft[privacy]'") from None
    return dp_accounting
