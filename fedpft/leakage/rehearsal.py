"""A federation that is run to be attacked: every round's updates are kept, and what each silo has is known.

    DIR/federation/                         OUT of the simulation (simulation/run.py)
    DIR/observed/settings.json              what a silo is told
    DIR/observed/ROUND/start.safetensors    the adapter that the round began with
    DIR/observed/ROUND/snapshot.safetensors the version of the proxy, if it was aligned before
    DIR/observed/ROUND/silos/               SILO.safetensors and SILO.json of each update, as it is before any masking

Each silo keeps a share of its rows out of its training: rows of the same kind that a membership attack must not name.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpft import atomic
from fedpft.config import RoundSettings, SimulationConfig
from fedpft.data.samples import Samples
from fedpft.errors import ConfigError, DataError
from fedpft.model.adapters import Adapter
from fedpft.seeding import derive_seed
from fedpft.server import run as server
from fedpft.server.ledger import Ledger
from fedpft.server.updates import Update, aggregate
from fedpft.silo.work import Update as Trained
from fedpft.simulation.crew import Crew, Done, Job, Post, crew
from fedpft.simulation.data import SilosData
from fedpft.simulation.silos import SimulatedSilos
from fedpft.wire.hello import Terms
from fedpft.wire.tensors import TensorFile


class SplitData(SilosData):
    """Silos that train on a part of their rows only."""

    def __init__(self, config: SimulationConfig, held_out: float) -> None:
        """Args:
            held_out: share of each silo's rows that it keeps out.

        Raises:
            DataError: a silo has a single row, or as of SilosData.
        """
        self._trained_on: dict[str, Tensor] = {}
        self._kept_out: dict[str, Tensor] = {}
        super().__init__(config)
        for silo, count in self.sizes.items():
            if count < 2:
                raise DataError(f"{silo} has a single row: none to train on and one to hold out", "take fewer silos")
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "held out", silo))
            order, out = torch.randperm(count, generator=generator), min(max(1, round(held_out * count)), count - 1)
            self._kept_out[silo], self._trained_on[silo] = order[:out].sort().values, order[out:].sort().values
        self.sizes = {silo: len(rows) for silo, rows in self._trained_on.items()}

    def samples(self, silo: str) -> Samples:
        """What a silo trains on."""
        rows, every = self._trained_on.get(silo), super().samples(silo)
        return every if rows is None else every.subset(rows)

    def held_out(self, silo: str) -> Samples:
        """The rest of what it has."""
        return super().samples(silo).subset(self._kept_out[silo])

    def all_held_out(self) -> Samples:
        """Of all silos, one after the other."""
        parts = [self.held_out(silo) for silo in sorted(self.sizes)]
        targets = [each.targets for each in parts]
        return Samples(
            parts[0].path,
            {role: [value for part in parts for value in part[role]] for role in parts[0].values},
            [line for part in parts for line in part.lines],
            None if targets[0] is None else [target for each in targets for target in each or []],
            labels=parts[0].labels,
        )


@dataclass(frozen=True)
class Observed:
    """A round.

    version: of the proxy; its snapshot is None for 0.
    updates: of its silos, in the order of their names.
    """

    number: int
    version: int
    snapshot: Path | None
    updates: list[Update]

    @functools.cached_property
    def start(self) -> Adapter:
        """The adapter that it began with, which every silo has."""
        first = self.updates[0]
        return {name: first.start_tensor(name) for name in first.specs}

    def mean(self, config: SimulationConfig) -> Adapter:
        """What the server makes of them: all that it has where it sees sums only."""
        return aggregate(self.updates, config.aggregation, config.training.batch)


@dataclass(frozen=True)
class Rehearsal:
    """A federation that is over. summary: what is in its summary.json; empty if it was broken off."""

    config: SimulationConfig
    data: SplitData
    settings: RoundSettings
    rounds: list[Observed]
    summary: dict[str, Any]

    @property
    def bundle(self) -> Path:
        """The proxy as the silos received it."""
        return (self.config.proxy_path or self.config.out / "proxy") / "bundle"


class _Enough(KeyboardInterrupt):
    """Ends a federation as its operator would, so that it can be gone on with."""


def rehearse(config: SimulationConfig, directory: Path, held_out: float, rounds: int | None = None) -> Rehearsal:
    """Runs the federation in that directory, or goes on with it; errors as of `simulate`.

    What only its own report would show on the way is not measured.

    Args:
        rounds: after which it is broken off, without a summary; None: not at all.
    """
    unseen = config.evaluation.model_copy(update={"every_rounds": 0, "gap_samples": 0})
    data = SplitData(config.model_copy(update={"out": directory / "federation", "evaluation": unseen}), held_out)
    own, observed = data.config, directory / "observed"

    def reach(_: object, bundle: Path, settings: RoundSettings, ledger: Ledger, __: Terms) -> SimulatedSilos:
        observed.mkdir(parents=True, exist_ok=True)
        atomic.write_text(observed / "settings.json", settings.model_dump_json())
        watched = _Watched(crew(Post(bundle, settings, data), 1, None), data, observed, rounds)
        return SimulatedSilos(own, bundle, settings, ledger, data, watched)

    summary: dict[str, Any] = {}
    with contextlib.suppress(_Enough):
        summary = server.run(own, reach)
    try:
        settings = RoundSettings.model_validate_json((observed / "settings.json").read_text(encoding="utf-8"))
        kept = [_read(path, own) for path in sorted(observed.iterdir()) if path.is_dir()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{observed}: cannot be read ({error})", "give another directory with --out") from None
    return Rehearsal(own, data, settings, kept, summary)


class _Watched(Crew):
    """Keeps what is trained before the server has it."""

    def __init__(self, crew: Crew, data: SilosData, directory: Path, rounds: int | None) -> None:
        self._crew, self._data, self._directory, self._rounds = crew, data, directory, rounds

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        by_silo = {job.silo: job for job in jobs}
        if self._rounds is not None and any(job.train.round > self._rounds for job in by_silo.values()):
            raise _Enough
        for done in self._crew.run(by_silo.values()):
            if done.trained is not None:
                self._keep(by_silo[done.silo], done.trained)
            yield done

    def close(self) -> None:
        self._crew.close()

    def _keep(self, job: Job, trained: Trained) -> None:
        directory = self._directory / f"{job.train.round:06d}"
        (directory / "silos").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.start, directory / "start.safetensors")
        if job.snapshot is not None:
            shutil.copyfile(job.snapshot, directory / "snapshot.safetensors")
        atomic.write_text(directory / "version", str(job.train.proxy_version))
        shutil.copyfile(self._data.work(job.silo).update_path, directory / "silos" / f"{job.silo}.safetensors")
        told = json.dumps({"samples": trained.samples, "metrics": trained.metrics})
        atomic.write_text(directory / "silos" / f"{job.silo}.json", told)


def _read(directory: Path, config: SimulationConfig) -> Observed:
    start, snapshot = TensorFile(directory / "start.safetensors"), directory / "snapshot.safetensors"
    updates = []
    for path in sorted((directory / "silos").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        file, encoding = path.with_suffix(".safetensors"), config.training.update_encoding
        updates.append(Update(path.stem, told["samples"], told["metrics"], file, start, encoding))
    version = int((directory / "version").read_text(encoding="utf-8"))
    return Observed(int(directory.name), version, snapshot if snapshot.exists() else None, updates)
