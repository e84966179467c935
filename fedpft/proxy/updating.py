"""Which neurons a neuron-level distillation updates (method.md, section 4).

Each choice is a score for every neuron of a compressed layer, of which the highest are updated. Only the first is the
paper's; counting on public data, and the other scores, are there to be compared with it.

K neurons of a compressed layer, U of them updated.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import AlignmentSection
from fedpft.data.batches import EncodedDataset, evaluation_batches, sample
from fedpft.errors import ModelError
from fedpft.finite import is_finite
from fedpft.model.architectures import base_of, layer_outputs
from fedpft.model.precision import DISTILLATION_SCALE, loss_scaler, wide
from fedpft.model.streaming import at_hand
from fedpft.model.subffn import SubExperts, SubFFN, counting, sub_ffns, totals
from fedpft.seeding import derive_seed

PUBLIC_SAMPLES = 256  # on which the server counts
GRADIENT_BATCHES = 4

Inactivity = Mapping[str, Tensor]  # as `totals` of fedpft.model.subffn has it


def updated_neurons(
    proxy: nn.Module,
    model: nn.Module,
    matched: Sequence[tuple[int, int]],
    public: EncodedDataset,
    section: AlignmentSection,
    silos: Sequence[Inactivity],
    *,
    seed: int,
    round: int,
) -> dict[int, Tensor]:
    """Proxy layer -> (U,) int64, ascending, U = round(p K), of each compressed layer.

    Args:
        proxy, model: with the round's adapter.
        matched: (proxy layer, FM layer) pairs of the compressed layers.
        silos: each one's counts; looked at if `section.asks_silos`, and then at least one.
    """
    layers, purpose = [student for student, _ in matched], derive_seed(seed, "updated neurons", round)
    if section.update == "random":
        generator, ffns = torch.Generator().manual_seed(purpose), list(sub_ffns(proxy).values())
        scores = {layer: torch.rand(ffns[layer].neurons, generator=generator) for layer in layers}
    elif section.update == "gradient":
        scores = _gradient_norms(proxy, model, matched, public, section.batch, purpose)
    else:
        counts = silos if section.asks_silos else [_counted(proxy, layers, public, section, purpose)]
        sign = 1 if section.update == "inactive" else -1
        scores = {layer: sign * share for layer, share in apoz(counts).items()}
    return highest(scores, section.updated_fraction)


def apoz(inactivity: Sequence[Inactivity]) -> dict[int, Tensor]:
    """The share of all tokens at which a neuron is inactive, of sums over silos: layer -> (K,) float64."""
    total: dict[str, Tensor] = {}
    for counts in inactivity:
        for name, value in counts.items():
            total[name] = total[name] + value if name in total else value
    return {
        int(name): inactive.double() / total[f"{name}.tokens"].clamp(min=1)
        for name, inactive in total.items()
        if not name.endswith(".tokens")
    }


def highest(scores: Mapping[int, Tensor], fraction: float) -> dict[int, Tensor]:
    """Of each layer's (K,) scores the round(p K) highest, ascending int64; of equal ones the lower index."""
    order = {layer: torch.sort(score, descending=True, stable=True).indices for layer, score in scores.items()}
    return {layer: found[: round(fraction * len(found))].sort().values for layer, found in order.items()}


def _counted(
    proxy: nn.Module, layers: Sequence[int], public: EncodedDataset, section: AlignmentSection, seed: int
) -> Inactivity:
    """What silos would count, if the public samples were their data."""
    with torch.no_grad(), counting(proxy, layers, section.inactive_below) as counters:
        for inputs, mask in _inputs(proxy, public, PUBLIC_SAMPLES, section.batch, seed):
            for counter in counters.values():
                counter.mask = mask
            base_of(proxy)(**inputs)
    return totals(counters)


def _gradient_norms(
    proxy: nn.Module,
    model: nn.Module,
    matched: Sequence[tuple[int, int]],
    public: EncodedDataset,
    batch: int,
    seed: int,
) -> dict[int, Tensor]:
    """Of each neuron the norm of the gradient of the distillation's loss, over all its weights: layer -> (K,)."""
    students, teachers = [pair[0] for pair in matched], [pair[1] for pair in matched]
    ffns, scaler = list(sub_ffns(proxy).values()), loss_scaler(proxy, DISTILLATION_SCALE)
    with ExitStack() as stack:
        stack.enter_context(at_hand(proxy, students))
        parameters = {layer: stack.enter_context(ffns[layer].training_neurons(None)) for layer in students}
        every = [parameter for own in parameters.values() for parameter in own]
        total = {parameter: torch.zeros_like(wide(parameter.detach())) for parameter in every}
        for inputs, mask in _inputs(proxy, public, GRADIENT_BATCHES * batch, batch, seed):
            with torch.no_grad():
                wanted = layer_outputs(model, teachers, inputs)
            loss = torch.zeros((), device=wanted[0].device)
            for h, target in zip(layer_outputs(proxy, students, inputs), wanted, strict=True):
                loss = loss + kernels.alignment_loss(h.flatten(0, 1), target.flatten(0, 1), mask)
            found = torch.autograd.grad(scaler.scale(loss), every, allow_unused=True)
            for parameter, gradient in zip(every, found, strict=True):
                if gradient is not None:  # an expert may have seen no token
                    total[parameter] += wide(gradient)
        norms = {layer: _norms(ffns[layer], [total[each] for each in own]) for layer, own in parameters.items()}
    if odd := [layer for layer, norm in norms.items() if not is_finite(norm)]:
        raise ModelError(
            f"layer {odd[0]}: the gradient by which neurons are chosen is not finite",
            "in a new run set alignment.update to another choice",
        )
    return norms


def _norms(ffn: SubFFN | SubExperts, gradients: Sequence[Tensor]) -> Tensor:
    """(K,) from those of `ffn.training_neurons`: each expert's, and in the end the output bias if there is one."""
    gradients = gradients[:-1] if ffn.has_output_bias else gradients
    squares = [gradient.view(len(gradient), -1).square().sum(1) for gradient in gradients]
    experts = ffn.neurons // len(squares[0])
    return torch.stack(squares).view(experts, -1, len(squares[0])).sum(1).flatten().sqrt().cpu()


def _inputs(
    proxy: nn.Module, public: EncodedDataset, samples: int, batch: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Public samples drawn with the seed, without labels, and which of their tokens are no padding."""
    device = next(proxy.parameters()).device
    for _, values in evaluation_batches(public, batch, sample(len(public), samples, seed, "updated neurons")):
        inputs = {name: value.to(device) for name, value in values.items() if name != "labels"}
        yield inputs, inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else None
