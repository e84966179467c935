"""What a model is worth, and how far a proxy's gradients can be trusted.

B batch, T sequence length, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.data.batches import EncodedDataset, evaluation_batches, sample
from fedpft.model.architectures import layer_outputs, layers_path
from fedpft.seeding import derive_seed


@dataclass(frozen=True)
class Metrics:
    """Shares in [0, 1]; `macro_f1` is the mean over the classes that occur among the labels or the predictions."""

    accuracy: float
    macro_f1: float


def evaluate(model: nn.Module, dataset: EncodedDataset, batch: int, chosen: Tensor | None = None) -> Metrics:
    """Accuracy and macro-F1 of a classifier over the `chosen` samples, (m,) int64 (default: all)."""
    assert dataset.labels is not None
    device = next(model.parameters()).device
    predicted = torch.empty(len(dataset), dtype=torch.int64)
    with torch.no_grad():
        for indices, inputs in evaluation_batches(dataset, batch, chosen):
            inputs = {name: value.to(device) for name, value in inputs.items() if name != "labels"}
            predicted[indices] = model(**inputs).logits.argmax(dim=-1).cpu()
    seen = slice(None) if chosen is None else chosen
    return score(predicted[seen], dataset.labels[seen])


def majority(dataset: EncodedDataset) -> Metrics:
    """The metrics of always naming the most frequent label."""
    assert dataset.labels is not None
    return score(torch.full_like(dataset.labels, int(dataset.labels.mode().values)), dataset.labels)


def score(predicted: Tensor, labels: Tensor) -> Metrics:
    """Metrics of predicted class indices, (n,) int64, against labels, (n,) int64."""
    classes = int(max(predicted.max(), labels.max())) + 1
    hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
    seen = torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes)
    f1 = (2 * hits / seen)[seen > 0]
    return Metrics(float((predicted == labels).double().mean()), float(f1.mean()))


@dataclass(frozen=True)
class Gap:
    """How far the proxy is from the FM, one entry a compressed layer.

    Attributes:
        layers: the proxy's compressed layers.
        hidden_error: ||H_l - h_l||^2 / ||H_l||^2 over a public batch, without padding.
        gradient_cosine: cosine between the gradients of the layer's LoRA on the proxy and on the FM.
    """

    layers: tuple[int, ...]
    hidden_error: tuple[float, ...]
    gradient_cosine: tuple[float, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Gap":
        """What `dataclasses.asdict` and JSON made of one."""
        return cls(**{name: tuple(value) for name, value in values.items()})


def measure_gap(
    proxy: nn.Module,
    model: nn.Module,
    matched: Sequence[tuple[int, int]],
    public: EncodedDataset,
    *,
    samples: int,
    seed: int,
) -> Gap:
    """Compares proxy and FM, both with the same adapter, on `samples` public samples, drawn with the seed.

    The gradient is that of the cross-entropy to labels drawn uniformly: public text has none, and the FM's own
    predictions would say nothing while the head is untrained.
    """
    indices = sample(len(public), samples, seed, "gap")
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in public.batch(indices).items() if name != "labels"}
    mask = inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else None
    classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(derive_seed(seed, "gap labels"))
    labels = torch.randint(classes, (len(indices),), generator=generator).to(device)

    students, teachers = [pair[0] for pair in matched], [pair[1] for pair in matched]
    with torch.no_grad():
        wanted = layer_outputs(model, teachers, inputs)
        found = layer_outputs(proxy, students, inputs)
        errors = [
            float(kernels.alignment_loss(h.flatten(0, 1), t.flatten(0, 1), mask))
            for h, t in zip(found, wanted, strict=True)
        ]
    ours = _lora_gradients(proxy, students, inputs, labels)
    theirs = _lora_gradients(model, teachers, inputs, labels)
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(ours, theirs, strict=True)]
    return Gap(tuple(students), tuple(errors), tuple(cosines))


def _lora_gradients(model: nn.Module, layers: Sequence[int], inputs: dict[str, Tensor], labels: Tensor) -> list[Tensor]:
    """The gradient of each layer's LoRA, flattened, float32. Leaves no gradient behind."""
    path = layers_path(model)
    loss = model(**inputs, labels=labels).loss
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if ".lora_" in n], strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return [
        torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(f"{path}{layer}.")])
        for layer in layers
    ]


def format_gaps(gaps: Sequence[tuple[str, Gap]]) -> str:
    """Stages of a proxy's making as a plain-text table, one line for each stage and compressed layer."""
    lines = [f"{'stage':<24}  layer  hidden-state error  gradient cosine"]
    for stage, gap in gaps:
        for layer, error, cosine in zip(gap.layers, gap.hidden_error, gap.gradient_cosine, strict=True):
            lines.append(f"{stage:<24}  {layer:>5}  {error:>18.4f}  {cosine:>15.4f}")
    return "\n".join(lines)
