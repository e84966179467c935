"""`python -m bench.leakage`: what `fedpft leakage` finds on `fedpft demo --news`, and how long that takes.

plain          that demo's settings, silos counting inactive neurons; with the curve over K
same_settings  whole epochs of large batches, as differential privacy wants them, without it
shifted        the same, but with the loss shifted by the silo's label shares, as in `plain`
private        as same_settings, at epsilon 8
seed-1, seed-2 as plain, with other partitions, documents and beginnings. The label reader's features were chosen
               on seed 0: these are the ones that say what it is worth

OUT/data-SEED/              the silos' files and the server's
OUT/RUN/simulation.yaml     what `fedpft leakage --config` takes
OUT/RUN/leakage/            its report
JSON                        for each run the findings, seconds, CPU seconds, commit
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from bench.measure import provenance
from fedpft.command import run_command
from fedpft.config import load_simulation_config
from fedpft.demo.run import DELTA, EPSILON, NEWS, QUICK, SILOS, Scale, Settings, merged
from fedpft.leakage import run as leakage
from fedpft.leakage.run import Effort, first_updates, leak

RESULT = Path(__file__).parent / "results" / "leakage.json"
COUNTED: Settings = {"alignment": {"counts": "silos"}}
PRIVATE: Settings = {
    "training": {"batch": 128, "local_epochs": 1.0, "head_learning_rate": 0.05, "logit_adjustment": "none"}
}
SHIFTED: Settings = {"training": {"logit_adjustment": "own"}}
PRIVACY: Settings = {"training": {"privacy": {"epsilon": EPSILON, "delta": DELTA}}}


@dataclass(frozen=True)
class Run:
    """What is other than in the demo.

    widths: as `fedpft leakage --widths`.
    updates_alone: only what the first round's updates tell is looked for.
    """

    seed: int = 0
    changes: Settings = field(default_factory=dict)
    widths: tuple[float, ...] = ()
    updates_alone: bool = False


RUNS = {
    "plain": Run(changes=COUNTED, widths=(0.25, 0.5, 1.0)),
    "private": Run(changes=merged(PRIVATE, PRIVACY)),
    **{f"seed-{seed}": Run(seed=seed, changes=COUNTED, updates_alone=True) for seed in (1, 2)},
    "same_settings": Run(changes=PRIVATE, updates_alone=True),
    "shifted": Run(changes=merged(PRIVATE, SHIFTED), updates_alone=True),
}
UPDATES = ("label shares of a silo", "which tokens occur, of those in no public text")
SEEDS = ("plain", "seed-1", "seed-2")
COLUMNS = {  # of the table: which run, and which rows of it, by what the attacker sees
    "without": ("plain", False),
    "with secure aggregation": ("plain", True),
    "with DP": ("private", False),
    "with both": ("private", True),
}
# What of each sort the server sees under secure aggregation; a single update of one step: nothing.
SUMS = {"single updates": "sums", "single inactivity counts": "sums of inactivity counts"}


def attack(out: Path, name: str, scale: Scale, effort: Effort) -> dict[str, Any]:
    """Rehearses and attacks one run's federation; goes on with one that was stopped."""
    run = RUNS[name]
    config = load_simulation_config(simulation_yaml(out, name, run, scale))
    facts, begun, before = provenance("cpu"), time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    directory, effort = out / name / "leakage", replace(effort, widths=run.widths)
    if run.updates_alone:
        found = {"seed": run.seed, "findings": [asdict(each) for each in first_updates(config, directory, effort)]}
    else:
        found = leak(config, directory, effort)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **facts,
        **{key: found[key] for key in ("seed", "findings", "held", "effort", "seconds", "config") if key in found},
        "wall_seconds": time.monotonic() - begun,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def simulation_yaml(out: Path, name: str, run: Run, scale: Scale) -> Path:
    """Writes it, and the data if they are not there."""
    data, labelled = out / f"data-{run.seed}", out / f"data-{run.seed}" / "by-name"
    dealt = scale.prepare(data, silos=SILOS, seed=run.seed)
    labelled.mkdir(exist_ok=True)
    for silo, path in dealt.silos.items():
        shutil.copyfile(path, labelled / f"{silo}{path.suffix}")
    settings: Settings = {
        "seed": run.seed,
        "out": str(out / name / "out"),
        "threads": 1,
        "model": {"path": str(scale.model()), "labels": str(dealt.labels)},
        "public_data": str(dealt.public),
        "test_data": str(dealt.test),
        "simulation": {"data": str(labelled)},
    }
    path = out / name / "simulation.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(merged(merged(settings, scale.settings), run.changes), sort_keys=False), "utf-8")
    return path


