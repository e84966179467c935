"""A frozen linear layer with LoRA on it, as one differentiable function: what a silo's step spends its time in.

    y  = x W^T + bias + s (m * x) A^T B^T                m: dropout's mask, 0 or 1 / (1 - p)
    dx = dy W + m * (s dy B) A        dA = (s dy B)^T (m * x)        dB = s dy^T ((m * x) A^T)

N tokens, D input features, E output features, R rank; x (N, D), W (E, D), A (R, D), B (E, R). x and W have one dtype,
in which all is computed and summed up in float32 or wider; A and B may have a wider one, and so have their gradients.

Kept for backward: x itself, which query, key and value share, m in one byte an element, and (m * x) A^T of (N, R). An A
that has no gradient costs neither x nor a multiply.
With a copy of A and B for each sample, (S, R, D) and (S, E, R), all the same, dA and dB are those of each sample; an A
without a gradient needs no copies.
Composed of torch's operators the same keeps m and m * x of each layer in x's dtype, and does each `+` and `*` above
in a pass of its own; here the sums are left to the matrix multiplies. W and bias get no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from fedpft.model.quantized import QuantizedWeight
from fedpft.products import add_product

_LEVELS = 1 << 16  # dropout draws 16 bits an element, so its probability is a multiple of 1 / 65536


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropped: int
    ) -> Tensor:
        ctx.samples = len(b) if b.dim() == 3 else None
        a, b = (factor if factor.dim() == 2 else factor[0] for factor in (a, b))
        keep = _draw_kept(x, dropped) if dropped else None
        ctx.kept_scale = _LEVELS / (_LEVELS - dropped)
        h = _masked(x, keep) @ a.to(x.dtype).t()
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        y.addmm_(h, b.to(x.dtype).t(), alpha=scale * ctx.kept_scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, a, b, h, keep)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h, keep = ctx.saved_tensors
        scale = ctx.scale * ctx.kept_scale
        grad_h = (grad_y @ b.to(weight.dtype)).mul_(scale)
        grad_x = grad_a = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_h @ a.to(weight.dtype)
            if keep is not None:
                grad_x.mul_(keep.to(weight.dtype))
            add_product(grad_x, grad_y, weight.dense() if isinstance(weight, QuantizedWeight) else weight)
        if ctx.needs_input_grad[3]:
            grad_a = _sum_of_products(grad_h, _masked(x, keep), ctx.samples).to(a.dtype)
        # in this order the multiply reads dy along its rows
        grad_b = _sum_of_products(h, grad_y, ctx.samples).mul_(scale).transpose(-1, -2)
        return grad_x, None, None, grad_a, grad_b.to(b.dtype), None, None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """The formula above; the mask is drawn from torch's default generator of x's device.

    Args:
        x: (..., D).
        weight: (E, D), bias: (E,) or None. Frozen.
        a: (R, D), b: (E, R), of x's dtype or a wider one; or (S, R, D) and (S, E, R), the same for each of S samples,
            which have equal parts of the N tokens.
        scale: s.
        dropout: p in [0, 1), rounded to a multiple of 1 / 65536; 1 / (1 - p) is that of the rounded one.

    Returns:
        (..., E).
    """
    dropped = min(round(dropout * _LEVELS), _LEVELS - 1)
    y: Tensor = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scale, dropped)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])


def _sum_of_products(left: Tensor, right: Tensor, samples: int | None) -> Tensor:
    """Over all tokens, (N, I) and (N, J) -> (I, J); or over those of each sample, (S, I, J)."""
    if samples is None:
        return left.t() @ right
    return left.view(samples, -1, left.shape[1]).transpose(1, 2) @ right.view(samples, -1, right.shape[1])


def _draw_kept(x: Tensor, dropped: int) -> Tensor:
    """x's shape, int8: 0 with probability `dropped` / 65536, else 1.

    Four elements for one draw of 64 bits: `bernoulli_` draws for each, which took a fifth of a silo's whole step.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return bits.ge_(dropped - _LEVELS // 2).to(torch.int8)


def _masked(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else keep.to(x.dtype).mul_(x)
