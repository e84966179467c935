"""Any number of labels for a text.

m samples that are looked at, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.config import BadRows
from fedpft.data.batches import EncodedDataset
from fedpft.data.rows import Unusable, shown
from fedpft.data.samples import Reader, Samples
from fedpft.data.text import encode_texts
from fedpft.tasks.classification import ClassNames
from fedpft.tasks.task import Batch, Metric, Task, log_shares


class MultiLabelClassification(Task):
    """None, one or several of the label list's classes for each text; each class is a yes or no of its own."""

    name = "multi-label-classification"
    model = "AutoModelForSequenceClassification"
    processor = "AutoTokenizer"
    problem_type = "multi_label_classification"
    peft = "SEQ_CLS"
    peft_loader = "AutoPeftModelForSequenceClassification"
    forms = (("text", "labels"),)
    public_forms = (("text",),)
    metrics = (
        Metric("micro_f1", "micro-F1", percent=True),
        Metric("macro_f1", "macro-F1", percent=True),
        Metric("exact_match", "exact match", percent=True),
    )
    baseline = ("usual_labels", "the labels that more than half of the texts have")

    def reader(self, labels: Sequence[str]) -> Reader:
        """A row's labels are a list of names; what is made of it are C numbers, 1 for a label that is there."""
        names = ClassNames(labels)

        def read(given: Sequence[object]) -> list[float]:
            found = [0.0] * len(labels)
            for name in given:
                index = names.index(name)
                if found[index]:
                    raise Unusable(f"label {shown(labels[index])} is there twice", "keep one of the two")
                found[index] = 1.0
            return found

        return Reader(("labels",), read, tuple(labels))

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
        """Token ids, and (n, C) float32 of 0 and 1."""
        labels = None if samples.targets is None else torch.tensor(samples.targets)
        return encode_texts(samples, processor, max_tokens, labels, bad_rows=bad_rows, way_out=way_out, cache=cache)

    def label_counts(self, dataset: EncodedDataset, classes: int) -> Tensor:
        """(2, C): the texts without and with each label."""
        assert dataset.labels is not None
        those_with = dataset.labels.long().sum(0)
        return torch.stack([len(dataset) - those_with, those_with])

    def logit_shift(self, counts: Tensor) -> Tensor:
        """Of each label by itself: a logit is the log of with against without."""
        those_without, those_with = log_shares(counts)
        shift: Tensor = those_with - those_without
        return shift

    def logit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, the mean over texts and labels."""
        return F.binary_cross_entropy_with_logits(logits, labels)

    def divergence(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """The mean over labels of each one's KL."""
        share, signs = wanted.sigmoid(), (1.0, -1.0)
        ours, theirs = ([F.logsigmoid(sign * each) for sign in signs] for each in (logits, wanted))
        return (share * (theirs[0] - ours[0]) + (1.0 - share) * (theirs[1] - ours[1])).mean(-1)

    def with_any_labels(self, inputs: Batch, classes: int, generator: torch.Generator) -> Batch:
        """Each label is there or not with equal probability."""
        ids = inputs["input_ids"]
        labels = torch.randint(2, (len(ids), classes), generator=generator).float()
        return {**inputs, "labels": labels.to(ids.device)}

    def answers(self, model: nn.Module, batch: Batch) -> list[list[bool]]:
        """C times whether the model gives a class more than one half."""
        named: list[list[bool]] = (model(**batch).logits > 0).tolist()  # the logit of one half
        return named

    def score(self, answers: Sequence[Any], dataset: EncodedDataset, chosen: Tensor) -> dict[str, float]:
        """`macro_f1` is the mean over the classes that occur among the labels or the answers; 0 if none does."""
        assert dataset.labels is not None
        named, labels = torch.tensor(answers), dataset.labels[chosen].bool()
        hits, seen = (named & labels).sum(0).double(), named.sum(0) + labels.sum(0)
        f1 = (2 * hits / seen)[seen > 0]
        return {
            "micro_f1": 2 * float(hits.sum()) / max(1, int(seen.sum())),
            "macro_f1": float(f1.mean()) if len(f1) else 0.0,
            "exact_match": float((named == labels).all(1).double().mean()),
        }

    def baseline_score(self, dataset: EncodedDataset) -> dict[str, float]:
        """Of always naming the labels that more than half of the texts have."""
        assert dataset.labels is not None
        usual = (dataset.labels.mean(0) > 0.5).tolist()
        return self.score([usual] * len(dataset), dataset, torch.arange(len(dataset)))
