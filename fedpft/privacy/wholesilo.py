"""A whole silo hidden in the sum: the distributed discrete Gaussian mechanism (Kairouz, Liu, Steinke 2021, 2102.06387).

    part      the silo's change, shrunk to L2 norm C and rounded to steps of 2^-f as ever; nothing else of its data
    noise     in each of the d entries a discrete Gaussian of deviation s = z (C 2^f + sqrt(d)) / sqrt(m) steps

The sum over the m silos or more without which nobody opens it has noise of z times what one silo can change in it,
whoever drops out: a silo's rounded part has norm below C 2^f + sqrt(d), because each entry is rounded by less than a
step, and is compared with zeros. z follows from epsilon, delta and the rounds, a Gaussian mechanism in each, in which
all silos take part.

Accounted for is a Gaussian. A discrete one differs by some 1 / s^2 of delta; a sum of n of them from one by tau = 10
sum over k < n of exp(-2 pi^2 s^2 k / (k + 1)) (theorem 1 of the paper: (1/2) e^2-concentrated privacy, e = 1 / z + tau
sqrt(d)), which is below n 10^-427 at LEAST_DEVIATION. As a rule s is some hundred thousand.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from fedpft.config import SecureTerms, SiloPrivacyTerms
from fedpft.errors import ConfigError, PrivacySpent
from fedpft.privacy.accounting import noise_for
from fedpft.privacy.fixedpoint import Contribution
from fedpft.privacy.noise import Secret

LEAST_DEVIATION = 10.0  # s, in steps
_SHY = 1.0 - 2.0**-20  # of the clip, for what float32 rounds


@functools.lru_cache
def multiplier(private: SiloPrivacyTerms) -> float:
    """z.

    Raises:
        ConfigError: no noise is enough for so many rounds.
    """
    try:
        return noise_for(private.epsilon, private.delta, [], 1.0, private.rounds)
    except PrivacySpent:
        raise ConfigError(
            f"silo_privacy: no noise hides a silo in {private.rounds} rounds at epsilon {private.epsilon:g}, delta "
            f"{private.delta:g}",
            "raise silo_privacy.epsilon in server.yaml, or have fewer rounds",
        ) from None


def deviation(terms: SecureTerms, entries: int) -> float:
    """s: of the noise that one silo adds to each of so many entries, in steps.

    Raises:
        ConfigError: the steps are too coarse for it, or no noise is enough.
    """
    private = terms.silo_privacy
    assert private is not None
    sensitivity = private.clip * 2.0**terms.fraction_bits + math.sqrt(entries)
    found = multiplier(private) * sensitivity / math.sqrt(terms.min_silos)
    if found < LEAST_DEVIATION:
        raise ConfigError(
            f"silo_privacy: among {terms.min_silos} silos the noise of each is {found:.1f} steps, which are too coarse",
            f"lower federation.min_silos: {LEAST_DEVIATION:g} steps or more are needed",
        )
    return found


def describe(terms: SecureTerms, entries: int) -> str:
    """What it comes to, for a log."""
    private = terms.silo_privacy
    assert private is not None
    relative = math.sqrt(terms.min_silos) * deviation(terms, entries) / 2.0**terms.fraction_bits / private.clip
    relative *= math.sqrt(entries) / terms.min_silos
    return (
        f"silo_privacy: epsilon {private.epsilon:g} at delta {private.delta:g} for a whole silo over {private.rounds} "
        f"rounds: z {multiplier(private):.2f}; with {terms.min_silos} silos the noise on the mean of {entries} values "
        f"has {relative:.3g} times the largest norm of a silo's change"
    )


def hidden(what: Contribution, clip: float) -> Contribution:
    """What goes into the sum in place of a silo's contribution: its change, shrunk to a norm of `clip`, and a 1."""
    changes = {name: tensor.double() - what.start[name].double() for name, tensor in what.trained.items()}
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    share = _SHY * clip / max(norm, clip)  # NaN stays, and is refused as any
    return dataclasses.replace(
        what,
        start={name: torch.zeros_like(change, dtype=torch.float32) for name, change in changes.items()},
        trained={name: (change * share).float() for name, change in changes.items()},
        samples=1,
        weight=1.0,
        metrics={},
        inactivity=None,
    )


def add_noise(entries: Tensor, terms: SecureTerms, secret: Secret) -> None:
    """Adds a silo's share of it to (d,) int32, in place, modulo 2^32."""
    entries.add_(secret.discrete_gaussian(len(entries), deviation(terms, len(entries))).to(torch.int32))
