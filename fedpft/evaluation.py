"""What a model is worth, and how far a proxy's gradients can be trusted.

m samples that are looked at.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.data.batches import EncodedDataset, evaluation_batches, sample
from fedpft.model.adapters import without_lora
from fedpft.model.architectures import architecture_of, layer_outputs, layers_path
from fedpft.model.precision import TASK_SCALE, loss_scaler, wide
from fedpft.model.streaming import for_backward
from fedpft.seeding import derive_seed
from fedpft.tasks import Task

Metrics = dict[str, float]  # by name, as the task has them
DRAWS = 200  # of which a standard error is known to 5 %


def evaluate(
    task: Task, model: nn.Module, dataset: EncodedDataset, batch: int, chosen: Tensor | None = None
) -> Metrics:
    """What a model is worth on the `chosen` samples, (m,) int64 (default: all), by the task's metrics."""
    chosen = torch.arange(len(dataset)) if chosen is None else chosen
    return task.score(answers(task, model, dataset, batch, chosen), dataset, chosen)


def answers(task: Task, model: nn.Module, dataset: EncodedDataset, batch: int, chosen: Tensor) -> list[Any]:
    """What a model makes of each `chosen` sample, (m,) int64, in that order, as the task's `score` takes it."""
    device = next(model.parameters()).device
    found: dict[int, Any] = {}
    with torch.no_grad():
        for indices, inputs in evaluation_batches(dataset, batch, chosen):
            of_batch = task.answers(model, {name: value.to(device) for name, value in inputs.items()})
            found.update(zip(indices.tolist(), of_batch, strict=True))
    return [found[index] for index in chosen.tolist()]


@dataclass(frozen=True)
class Difference:
    """By how much one model is better than another by the headline metric.

    value: above 0 if it is, whichever way the metric counts.
    standard_error: over draws of the test samples, both models on the same ones.
    """

    value: float
    standard_error: float


def difference(task: Task, ours: Sequence[Any], theirs: Sequence[Any], dataset: EncodedDataset) -> Difference:
    """Compares the answers of two models to all samples, by the paired bootstrap (Efron and Tibshirani 1993, ch. 6).

    Each of DRAWS times as many samples are drawn with replacement, the same for both, and scored: that holds for
    any metric, and is far less than the errors of both models together where they err on the same samples.
    """
    name, sign = task.headline.name, 1.0 if task.headline.more_is_better else -1.0

    def scored(chosen: Tensor) -> float:
        both = [task.score([each[i] for i in chosen.tolist()], dataset, chosen)[name] for each in (ours, theirs)]
        return sign * (both[0] - both[1])

    generator = torch.Generator().manual_seed(derive_seed(0, "bootstrap"))
    count = len(dataset)
    drawn = [scored(torch.randint(count, (count,), generator=generator)) for _ in range(DRAWS)]
    return Difference(scored(torch.arange(count)), statistics.stdev(drawn))


