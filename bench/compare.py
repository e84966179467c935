"""`python -m bench.compare`: every row of the demo over several seeds, mean and spread.

A seed draws the silos' and the public documents, the partition, the head, LoRA, dropout and all orders. Within one
seed all rows have the same silos, the same documents and the same number of steps. A seed whose summary.json is there
is not run again, so an interrupted comparison goes on where it stopped.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import commit
from fedpft.command import run_command
from fedpft.demo.run import LM_FULL, NEWS, Scale, run_demo
from fedpft.tasks import TASKS

ORDER = (
    "zero_shot",
    "proxy_zero_shot",
    "full_model",
    "plugged_in",
    "plugged_in_raw",
    "logit_offset",
    "proxy",
    "before_only",
    "during_only",
    "no_distillation",
    "layer_drop",
    "head_only",
    "local_only",
    "majority",
)


def compare(out: Path, scale: Scale, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs what is missing; returns all that docs/results.md shows."""
    summaries = []
    for seed in seeds:
        path = out / f"seed-{seed}" / "summary.json"
        if path.exists():
            summaries.append(json.loads(path.read_text(encoding="utf-8")))
        else:
            summaries.append(run_demo(path.parent, scale=scale, seed=seed, compare=True))
    first = summaries[0]
    rows = [row for row in ORDER if row in first["metrics"]]
    metrics = first["metrics"]["plugged_in"]
    return {
        **commit(),
        "task": first["task"],
        "versions": first["versions"],
        "seeds": list(seeds),
        **{section: first["config"][section] for section in ("training", "distillation", "alignment")},
        "samples": first["data"],
        "metrics": {name: {row: [s["metrics"][row].get(name) for s in summaries] for row in rows} for name in metrics},
        "costs": {row: [s["costs"][row] for s in summaries] for row in rows if row in first["costs"]},
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds, and each seed; then what the rows took."""
    seeds, shown = results["seeds"], [m for m in TASKS[results["task"]].metrics if m.name in results["metrics"]]
    found = results["metrics"][shown[0].name]
    lines = [
        f"| row | {' | '.join(metric.title for metric in shown)} | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        f"| --- | {' | '.join('---' for _ in (*shown, *seeds))} |",
    ]
    for row, values in found.items():
        each = " | ".join(f"{value:.3f}" for value in values)
        spreads = " | ".join(_spread(results["metrics"][metric.name][row]) for metric in shown)
        lines.append(f"| `{row}` | {spreads} | {each} |")
    ours = zip(found["plugged_in"], found["layer_drop"], found["full_model"], found["proxy"], strict=True)
    ways, gains = [], []
    for plugged_in, layer_drop, full_model, proxy in ours:
        ways.append((plugged_in - layer_drop) / (full_model - layer_drop))
        gains.append((plugged_in - proxy) * (1 if shown[0].more_is_better else -1))
    lines.append(f"\nWay from `layer_drop` to `full_model` that `plugged_in` goes: {_spread(ways)}")
    lines.append(f"\n`plugged_in` better than `proxy` by: {_spread(gains)}\n")
    lines += ["| row | seconds | a silo's peak memory, MB | MB a silo moved |", "| --- | --- | --- | --- |"]
    for row, costs in results["costs"].items():
        means = [statistics.fmean(cost[key] for cost in costs) for key in ("seconds", "silo_peak_bytes", "silo_bytes")]
        lines.append(f"| `{row}` | {means[0]:.0f} | {means[1] / 1e6:.0f} | {means[2] / 1e6:.1f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def main() -> int:
    """Parses the command line, runs, prints the table, writes the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("compare-out"), help="directory of all runs; default: %(default)s"
    )
    parser.add_argument("--lm", action="store_true", help="the language model's demo")
    parser.add_argument("--json", type=Path, help="default: bench/results/compare.json, or compare-lm.json")
    arguments = parser.parse_args()

    def command() -> None:
        name = "compare-lm" if arguments.lm else "compare"
        results = compare(arguments.out / name, LM_FULL if arguments.lm else NEWS, arguments.seeds)
        path = arguments.json or Path("bench/results") / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table(results))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
