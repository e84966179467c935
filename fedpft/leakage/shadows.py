"""Silos of the owner's own: what an update looks like, of data that the owner knows.

The owner has the training's code and settings, the adapter that a round began with, and labelled rows of its own (the
test data). So it trains as a silo would, and learns to read real updates from those (shadow training: Shokri et al.
2017, arXiv 1610.05820; Melis et al. 2019, arXiv 1805.04049). Shadows draw their label shares evenly from all there are.

C classes; n rows of a shadow.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedpft.config import LimitsSection, SimulationConfig
from fedpft.data.batches import EncodedDataset
from fedpft.data.samples import Samples
from fedpft.gradients import Private
from fedpft.leakage.rehearsal import Observed
from fedpft.model.adapters import Adapter
from fedpft.seeding import derive_seed
from fedpft.silo.budget import Budget
from fedpft.silo.learner import Learner


@dataclass(frozen=True)
class Shadow:
    """What one was trained on, as (C,) shares of labels, None if they have no single class; and what came of it."""

    shares: Tensor | None
    adapter: Adapter


def has_classes(samples: Samples) -> bool:
    """Whether each row has one class of the label list."""
    targets = samples.targets
    return bool(samples.labels) and targets is not None and all(type(target) is int for target in targets)


def class_shares(samples: Samples) -> Tensor:
    """(C,) float64."""
    counts = torch.tensor(samples.targets).bincount(minlength=len(samples.labels))
    return counts.double() / counts.sum()


def train(
    learner: Learner, config: SimulationConfig, observed: Observed, labelled: Samples, count: int, scratch: Path
) -> list[Shadow]:
    """So many shadows of a round, each with as many rows as the round's silos have in the mean.

    Args:
        scratch: a directory for what a silo with differential privacy keeps.
    """
    rows = max(2, round(sum(update.samples for update in observed.updates) / len(observed.updates)))
    rows = max(2, round(rows / min(1.0, config.training.local_epochs)))
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "shadow", number))
        chosen = torch.multinomial(_likely(labelled, generator), rows, replacement=True, generator=generator)
        part = labelled.subset(chosen)
        dataset = learner.task.encode(part, learner.proxy.processor, learner.proxy.max_tokens)
        adapter = fit(learner, config, observed, dataset, f"shadow-{number}", scratch)
        found.append(Shadow(class_shares(part) if has_classes(part) else None, adapter))
    return found


def fit(
    learner: Learner, config: SimulationConfig, observed: Observed, dataset: EncodedDataset, name: str, scratch: Path
) -> Adapter:
    """What a silo of that name would send, had it joined in that round with this data."""
    limits = LimitsSection()
    result = learner.fit(
        name,
        dataset,
        observed.start,
        round=observed.number,
        count_inactivity=False,
        limits=limits,
        packing=None,
        private=_private(learner, config, dataset, limits, scratch / name),
    )
    return result.adapter


def _private(
    learner: Learner, config: SimulationConfig, dataset: EncodedDataset, limits: LimitsSection, scratch: Path
) -> Private | None:
    if (allowed := config.training.privacy) is None:
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    budget = Budget(scratch, allowed, len(dataset))
    return budget.private(budget.plan(learner.settings, limits))


def _likely(labelled: Samples, generator: torch.Generator) -> Tensor:
    """How likely each row is drawn, (n,): by shares of classes that are drawn evenly from all that there are."""
    if not has_classes(labelled):
        return torch.ones(len(labelled), dtype=torch.float64)
    classes = torch.tensor(labelled.targets)
    shares = -torch.rand(len(labelled.labels), generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
    counts = classes.bincount(minlength=len(shares)).clamp(min=1)
    return (shares / counts)[classes]
