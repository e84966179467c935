"""The operators as the rest of the package calls them.

N tokens (all leading dimensions of x), D hidden size, F FFN neurons of the FM, K neurons of the sub-FFN,
U updated neurons, L layers. A wrong argument raises TypeError or ValueError whose text starts with its name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpft.kernels import reference
from fedpft.kernels.registration import ops

ACTIVATIONS: tuple[str, ...] = tuple(reference.ACTIVATIONS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def neuron_saliency(w_in: Sequence[Tensor], w_gate: Sequence[Tensor], w_out: Sequence[Tensor]) -> Tensor:
    """Saliency of every neuron of L layers: s_j = sqrt of the sum of squares of all weights of neuron j.

    Args:
        w_in: L tensors (F, D), any strides; float32, bfloat16, float16 or float64.
        w_gate: L tensors (F, D) of a gated FFN, or none at all for a plain one.
        w_out: L tensors (D, F), any strides.

    Returns:
        (L, F) float32; squares are summed in float32 or wider, whatever the weights' dtype.
    """
    if not w_in:
        raise ValueError("w_in: needs at least one layer")
    _check(w_in[0], "w_in[0]", (None, None))
    shape = tuple(w_in[0].shape)
    layers = {"w_in": (w_in, shape), "w_gate": (w_gate, shape), "w_out": (w_out, shape[::-1])}
    for name, (weights, wanted) in layers.items():
        if len(weights) != len(w_in) and (weights or name != "w_gate"):
            raise ValueError(f"{name}: has {len(weights)} layers, but w_in has {len(w_in)}")
        for layer, weight in enumerate(weights):
            _check(weight, f"{name}[{layer}]", wanted, like=w_in[0])
    saliency: Tensor = ops.neuron_saliency(list(w_in), list(w_gate), list(w_out))
    return saliency


def inactivity_count(z: Tensor, mask: Tensor | None, activation: str, eps: float) -> Tensor:
    """Counts, for every neuron, the tokens at which it is inactive: |act(z)| <= eps.

    Args:
        z: (N, F) pre-activations.
        mask: (N,) bool, True for the tokens that count; None: all do.
        activation: one of ACTIVATIONS.
        eps: threshold, at least 0; act is evaluated in float32 or wider.

    Returns:
        (F,) int64.
    """
    _check(z, "z", (None, None))
    _check_mask(mask, z.shape[0], z)
    _check_inactivity(activation, eps)
    counts: Tensor = ops.inactivity_count(z, mask, activation, eps)
    return counts


def sub_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    neurons: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 0.0,
    count: bool = False,
    compact: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A frozen FFN, plain or gated, that can count the inactivity of its neurons on the way.

    plain: y = act(x W_in^T + b_in) W_out + b_out
    gated: y = (act(x W_gate^T + b_gate) * (x W_in^T + b_in)) W_out + b_out

    The gradient flows to x alone; weights that require one are refused, so that none is lost in silence.

    Args:
        x: (..., D).
        w_in, w_gate: (F, D), of x's dtype; w_gate None: a plain FFN. F = K without `neurons`.
        b_in, b_gate: (F,) or None.
        w_out: (F, D): row j is the column of W_out that belongs to neuron j.
        b_out: (D,) or None.
        activation: one of ACTIVATIONS.
        neurons: (K,) int64, the rows of the *full* weights that are used, in this order; None: all of them. The full
            weights are never copied as a whole: the kernels gather a block of rows at a time.
        mask: bool, one per token, any shape with N elements: the tokens that `count` counts.
        eps: a neuron is inactive at a token if |act(z)| <= eps, z being the gate's value in a gated FFN.
        count: also return the inactivity counts.
        compact: keep act'(z) in bfloat16 for backward instead of z: half the memory, and an error of up to 2^-9
            (0.2 %) in every factor of the gradient of x.

    Returns:
        y (..., D), or with `count` the pair y and counts (K,) int64, in the order of `neurons` if given.
    """
    _check_ffn(x, w_in, b_in, w_gate, b_gate, w_out, b_out)
    _check_inactivity(activation, eps)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if mask is not None:
        mask = mask.reshape(-1) if isinstance(mask, Tensor) else mask
        _check_mask(mask, tokens.shape[0], x)
    grad = torch.is_grad_enabled()
    if grad:
        weights = {"w_in": w_in, "b_in": b_in, "w_gate": w_gate, "b_gate": b_gate, "w_out": w_out, "b_out": b_out}
        _refuse_gradients(weights, "sub_ffn_train computes it")
    if neurons is not None:
        if not isinstance(neurons, Tensor) or neurons.dtype != torch.int64 or neurons.dim() != 1:
            raise TypeError("neurons: must be a one-dimensional int64 tensor")
        if neurons.device != x.device:
            raise TypeError(f"neurons: is on {neurons.device}, must be on {x.device}")
    save = grad and x.requires_grad
    y, _, counts = ops.sub_ffn(
        tokens, w_in, b_in, w_gate, b_gate, w_out, b_out, neurons, mask, activation, eps, count, save, compact
    )
    y = y if x.dim() == 2 else y.reshape(x.shape)
    return (y, counts) if count else y


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
    *,
    activation: str,
    mask: Tensor | None = None,
    eps: float = 0.0,
    count: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The FFN of :func:`sub_ffn`, of which the first U neurons and b_out train.

    The neurons stand updated-first, and each `updated_*` is a view of the first U rows of the full tensor, in the same
    memory: the forward reads the full tensors, and the gradients flow to x, `updated_*` and b_out. U = K: all train.

    Args:
        x, w_in, b_in, w_gate, b_gate, w_out, b_out, activation: as in :func:`sub_ffn`.
        updated_in, updated_gate, updated_out: (U, D) views; updated_gate None in a plain FFN.
        updated_b_in, updated_b_gate: (U,) views, None where the full bias is None.
        mask, eps, count: as in :func:`sub_ffn`. What is counted are the values that backward needs anyway.

    Returns:
        y (..., D), or with `count` the pair y and counts (K,) int64.
    """
    _check_ffn(x, w_in, b_in, w_gate, b_gate, w_out, b_out)
    _check_inactivity(activation, eps)
    full = {"w_in": w_in, "b_in": b_in, "w_gate": w_gate, "b_gate": b_gate, "w_out": w_out}
    _refuse_gradients(full, "pass it detached, and the rows that train as updated_*")
    updated = (updated_in, updated_b_in, updated_gate, updated_b_gate, updated_out)
    _check(updated_in, "updated_in", (None, x.shape[-1]), like=x)
    for (name, whole), view in zip(full.items(), updated, strict=True):
        _check_view(view, name.replace("w_", "updated_").replace("b_", "updated_b_"), whole, updated_in.shape[0])
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b_out, *updated))
    tokens = x.reshape(-1, x.shape[-1])
    if mask is not None:
        mask = mask.reshape(-1) if isinstance(mask, Tensor) else mask
        _check_mask(mask, tokens.shape[0], x)
    y, z = ops.sub_ffn_train(tokens, *full.values(), b_out, *updated, activation, save or count)
    result: Tensor = y.reshape(x.shape)
    return (result, ops.inactivity_count(z[0], mask, activation, eps)) if count else result


def activation_moments(
    total: Tensor,
    second: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    *,
    activation: str,
    shares: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Adds to sums over many calls what an FFN's neurons pass on, and its squares or products. In place.

    plain: h = act(x W_in^T + b_in)
    gated: h = act(x W_gate^T + b_gate) * (x W_in^T + b_in)

    h is computed, and the products of a few hundred tokens are summed, in float32 (float64 if x is); sums of more
    tokens are of float64. h never exists for more than a block of tokens.

    Args:
        total: (F,) float64, to which the sums of h_j are added.
        second: float64, contiguous: (F,) for the sums of h_j^2, or (F, F) for those of h_i h_j, i <= j. Nothing below
            the diagonal is touched.
        x: (..., D).
        w_in, w_gate, b_in, b_gate, activation: as in :func:`sub_ffn`.
        shares: one per token, any shape with N elements: a factor of h; None: 1.
        mask: bool, one per token, any shape with N elements: the tokens that count; None: all do.
    """
    _check_projections(x, w_in, b_in, w_gate, b_gate)
    _check_activation(activation)
    neurons = w_in.shape[0]
    _check(total, "total", (neurons,), dtypes=(torch.float64,))
    square = isinstance(second, Tensor) and second.dim() == 2
    _check(second, "second", (neurons, neurons) if square else (neurons,), dtypes=(torch.float64,))
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    for name, sums in {"total": total, "second": second}.items():
        if sums.device != x.device:
            raise TypeError(f"{name}: is on {sums.device}, must be on {x.device}")
        if not sums.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, because it is added to in place")
    if shares is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        shares = shares.reshape(-1).to(wide) if isinstance(shares, Tensor) else shares
        _check(shares, "shares", (tokens.shape[0],), like=x.new_empty(0, dtype=wide))
    if mask is not None:
        mask = mask.reshape(-1) if isinstance(mask, Tensor) else mask
        _check_mask(mask, tokens.shape[0], x)
    given = {"x": x, "w_in": w_in, "b_in": b_in, "w_gate": w_gate, "b_gate": b_gate, "shares": shares}
    _refuse_gradients(given | {"total": total, "second": second}, "detach it")
    ops.activation_moments(total, second, tokens, w_in, b_in, w_gate, b_gate, shares, mask, activation)
    for sums in (total, second):
        torch.autograd.graph.increment_version(sums)


