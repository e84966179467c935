"""A training step's gradients: of the mean loss of a batch, or of its samples one by one, clipped and noised (DP-SGD).

Either is made part by part, so that a batch may be larger than what fits into memory at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedpft.model.persample import per_sample
from fedpft.model.subffn import uncounted
from fedpft.parallel import Ranks
from fedpft.privacy.clipping import ClippedSum
from fedpft.privacy.noise import Secret
from fedpft.tasks import Task

Part = dict[str, Tensor]  # some samples of a batch, as the model takes them


@dataclass(frozen=True)
class Private:
    """How a round is trained so that it says little of any sample (DP-SGD, Abadi et al. 2016, arXiv 1607.00133).

    Attributes:
        clip: C, the largest norm of a sample's gradient.
        noise: z, the noise's deviation in units of C.
        secret: draws samples and noise.
    """

    clip: float
    noise: float
    secret: Secret = field(default_factory=Secret)


def sampling_rate(samples: int, batch: int) -> float:
    """q: how likely each sample is in a step of a private training that is to have `batch` of them."""
    return min(1.0, batch / samples)


@dataclass(frozen=True)
class Gradients(ABC):
    """Makes those of a step.

    Attributes:
        loss_of: a part's mean loss.
    """

    task: Task
    model: nn.Module
    parameters: Sequence[nn.Parameter]
    loss_of: Callable[[Part], Tensor]

    @abstractmethod
    def make(self, built: Sequence[Part], weight: int, parts: int, other: Callable[[], Part]) -> list[float]:
        """Adds them to the parameters'.

        Args:
            built: the parts of the batch that are this rank's.
            weight: of all parts: what the task's loss counts in the batch.
            parts: how many the batch has on all ranks.
            other: some sample of the batch, whosoever's.

        Returns:
            What each of `built` contributes to the batch's mean loss.
        """

    @abstractmethod
    def clip(self) -> None:
        """Cuts them to the norm that a step may have, when all are there and unscaled."""


@dataclass(frozen=True)
class PlainGradients(Gradients):
    """Of the mean over all that the task counts in a batch, cut to a norm.

    Attributes:
        scaler: of the loss, so that narrow types hold its gradient.
        largest: the norm.
    """

    scaler: torch.amp.GradScaler
    ranks: Ranks
    largest: float

    def make(self, built: Sequence[Part], weight: int, parts: int, other: Callable[[], Part]) -> list[float]:
        """See the base class; the ranks' parts are added up in their order."""
        losses = list[float]()
        for turn, first in enumerate(range(0, parts, self.ranks.size)):
            with self.ranks.adding(self.parameters, min(self.ranks.size, parts - first)):
                if turn < len(built):
                    losses.append(self._learn(built[turn], weight))
                elif self.ranks.sharded:  # the others need this rank's pieces; what comes of it here is in no sum
                    devices = {parameter.device for parameter in self.parameters if parameter.device.type == "cuda"}
                    with uncounted(self.model), torch.random.fork_rng(devices=list(devices)):
                        self._learn(other(), weight)
        return losses

    def clip(self) -> None:
        """To `largest`."""
        nn.utils.clip_grad_norm_(self.parameters, self.largest)

    def _learn(self, part: Part, weight: int) -> float:
        loss = self.loss_of(part) * (self.task.weight(part) / weight)
        self.scaler.scale(loss).backward()
        return float(loss.detach())


@dataclass(frozen=True)
class PrivateGradients(Gradients):
    """Of the samples one by one, each cut to a norm, and noise on their sum over the samples that are expected.

    A sample's own loss is the mean over what the task counts in it; that of a part is a mean over all of its samples.

    Attributes:
        samples: that the silo has.
        batch: how many of them are expected in a step.
    """

    private: Private
    samples: int
    batch: int

    @property
    def rate(self) -> float:
        """q."""
        return sampling_rate(self.samples, self.batch)

    def make(self, built: Sequence[Part], weight: int, parts: int, other: Callable[[], Part]) -> list[float]:
        """See the base class; for one rank."""
        total, losses = ClippedSum(self.parameters, self.private.clip), list[float]()
        for part in built:
            weights = [self.task.weight(sample) for sample in _samples(part)]
            with per_sample(self.model, len(weights)) as copies:
                loss = self.loss_of(part)
                loss.backward()
            factors = torch.tensor([sum(weights) / each if each else 0.0 for each in weights])
            gradients = {parameter: copy.grad for parameter, copy in copies.items() if copy.grad is not None}
            total.add(gradients, factors.to(loss))
            losses.append(float(loss.detach()) * sum(weights) / max(weight, 1))
        noised = total.noised(self.private.noise, self.private.secret, self.samples * self.rate)
        for parameter, gradient in noised.items():
            parameter.grad = gradient
        return losses

    def clip(self) -> None:
        """Nothing: each sample's is cut by itself."""


def _samples(part: Part) -> list[Part]:
    count = len(next(iter(part.values())))
    return [{name: value[index : index + 1] for name, value in part.items()} for index in range(count)]
