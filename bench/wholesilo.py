"""`python -m bench.wholesilo`: for how many silos it is of use to hide each whole silo in the sum (docs/privacy.md).

A linear head on what the demo's FM (MiniLM, as it is) makes of Reuters' texts of eight classes, the same texts dealt
out at random to more and more silos. In each round every silo takes gradient steps on all that it has. What goes into
the sum, its noise and what comes out of it are fedpft's own (fedpft/privacy/wholesilo.py), but for masks and server.

Then `fedpft simulate` with 64 silos, which train that head alone, or LoRA with it.

    JSON    accuracy for each number of silos, epsilon and seed of the noise, and of each federation
"""

import argparse
import csv
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from bench.measure import provenance
from fedpft.command import run_command
from fedpft.config import SecureTerms, SiloPrivacyTerms, load_simulation_config
from fedpft.demo import corpora
from fedpft.model.adapters import trains
from fedpft.privacy import fixedpoint, wholesilo
from fedpft.privacy.fixedpoint import Contribution, Layout
from fedpft.privacy.noise import Secret
from fedpft.simulation.run import simulate
from fedpft.wire.tensors import read_tensors

RESULT = Path(__file__).parent / "results" / "wholesilo.json"
CORPUS: corpora.Corpus = "r8"
SILOS, EPSILONS, DELTA, CLIP = (10, 64, 256, 1024), (8.0, 2.0), 1e-5, 4.0
ROUNDS, STEPS, RATE, REPETITIONS = 6, 10, 4.0, 3
TOKENS, BATCH = 64, 64
# What 64 silos train in a federation, and the clip: about what a silo's change is without.
ADAPTERS: dict[str, dict[str, float]] = {"head": {"rank": 0}, "LoRA and head": {"rank": 1, "alpha": 4}}
FEDERATED_SILOS, FEDERATED_TEXTS, FEDERATED_CLIP = 64, 10, 1.0


@dataclasses.dataclass(frozen=True)
class Data:
    """Of texts: what the FM makes of each, with a 1 behind it (N, D), and its class (N,)."""

    features: Tensor
    labels: Tensor


