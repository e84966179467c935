"""What has a silo that takes the proxy for itself? The owner's side of the report, for several sizes of the proxy.

    parameters    of the FM, part by part, that a silo holds
    ability       the model as it was: of a language model its zero-shot score, otherwise that of a head alone, tuned on
                  labelled rows that anybody could have
    thief         LoRA and head tuned on those rows, by somebody who took part in nothing
    tuned         the federation's adapter, on the proxy, which a silo has, and on the FM, which the owner sells

Each of proxy and FM, with the share of what the FM has above chance that the proxy has too.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpft.config import LimitsSection, RoundSettings, ServerConfig
from fedpft.data.batches import EncodedDataset
from fedpft.evaluation import evaluate
from fedpft.model import adapters
from fedpft.proxy.bundle import load_proxy, mean_neurons
from fedpft.server.construction import Owner
from fedpft.tasks import TASKS
from fedpft.training import train_round


@dataclass(frozen=True)
class Pair:
    """The headline of proxy and FM. share: of what the FM has above chance; None if it has nothing there."""

    proxy: float
    model: float
    share: float | None


@dataclass(frozen=True)
class Held:
    """For one proxy. neurons: K, of the compressed layers in the mean; chance: the headline of whoever has no model."""

    neurons: int
    chance: float
    parts: dict[str, dict[str, int]]
    ability: Pair
    thief: Pair
    tuned: Pair

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Thief:
    """Tunes FM and proxies on the same rows in the same way."""

    def __init__(self, config: ServerConfig, owner: Owner, rows: EncodedDataset, epochs: float) -> None:
        """Tunes the FM on these rows; the owner has others as test data."""
        training = config.training.model_copy(update={"rounds": 1, "local_epochs": epochs, "privacy": None})
        eps = config.alignment.inactive_below
        self._config = config
        self._settings = RoundSettings(seed=config.seed, adapter=config.adapter, training=training, inactive_below=eps)
        self._owner, self._rows, self._task = owner, rows, TASKS[config.model.task]
        assert owner.test is not None
        baseline, headline = self._task.baseline, self._task.headline.name
        if baseline is not None:
            self._chance = self._task.baseline_score(owner.test)[headline]
        else:  # of a language model that knows nothing, the loss
            self._chance = math.log(int(owner.model.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]
        self._ability, self._tuned = self._of(owner.model)

    def held(self, bundle: Path, parts: dict[str, dict[str, int]], tuned: tuple[float, float]) -> Held:
        """Of the proxy in a directory, and of the federation that ran on it.

        Args:
            parts: as summary.json has them as `holdings`.
            tuned: the headline of tuned proxy and plugged-in FM.
        """
        proxy = load_proxy(bundle, device=self._config.device)
        adapters.attach(proxy.model, self._config.adapter, seed=self._config.seed)
        proxy.model.to(self._config.device)
        ability, stolen = self._of(proxy.model)
        return Held(
            mean_neurons(bundle),
            self._chance,
            parts,
            self.pair(ability, self._ability),
            self.pair(stolen, self._tuned),
            self.pair(*tuned),
        )

    def pair(self, proxy: float, model: float) -> Pair:
        """Beside chance."""
        above = model - self._chance
        better = above > 0 if self._task.headline.more_is_better else above < 0
        return Pair(proxy, model, (proxy - self._chance) / above if better else None)

    def _of(self, model: nn.Module) -> tuple[float, float]:
        """What a model with an untrained adapter is worth as it is, and tuned; it carries the latter then."""
        untrained = adapters.extract(model)
        if self._task.head:
            with _head_alone(model):
                self._tune(model)
        ability = self._score(model)
        adapters.load(model, untrained)
        self._tune(model)
        return ability, self._score(model)

    def _tune(self, model: nn.Module) -> None:
        train_round(
            self._task,
            model,
            self._rows,
            self._settings,
            silo="thief",
            round=1,
            compressed=(),
            count_inactivity=False,
            limits=LimitsSection(),
        )

    def _score(self, model: nn.Module) -> float:
        assert self._owner.test is not None
        found = evaluate(self._task, model, self._owner.test, self._config.evaluation.batch)
        return found[self._task.headline.name]


@contextmanager
def _head_alone(model: nn.Module) -> Iterator[None]:
    """While open, LoRA rests; B is 0 before and after."""
    lora = adapters.lora_parameters(model)
    with torch.no_grad():
        for parameter in lora:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in lora:
            parameter.requires_grad_(True)
