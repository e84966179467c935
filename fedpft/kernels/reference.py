"""Every operator in plain torch: its specification, its fallback on any device, and the oracle of its tests.

N tokens, D hidden size, F FFN neurons of the FM, K neurons of the sub-FFN, U updated neurons, L layers,
P projections into the neurons (1 plain, 2 gated). Signatures are those of schemas.py.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Rows = TypeVar("Rows", Tensor, Tensor | None)


class Activation(NamedTuple):
    """A pointwise function and its backward: `forward(z)` and `backward(grad, z)` = grad * act'(z)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda grad, z: aten.threshold_backward(grad, z, 0)),
    "gelu": Activation(F.gelu, lambda grad, z: aten.gelu_backward(grad, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda grad, z: aten.gelu_backward(grad, z, approximate="tanh")
    ),
    "silu": Activation(F.silu, lambda grad, z: aten.silu_backward(grad, z)),
    "quick_gelu": Activation(lambda z: z * torch.sigmoid(1.702 * z), lambda grad, z: _quick_gelu_backward(grad, z)),
}


def _quick_gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * z)
    return grad * (s + 1.702 * z * s * (1 - s))


def neuron_saliency(w_in: list[Tensor], w_gate: list[Tensor], w_out: list[Tensor]) -> Tensor:
    """(L, F) float32: square root of the sum of squares of all that belongs to a neuron."""
    energy = torch.stack([_squares(w, 1) for w in w_in]) + torch.stack([_squares(w, 0) for w in w_out])
    if w_gate:
        energy += torch.stack([_squares(w, 1) for w in w_gate])
    return energy.sqrt().float()


def inactivity_count(z: Tensor, mask: Tensor | None, activation: str, eps: float) -> Tensor:
    """(F,) int64: tokens under the mask with |act(z)| <= eps, act in float32 or wider."""
    inactive = ACTIVATIONS[activation].forward(_wide(z)).abs() <= eps
    if mask is not None:
        inactive &= mask[:, None]
    return inactive.sum(0)


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
    """y (N, D); saved (P, N, K): pre-activations, or derivatives in bfloat16; counts (K,) int64."""
    w_in, w_out = _chosen(w_in, neurons), _chosen(w_out, neurons)
    b_in, w_gate, b_gate = (_chosen(rows, neurons) for rows in (b_in, w_gate, b_gate))
    z = _pre_activations(x, w_in, b_in, w_gate, b_gate)
    y = _output(_hidden(z, activation), w_out, b_out)
    counts = inactivity_count(z[0], mask, activation, eps) if count else x.new_empty(0, dtype=torch.int64)
    if not save:
        return y, x.new_empty(0), counts
    return y, (_derivatives(z, activation).bfloat16() if compact else z), counts


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
    """grad_x (N, D)."""
    w_in, w_gate, w_out = _chosen(w_in, neurons), _chosen(w_gate, neurons), _chosen(w_out, neurons)
    grad_hidden = grad_y @ w_out.t()
    grad_z = grad_hidden * saved.to(grad_y.dtype) if compact else _grad_z(grad_hidden, saved, activation)
    return _grad_input(grad_z, w_in, w_gate)


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
    """y (N, D) and saved (P, N, K). The updated views only mark where gradients go."""
    z = _pre_activations(x, w_in, b_in, w_gate, b_gate)
    return _output(_hidden(z, activation), w_out, b_out), z if save else x.new_empty(0)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the first U rows of in, b_in, gate, b_gate and out, and of b_out; what has none is empty."""
    reached = w_in.shape[0] if input_grad else updated
    z = saved[..., :reached]
    grad_z = _grad_z(grad_y @ w_out[:reached].t(), z, activation)
    none = x.new_empty(0)
    grad_x = _grad_input(grad_z, w_in, w_gate) if input_grad else none
    rows = grad_z[..., :updated]
    grad_in, grad_b_in = rows[-1].t() @ x, rows[-1].sum(0)
    grad_gate, grad_b_gate = (none, none.clone()) if w_gate is None else (rows[0].t() @ x, rows[0].sum(0))
    grad_out = _hidden(z[..., :updated], activation).t() @ grad_y
    return grad_x, grad_in, grad_b_in, grad_gate, grad_b_gate, grad_out, grad_y.sum(0)


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
    """Adds the sums of h over the tokens under the mask to total (F,), and of h^2 or h_i h_j to second, both float64.

    h (N, F) is what the neurons pass on, times the token's share. Of the products (F, F) only i <= j.
    """
    if mask is not None:
        x, shares = x[mask], None if shares is None else shares[mask]
    hidden = _hidden(_pre_activations(x, w_in, b_in, w_gate, b_gate), activation).double()
    if shares is not None:
        hidden *= shares[:, None]
    total += hidden.sum(0)
    second += hidden.square().sum(0) if second.dim() == 1 else (hidden.t() @ hidden).triu()


def alignment_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss and 1 / sum(teacher^2), both scalars.

    mean(((t - s) / rms(t))^2) = sum((t - s)^2) / sum(t^2) over the same elements: the counts cancel.
    """
    student, teacher = _wide(student), _wide(teacher)
    error, energy = (teacher - student).square().sum(1), teacher.square().sum(1)
    if mask is not None:
        error, energy = error[mask], energy[mask]
    inverse_energy = energy.sum().reciprocal() if energy.numel() else energy.new_zeros(())
    return error.sum() * inverse_energy, inverse_energy


