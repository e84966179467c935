"""`python -m bench.privacy`: what privacy costs on the demo's federation, in accuracy and in seconds.

Rows of `fedpft demo` with secure aggregation, with differential privacy at several epsilons, and with noise on both of
LoRA's factors; and with inactive neurons counted at the silos or by nobody. And, of no federation: the noise that hides
a whole silo in a sum, against the largest update that there can be.

newsgroups    of `fedpft demo --news`: some 870 texts a silo, of twenty classes
reuters       1,500 texts a silo, of eight
films         3,000 sentences a silo, of two

    OUT/DATA/rows/ROW/    each row's configurations and logs
    JSON                  for each DATA and row its metrics, seconds, commit and machine; and that table
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import provenance
from fedpft.command import run_command
from fedpft.demo import corpora, movies
from fedpft.demo.run import DELTA, NEWS, QUICK, SECURE, Settings, run_demo
from fedpft.privacy.accounting import noise_for

RESULT = Path(__file__).parent / "results" / "privacy.json"
EPSILON, SILO_DELTA, ROUNDS = 8.0, 1e-5, 6  # of whole silos
SILOS, VALUES = (10, 64, 1_000, 10_000), (10_000, 150_000)
REUTERS = replace(
    NEWS,
    prepare=partial(
        corpora.prepare, corpus="r8", documents=4500, test_documents=1000, public_documents=900, concentration=1.0
    ),
    private={**NEWS.private, "batch": 750},
)
FILMS = replace(
    NEWS,
    prepare=partial(movies.prepare, sentences=9000, test_sentences=1000, public_sentences=4000, concentration=100.0),
    private={**NEWS.private, "batch": 1500},
)
DATA = {"newsgroups": NEWS, "reuters": REUTERS, "films": FILMS}


def rows(training: Settings) -> dict[str, Settings]:
    """What each row changes in the demo's server.yaml. training: as of the demo's private row."""

    def private(epsilon: float, **changes: Any) -> Settings:
        return {"training": {**training, "privacy": {"epsilon": epsilon, "delta": DELTA}, **changes}}

    return {
        "secure_aggregation": SECURE,
        "counts_silos": {"alignment": {"counts": "silos"}},
        "counts_none": {"alignment": {"update": "random"}},
        "same_settings": {"training": {**training, "logit_adjustment": "none"}},
        **{f"epsilon_{epsilon:g}": private(epsilon) for epsilon in (8.0, 3.0, 30.0)},
        "epsilon_8_both_factors": private(8.0, frozen_a=False),
    }


def silo_noise() -> list[dict[str, float]]:
    """The noise's norm on the mean of S silos' updates, each clipped to 1, for all rounds to keep to epsilon."""
    noise = noise_for(EPSILON, SILO_DELTA, [], 1.0, ROUNDS)
    return [
        {"silos": silos, "values": values, "noise": noise * math.sqrt(values) / silos}
        for values in VALUES
        for silos in SILOS
    ]


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| data | row | accuracy | macro-F1 | seconds |", "| --- | --- | --- | --- | --- |"]
    for name in filter(found.__contains__, DATA):
        for row, each in found[name].items():
            seconds = f"{each['cost']['seconds']:.0f}" if "cost" in each else ""
            metrics = each["metrics"]
            lines.append(f"| {name} | {row} | {metrics['accuracy']:.3f} | {metrics['macro_f1']:.3f} | {seconds} |")
    lines += ["", f"| values of the adapter | {' | '.join(f'{silos:,} silos' for silos in SILOS)} |"]
    lines.append(f"| --- {'| --- ' * len(SILOS)}|")
    for values in VALUES:
        noises = [row["noise"] for row in found["silo_noise"] if row["values"] == values]
        lines.append(f"| {values:,} | {' | '.join(f'{noise:.2f}' for noise in noises)} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.privacy", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("privacy-out"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULT, help="default: %(default)s; what else is in it stays")
    parser.add_argument("--data", nargs="+", choices=DATA, default=tuple(DATA), help="default: all")
    parser.add_argument("--row", nargs="+", choices=rows({}), help="beside the product; default: all")
    parser.add_argument("--quick", action="store_true", help="the quick demo's data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def command() -> None:
        path: Path = arguments.json
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in arguments.data:
            scale, facts = QUICK if arguments.quick else DATA[name], provenance("cpu")
            wanted = {row: each for row, each in rows(scale.private).items() if row in (arguments.row or (row,))}
            summary = run_demo(arguments.out / name, scale=scale, seed=arguments.seed, compare=False, more=wanted)
            for row, metrics in summary["metrics"].items():
                cost = {"cost": summary["costs"][row]} if row in summary["costs"] else {}
                found.setdefault(name, {})[row] = {**facts, "seed": arguments.seed, "metrics": metrics, **cost}
            found["silo_noise"] = silo_noise()
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(table(found))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
