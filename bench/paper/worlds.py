"""What can be run: the worlds of a YAML file are its models times its tasks, all with its settings.

settings:           sections of simulation.yaml
models:
  NAME:
    hub: NAME        or `package: NAME`, see sources.py; not looked at with --data
    separator: TEXT  stands between the two sentences of a task that has pairs
    layers: N        of a layer-drop proxy that has as many transformer parameters as the product's
    hidden: D, ffn: F    sizes of a layer
tasks:
  NAME:
    data: {...}      see sources.py; not looked at with --data
    settings: {...}  what is other than above
variations:          other values than the paper's, by table
  TABLE: [...]
accuracy:            sections of simulation.yaml, as bench.accuracy has them in all its rows
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.paper import sources
from fedpft.demo.run import Settings, merged
from fedpft.errors import ConfigError
from fedpft.tasks import TASKS

DIRECTORY = Path(__file__).parent
SIZES = ("layers", "hidden", "ffn")  # of a model, which do not say which one it is
PAPER_TEXT, PAPER_VISION, QUICK = "paper_text", "paper_vision", "quick"


@dataclass(frozen=True)
class Files:
    """Where a world's model and data are. labels: None if the task has no label list."""

    model: Path
    train: Path
    test: Path
    public: Path
    labels: Path | None


@dataclass(frozen=True)
class World:
    """One model on one task.

    setting: the YAML file, without its ending.
    layers: of a layer-drop proxy of equal size.
    hidden, ffn: D and F of the model's layers.
    origin: what sources.py makes model and data of.
    variations: table -> values of what the table varies.
    accuracy: what bench.accuracy changes in the settings.
    """

    setting: str
    model: str
    task: str
    layers: int
    hidden: int
    ffn: int
    settings: Settings
    origin: Mapping[str, Mapping[str, Any]]
    variations: Mapping[str, list[Any]] = field(default_factory=dict)
    accuracy: Settings = field(default_factory=dict)

    def files(self, work: Path, packages: Path, data: Path | None) -> Files:
        """Makes what is not there yet.

        Args:
            work: directory for it; what is made there once is there for all worlds.
            packages: directory with packages, see sources.py.
            data: the caller's own directory instead, DATA/models/MODEL and DATA/TASK/{train,test,public}.jsonl,
                DATA/TASK/labels.txt.
        """
        if data is not None:
            model, rows = data / "models" / self.model, data / self.task
        else:
            about = self.origin["model"]
            model = sources.model(about, work / "models" / self.model, packages)
            rows = work / "data" / f"{self.task}-{digest(self.origin)[:8]}"
            sources.write_rows(self.origin["data"], rows, packages, about.get("separator", " "))
        labels = rows / "labels.txt" if TASKS[self.settings["model"]["task"]].label_list else None
        train, test, public = (rows / f"{name}.jsonl" for name in ("train", "test", "public"))
        return Files(model, train, test, public, labels)


def worlds(directory: Path = DIRECTORY) -> list[World]:
    """Of all YAML files, in the order in which they stand there."""
    return [world for path in sorted(directory.glob("*.yaml")) for world in _worlds(path)]


def chosen(found: list[World], *, setting: str | None, model: str | None, task: str | None) -> list[World]:
    """Those that a command line names; ConfigError if there is none.

    Args:
        setting: a YAML file's name; None: any but QUICK's.
    """
    pool = [world for world in found if (world.setting == setting if setting else world.setting != QUICK)]
    kept = [world for world in pool if model in (None, world.model) and task in (None, world.task)]
    if not kept:
        there = ", ".join(f"{world.model} {world.task}" for world in pool)
        raise ConfigError(f"there is no world of --model {model} and --task {task}", f"there are: {there}")
    return kept


def digest(values: object) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _worlds(path: Path) -> list[World]:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        World(
            setting=path.stem,
            model=model,
            task=task,
            layers=about["layers"],
            hidden=about["hidden"],
            ffn=about["ffn"],
            settings=merged(raw["settings"], given.get("settings", {})),
            origin={
                "model": {key: value for key, value in about.items() if key not in SIZES},
                "data": given["data"],
            },
            variations=raw.get("variations", {}),
            accuracy=raw.get("accuracy", {}),
        )
        for model, about in raw["models"].items()
        for task, given in raw["tasks"].items()
    ]