def alignment_loss_backward(
    grad: Tensor, inverse_energy: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Tensor:
    """Gradient of the student (N, D), in its dtype."""
    gradient = (_wide(student) - _wide(teacher)) * (2.0 * grad * inverse_energy)
    if mask is not None:
        gradient = gradient.masked_fill(~mask[:, None], 0.0)
    return gradient.to(student.dtype)


def quantize_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """q (n,) int8 in [-127, 127] and scales (ceil(n / block),) float32 = max|x| / 127 of each block.

    A block with a value that is not finite gets a scale that is not finite, so that it cannot pass for a number later.
    """
    blocks = _blocks(x.float(), block)
    scales = blocks.abs().amax(1) / 127.0
    steps = (blocks / scales[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    return steps.to(torch.int8).view(-1)[: x.numel()].clone(), scales


def dequantize_accumulate(total: Tensor, q: Tensor, scales: Tensor, weight: float, block: int) -> None:
    """total += weight * scale of the block * q, in float32, in place."""
    values = _blocks(q.float(), block) * scales[:, None]
    total.add_(values.view(-1)[: q.numel()], alpha=weight)


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
    """words (n,) int32 become floor(change * scale + chance), chance in [0, 1) of streams[0], plus and minus the masks.

    odd (2,) int32 counts the changes that were cut to the bound, and those that are not finite, which count as 0.
    """
    change = after.double() - before.double()
    finite = change.isfinite()
    change = change.where(finite, 0.0)
    odd += torch.stack([(change.abs() > bound).sum(), (~finite).sum()])
    chance = streams[0].bitwise_and(0xFFFFFF).double() * 2.0**-24
    total = (change.clamp(-bound, bound) * scale + chance).floor().long()
    masks = streams.long()
    total += masks[1 : added + 1].sum(0) - masks[added + 1 :].sum(0)
    words.copy_((total + (1 << 31)).remainder(1 << 32) - (1 << 31))


def _chosen(rows: Rows, neurons: Tensor | None) -> Rows:
    return rows if rows is None or neurons is None else rows.index_select(0, neurons)


def _blocks(x: Tensor, block: int) -> Tensor:
    count = -(-x.numel() // block)
    return F.pad(x, (0, count * block - x.numel())).view(count, block)


def _squares(weight: Tensor, dim: int) -> Tensor:
    return _wide(weight).square().sum(dim)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pre_activations(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_gate: Tensor | None, b_gate: Tensor | None
) -> Tensor:
    """z (P, N, K): what the activation sees first, and for a gated FFN what it is multiplied with second."""
    z_in = F.linear(x, w_in, b_in)
    return z_in[None] if w_gate is None else torch.stack([F.linear(x, w_gate, b_gate), z_in])


def _hidden(z: Tensor, activation: str) -> Tensor:
    active = ACTIVATIONS[activation].forward(z[0])
    return active if z.shape[0] == 1 else active * z[1]


def _output(hidden: Tensor, w_out: Tensor, b_out: Tensor | None) -> Tensor:
    return hidden @ w_out if b_out is None else torch.addmm(b_out, hidden, w_out)


def _derivatives(z: Tensor, activation: str) -> Tensor:
    """(P, N, K): derivatives of the hidden value by each pre-activation."""
    return _grad_z(torch.ones_like(z[0]), z, activation)


def _grad_z(grad_hidden: Tensor, z: Tensor, activation: str) -> Tensor:
    act = ACTIVATIONS[activation]
    if z.shape[0] == 1:
        return act.backward(grad_hidden, z[0])[None]
    return torch.stack([act.backward(grad_hidden * z[1], z[0]), grad_hidden * act.forward(z[0])])


def _grad_input(grad_z: Tensor, w_in: Tensor, w_gate: Tensor | None) -> Tensor:
    grad_x = grad_z[-1] @ w_in
    return grad_x if w_gate is None else torch.addmm(grad_x, grad_z[0], w_gate)