def alignment_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Distance of the student's hidden states from the teacher's, in units of the teacher's root mean square.

    loss = mean over valid tokens and D of ((teacher - student) / rms(teacher over valid tokens))^2

    Args:
        student, teacher: (N, D). The gradient flows to the student alone.
        mask: (N,) bool, True for valid tokens; None: all are.

    Returns:
        scalar, float32 (float64 for float64 inputs); 0 with a gradient of 0 if no token is valid.
    """
    _check(student, "student", (None, None))
    _check(teacher, "teacher", tuple(student.shape), like=student)
    _check_mask(mask, student.shape[0], student)
    _refuse_gradients({"teacher": teacher}, "detach it")
    loss: Tensor = ops.alignment_loss(student, teacher, mask)[0]
    return loss


def quantize_blocks(x: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Rounds to 8 bits, with one scale for each block of consecutive values.

    Args:
        x: (n,).
        block: values that share a scale.

    Returns:
        q: (n,) int8 in [-127, 127].
        scales: (ceil(n / block),) float32, max|x| / 127 of each block; |x - scale * q| <= scale / 2.
            Not finite where the block holds a value that is not.
    """
    _check(x, "x", (None,))
    _check_block(block)
    q, scales = ops.quantize_blocks(x, block)
    return q, scales