def read(texts: int, tests: int) -> tuple[Data, Data]:
    """Of all silos together, and those to be measured on."""
    tokenizer = AutoTokenizer.from_pretrained(corpora.model_directory())
    model = AutoModel.from_pretrained(corpora.model_directory()).eval()

    def features(batch: list[str]) -> Tensor:
        tokens = tokenizer(batch, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    with tempfile.TemporaryDirectory() as directory:
        data = corpora.prepare(
            Path(directory),
            corpus=CORPUS,
            silos=["all"],
            documents=texts,
            test_documents=tests,
            public_documents=1,
            concentration=1.0,
            seed=0,
        )
        assert data.labels is not None
        classes = data.labels.read_text(encoding="utf-8").split()
        found = []
        for path in (data.silos["all"], data.test):
            with path.open(encoding="utf-8", newline="") as file:
                rows = sorted(csv.DictReader(file), key=lambda row: len(row["text"]))
            parts = [features([row["text"] for row in rows[at : at + BATCH]]) for at in range(0, len(rows), BATCH)]
            ones = torch.ones(len(rows), 1)
            labels = torch.tensor([classes.index(row["label"]) for row in rows])
            found.append(Data(torch.cat([torch.cat(parts), ones], 1), labels))
    return found[0], found[1]


def trained(head: Tensor, silos: Data) -> Tensor:
    """What each of S silos makes of a head (D, C) by gradient steps on (S, N, D) and (S, N): (S, D, C)."""
    heads, wanted = head.expand(len(silos.features), *head.shape).clone(), silos.labels
    one_hot = torch.nn.functional.one_hot(wanted, head.shape[1]).float()
    for _ in range(STEPS):
        odds = (silos.features @ heads).softmax(-1)
        heads -= RATE * silos.features.mT @ (odds - one_hot) / wanted.shape[1]
    return heads


def federated(silos: Data, test: Data, classes: int, terms: SecureTerms, *, noise: bool) -> float:
    """Accuracy after all rounds. terms: with the clip, if there is one; infinity else."""
    private = terms.silo_privacy
    assert private is not None
    head = torch.zeros(test.features.shape[1], classes)
    layout = Layout.of({"head": tuple(head.shape)}, {})
    for round in range(1, private.rounds + 1):
        total = torch.zeros(layout.words, dtype=torch.int32)
        for number, each in enumerate(trained(head, silos)):
            what = Contribution({"head": head}, {"head": each}, 1, 1.0, {}, None)
            what = wholesilo.hidden(what, private.clip)
            key = fixedpoint.rounding_key(0, f"silo-{number}", round)
            words, _ = fixedpoint.encode(what, layout, terms, key)
            if noise:
                wholesilo.add_noise(words[: layout.entries], terms, Secret())
            total += words
        found = fixedpoint.decode(total, layout, terms, len(silos.labels))
        head += (found.change["head"] / found.weight).float()
    return float(((test.features @ head).argmax(1) == test.labels).double().mean())


def rows(data: Data, test: Data, counts: tuple[int, ...], repetitions: int) -> list[dict[str, Any]]:
    """One for each number of silos and epsilon; epsilon of None: clipped, but no noise."""
    classes = int(data.labels.max()) + 1
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    found = []
    for count in counts:
        chosen = order[: len(order) // count * count].view(count, -1)
        silos = Data(data.features[chosen], data.labels[chosen])
        for epsilon in (None, *EPSILONS):
            private = SiloPrivacyTerms(epsilon=epsilon or EPSILONS[0], delta=DELTA, clip=CLIP, rounds=ROUNDS)
            terms = SecureTerms(
                most_samples=1,
                max_entry=CLIP,
                threshold_fraction=0.5,
                min_silos=count,
                weights="equal",
                silo_privacy=private,
            )
            again = 1 if epsilon is None else repetitions
            accuracies = [federated(silos, test, classes, terms, noise=epsilon is not None) for _ in range(again)]
            values = data.features.shape[1] * classes
            noise = wholesilo.multiplier(private) * math.sqrt(values) / count
            row = {"silos": count, "texts": chosen.shape[1], "epsilon": epsilon, "accuracies": accuracies}
            found.append(row | {"values": values, "noise_in_clips": None if epsilon is None else noise})
            print(found[-1], flush=True)
    return found


def federations(work: Path) -> list[dict[str, Any]]:
    """One row for each of ADAPTERS, without silo_privacy and with it."""
    silos = FEDERATED_SILOS
    data = corpora.prepare(
        work / "data",
        corpus=CORPUS,
        silos=["all"],
        documents=silos * FEDERATED_TEXTS,
        test_documents=400,
        public_documents=64,
        concentration=1.0,
        seed=0,
    )
    found = []
    for adapter, section in ADAPTERS.items():
        for epsilon in (None, EPSILONS[0]):
            name = f"{adapter}-{epsilon}".replace(" ", "-")
            federation: dict[str, Any] = {"secure_aggregation": True, "min_silos": silos}
            if epsilon is not None:
                federation["silo_privacy"] = {"epsilon": epsilon, "delta": DELTA, "clip": FEDERATED_CLIP}
            settings = {
                "out": str(work / name),
                "model": {"path": str(corpora.model_directory()), "labels": str(data.labels), "max_tokens": 32},
                "proxy": {"neurons": "all", "allow_whole": True},
                "distillation": {"steps": 0, "closed_form_samples": 0},
                "alignment": {"every_rounds": 0},
                "adapter": section,
                "aggregation": {"weights": "equal"},
                "training": {
                    "rounds": 4,
                    "batch": 5,
                    "learning_rate": 0.002,
                    "head_learning_rate": 0.05,
                    "schedule": "constant",
                    "frozen_a": True,
                },
                "federation": federation,
                "evaluation": {"every_rounds": 0, "gap_samples": 0},
                "public_data": str(data.public),
                "test_data": str(data.test),
                "simulation": {"data": str(data.silos["all"]), "silos": silos},
            }
            path = work / "simulation.yaml"
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
            metrics = simulate(load_simulation_config(path))["metrics"]
            adapter_file = read_tensors(work / name / "rounds" / "1" / "adapter.safetensors", "adapter")
            values = sum(each.numel() for key, each in adapter_file.items() if trains(key, frozen_a=True))
            accuracy, majority = (metrics[row]["accuracy"] for row in ("plugged_in", "majority"))
            found.append({"adapter": adapter, "values": values, "epsilon": epsilon, "accuracy": accuracy})
            found[-1]["majority"] = majority
            print(found[-1], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """As Markdown: the mean over the seeds of the noise."""
    lines = [f"| silos | texts each | clipped only | {' | '.join(f'epsilon {each:g}' for each in EPSILONS)} |"]
    lines.append(f"| --- | --- | --- |{' --- |' * len(EPSILONS)}")
    for count in dict.fromkeys(row["silos"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["silos"] == count]
        means = [f"{sum(row['accuracies']) / len(row['accuracies']):.3f}" for row in own]
        lines.append(f"| {count:,} | {own[0]['texts']} | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.wholesilo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few texts and silos, and no federation")
    arguments = parser.parse_args()

    def command() -> None:
        data, test = read(300, 100) if arguments.quick else read(5120, 2000)
        found = {
            **provenance("cpu"),
            "settings": {"corpus": CORPUS, "clip": CLIP, "rounds": ROUNDS, "steps": STEPS, "rate": RATE},
            "majority": float((test.labels == data.labels.mode().values).double().mean()),
            "rows": rows(data, test, (10,) if arguments.quick else SILOS, 1 if arguments.quick else REPETITIONS),
        }
        if not arguments.quick:
            with tempfile.TemporaryDirectory() as directory:
                found["federations"] = federations(Path(directory))
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(table(found))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
