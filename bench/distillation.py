"""`python -m bench.distillation`: what brings the proxy near the FM before the federation, in the demo's setting.

Prints, for the proxy as cut and after each way of distilling it, the relative hidden-state error and the cosine of the
adapter gradients, as means over the compressed layers, on public documents that no distillation saw.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fedpft.config import AdapterSection, ColumnsSection, DistillationSection, ProxySection
from fedpft.data.batches import encode
from fedpft.data.samples import read_label_list, read_unlabelled
from fedpft.demo import corpora
from fedpft.demo.run import FULL, SILOS
from fedpft.evaluation import measure_gap
from fedpft.model import adapters, loading
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.selection import select

HELD_OUT = 64
TASK = "sequence-classification"
WAYS = {
    "as cut": {"closed_form_samples": 0, "steps": 0},
    "closed form": {"steps": 0},
    "steps": {"closed_form_samples": 0},
    "closed form, then steps": {},
}


def main() -> None:
    """Distils in every way and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.distillation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    seed = parser.parse_args().seed
    settings, max_tokens = FULL.settings["distillation"], FULL.settings["model"]["max_tokens"]
    with tempfile.TemporaryDirectory() as directory:
        data = corpora.prepare(
            Path(directory),
            corpus=FULL.corpus,
            silos=SILOS,
            documents=FULL.documents,
            test_documents=FULL.test_documents,
            public_documents=FULL.public_documents,
            concentration=1.0,
            seed=seed,
        )
        public, labels = read_unlabelled(data.public, ColumnsSection(), "text"), read_label_list(data.labels)
    processor = loading.load_processor(corpora.model_directory(), TASK)
    held_out, seen = (
        encode(replace(public, inputs=public.inputs[part], lines=public.lines[part]), processor, "text", max_tokens)
        for part in (slice(HELD_OUT), slice(HELD_OUT, None))  # the demo's data is in random order
    )
    model = loading.load_model(corpora.model_directory(), TASK, labels, seed=seed)
    adapters.attach(model, AdapterSection(), seed=seed)
    selection = select(model, ProxySection())
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, settings {settings}\n")
    print("| | hidden-state error | gradient cosine |\n| --- | --- | --- |")
    for name, changes in WAYS.items():
        proxy = cut(model, selection)
        distillation = DistillationSection(**{**settings, **changes})
        layer_level(proxy, model, selection.matched, seen, distillation, seed=seed, progress=lambda _step, _loss: None)
        gap = measure_gap(proxy, model, selection.matched, held_out, samples=HELD_OUT, seed=seed)
        error, cosine = statistics.fmean(gap.hidden_error), statistics.fmean(gap.gradient_cosine)
        print(f"| {name} | {error:.3f} | {cosine:.3f} |", flush=True)


if __name__ == "__main__":
    main()