def table(runs: Mapping[str, Any]) -> str:
    """As Markdown: attackers and what they look for, with and without; then seeds beside each other."""
    having = [(title, of, sums) for title, (of, sums) in COLUMNS.items() if of in runs]
    keys = dict.fromkeys(
        (each["attacker"], each["sees"], each["goal"], each["measure"])
        for of in ("plain", "private")
        if of in runs
        for each in runs[of]["findings"]
        if each["sees"] not in SUMS.values()
    )
    lines = [f"| attacker | sees | looks for | measure | {' | '.join(title for title, *_ in having)} |"]
    lines.append(f"| {' | '.join(['---'] * (4 + len(having)))} |")
    for attacker, sees, goal, measure in keys:
        seen = SUMS.get(sees, "") if attacker == "the server" else sees
        cells = [_cell(runs[of], (attacker, seen if sums else sees, goal, measure)) for _, of, sums in having]
        lines.append(f"| {attacker} | {sees} | {goal} | {measure} | {' | '.join(cells)} |")
    seeds = [name for name in SEEDS if name in runs]
    lines += ["", f"| sees | looks for | measure | {' | '.join(seeds)} | mean |"]
    lines.append(f"| {' | '.join(['---'] * (4 + len(seeds)))} |")
    for each in runs[seeds[0]]["findings"] if seeds else []:
        if each["goal"] not in UPDATES:
            continue
        key = tuple(each[part] for part in ("attacker", "sees", "goal", "measure"))
        values = [found["value"] for name in seeds if (found := _find(runs[name], key)) is not None]
        cells = [_cell(runs[name], key) for name in seeds]
        lines.append(f"| {' | '.join((*key[1:], *cells))} | {fmean(values):.3f} |")
    lines += ["", "| run | seconds | of CPU |", "| --- | --- | --- |"]
    lines += [f"| {name} | {run['wall_seconds']:.0f} | {run['cpu_seconds']:.0f} |" for name, run in runs.items()]
    return "\n".join(lines)


def _find(run: Mapping[str, Any], key: tuple[str, ...]) -> dict[str, Any] | None:
    parts = ("attacker", "sees", "goal", "measure")
    return next((each for each in run["findings"] if tuple(each[part] for part in parts) == key), None)


def _cell(run: Mapping[str, Any], key: tuple[str, ...]) -> str:
    """What was found beside what guessing gives; bold if it is more than that; - if it is not seen."""
    if (found := _find(run, key)) is None:
        return "-"
    finding = leakage.Finding(**found)
    value = f"**{finding.value:.3f}**" if finding.found else f"{finding.value:.3f}"
    return f"{value} ({finding.guess:.3f}{f' ± {2 * finding.error:.3f}' if finding.error else ''})"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.leakage", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("leakage-out"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULT, help="default: %(default)s; other runs in it stay")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=tuple(RUNS), help="default: all; none: only a table")
    parser.add_argument("--quick", action="store_true", help="the quick demo's data, and few attacks")
    arguments = parser.parse_args()

    def command() -> None:
        scale, effort = (QUICK, leakage.QUICK) if arguments.quick else (NEWS, leakage.FULL)
        path: Path = arguments.json
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in arguments.runs:
            known[name] = attack(arguments.out.absolute(), name, scale, effort)
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(table({name: known[name] for name in RUNS if name in known}))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
