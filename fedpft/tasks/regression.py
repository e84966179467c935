"""A number for a text.

m samples that are looked at.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpft.config import BadRows, ColumnsSection
from fedpft.data.batches import EncodedDataset
from fedpft.data.rows import Unusable, shown
from fedpft.data.samples import Reader, Samples
from fedpft.data.text import encode_texts
from fedpft.tasks.task import Batch, Metric, Task

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
LARGEST = torch.finfo(torch.float32).max
FAR = 10.0  # a mean or a spread that a head which starts near 0 is long in reaching


class Regression(Task):
    """One number for each text, learned as it stands: a product gives numbers on the scale of the silos' files."""

    name = "regression"
    model = "AutoModelForSequenceClassification"
    processor = "AutoTokenizer"
    problem_type = "regression"
    peft = "SEQ_CLS"
    peft_loader = "AutoPeftModelForSequenceClassification"
    forms = (("text", "label"),)
    public_forms = (("text",),)
    label_list = False
    metrics = (
        Metric("rmse", "RMSE", more_is_better=False),
        Metric("pearson", "Pearson's r"),
        Metric("spearman", "Spearman's rho"),
    )
    baseline = ("mean", "the mean of the test numbers")

    def reader(self, labels: Sequence[str]) -> Reader:
        """A row's label is a number."""
        return Reader(("label",), number)

    def read_labelled(
        self, path: Path, columns: ColumnsSection, labels: Sequence[str], encoding: str | None = None
    ) -> Samples:
        """Warns of numbers that are far from where a head starts."""
        samples = super().read_labelled(path, columns, labels, encoding)
        numbers = torch.tensor(samples.targets, dtype=torch.float64)
        mean, spread = float(numbers.mean()), float(numbers.std(correction=0))
        if abs(mean) <= FAR and 1 / FAR <= spread <= FAR:
            return samples
        warning = (
            f"{path}: the numbers have mean {mean:.4g} and standard deviation {spread:.4g}, and the head, which starts "
            "near 0, is slow to get there -> have all institutions subtract and divide by the same two numbers, so "
            "that most are between -2 and 2"
        )
        return replace(samples, warnings=(*samples.warnings, warning))

    def encode(
        self,
        samples: Samples,
        processor: Any,
        max_tokens: int,
        *,
        bad_rows: BadRows = "refuse",
        way_out: str = "",
        cache: Path | None = None,
    ) -> EncodedDataset:
        """Token ids, and (n,) float32."""
        numbers = None if samples.targets is None else torch.tensor(samples.targets, dtype=torch.float32)
        return encode_texts(samples, processor, max_tokens, numbers, bad_rows=bad_rows, way_out=way_out, cache=cache)

    def divergence(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """The squared error."""
        return (logits - wanted).square().squeeze(-1)

    def with_any_labels(self, inputs: Batch, classes: int, generator: torch.Generator) -> Batch:
        """Numbers from the standard normal distribution."""
        ids = inputs["input_ids"]
        return {**inputs, "labels": torch.randn(len(ids), generator=generator).to(ids.device)}

    def answers(self, model: nn.Module, batch: Batch) -> list[float]:
        """The model's number."""
        found: list[float] = model(**batch).logits.squeeze(-1).tolist()
        return found

    def score(self, answers: Sequence[float], dataset: EncodedDataset, chosen: Tensor) -> dict[str, float]:
        """A correlation is left out where one side is constant."""
        assert dataset.labels is not None
        found, wanted = torch.tensor(answers, dtype=torch.float64), dataset.labels[chosen].double()
        scores = {"rmse": float((found - wanted).square().mean().sqrt())}
        if found.unique().numel() > 1 and wanted.unique().numel() > 1:
            scores["pearson"] = correlation(found, wanted)
            scores["spearman"] = correlation(ranks(found), ranks(wanted))
        return scores

    def baseline_score(self, dataset: EncodedDataset) -> dict[str, float]:
        """Of always giving the mean."""
        assert dataset.labels is not None
        mean = float(dataset.labels.double().mean())
        return self.score([mean] * len(dataset), dataset, torch.arange(len(dataset)))


def number(given: object) -> float:
    """A label as a finite float32; Unusable if it is none. A file may hold it as a number or write it in C's way."""
    written = str(given).strip()
    if NOT_FINITE.fullmatch(written):
        raise Unusable(f"{shown(written)} is not a finite number", "give the row a number, or remove it")
    if "," in written and NUMBER.fullmatch(written.replace(",", "")):
        raise Unusable(f"the number {shown(written)} has a comma", "write a decimal point, and nothing for thousands")
    if not NUMBER.fullmatch(written):
        raise Unusable(f"{shown(written)} is not a number", "write one such as -3.5 or 1e-3, without a unit")
    if abs(value := float(written)) > LARGEST:
        raise Unusable(f"the number {shown(written)} is too large", f"give one of at most {LARGEST:.1e}")
    return value


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two (m,) float64 that are not constant."""
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def ranks(values: Tensor) -> Tensor:
    """(m,) float64 from 1; equal values share the mean of their ranks."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    means: Tensor = counts.cumsum(0) - (counts - 1) / 2.0
    return means.double()[places]
