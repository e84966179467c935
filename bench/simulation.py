"""`python -m bench.simulation`: what a simulation costs beside the real thing, and how it grows with the silos.

cost    the demo's federation of three silos: real processes over TLS, and simulated in one and in two processes;
        seconds of the rounds, bytes, and whether the adapters are the same
growth  10, 100 and 1,000 silos of which ten train in each round: peak memory of the process, seconds a round
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bench.measure import commit, machine, peak_resident_bytes
from fedpft.command import run_command
from fedpft.config import load_simulation_config
from fedpft.demo import corpora
from fedpft.demo.run import MAIN, NEWS, QUICK, SILOS, Scale, run_demo
from fedpft.simulation.run import simulate

GROWTH = (10, 100, 1000)


def cost(work: Path, scale: Scale) -> list[dict[str, Any]]:
    """One row for each way to run the demo's federation."""
    run_demo(work / "demo", scale=scale, seed=0, compare=False)
    row = work / "demo" / "rows" / MAIN
    summary = json.loads((row / "out" / "summary.json").read_text(encoding="utf-8"))
    rows = [_row("real processes, TLS", row / "out", summary)]
    silos = work / "silos"
    silos.mkdir()
    for name in SILOS:
        shutil.copyfile(work / "demo" / "data" / "silos" / name / "train.csv", silos / f"{name}.csv")
    settings = yaml.safe_load((row / "server.yaml").read_text(encoding="utf-8"))
    for processes in (1, 2):
        out = work / f"simulated-{processes}"
        path = work / "simulation.yaml"
        settings |= {"out": str(out), "proxy_path": str(row / "out" / "proxy"), "simulation": {"data": str(silos)}}
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        rows.append(
            _row(f"simulated, processes: {processes}", out, simulate(load_simulation_config(path), processes=processes))
        )
    return rows


def _row(name: str, out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256((out / "adapter.safetensors").read_bytes()).hexdigest()
    seconds = summary["seconds"].get("enrolment", 0.0) + summary["seconds"]["rounds"]
    return {"row": name, "seconds": seconds, "bytes": summary["bytes"], "adapter_sha256": digest}


def growth(work: Path, silos: int) -> dict[str, Any]:
    """To be run in a process of its own, whose peak memory is this simulation's."""
    data = corpora.prepare(
        work / "data",
        corpus="20newsgroups",
        silos=["everybody"],
        documents=4000,
        test_documents=100,
        public_documents=100,
        concentration=1.0,
        seed=0,
    )
    settings = {
        "out": str(work / "out"),
        "model": {"path": str(corpora.model_directory()), "labels": str(data.labels), "max_tokens": 16},
        "distillation": {"steps": 0, "closed_form_samples": 0},
        "alignment": {"every_rounds": 2, "steps": 1, "batch": 8},
        "training": {"rounds": 3, "batch": 8, "local_epochs": 4 / (4000 / silos), "update_encoding": "int8"},
        "federation": {"sample_fraction": 10 / silos},
        "evaluation": {"every_rounds": 0, "gap_samples": 0},
        "public_data": str(data.public),
        "test_data": str(data.test),
        "simulation": {"data": str(data.silos["everybody"]), "silos": silos},
    }
    path = work / "simulation.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    summary = simulate(load_simulation_config(path))
    peak = peak_resident_bytes()
    rounds = summary["seconds"]["rounds"] / len(summary["rounds"])
    return {"silos": silos, "peak_bytes": peak, "round_seconds": rounds, "out_bytes": _size(work / "out")}


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> int:
    """Parses the command line, runs, prints, writes the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the quick demo's federation")
    parser.add_argument("--json", type=Path, default=Path("bench/results/simulation.json"))
    parser.add_argument("--growth", type=int, metavar="SILOS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    def command() -> None:
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            if arguments.growth:
                print(json.dumps(growth(work, arguments.growth)))
                return
            grown = []
            for silos in GROWTH:
                again = [sys.executable, "-m", "bench.simulation", "--growth", str(silos)]
                done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
                grown.append(json.loads(done.stdout))
            rows = cost(work, QUICK if arguments.quick else NEWS)
        results = {**commit(), "machine": machine("cpu"), "cost": rows, "growth": grown}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for row in [*rows, *grown]:
            print(row)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
