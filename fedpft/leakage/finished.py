"""`fedpft leakage` on a run that is over: what a silo has of the FM, measured; what else there is to ask, named.

A finished run has neither what attacks on silos need nor the truth that they are held against: single updates are
deleted when a round closes, under secure aggregation there never were any, and silos' rows are with the silos. The
owner's side is all there. Half of the test data plays what a thief has, the other half measures.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedpft.config import ServerConfig, dump
from fedpft.data.batches import EncodedDataset, sample
from fedpft.data.samples import Samples
from fedpft.digests import Digests
from fedpft.errors import CheckpointError, ConfigError
from fedpft.leakage import membership
from fedpft.leakage.owner import Thief
from fedpft.leakage.report import write
from fedpft.leakage.run import Effort
from fedpft.server.construction import load_owner
from fedpft.tasks import TASKS

ROWS_UNKNOWN = "which rows a silo trained on is not known here"
UNMEASURED = (
    ("the server", "label shares of a silo", "the silos' labels are not known here"),
    ("the server", "which tokens occur", "the silos' texts are not known here"),
    ("the server", "texts, token by token", "the silos' texts are not known here, nor any update of one step"),
    *dict.fromkeys((attacker, goal, ROWS_UNKNOWN) for attacker, _, goal, _ in membership.ROWS),
)


def leak_finished(config: ServerConfig, summary: dict[str, Any], directory: Path, effort: Effort) -> dict[str, Any]:
    """Measures, and writes the report; returns what is in leakage.json.

    Args:
        summary: of the run in `out` (:func:`fedpft.server.run.finished`).
        effort: of which only `epochs` counts.

    Raises:
        ConfigError: there is no test data, or a single row of them.
        CheckpointError: what proxy and FM made of them is not there.
    """
    if config.test_data is None:
        raise ConfigError("fedpft leakage needs test_data, and this run has none", "rehearse it with some")
    task = TASKS[config.model.task]
    owner = load_owner(config, Digests())
    assert owner.test is not None
    samples = task.read_labelled(config.test_data, config.columns, owner.labels, config.encoding)
    if len(samples) < 2:
        raise ConfigError(f"{config.test_data}: has a single row, none to tune on and one to measure by", "add rows")
    stolen = sample(len(samples), len(samples) // 2, config.seed, "leakage, thief")
    kept = torch.ones(len(samples), dtype=torch.bool)
    kept[stolen] = False
    measured = kept.nonzero()[:, 0]

    def encoded(rows: Samples) -> EncodedDataset:
        return task.encode(rows, owner.processor, config.model.max_tokens)

    answered = _answers(config, len(samples))
    tuned = [
        task.score([answered[row][place] for place in measured.tolist()], owner.test, measured)[task.headline.name]
        for row in ("proxy", "plugged_in")
    ]
    own = replace(owner, test=encoded(samples.subset(measured)))
    thief = Thief(config, own, encoded(samples.subset(stolen)), effort.epochs)
    bundle = (config.proxy_path or config.out / "proxy") / "bundle"
    found = {
        "task": config.model.task,
        "finished": True,
        "silos": len(config.federation.silos),
        "findings": [],
        "held": [thief.held(bundle, summary["holdings"], (tuned[0], tuned[1])).to_json()],
        "rows": {"thief": len(stolen), "measured": len(measured)},
        "seen": _seen(config, summary),
        "unmeasured": UNMEASURED,
        "effort": asdict(effort),
        "versions": summary["versions"],
        "seed": config.seed,
        "config": dump(config),
    }
    return write(found, directory)


def _answers(config: ServerConfig, rows: int) -> dict[str, list[Any]]:
    """What proxy and plugged-in FM made of each test row when the run was finished."""
    path = config.out / "answers.json"
    try:
        found: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        if {len(found[row]) for row in ("proxy", "plugged_in")} != {rows}:
            raise ValueError("of other test data")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})", "restore it from a backup") from None
    return found


def _seen(config: ServerConfig, summary: dict[str, Any]) -> dict[str, str]:
    """What the server had of the silos in this run."""
    rounds, told = summary["rounds"], summary["data"]["silos"]
    fewest = min((entry["silos"] for entry in rounds), default=0)
    secure = config.federation.secure_aggregation
    each = f"sums over {fewest} silos or more" if secure else "each silo's by itself, until its round closed"
    counted = config.alignment.every_rounds > 0 and config.alignment.asks_silos
    return {
        "adapters' updates": f"{each}; rounds: {len(rounds)}",
        "numbers of samples": f"each silo's by itself; silos: {len(told)}" if told else each,
        "inactivity counts": each if counted else "not asked for",
        "metrics, as far as silos share them": each,
    }
