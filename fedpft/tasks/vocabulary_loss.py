"""Losses over a vocabulary without ever holding all logits: (N, V) of them can need more than the model.

The output layer W is frozen, so that only the gradient of the hidden states is wanted. It is known once the loss is, so
forward computes it beside the loss, some rows at a time, and backward only scales it. Rows that are not to be learned
cost nothing. Logits are computed in the dtype of the hidden states, as the model itself would; all that follows is
float32. A logit is softcap * tanh(scale * (h w + b) / softcap), or scale * (h w + b) without a softcap.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same, knows neither scale nor softcap, and adds up in
the dtype of the hidden states: in bfloat16 its sum is off by up to 1 %, its gradient ten times further from the plain
one, and on a CPU it holds the weight once more in float32. In float32 it holds as much as ours
(docs/language-models.md). So there is one way, for every torch.

N  tokens
D  hidden size
V  words of the vocabulary
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpft.data.language import NOT_LEARNED
from fedpft.products import add_product

LOGITS_BYTES = 1 << 27  # of one chunk, in float32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The sum of -log p(target) over the tokens that have one: () float32, nats. Differentiable in `hidden` only.

    Args:
        hidden: (..., D) what the output layer takes, float32, bfloat16 or float16.
        weight: (V, D) of the output layer, of the same dtype. bias: (V,).
        targets: (...) int64, NOT_LEARNED where there is none; what `hidden` there predicts, so that the caller shifts.
        softcap, scale: as the model has them (Gemma 2, Cohere, Granite).
        chunk: tokens at a time; default: as many as keep the logits within LOGITS_BYTES.

    Raises:
        ValueError: a gradient of weight or bias is asked for.
    """
    _check_frozen(weight, bias)
    hidden, targets = _learned(hidden, targets)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, softcap, scale, chunk
    )
    return loss


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What each token costs, and whether the likeliest word is the target. Arguments as of `linear_cross_entropy`.

    Returns:
        (...) float32 -log p(target), 0 where there is no target; and (...) bool, False where there is none.
    """
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    right = torch.zeros(targets.shape, dtype=torch.bool, device=targets.device)
    there = targets != NOT_LEARNED
    hidden, targets = _learned(hidden, targets)
    found = [
        (logits.logsumexp(-1) - _at(logits, wanted), logits.argmax(-1) == wanted)
        for rows, wanted, _ in _chunks(hidden, targets, weight, chunk)
        for logits in (_logits(rows, weight, bias, softcap, scale),)
    ]
    if found:
        losses[there], right[there] = (torch.cat(parts) for parts in zip(*found, strict=True))
    return losses, right


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The sum of KL(teacher || student) over the tokens that have a target, whatever that is: () float32, nats.

    Args:
        teacher: what the teacher gives to the same output layer, shaped as `hidden`.
        others: as of `linear_cross_entropy`; ValueError as there.
    """
    _check_frozen(weight, bias)
    there = targets != NOT_LEARNED
    divergence: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        hidden[there], weight, bias, teacher[there], softcap, scale, chunk
    )
    return divergence


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int | None,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else hidden.new_empty(0)
        for rows, wanted, place in _chunks(hidden, targets, weight, chunk, gradient):
            logits = _logits(rows, weight, bias, softcap, scale)
            loss -= _at(logits, wanted).sum()
            slope = None if softcap is None or place is None else (logits / softcap).square_().neg_().add_(1.0)
            top = logits.amax(-1)
            odds = logits.sub_(top[:, None]).exp_()  # in place from here on: a chunk is held once
            total = odds.sum(-1)
            loss += (total.log() + top).sum()
            if place is not None:
                odds.div_(total[:, None])
                odds[torch.arange(len(wanted), device=wanted.device), wanted] -= 1.0
                if slope is not None:
                    odds.mul_(slope)
                if scale != 1.0:
                    odds.mul_(scale)
                add_product(place.zero_(), odds, weight)
            del logits, odds
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype), None, None, None, None, None, None)


class _Divergence(_Loss):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int | None,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else hidden.new_empty(0)
        for rows, wanted, place in _chunks(hidden, teacher, weight, chunk, gradient):
            theirs = _logits(wanted, weight, bias, softcap, scale)
            theirs.sub_(theirs.logsumexp(-1)[:, None])
            ours = _logits(rows, weight, bias, softcap, scale)
            slope = None if softcap is None or place is None else (ours / softcap).square_().neg_().add_(1.0)
            ours.sub_(ours.logsumexp(-1)[:, None])
            odds = theirs.exp()
            loss += odds.mul(theirs.sub_(ours)).sum()
            if place is not None:
                ours.exp_().sub_(odds)
                if slope is not None:
                    ours.mul_(slope)
                if scale != 1.0:
                    ours.mul_(scale)
                add_product(place.zero_(), ours, weight)
            del theirs, ours, odds, slope  # before the next chunk's
        ctx.save_for_backward(gradient)
        return loss


def _check_frozen(weight: Tensor, bias: Tensor | None) -> None:
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the output layer is frozen: the loss has no gradient of it")


def _learned(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Only the tokens that have a target: (n, D) and (n,)."""
    there = targets != NOT_LEARNED
    return hidden[there], targets[there]


def _chunks(
    hidden: Tensor, targets: Tensor, weight: Tensor, chunk: int | None, gradient: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(n, D) of hidden and (n,) of targets, some at a time, with their place in the gradient, if that has any."""
    size = chunk or max(1, LOGITS_BYTES // (4 * len(weight)))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        place = gradient[part] if gradient is not None and len(gradient) else None
        yield hidden[part], targets[part], place


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """(n, V) float32, which may be written on."""
    logits = F.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1)
