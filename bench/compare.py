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
from fedpft.demo.run import FULL, run_demo

ORDER = (
    "full_model",
    "plugged_in",
    "proxy",
    "before_only",
    "during_only",
    "no_distillation",
    "layer_drop",
    "head_only",
    "local_only",
    "majority",
)


def compare(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs what is missing; returns all that docs/results.md shows."""
    summaries = []
    for seed in seeds:
        path = out / f"seed-{seed}" / "summary.json"
        if path.exists():
            summaries.append(json.loads(path.read_text(encoding="utf-8")))
        else:
            summaries.append(run_demo(path.parent, scale=FULL, seed=seed, compare=True))
    first = summaries[0]
    return {
        **commit(),
        "versions": first["versions"],
        "seeds": list(seeds),
        "training": first["config"]["training"],
        "distillation": first["config"]["distillation"],
        "alignment": first["config"]["alignment"],
        "documents": {name: getattr(FULL, name) for name in ("documents", "test_documents", "public_documents")},
        "accuracy": {row: [s["metrics"][row]["accuracy"] for s in summaries] for row in ORDER},
        "macro_f1": {row: [s["metrics"][row]["macro_f1"] for s in summaries] for row in ORDER},
        "closed": [_closed({row: s["metrics"][row]["accuracy"] for row in ORDER}) for s in summaries],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds, and each seed."""
    seeds = results["seeds"]
    lines = [
        f"| row | accuracy | macro-F1 | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in seeds)} |",
    ]
    for row, values in results["accuracy"].items():
        each = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| `{row}` | {_spread(values)} | {_spread(results['macro_f1'][row])} | {each} |")
    lines.append(f"\nWay from `layer_drop` to `full_model` that `plugged_in` goes: {_spread(results['closed'])}")
    return "\n".join(lines)


def _closed(accuracy: dict[str, float]) -> float:
    """The share of the way from FedOT to the full model; the paper's 62 % on RoBERTa QNLI."""
    return (accuracy["plugged_in"] - accuracy["layer_drop"]) / (accuracy["full_model"] - accuracy["layer_drop"])


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def main() -> int:
    """Parses the command line, runs, prints the table, writes the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("compare-out"), help="directory of all runs; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, default=Path("bench/results/compare.json"), help="default: %(default)s")
    arguments = parser.parse_args()

    def command() -> None:
        results = compare(arguments.out, arguments.seeds)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table(results))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
