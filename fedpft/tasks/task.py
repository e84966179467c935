"""What there is to say about a task; each is one subclass, in a file of its own.

M samples in one batch, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedpft.config import BadRows, ColumnsSection, TaskName
from fedpft.data.batches import EncodedDataset
from fedpft.data.rows import Form
from fedpft.data.samples import Reader, Samples, read_samples

Batch = Mapping[str, Tensor]  # the keyword arguments of a model


@dataclass(frozen=True)
class Metric:
    """A number that says what a model is worth.

    name: its key in summary.json.
    title: in tables and pictures.
    more_is_better: or less.
    percent: whether it is a share, in [0, 1].
    """

    name: str
    title: str
    more_is_better: bool = True
    percent: bool = False

    def shown(self, value: float) -> str:
        """The value within a sentence."""
        return f"{value:.1%}" if self.percent else f"{value:.4g}"


class Task(ABC):
    """What the silos' data is for.

    Attributes:
        name: in server.yaml, in a proxy's files and on the wire.
        model: the class of transformers that loads an FM for the task.
        processor: the class of transformers that loads what goes with it.
        problem_type: what the model's own loss has to be told, by transformers' name; None: nothing.
        peft: peft's name of the task; None if it has none, and takes the model's class.
        peft_loader: the class of peft that loads the product.
        forms: what a row of labelled data may consist of; of several that a file has the first counts.
        public_forms: the same of the server's public data, which has no labels.
        has_tokens: whether an input has a length, which `max_tokens` bounds.
        label_list: whether the owner names the classes, in `model.labels`; then there is :meth:`label_counts` as well.
        head: whether the FM gets a head for the task, which trains in full: a row for each class, or one for a number.
        metrics: what :meth:`score` finds; the first is the headline.
        baseline: the row of a table that :meth:`baseline_score` fills, and what it means; None: there is none.
    """

    name: ClassVar[TaskName]
    model: ClassVar[str]
    processor: ClassVar[str]
    problem_type: ClassVar[str | None] = None
    peft: ClassVar[str | None]
    peft_loader: ClassVar[str]
    forms: ClassVar[tuple[Form, ...]]
    public_forms: ClassVar[tuple[Form, ...]]
    has_tokens: ClassVar[bool] = True
    label_list: ClassVar[bool] = True
    head: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]]
    baseline: ClassVar[tuple[str, str] | None] = None

    @property
    def headline(self) -> Metric:
        """The metric that a run is judged by."""
        return self.metrics[0]

    def reader(self, labels: Sequence[str]) -> Reader | None:
        """How a row's label is read; None if the input itself is what is to be learned.

        Args:
            labels: C names in the order of their class indices; none if the task has no label list.
        """
        return None

    @property
    def has_images(self) -> bool:
        """Whether a data file names other files, which belong to the data."""
        return any("image" in form for form in self.forms)

    def read_labelled(
        self, path: Path, columns: ColumnsSection, labels: Sequence[str], encoding: str | None = None
    ) -> Samples:
        """Reads a labelled data file of which every row has to be in order; errors as of Examination."""
        return read_samples(path, columns, self.forms, self.reader(labels), encoding)

    def read_public(self, path: Path, columns: ColumnsSection, encoding: str | None = None) -> Samples:
        """Reads a public corpus of which every row has to be in order; a label column is not looked at."""
        return read_samples(path, columns, self.public_forms, encoding=encoding)

    @abstractmethod
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
        """Turns samples into what the model takes.

        Args:
            samples: with the reader's targets; without them: unlabelled.
            processor: the FM's tokenizer or image processor, as transformers has them.
            max_tokens: inputs are cut to this many tokens, special ones included.
            bad_rows, way_out: as of :meth:`Examination.samples`, for what only the processor can tell.
            cache: the file that keeps token ids from one start to the next; None: they are held in memory.

        Raises:
            DataError: rows that the processor makes nothing of, or files that changed since they were looked at.
            ModelError: a processor that is not fit.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over whatever :meth:`weight` counts, (), differentiable; by default the model's own loss."""
        loss: Tensor = model(**batch).loss
        return loss

    def label_counts(self, dataset: EncodedDataset, classes: int) -> Tensor:
        """How often each label occurs, int64, by default (C,); the sum over silos is that of all their data."""
        raise NotImplementedError(f"{self.name} has no classes")

    def logit_shift(self, counts: Tensor) -> Tensor:
        """What a silo's label shares add to the logits, (C,) float32: 0 where its shares are equal.

        Logit adjustment (Menon et al. 2021, arXiv 2007.07314) by each silo's own labels; FedLC (Zhang et al. 2022,
        arXiv 2209.00189) does so with a margin of another form. What is learned names no class for being frequent.

        Args:
            counts: :meth:`label_counts` of the silo.
        """
        return log_shares(counts)

    def shifted_loss(self, model: nn.Module, batch: Batch, shift: Tensor) -> Tensor:
        """As :meth:`loss`, with a :meth:`logit_shift` added to the logits in float32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.logit_loss(model(**inputs).logits.float() + shift, batch["labels"])

    def logit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean that is :meth:`loss`, from (..., C) float32."""
        raise NotImplementedError(f"{self.name} has no classes")

    def head_divergence(self, model: nn.Module, hidden: Tensor, teacher: Tensor) -> Tensor:
        """How far what the FM's own head says of some hidden states is from what it says of the teacher's.

        Only of tasks whose FM has such a head: not those with `head`, which is drawn.

        Args:
            model: FM or proxy, whose heads are the same.
            hidden, teacher: (N, D) what the head is given.

        Returns:
            The mean over N of the Kullback-Leibler divergence, () float32, nats. Differentiable in `hidden` only.
        """
        raise NotImplementedError(f"{self.name} has no head before it is trained")

    def soft_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """How far a model's answers are from a teacher's, (): 0 where they agree. Differentiable in the model only.

        The mean over samples, or over the tokens that are answered. Labels are not looked at.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            wanted = teacher(**inputs).logits.float()
        each = self.divergence(model(**inputs).logits.float(), wanted)
        return each.mean() if each.dim() == 1 else each[inputs["attention_mask"].bool()].mean()

    def divergence(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """How far each answer is from the one that is wanted: (..., C) float32 -> (...); by default KL, in nats."""
        ours, theirs = logits.log_softmax(-1), wanted.log_softmax(-1)
        return (theirs.exp() * (theirs - ours)).sum(-1)

    def weight(self, batch: Batch) -> int:
        """Over how many things the loss of a batch is a mean; by default over its samples."""
        return len(batch["labels"])

    def with_any_labels(self, inputs: Batch, classes: int, generator: torch.Generator) -> Batch:
        """Unlabelled inputs with labels drawn uniformly from the CPU's generator: a loss to compare gradients by."""
        samples = len(next(iter(inputs.values())))
        labels = torch.randint(classes, (samples,), generator=generator)
        return {**inputs, "labels": labels.to(next(iter(inputs.values())).device)}

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Any]:
        """What a model makes of each of M samples: all that :meth:`score` needs. Without gradients."""

    @abstractmethod
    def score(self, answers: Sequence[Any], dataset: EncodedDataset, chosen: Tensor) -> dict[str, float]:
        """The metrics, by name.

        Args:
            answers: to m samples.
            chosen: (m,) int64, which of the dataset they are.
        """

    def write(self, model: nn.Module, processor: Any, dataset: EncodedDataset, chosen: Tensor, batch: int) -> list[str]:
        """What a model writes for the `chosen` samples, (m,) int64; nothing if the task's answers are no words."""
        return []

    def wanted(self, processor: Any, dataset: EncodedDataset, chosen: Tensor) -> list[tuple[str, str]]:
        """(what is asked, what is to be written) of the same samples."""
        return []

    def benchmark(self, directory: Path, processor: Any, dataset: EncodedDataset) -> dict[str, str]:
        """The test data as others measure it, if there is such a form: name of a file in `directory` -> its content."""
        return {}

    def score_written(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """The metrics of what was written, by name."""
        return {}

    def baseline_score(self, dataset: EncodedDataset) -> dict[str, float]:
        """The metrics of what knows nothing but the labels of the test data."""
        raise NotImplementedError(f"{self.name} has no baseline")


def diversity(counts: Tensor) -> float:
    """1 - sum_v p_v^2 over the shares p of V values: how likely two samples differ; of labels with several, the mean.

    0 with one value, 1 - 1 / V with equal shares. The Gini-Simpson index.

    Args:
        counts: (V, ...), of a silo.
    """
    shares = counts.double() / counts.sum(0).clamp(min=1)
    return float((1.0 - shares.square().sum(0)).mean())


ABSENT = -30.0  # a share of 1e-13: its gradient is nothing beside AdamW's epsilon


def log_shares(counts: Tensor) -> Tensor:
    """The log of each value's share over an equal share: of a silo's counts of V values, (V, ...), float32.

    What a silo never saw is at ABSENT, so far down that it has no part in the loss: a silo with one class has nothing
    to tell it from, and should teach nothing. Any smoothing would leave it a gradient, if a small one, of which an
    optimizer that normalises, as AdamW does, makes full steps: towards naming that class always.
    """
    relative = counts.double() * len(counts) / counts.sum(0)
    return relative.log().clamp(min=ABSENT).float()
