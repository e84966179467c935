"""What an attack has found out, in a number beside the one that guessing would give.

P members, N non-members; C classes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RATE = 0.01  # of false positives, at which true ones are counted
SURE = 2.0  # so many standard errors from guessing nobody takes for chance


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        attacker: who.
        sees: of what.
        goal: what is to be found out.
        measure: what `value` is.
        value: of the attack.
        guess: of guessing.
        error: by how much guessing would differ from `guess`, as a standard error; 0.0 if not at all.
        more: whether an attack that succeeds has a larger value, or a smaller one.
    """

    attacker: str
    sees: str
    goal: str
    measure: str
    value: float
    guess: float
    error: float = 0.0
    more: bool = True

    @property
    def found(self) -> bool:
        """Whether that is more than chance."""
        gain = self.value - self.guess if self.more else self.guess - self.value
        return gain > SURE * self.error + 1e-9


def auc(members: Tensor, others: Tensor) -> float:
    """How likely a member's score is above another's, (P,) and (N,); equal ones count half."""
    ordered = others.double().sort().values
    below = torch.searchsorted(ordered, members.double(), right=False)
    up_to = torch.searchsorted(ordered, members.double(), right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))


def auc_error(members: int, others: int) -> float:
    """The standard error of the AUC of scores that say nothing (Mann and Whitney 1947)."""
    return math.sqrt((members + others + 1) / (12.0 * members * others))


def true_positives(members: Tensor, others: Tensor, rate: float = RATE) -> float:
    """The share of members whose score is above all but this share of the others' (Carlini et al. 2022)."""
    allowed = int(rate * len(others))
    threshold = others.double().sort(descending=True).values[allowed]
    return float((members.double() > threshold).double().mean())


def true_positives_by_chance(members: int, others: int, rate: float = RATE) -> tuple[float, float]:
    """Mean and standard error of that where scores say nothing: the threshold is an order statistic of a few rows."""
    place = int(rate * others) + 1
    mean = place / (others + 1)
    return mean, math.sqrt(mean * (1 - mean) * (1 / (others + 2) + 1 / members))


def membership(attacker: str, sees: str, goal: str, members: Tensor, others: Tensor) -> list[Finding]:
    """Both figures of a membership attack's scores, (P,) and (N,)."""
    error = auc_error(len(members), len(others))
    guess, spread = true_positives_by_chance(len(members), len(others))
    at = f"true positives at {RATE:.0%} false ones"
    return [
        Finding(attacker, sees, goal, "AUC", auc(members, others), 0.5, error),
        Finding(attacker, sees, goal, at, true_positives(members, others), guess, spread),
    ]


def total_variation(shares: Tensor, truth: Tensor) -> float:
    """Between two distributions, (C,): 0 where they agree, 1 where they have nothing in common."""
    return float((shares.double() - truth.double()).abs().sum() / 2)
