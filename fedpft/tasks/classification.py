"""What tasks with one of C classes for each sample have in common."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.data.batches import EncodedDataset
from fedpft.data.rows import Unusable, alike, closest, listed, shown
from fedpft.data.samples import Reader, Samples
from fedpft.tasks.task import Batch, Metric, Task

DECIMAL = re.compile(r"([+-]?\d+)[.,]0+")  # a whole number as a spreadsheet or a data frame may have written it


class Classification(Task):
    """One of the label list's classes for each sample."""

    problem_type = "single_label_classification"
    metrics = (Metric("accuracy", "accuracy", percent=True), Metric("macro_f1", "macro-F1", percent=True))
    baseline = ("majority", "most frequent class")

    def reader(self, labels: Sequence[str]) -> Reader:
        """A row's label is the name of a class."""
        return Reader(("label",), ClassNames(labels).index, tuple(labels))

    def label_counts(self, dataset: EncodedDataset, classes: int) -> Tensor:
        """The samples of each class."""
        assert dataset.labels is not None
        return dataset.labels.bincount(minlength=classes)

    def logit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels)

    def answers(self, model: nn.Module, batch: Batch) -> list[int]:
        """The index of the class that the model names."""
        predicted: list[int] = model(**batch).logits.argmax(dim=-1).tolist()
        return predicted

    def score(self, answers: Sequence[int], dataset: EncodedDataset, chosen: Tensor) -> dict[str, float]:
        """`macro_f1` is the mean over the classes that occur among the labels or the answers."""
        assert dataset.labels is not None
        predicted, labels = torch.tensor(answers), dataset.labels[chosen]
        classes = int(max(predicted.max(), labels.max())) + 1
        hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
        seen = torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes)
        f1 = (2 * hits / seen)[seen > 0]
        return {"accuracy": float((predicted == labels).double().mean()), "macro_f1": float(f1.mean())}

    def baseline_score(self, dataset: EncodedDataset) -> dict[str, float]:
        """Of always naming the most frequent label."""
        assert dataset.labels is not None
        everything = torch.arange(len(dataset))
        return self.score([int(dataset.labels.mode().values)] * len(dataset), dataset, everything)


class ClassNames:
    """A label list in which names are found as people write them."""

    def __init__(self, labels: Sequence[str], column: str = "label") -> None:
        self._labels, self._column = labels, column
        self._indices = {alike(name): number for number, name in enumerate(labels)}

    def index(self, name: object) -> int:
        """The index of the class with this name; Unusable if there is none."""
        if not isinstance(name, str):
            what = f"{self._column!r} is {type(name).__name__}, not a string"
            raise Unusable(what, "write one name, between quotes")
        key = alike(name)
        if key not in self._indices and (decimal := DECIMAL.fullmatch(key)):
            key = decimal[1]
        if key not in self._indices:
            remedy = closest(name, self._labels, f"use one of its {len(self._labels)} labels: {listed(self._labels)}")
            raise Unusable(f"{self._column} {shown(name)} is not in the server's label list", remedy)
        return self._indices[key]


def class_indices(samples: Samples) -> Tensor | None:
    """(n,) int64; None for unlabelled samples."""
    return None if samples.targets is None else torch.tensor(samples.targets)
