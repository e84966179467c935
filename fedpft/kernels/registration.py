"""Defines the operators: the reference as default kernel, fakes for tracing, and derivatives.

The reference is registered for every device, below autograd (CompositeExplicitAutograd); a compiled kernel that is
registered for a device takes its place there, so the dispatcher alone decides and nothing asks what was built.
"""

from typing import Any

import torch
from torch import Tensor

from fedpft.kernels import fakes, reference
from fedpft.kernels.schemas import SCHEMAS

ops = torch.ops.fedpft


def _sub_ffn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w_in, _, w_gate, _, w_out, _, neurons, _, ctx.activation, _, _, ctx.has_saved, ctx.compact = inputs
    _, saved, counts = output
    ctx.mark_non_differentiable(saved, counts)
    ctx.set_materialize_grads(False)  # or autograd makes zeros as large as `saved`, only to hand them to backward
    ctx.save_for_backward(saved, w_in, w_gate, w_out, neurons)


def _sub_ffn_grad(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 14
    if not ctx.has_saved:
        raise RuntimeError("fedpft::sub_ffn: no gradient, because it ran with save=False")
    return ops.sub_ffn_backward(grad_y, *ctx.saved_tensors, ctx.activation, ctx.compact), *[None] * 13


def _sub_ffn_train_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, _, w_gate, _, w_out, _, updated_in, _, _, _, _, ctx.activation, ctx.has_saved = inputs
    ctx.updated = updated_in.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], w_in, w_gate, w_out)


def _sub_ffn_train_grad(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 14
    if not ctx.has_saved:
        raise RuntimeError("fedpft::sub_ffn_train: no gradient, because it ran with save=False")
    needed = ctx.needs_input_grad
    grads = ops.sub_ffn_train_backward(grad_y, *ctx.saved_tensors, ctx.updated, ctx.activation, needed[0])
    grad_x, *grad_updated, grad_b_out = grads
    by_input = [grad_x, *[None] * 5, grad_b_out, *grad_updated, None, None]
    return tuple(grad if wanted else None for grad, wanted in zip(by_input, needed, strict=True))


def _alignment_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], student, teacher, mask)


def _alignment_loss_grad(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return ops.alignment_loss_backward(grad, *ctx.saved_tensors), None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("fedpft's operators have no second derivative")


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fedpft::{_name}", " ".join(_schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fedpft::{_name}", "CompositeExplicitAutograd", getattr(reference, _name))
    torch.library.register_fake(f"fedpft::{_name}", getattr(fakes, _name))
    if _name.endswith("_backward"):
        torch.library.register_autograd(f"fedpft::{_name}", _no_second_derivative)
torch.library.register_autograd("fedpft::sub_ffn", _sub_ffn_grad, setup_context=_sub_ffn_context)
torch.library.register_autograd("fedpft::sub_ffn_train", _sub_ffn_train_grad, setup_context=_sub_ffn_train_context)
torch.library.register_autograd("fedpft::alignment_loss", _alignment_loss_grad, setup_context=_alignment_loss_context)
