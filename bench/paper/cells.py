"""What a table consists of, and one cell's run.

A cell is one configuration of one federation. Two tables that have the same one share it: it is known by its model,
data and settings alone, so that a change of a YAML file makes it another cell, which has yet to be run.
"""

import datetime
import fcntl
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.measure import commit, machine, peak_resident_bytes, reset_peak
from bench.paper.worlds import Files, World, digest
from fedpft import atomic
from fedpft.config import SimulationConfig, dump
from fedpft.demo.run import NO_DISTILLATION, Settings, merged, rows
from fedpft.digests import Digests
from fedpft.errors import ConfigError
from fedpft.model import adapters
from fedpft.proxy.cut import cut
from fedpft.proxy.holdings import holdings
from fedpft.proxy.selection import select_for_size
from fedpft.server.construction import build_proxy, load_fm, load_owner
from fedpft.server.identity import label_list
from fedpft.simulation.run import simulate

ADAPTER_VALUE_BYTES = 4  # float32
Record = dict[str, Any]  # what is kept of a cell that has been run, as JSON
IID: Settings = {"simulation": {"partition": {"kind": "iid"}}}


def methods(layers: int) -> dict[str, Settings]:
    """What each changes in the product's settings, by the paper's names where it has one."""
    found = rows(layers, head=False, compare=True, ablations=True)
    dropped = found["layer_drop"]
    return {
        "FedPETuning": found["full_model"],
        "FedOT": dropped,
        "FedOT, not distilled": {**dropped, **NO_DISTILLATION},
        "FedBiOT-like": {section: change for section, change in dropped.items() if section != "alignment"},
        "FedPFT_N": found["no_distillation"],
        "FedPFT_B": found["before_only"],
        "FedPFT_D": found["during_only"],
        "FedPFT": {},
        **AGAINST_DRIFT,
    }


# Against drift, each by itself and what goes together, in the product's settings; docs/choosing.md.
OWN_SHARES: Settings = {"training": {"logit_adjustment": "own"}}
DIVERSITY: Settings = {"aggregation": {"weights": "diversity"}}
AGAINST_DRIFT: dict[str, Settings] = {
    "own shares, diversity": {**OWN_SHARES, **DIVERSITY},
    "own shares": OWN_SHARES,
    "diversity": DIVERSITY,
    "epsilon 1e-4": {"training": {"adam_epsilon": 1e-4}},
    "own shares, diversity, epsilon 1e-4": {
        "training": {"logit_adjustment": "own", "adam_epsilon": 1e-4},
        **DIVERSITY,
    },
    "FedProx, mu 1": {"training": {"proximal": 1.0}},
    "FFA-LoRA": {"training": {"frozen_a": True}},
    "cosine": {"training": {"schedule": "cosine"}},
    "FedAvgM": {"aggregation": {"optimizer": "momentum", "beta1": 0.5, "learning_rate": 0.7}},
    "FedAdam": {"aggregation": {"optimizer": "adam"}},
    "FedYogi": {"aggregation": {"optimizer": "yogi"}},
    "FedNova": {"aggregation": {"weights": "steps"}},
    "equal weights": {"aggregation": {"weights": "equal"}},
    "median": {"aggregation": {"mean": "median"}},
    "16 rounds": {"training": {"rounds": 16, "local_epochs": 0.125}},
}
SPLITS: dict[str, Settings] = {
    "0.3": {"simulation": {"partition": {"kind": "dirichlet", "concentration": 0.3}}},
    "1": {"simulation": {"partition": {"kind": "dirichlet", "concentration": 1.0}}},
    "even": IID,
}

Variations = Callable[[World], dict[str, Settings]]  # what is shown of each -> its settings


def _varied(name: str, values: Sequence[Any], change: Callable[[Any], Settings]) -> Variations:
    def variations(world: World) -> dict[str, Settings]:
        return {f"{value:g}": change(value) for value in world.variations.get(name, values)}

    return variations


def _as_it_is(world: World) -> dict[str, Settings]:
    return {"": {}}


@dataclass(frozen=True)
class Table:
    """Which methods, each with which variations of a world's settings.

    varied: what the variations are of, for the head of a column.
    counted: whether parameters are counted, and nothing trains.
    """

    methods: tuple[str, ...]
    variations: Variations = _as_it_is
    varied: str = ""
    counted: bool = False


RIVALS = ("FedPETuning", "FedOT", "FedOT, not distilled", "FedBiOT-like")
TABLES: dict[str, Table] = {
    "iid": Table((*RIVALS, "FedPFT"), lambda _: {"": IID}),
    "dirichlet": Table(
        ("FedPETuning", "FedOT", "FedPFT"),
        _varied(
            "dirichlet",
            (1.0, 5.0, 10.0),
            lambda value: {"simulation": {"partition": {"kind": "dirichlet", "concentration": value}}},
        ),
        "concentration",
    ),
    "ablation": Table(("FedPFT_N", "FedPFT_B", "FedPFT_D", "FedPFT")),
    "interval": Table(
        ("FedPFT",), _varied("interval", (5, 10, 20), lambda t: {"alignment": {"every_rounds": t}}), "t, rounds"
    ),
    "fraction": Table(
        ("FedPFT",), _varied("fraction", (0.3, 0.5, 0.8), lambda p: {"alignment": {"updated_fraction": p}}), "p"
    ),
    "parameters": Table(("FedPETuning", "FedOT", "FedPFT"), counted=True),
    "vision": Table((*RIVALS, "FedPFT"), lambda _: {"": IID}),
    "drift": Table(("FedPFT", *AGAINST_DRIFT), lambda _: SPLITS, "concentration"),  # of this project, as the next
    "natural": Table((*RIVALS, "FedPFT_N", "FedPFT")),  # as the world's own partition has it
}


