"""`python -m bench.distillation`: what brings the proxy near the FM before the federation, in the demo's setting.

Prints, for the proxy as cut and after each way of distilling it, the relative hidden-state error and the cosine of the
adapter gradients, as means over the compressed layers, on public documents that no distillation saw.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fedpft.config import AdapterSection, ColumnsSection, DistillationSection, ProxySection
from fedpft.data.samples import Samples, read_label_list
from fedpft.demo import corpora
from fedpft.demo.run import NEWS, SILOS
from fedpft.evaluation import measure_gap
from fedpft.model import adapters, loading
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.selection import select
from fedpft.tasks import TASKS

HELD_OUT = 64
IMPORTANCE = ("weights", "variance", "leverage", "random")
TASK = "sequence-classification"
WAYS: dict[str, dict[str, Any]] = {
    "as cut": {"closed_form_samples": 0, "steps": 0},
    "closed form, fixed ridge": {"steps": 0, "closed_form_ridge": 1e-3},
    "closed form": {"steps": 0},
    "closed form with probes": {"steps": 0, "closed_form_probes": 0.1},
    "steps": {"closed_form_samples": 0},
    "closed form, then steps": {},
}


def main() -> None:
    """Distils in every way and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.distillation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    seed = parser.parse_args().seed
    task, settings, max_tokens = TASKS[TASK], NEWS.settings["distillation"], NEWS.settings["model"]["max_tokens"]
    with tempfile.TemporaryDirectory() as directory:
        data = NEWS.prepare(Path(directory), silos=SILOS, seed=seed)
        assert data.labels is not None
        public, labels = task.read_public(data.public, ColumnsSection()), read_label_list(data.labels)
    processor = loading.load_processor(corpora.model_directory(), TASK)
    held_out, seen = (
        task.encode(_part(public, part), processor, max_tokens)
        for part in (slice(HELD_OUT), slice(HELD_OUT, None))  # the demo's data is in random order
    )
    model = loading.load_model(corpora.model_directory(), TASK, labels, seed=seed)
    adapters.attach(model, AdapterSection(), seed=seed)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, settings {settings}\n")
    print("| neurons by | then | hidden-state error | gradient cosine |\n| --- | --- | --- | --- |")
    for importance, (name, changes) in product(IMPORTANCE, WAYS.items()):
        selection = select(model, ProxySection(importance=importance), seen, seed=seed)
        proxy = cut(model, selection)
        distillation = DistillationSection(**{**settings, **changes})
        layer_level(proxy, model, selection.matched, seen, distillation, seed=seed, progress=lambda _step, _loss: None)
        gap = measure_gap(task, proxy, model, selection.matched, held_out, samples=HELD_OUT, seed=seed)
        error, cosine = statistics.fmean(gap.hidden_error), statistics.fmean(gap.gradient_cosine)
        print(f"| {importance} | {name} | {error:.3f} | {cosine:.3f} |", flush=True)


def _part(samples: Samples, part: slice) -> Samples:
    values = {role: column[part] for role, column in samples.values.items()}
    return replace(samples, values=values, lines=samples.lines[part])


if __name__ == "__main__":
    main()