def dequantize_accumulate(total: Tensor, q: Tensor, scales: Tensor, weight: float, block: int = 256) -> None:
    """total += weight * scale * q, in place.

    Args:
        total: (n,) float32, changed.
        q, scales: what :func:`quantize_blocks` returned for the same `block`.
        weight: factor, such as the share of a silo's samples.
    """
    _check(total, "total", (None,), dtypes=(torch.float32,))
    _check_block(block)
    _check(q, "q", (total.shape[0],), dtypes=(torch.int8,))
    _check(scales, "scales", ((total.shape[0] + block - 1) // block,), dtypes=(torch.float32,))
    ops.dequantize_accumulate(total, q, scales, weight, block)
    torch.autograd.graph.increment_version(total)  # a compiled kernel writes where autograd does not look


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
    """What a silo's adapter has changed by, as whole numbers under masks: words modulo 2^32, written in place.

    On the CPU only: what is sent is there.

    Args:
        words: (n,) int32, contiguous.
        odd: (2,) int32, contiguous; how many changes were beyond the bound is added to the first, how many were not
            finite, and count as 0, to the second.
        before, after: (n,) float32.
        streams: (M, n) int32. The lowest 24 bits of the first row say by chance which way a value is rounded; the
            next `added` rows are added, the others taken off.
        scale: steps of a change of 1; bound: largest change. Their product is below 2^31 - 1.
    """
    for name, tensor, shape, dtype in (
        ("words", words, (None,), torch.int32),
        ("odd", odd, (2,), torch.int32),
        ("before", before, (words.numel(),), torch.float32),
        ("after", after, (words.numel(),), torch.float32),
        ("streams", streams, (None, words.numel()), torch.int32),
    ):
        _check(tensor, name, shape, dtypes=(dtype,))
        if tensor.device.type != "cpu":
            raise TypeError(f"{name}: is on {tensor.device}, must be on the CPU")
    for name, tensor in (("words", words), ("odd", odd)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
    if not 0 <= added < streams.shape[0]:
        raise ValueError(f"added: must be from 0 to {streams.shape[0] - 1}, the masks in streams, not {added}")
    if not (bound >= 0.0 and scale >= 0.0 and bound * scale < (1 << 31) - 1):
        raise ValueError(f"bound * scale: must be from 0 and below 2^31 - 1, not {bound * scale}")
    ops.mask_update(words, odd, before, after, streams, added, scale, bound)
    torch.autograd.graph.increment_version((words, odd))


def _check(
    tensor: Tensor,
    name: str,
    shape: tuple[int | None, ...],
    *,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = _DTYPES,
) -> None:
    """`shape` has None where any size will do; `like` gives the dtype and device that are wanted."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {type(tensor).__name__}")
    if like is None and tensor.dtype not in dtypes:
        raise TypeError(f"{name}: must be of {', '.join(map(str, dtypes))}, not {tensor.dtype}")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise TypeError(f"{name}: is {tensor.dtype} on {tensor.device}, must be {like.dtype} on {like.device}")
    if tensor.shape != shape and not _fits(tensor.shape, shape):
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, must be {_shape_text(shape)}")


def _fits(sizes: Sequence[int], shape: tuple[int | None, ...]) -> bool:
    return len(sizes) == len(shape) and all(s == w for s, w in zip(sizes, shape, strict=True) if w is not None)


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def _check_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> None:
    _check_projections(x, w_in, b_in, w_gate, b_gate)
    _check(w_out, "w_out", tuple(w_in.shape), like=x)
    if b_out is not None:
        _check(b_out, "b_out", (x.shape[-1],), like=x)


def _check_projections(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_gate: Tensor | None, b_gate: Tensor | None
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: must be a tensor, not {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("x: has shape (), must be (..., D)")
    _check(x, "x", (None,) * x.dim())
    hidden = x.shape[-1]
    _check(w_in, "w_in", (None, hidden), like=x)
    neurons = w_in.shape[0]
    if b_in is not None:
        _check(b_in, "b_in", (neurons,), like=x)
    if w_gate is not None:
        _check(w_gate, "w_gate", (neurons, hidden), like=x)
    if b_gate is not None:
        if w_gate is None:
            raise ValueError("b_gate: given without w_gate")
        _check(b_gate, "b_gate", (neurons,), like=x)


def _check_view(view: Tensor | None, name: str, whole: Tensor | None, updated: int) -> None:
    if whole is None or view is None:
        if whole is not view:
            raise ValueError(f"{name}: must be given exactly if its full tensor is")
        return
    if updated > whole.shape[0]:
        raise ValueError(f"{name}: has {updated} rows, the full tensor only {whole.shape[0]}")
    _check(view, name, (updated, *whole.shape[1:]), like=whole)
    # Tracing has no memory to compare; a copy there would have been refused in the eager run before it.
    if not torch.compiler.is_compiling() and view.numel() and view.data_ptr() != whole.data_ptr():
        raise ValueError(f"{name}: must be a view of the first rows of its full tensor, not a copy")


def _check_mask(mask: Tensor | None, tokens: int, like: Tensor) -> None:
    if mask is not None:
        _check(mask, "mask", (tokens,), dtypes=(torch.bool,))
        if mask.device != like.device:
            raise TypeError(f"mask: is on {mask.device}, must be on {like.device}")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def _check_inactivity(activation: str, eps: float) -> None:
    _check_activation(activation)
    if not eps >= 0.0:
        raise ValueError(f"eps: must be at least 0, not {eps}")


def _check_block(block: int) -> None:
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block: must be a positive whole number, not {block!r}")


def _refuse_gradients(tensors: dict[str, Tensor | None], remedy: str) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, which is not computed: {remedy}")
