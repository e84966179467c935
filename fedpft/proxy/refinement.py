"""After plug-in: the FM's adapter, brought to do in the FM what it did in the proxy (method.md, section 5).

The silos tuned the adapter where fewer neurons follow each attention; in the FM the same LoRA does not do quite the
same. The server has both models, and public data without labels: all that is wanted of the tuning is how it changes
the proxy. What trains is LoRA; the head stays as the silos made it.

**Choice:** not in the paper, whose product is the adapter as it was tuned.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import PlugInSection
from fedpft.data.batches import EncodedDataset, batches, evaluation_batches, sample
from fedpft.errors import ModelError
from fedpft.finite import is_finite
from fedpft.model.adapters import lora_parameters, scale_lora, without_lora
from fedpft.model.architectures import layer_outputs, layers_of
from fedpft.model.precision import DISTILLATION_SCALE, TASK_SCALE, loss_scaler, wide
from fedpft.model.streaming import at_hand, for_backward
from fedpft.model.walk import LayerWalk
from fedpft.seeding import derive_seed
from fedpft.tasks import Task

SCALE_SAMPLES = 256  # public samples for one number a layer
GRADIENT_CLIP = 1.0
_REMEDY = "lower plug_in.learning_rate, or turn plug_in off; the run goes on after its last round"


def scale_layers(
    model: nn.Module, proxy: nn.Module, layers: Sequence[int], public: EncodedDataset, *, batch: int, seed: int
) -> list[float]:
    """Multiplies the LoRA of each of the FM's layers, from first to last, in place; returns the factors.

    With d the change of a layer's output that the layer's own LoRA makes, at the states that reach it,

        c = <d_FM, d_proxy> / <d_FM, d_FM>      over the tokens of some public samples:

    no other factor brings c d_FM nearer to d_proxy. Where LoRA does nothing c is 1.

    Args:
        model, proxy: with the same adapter.
        layers: for each layer of the proxy the FM's.
    """
    device, factors = next(proxy.parameters()).device, []
    with torch.no_grad():
        walks = []
        for _, inputs in evaluation_batches(public, batch, sample(len(public), SCALE_SAMPLES, seed, "layer scales")):
            inputs = {name: value.to(device) for name, value in inputs.items()}
            walks.append((LayerWalk(proxy, inputs), LayerWalk(model, inputs), _real(inputs)))
        for teacher in layers:
            products = torch.zeros(2, dtype=torch.float64, device=device)
            with at_hand(proxy, [walks[0][0].position]), at_hand(model, [teacher]):
                for ours, theirs, real in walks:
                    while theirs.position < teacher:
                        theirs.advance()
                    (wanted, after), (given, _) = _effect(ours, proxy), _effect(theirs, model)
                    ours.advance(after)
                    if real is not None:
                        wanted, given = wanted[real], given[real]
                    products += torch.stack([(given * wanted).sum(), given.square().sum()])
            across, own = products.tolist()
            factors.append(across / own if own else 1.0)
            if not math.isfinite(factors[-1]):
                raise ModelError(f"layer {teacher}: the scale of its LoRA is {factors[-1]}", _REMEDY)
            scale_lora(layers_of(model)[teacher], factors[-1])
            for _, theirs, _ in walks:
                theirs.advance()
    return factors


def refine(
    model: nn.Module,
    proxy: nn.Module,
    matched: Sequence[tuple[int, int]],
    task: Task,
    public: EncodedDataset,
    settings: PlugInSection,
    *,
    seed: int,
    progress: Callable[[int, float], None],
) -> list[float]:
    """Trains the FM's LoRA, in place; returns the loss of each step.

    Towards `change` the loss is the mean over `matched` layers of

        || (H - H_0) - (h - h_0) ||^2 / || h - h_0 ||^2

    with H and h the states after the layer in FM and proxy, H_0 and h_0 the same without LoRA. Towards `proxy` it is
    the task's :meth:`soft_loss` with the proxy as the teacher.

    Args:
        model, proxy: with the same adapter but for what :func:`scale_layers` did.
        matched: (proxy layer, FM layer) pairs.

    Raises:
        ModelError: it diverges.
    """
    if not settings.steps:
        return []
    lora, device = lora_parameters(model), next(model.parameters()).device
    optimizer = torch.optim.AdamW(lora, lr=settings.learning_rate, weight_decay=0.0)
    scaler = loss_scaler(model, DISTILLATION_SCALE if settings.towards == "change" else TASK_SCALE)
    losses: list[float] = []
    count, order_seed = settings.steps * settings.batch, derive_seed(seed, "refinement")
    for step, batch in enumerate(batches(public, batch=settings.batch, start=0, count=count, seed=order_seed)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1.0 - step / settings.steps)
        inputs = {name: value.to(device) for name, value in batch.items()}
        with for_backward(model):
            if settings.towards == "change":
                loss = change_loss(model, proxy, matched, inputs)
            else:
                loss = task.soft_loss(model, proxy, inputs)
        optimizer.zero_grad()
        scaler.scale(loss).backward(inputs=lora)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(lora, GRADIENT_CLIP)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or not all(map(is_finite, lora)):
            raise ModelError(f"step {step + 1} after plug-in: loss or adapter is not finite", _REMEDY)
        progress(step + 1, losses[-1])
    optimizer.zero_grad()
    return losses


def change_loss(
    model: nn.Module, proxy: nn.Module, matched: Sequence[tuple[int, int]], inputs: dict[str, Tensor]
) -> Tensor:
    """The loss of :func:`refine` towards `change`, (); differentiable in the FM's LoRA."""
    students, teachers = [pair[0] for pair in matched], [pair[1] for pair in matched]
    mask = None if (real := _real(inputs)) is None else real.flatten()
    with torch.no_grad():
        with without_lora(proxy), without_lora(model):
            before = layer_outputs(proxy, students, inputs), layer_outputs(model, teachers, inputs)
        proxy_after = layer_outputs(proxy, students, inputs)
    after = proxy_after, layer_outputs(model, teachers, inputs)
    theirs, ours = (
        [(wide(new) - wide(old)).flatten(0, 1) for new, old in zip(*pair, strict=True)]
        for pair in zip(after, before, strict=True)
    )
    loss = torch.zeros((), device=ours[0].device, requires_grad=True)
    for change, wanted in zip(ours, theirs, strict=True):
        if bool(wanted.any()):  # else there is nothing to be relative to
            loss = loss + kernels.alignment_loss(change, wanted, mask) / len(matched)
    return loss


def _effect(walk: LayerWalk, model: nn.Module) -> tuple[Tensor, Tensor]:
    """What the LoRA of the next layer changes in its output, (B, T, D) float64, and that output."""
    tuned = walk.output()
    with without_lora(layers_of(model)[walk.position]):
        return tuned.double() - walk.output().double(), tuned


def _real(inputs: dict[str, Tensor]) -> Tensor | None:
    """Which tokens are no padding: (B, T) bool; None: all."""
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None
