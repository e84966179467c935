"""What every operator returns when it is traced: shapes, dtypes and devices, no values. Twins of reference.py."""

import torch
from torch import Tensor


def neuron_saliency(w_in: list[Tensor], w_gate: list[Tensor], w_out: list[Tensor]) -> Tensor:
    return w_in[0].new_empty((len(w_in), w_in[0].shape[0]), dtype=torch.float32)


def inactivity_count(z: Tensor, mask: Tensor | None, activation: str, eps: float) -> Tensor:
    return z.new_empty(z.shape[1], dtype=torch.int64)


def sub_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    neurons: Tensor | None,
    mask: Tensor | None,
    activation: str,
    eps: float,
    count: bool,
    save: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = w_in if neurons is None else neurons
    counts = x.new_empty(chosen.shape[0] if count else 0, dtype=torch.int64)
    return x.new_empty(x.shape), _saved(x, chosen, w_gate, save, compact), counts


def sub_ffn_backward(
    grad_y: Tensor,
    saved: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    neurons: Tensor | None,
    activation: str,
    compact: bool,
) -> Tensor:
    return grad_y.new_empty(grad_y.shape)


def sub_ffn_train(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    updated_in: Tensor,
    updated_b_in: Tensor | None,
    updated_gate: Tensor | None,
    updated_b_gate: Tensor | None,
    updated_out: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _saved(x, w_in, w_gate, save, compact=False)


def sub_ffn_train_backward(
    grad_y: Tensor,
    x: Tensor,
    saved: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    updated: int,
    activation: str,
    input_grad: bool,
) -> tuple[Tensor, ...]:
    rows, bias = (updated, x.shape[1]), (updated,)
    shapes = [x.shape if input_grad else (0,), rows, bias]
    shapes += [(0,), (0,)] if w_gate is None else [rows, bias]
    return tuple(x.new_empty(shape) for shape in [*shapes, rows, (x.shape[1],)])


def activation_moments(
    total: Tensor,
    second: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    shares: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> None:
    return None


def alignment_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty((), dtype=dtype), student.new_empty((), dtype=dtype)


def alignment_loss_backward(
    grad: Tensor, inverse_energy: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Tensor:
    return student.new_empty(student.shape)


def quantize_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = (x.shape[0] + block - 1) // block
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(blocks, dtype=torch.float32)


def dequantize_accumulate(total: Tensor, q: Tensor, scales: Tensor, weight: float, block: int) -> None:
    return None


def mask_update(
    words: Tensor,
    odd: Tensor,
    before: Tensor,
    after: Tensor,
    streams: Tensor,
    added: int,
    scale: float,
    bound: float,
) -> None:
    return None


def _saved(x: Tensor, rows: Tensor, w_gate: Tensor | None, save: bool, compact: bool) -> Tensor:
    if not save:
        return x.new_empty(0)
    shape = (1 if w_gate is None else 2, x.shape[0], rows.shape[0])
    return x.new_empty(shape, dtype=torch.bfloat16 if compact else x.dtype)