@dataclass(frozen=True)
class Cell:
    """One configuration. variation: what is shown of how it differs from the world's settings."""

    world: World
    method: str
    variation: str
    settings: Settings
    counted: bool

    @property
    def seed(self) -> int:
        """Of the federation: it draws who has what, the head, LoRA, dropout and all orders."""
        seed: int = self.settings["seed"]
        return seed

    @property
    def key(self) -> str:
        """The same for the same configuration of the same model and data."""
        known = [self.world.model, self.world.task, self.world.origin, self.settings, self.counted]
        return digest(known)[:16]

    @property
    def title(self) -> str:
        """For people."""
        parts = (self.world.model, self.world.task, self.method, self.variation)
        return f"{' '.join(part for part in parts if part)}, seed {self.seed}"


def cells(table: str, world: World, seeds: Sequence[int]) -> list[Cell]:
    """Those of one table; every method comes to its first seed before any to its second."""
    section = TABLES[table]
    own = world.settings["simulation"]["partition"]["kind"]
    if table == "natural" and own != "column":
        raise ConfigError(f"{world.setting}.yaml: there is no natural partition", "take a world with kind: column")
    changes = methods(world.layers)
    found = []
    for seed in seeds:
        for shown, variation in section.variations(world).items():
            for method in section.methods:
                settings = merged(merged(world.settings, variation), changes[method]) | {"seed": seed}
                found.append(Cell(world, method, shown, settings, section.counted))
    return found


def run_cell(cell: Cell, files: Files, work: Path, *, device: str = "cpu", threads: int | None = None) -> Record:
    """Runs a cell, or goes on with it in `directory_of`, and returns its record."""
    out = directory_of(cell, work)
    config = _config(cell, files, out, device, threads)
    about = {
        "key": cell.key,
        "model": cell.world.model,
        "task": cell.world.task,
        "setting": cell.world.setting,
        "method": cell.method,
        "settings": cell.settings,
        "origin": dict(cell.world.origin),
    }
    if cell.counted:
        return about | {"parameters": _count(config)} | _provenance(device)
    reset_peak()
    summary = simulate(config.model_copy(update={"proxy_path": _proxy(cell, config, work)}))
    found = {
        "metrics": summary["metrics"],
        "parameters": summary["parameters"],
        "adapter_bytes": ADAPTER_VALUE_BYTES * summary["parameters"]["adapter"],
        "silo_bytes": sum(summary["bytes"].values()) // len(summary["config"]["federation"]["silos"]),
        "silo_seconds": statistics.fmean(entry["silo_seconds"] for entry in summary["rounds"]),
        "seconds": summary["seconds"],
        "peak_bytes": peak_resident_bytes(),
        "samples": {name: part["samples"] for name, part in summary["data"]["server"].items()},
        "rounds": summary["rounds"],
    }
    return about | found | _provenance(device)


def directory_of(cell: Cell, work: Path) -> Path:
    """Where a cell runs; of no more use once its record is kept."""
    return work / "cells" / cell.key


def _config(cell: Cell, files: Files, out: Path, device: str, threads: int | None) -> SimulationConfig:
    paths: Settings = {
        "out": out,
        "device": device,
        "threads": threads,
        "model": {"path": files.model, "labels": files.labels},
        "simulation": {"data": files.train, "threads": threads or 1},
        "public_data": files.public,
        "test_data": files.test,
    }
    try:
        return SimulationConfig.model_validate({"preset": "paper"} | merged(cell.settings, paths))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(f"{cell.title}: {where}: {error.errors()[0]['msg']}", "mend its YAML file") from None


def _proxy(cell: Cell, config: SimulationConfig, work: Path) -> Path:
    """What is distilled alike before the federation is distilled once; a run comes to the same bits either way."""
    given = [cell.world.model, cell.world.task, cell.world.origin, cell.settings["model"], cell.seed]
    parts = (config.proxy, config.distillation, config.adapter, config.evaluation)  # with what a preset says of them
    known = [*given, *(dump(part) for part in parts)]
    directory = work / "proxies" / digest(known)[:16]
    if not (directory / "record.json").exists():
        build_proxy(config, load_owner(config, Digests()), directory)
    return directory


def _count(config: SimulationConfig) -> dict[str, int]:
    """Parameters of FM, proxy and adapter, as a run's summary has them."""
    model, _ = load_fm(config, label_list(config))
    proxy = cut(model, select_for_size(model, config.proxy))
    parts = holdings(model, proxy)
    totals = {side: sum(part[side] for part in parts.values()) for side in ("model", "proxy")}
    adapters.attach(proxy, config.adapter, seed=config.seed)
    return {
        **totals,
        **{f"{side}_transformer": total - parts["embeddings"][side] for side, total in totals.items()},
        "adapter": sum(tensor.numel() for tensor in adapters.extract(proxy).values()),
    }


def _provenance(device: str) -> dict[str, Any]:
    about = machine(device)
    return {
        **commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {"device": device, **{name: about[name] for name in ("cpu", "cores", "gpu") if name in about}},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    }


def read_records(path: Path) -> dict[str, Record]:
    """The records of a file by their keys; none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def add_record(path: Path, record: Record) -> None:
    """Whole or not at all: a run may be killed at any time, and another one may write to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        atomic.write_text(path, f"{before}{json.dumps(record)}\n")
    finally:
        os.close(lock)