class LogitOffset(nn.Module):
    """A language model whose logits are the untuned FM's + the tuned proxy's - the untuned proxy's.

    Proxy-tuning (Liu et al. 2024, arXiv 2401.08565). The three have one output layer, which is linear and which no silo
    trains: so it is the last hidden states that are added up, and logits are never held beyond what one model needs. A
    cap on logits (Gemma 2) is put on the sum.

    Args:
        model, proxy: carry the adapter.
    """

    def __init__(self, model: nn.Module, proxy: nn.Module) -> None:
        super().__init__()
        self._model, self._proxy, self.config = model, proxy, model.config

    @property
    def base_model(self) -> nn.Module:
        """What makes hidden states."""
        return self

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits of them."""
        layer: nn.Module = self._model.get_output_embeddings()  # type: ignore[operator]
        return layer

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        """`last_hidden_state`: (B, T, D)."""
        tuned = _last_states(self._proxy, inputs)
        with without_lora(self._model), without_lora(self._proxy):
            states = _last_states(self._model, inputs)
            combined = wide(states) + (wide(tuned) - wide(_last_states(self._proxy, inputs)))
        return SimpleNamespace(last_hidden_state=combined.to(states.dtype))


def _last_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    states: Tensor = model.base_model(**inputs).last_hidden_state  # type: ignore[operator]
    return states


@dataclass(frozen=True)
class Gap:
    """How far the proxy is from the FM, one entry a compressed layer.

    Attributes:
        layers: the proxy's compressed layers.
        hidden_error: ||H_l - h_l||^2 / ||H_l||^2 over a public batch, without padding.
        gradient_cosine: cosine between the gradients of the layer's LoRA on attention, on the proxy and on the FM. That
            on the FFN, where there is any, has no part in it: it is of other neurons.
        task_cosine: the same on test samples with their labels; empty without any.
    """

    layers: tuple[int, ...]
    hidden_error: tuple[float, ...]
    gradient_cosine: tuple[float, ...]
    task_cosine: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Gap":
        """What `dataclasses.asdict` and JSON made of one."""
        return cls(**{name: tuple(value) for name, value in values.items()})


def measure_gap(
    task: Task,
    proxy: nn.Module,
    model: nn.Module,
    matched: Sequence[tuple[int, int]],
    public: EncodedDataset,
    *,
    samples: int,
    seed: int,
    test: EncodedDataset | None = None,
) -> Gap:
    """Compares proxy and FM, both with the same adapter, on `samples` public samples, drawn with the seed.

    The gradient is that of the task's loss. Where public samples have no labels they are drawn uniformly: the FM's own
    answers would say nothing while the head is untrained.

    Args:
        proxy, model, matched: as of :func:`fedpft.proxy.distillation.layer_level`.
        test: labelled samples, of which as many are looked at for `task_cosine`.
    """
    indices = sample(len(public), samples, seed, "gap")
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in public.batch(indices).items()}
    mask = inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else None
    classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    labelled = task.with_any_labels(inputs, classes, torch.Generator().manual_seed(derive_seed(seed, "gap labels")))

    students, teachers = [pair[0] for pair in matched], [pair[1] for pair in matched]
    with torch.no_grad():
        wanted = layer_outputs(model, teachers, inputs)
        found = layer_outputs(proxy, students, inputs)
        errors = [
            float(kernels.alignment_loss(h.flatten(0, 1), t.flatten(0, 1), mask))
            for h, t in zip(found, wanted, strict=True)
        ]

    def cosines(batch: Mapping[str, Tensor]) -> tuple[float, ...]:
        ours, theirs = (_lora_gradients(task, *each, batch) for each in ((proxy, students), (model, teachers)))
        return tuple(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(ours, theirs, strict=True))

    of_task: tuple[float, ...] = ()
    if test is not None:
        batch = test.batch(sample(len(test), samples, seed, "gap, test"))
        of_task = cosines({name: value.to(device) for name, value in batch.items()})
    return Gap(tuple(students), tuple(errors), cosines(labelled), of_task)


def _lora_gradients(task: Task, model: nn.Module, layers: Sequence[int], batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradient of each layer's LoRA on attention, flattened, float32. Leaves no gradient behind."""
    path, marks = layers_path(model), [f".{part}.lora_" for part in architecture_of(model).attention]
    with for_backward(model):
        loss = loss_scaler(model, TASK_SCALE).scale(task.loss(model, batch))  # a cosine knows no scale
    chosen = [(name, p) for name, p in model.named_parameters() if any(mark in name for mark in marks)]
    names, parameters = zip(*chosen, strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return [
        torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(f"{path}{layer}.")])
        for layer in layers
    ]


def format_gaps(gaps: Sequence[tuple[str, Gap]]) -> str:
    """Stages of a proxy's making as a plain-text table, one line for each stage and compressed layer."""
    labelled = any(gap.task_cosine for _, gap in gaps)
    lines = [f"{'stage':<24}  layer  hidden-state error  gradient cosine{'  with labels' if labelled else ''}"]
    for stage, gap in gaps:
        rows = zip_longest(gap.layers, gap.hidden_error, gap.gradient_cosine, gap.task_cosine)
        for layer, error, cosine, of_task in rows:
            shown = "" if of_task is None else f"  {of_task:>11.4f}"
            lines.append(f"{stage:<24}  {layer:>5}  {error:>18.4f}  {cosine:>15.4f}{shown}")
    return "\n".join(lines)
