"""Small inputs for every operator, and how far a kernel may be from its reference; for check, tests and bench.

N tokens, D hidden size, K neurons, U updated neurons. Sizes are odd on purpose: no vector width divides them.
Only where a label says "even" are D and K multiples of 8, which kernels with fused multiplies ask for.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpft.kernels import reference

# How far outputs may be from the reference in float64, as a share of the output's largest value. Weights are scaled so
# that every stage keeps values near 1, and products are summed over at most 300 terms: half as many roundings, all to
# one side, would reach the figures of float64 and float32. Half types: inputs are exact; z, the hidden value and the
# output are each rounded once, to 2^-11 or 2^-8, and a sum of rounded terms may be small beside them.
TOLERANCES = {torch.float64: 2e-14, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
DTYPES = tuple(TOLERANCES)


@dataclass(frozen=True)
class Case:
    """One call: `arguments` in the order of the operator's schema, floating tensors in `dtype`."""

    operator: str
    label: str
    dtype: torch.dtype
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.operator}-{self.label}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Ffn:
    """A random FFN and N tokens for it."""

    x: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    mask: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """As every FFN operator takes them, after x."""
        return self.w_in, self.b_in, self.w_gate, self.b_gate, self.w_out, self.b_out

    def updated(self, count: int) -> tuple[Tensor | None, ...]:
        """Views of the first `count` rows, as `sub_ffn_train` takes them."""
        return tuple(None if rows is None else rows[:count] for rows in self.weights[:5])


def make_ffn(
    N: int, D: int, K: int, *, dtype: torch.dtype, gated: bool = False, bias: bool = True, strided: bool = False
) -> Ffn:
    """Weights of standard deviation 1 / sqrt(fan-in), so that every stage keeps values near 1.

    Args:
        strided: x and the weights are transposed views, biases and mask have gaps.
    """
    draw = torch.Generator().manual_seed(N + 31 * D + 1009 * K)

    def matrix(rows: int, columns: int, fan_in: int) -> Tensor:
        shape = (columns, rows) if strided else (rows, columns)
        drawn: Tensor = (torch.randn(shape, generator=draw) / math.sqrt(fan_in)).to(dtype)
        return drawn.t() if strided else drawn

    def vector(size: int) -> Tensor:
        return (0.3 * torch.randn(2 * size, generator=draw)).to(dtype)[:: 2 if strided else 1][:size]

    return Ffn(
        x=matrix(N, D, 1),
        w_in=matrix(K, D, D),
        b_in=vector(K) if bias else None,
        w_gate=matrix(K, D, D) if gated else None,
        b_gate=vector(K) if gated and bias else None,
        w_out=matrix(K, D, K),
        b_out=vector(D) if bias else None,
        mask=(torch.rand(2 * N, generator=draw) < 0.7)[:: 2 if strided else 1][:N],
    )


def cases() -> Iterator[Case]:
    """Every operator and every dtype it takes, with ragged, strided, empty and single-neuron inputs."""
    for dtype in DTYPES:
        yield from _saliency_cases(dtype)
        yield from _ffn_cases(dtype)
        yield from _neuron_set_cases(dtype)
        yield from _moment_cases(dtype)
        yield from _other_cases(dtype)
        yield from _even_cases(dtype)
    yield from _mask_cases()


def _saliency_cases(dtype: torch.dtype) -> Iterator[Case]:
    draw = torch.Generator().manual_seed(7)
    for F, D in ((67, 41), (301, 129), (1, 3)):

        def layers(rows: int, columns: int) -> list[Tensor]:
            return [torch.randn(rows, columns, generator=draw).to(dtype) for _ in range(2)]

        def views(weights: list[Tensor]) -> list[Tensor]:
            return [w.t() for w in weights]

        yield Case("neuron_saliency", f"plain-{F}x{D}", dtype, (layers(F, D), [], layers(D, F)))
        yield Case("neuron_saliency", f"gated-{F}x{D}", dtype, (layers(F, D), layers(F, D), layers(D, F)))
        yield Case("neuron_saliency", f"transposed-{F}x{D}", dtype, (views(layers(D, F)), [], views(layers(F, D))))
        gaps = [w[::2, ::3] for w in layers(2 * F, 3 * D)]
        yield Case("neuron_saliency", f"gaps-{F}x{D}", dtype, (gaps, [], layers(D, F)))


def _ffn_cases(dtype: torch.dtype) -> Iterator[Case]:
    shapes = {
        "ragged": make_ffn(37, 19, 23, dtype=dtype),
        "gated": make_ffn(37, 19, 23, dtype=dtype, gated=True),
        "tiles": make_ffn(1061, 17, 29, dtype=dtype),
        "no-bias": make_ffn(9, 16, 33, dtype=dtype, gated=True, bias=False),
        "strided": make_ffn(35, 21, 18, dtype=dtype, gated=True, strided=True),
        "one-neuron": make_ffn(5, 3, 1, dtype=dtype),
        "no-tokens": make_ffn(0, 8, 8, dtype=dtype, gated=True),
        "even": make_ffn(136, 64, 72, dtype=dtype),
        "even-gated": make_ffn(136, 64, 72, dtype=dtype, gated=True),
        "even-tiles": make_ffn(300, 128, 256, dtype=dtype, gated=True),
        "even-no-bias": make_ffn(40, 72, 136, dtype=dtype, bias=False),
    }
    every_activation = ("ragged", "gated", "even", "even-gated")
    for label, ffn in shapes.items():
        for activation in reference.ACTIVATIONS if label in every_activation else ("gelu",):
            name = f"{label}-{activation}"
            for compact in (False, True):
                full: tuple[Any, ...] = (ffn.x, *ffn.weights, None, ffn.mask, activation, 0.05, True, True, compact)
                yield Case("sub_ffn", f"{name}-compact" if compact else name, dtype, full)
                saved = reference.sub_ffn(*full)[1]
                inputs: tuple[Any, ...] = (ffn.x, saved, ffn.w_in, ffn.w_gate, ffn.w_out, None, activation, compact)
                yield Case("sub_ffn_backward", f"{name}-compact" if compact else name, dtype, inputs)
            bare = (ffn.x, *ffn.weights, None, None, activation, 0.0, False, False, False)
            yield Case("sub_ffn", f"{name}-bare", dtype, bare)
            updated = (ffn.w_in.shape[0] + 1) // 2
            train: tuple[Any, ...] = (ffn.x, *ffn.weights, *ffn.updated(updated), activation, True)
            yield Case("sub_ffn_train", name, dtype, train)
            inputs = (ffn.x, ffn.x, reference.sub_ffn_train(*train)[1], ffn.w_in, ffn.w_gate, ffn.w_out)
            for suffix, input_grad in (("", True), ("-weights-only", False)):
                backward = (*inputs, updated, activation, input_grad)
                yield Case("sub_ffn_train_backward", f"{name}{suffix}", dtype, backward)


def _neuron_set_cases(dtype: torch.dtype) -> Iterator[Case]:
    """A set of neurons of the full weights: more than one block of rows, few, none, and in any order."""
    draw = torch.Generator().manual_seed(13)
    for label, (N, D, F, K, gated, strided) in {
        "set": (37, 19, 23, 11, False, False),
        "set-gated": (37, 19, 23, 11, True, False),
        "set-strided": (35, 21, 18, 7, True, True),
        "set-blocks": (261, 16, 400, 300, True, False),
        "set-of-none": (9, 16, 33, 0, False, False),
        "set-even": (136, 64, 96, 72, True, False),
    }.items():
        ffn = make_ffn(N, D, F, dtype=dtype, gated=gated, strided=strided)
        neurons = torch.randperm(F, generator=draw)[:K]
        for compact in (False, True):
            name = f"{label}-compact" if compact else label
            full = (ffn.x, *ffn.weights, neurons, ffn.mask, "gelu", 0.05, True, True, compact)
            yield Case("sub_ffn", name, dtype, full)
            saved = reference.sub_ffn(*full)[1]
            inputs = (ffn.x, saved, ffn.w_in, ffn.w_gate, ffn.w_out, neurons, "gelu", compact)
            yield Case("sub_ffn_backward", name, dtype, inputs)


def _moment_cases(dtype: torch.dtype) -> Iterator[Case]:
    """More tokens than are held at a time, more neurons than a tile has; squares and products, on sums of before."""
    shapes = {
        "ragged": make_ffn(37, 19, 23, dtype=dtype),
        "gated": make_ffn(37, 19, 23, dtype=dtype, gated=True),
        "tiles": make_ffn(1061, 17, 29, dtype=dtype),
        "triangle": make_ffn(61, 8, 523, dtype=dtype, gated=True),
        "no-bias": make_ffn(9, 16, 33, dtype=dtype, gated=True, bias=False),
        "strided": make_ffn(35, 21, 18, dtype=dtype, gated=True, strided=True),
        "one-neuron": make_ffn(5, 3, 1, dtype=dtype),
        "no-tokens": make_ffn(0, 8, 8, dtype=dtype),
        "even": make_ffn(136, 64, 72, dtype=dtype, gated=True),
    }
    draw = torch.Generator().manual_seed(19)
    for label, ffn in shapes.items():
        (N, _), F = ffn.x.shape, ffn.w_in.shape[0]
        shares = torch.rand(2 * N, generator=draw).to(dtype if dtype == torch.float64 else torch.float32)[::2]
        for activation in reference.ACTIVATIONS if label in ("ragged", "gated") else ("gelu",):
            for kind, second in (("products", torch.ones(F, F)), ("squares", torch.ones(F))):
                for suffix, given in (("masked", (shares, ffn.mask)), ("all", (None, None))):
                    name = f"{label}-{activation}-{kind}-{suffix}"
                    sums = (torch.ones(F, dtype=torch.float64), second.double())
                    yield Case("activation_moments", name, dtype, (*sums, ffn.x, *ffn.weights[:4], *given, activation))


def _other_cases(dtype: torch.dtype) -> Iterator[Case]:
    draw = torch.Generator().manual_seed(11)

    def tokens(N: int, D: int) -> Tensor:
        return torch.randn(N, D, generator=draw).to(dtype)

    for N, D in ((37, 19), (0, 5), (1, 1), (7, 1031), (701, 129)):
        first, second = tokens(N, D), tokens(N, D)
        mask = torch.rand(N, generator=draw) < 0.6
        for label, valid in (("masked", mask), ("all", None), ("none", torch.zeros_like(mask))):
            yield from _token_cases(f"{N}x{D}-{label}", first, second, valid)
    gaps = torch.rand(70, generator=draw) < 0.6
    yield from _token_cases("strided-columns", tokens(19, 35).t(), tokens(35, 57)[:, ::3], gaps[::2])
    yield from _token_cases("strided-rows", tokens(70, 19)[::2], tokens(1, 19).expand(35, 19), gaps[::2])
    for value in (math.inf, -math.inf, math.nan):
        first, second = tokens(40, 7), tokens(40, 7)
        first[3, 5], second[30, 1] = value, value
        yield from _token_cases(f"masked-{value}", first, second, torch.arange(40) % 27 != 3)
        yield from _token_cases(f"counted-{value}", first, second, torch.arange(40) != 30)

    for size, block in ((0, 64), (1, 64), (256, 64), (777, 64), (100, 1), (1000, 4096), (70_001, 256)):
        yield from _quantization_cases(f"{size}-by-{block}", tokens(1, size)[0], block)
    yield from _quantization_cases("strided", tokens(2, 301).t()[:, 0], 64)
    for value in (math.inf, -math.inf, math.nan):
        x = tokens(1, 300)[0]
        x[100] = value
        yield from _quantization_cases(f"{value}", x, 64)


def _even_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Sizes that 16-byte accesses divide, rows longer than a warp's step, more layers than one CUDA launch has."""
    draw = torch.Generator().manual_seed(17)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw).to(dtype)

    for L, F, D in ((2, 40, 1064), (1, 136, 8)):
        w_in, w_gate = ([matrix(F, D) for _ in range(L)] for _ in range(2))
        w_out = [matrix(D, F) for _ in range(L)]
        yield Case("neuron_saliency", f"even-{F}x{D}", dtype, (w_in, w_gate, w_out))
        padded = [matrix(D, F + 8)[:, :F] for _ in range(L)]
        yield Case("neuron_saliency", f"even-padded-{F}x{D}", dtype, ([w.t() for w in padded], [], padded))
    w_in, w_out = ([matrix(8, 8) for _ in range(131)] for _ in range(2))
    w_in[130] = w_in[130].t()
    yield Case("neuron_saliency", "even-131-layers", dtype, (w_in, [], w_out))
    for N, D in ((70, 1064), (130, 72)):
        first, second = matrix(N, D), matrix(N, D + 8)[:, :D]
        mask = (torch.rand(2 * N, generator=draw) < 0.6)[::2]
        for label, valid in (("masked", mask), ("all", None)):
            yield from _token_cases(f"even-{N}x{D}-{label}", first, second, valid)
        yield Case("inactivity_count", f"even-{N}x{D}-transposed", dtype, (first.t(), None, "relu", 0.5))
    for size, block in ((20_010, 256), (20_010, 8192), (77, 5), (300, 1)):
        x = torch.randn(2 * size, generator=draw).to(dtype)
        for label, values in (("even", x[:size]), ("gaps", x[::2])):
            yield from _quantization_cases(f"{label}-{size}-by-{block}", values, block)


def _token_cases(label: str, first: Tensor, second: Tensor, mask: Tensor | None) -> Iterator[Case]:
    for activation in reference.ACTIVATIONS if label == "37x19-masked" else ("silu",):
        name = f"{label}-{activation}"
        yield Case("inactivity_count", name, first.dtype, (first, mask, activation, 0.05))
    yield Case("alignment_loss", label, first.dtype, (first, second, mask))
    inverse_energy = reference.alignment_loss(first, second, mask)[1]
    grad = torch.full_like(inverse_energy, first.numel())  # keeps the result near 1, which float16 needs
    yield Case("alignment_loss_backward", label, first.dtype, (grad, inverse_energy, first, second, mask))


def _quantization_cases(label: str, x: Tensor, block: int) -> Iterator[Case]:
    yield Case("quantize_blocks", label, x.dtype, (x, block))
    if x.dtype == torch.float32:
        q, scales = (torch.stack([t, t], 1)[:, 0] for t in reference.quantize_blocks(x, block))
        yield Case("dequantize_accumulate", label, x.dtype, (x, q, scales, 0.37, block))


def _mask_cases() -> Iterator[Case]:
    """Whole blocks and parts of one; no masks, some of either sign; changes on the bound, beyond it and endless."""
    draw = torch.Generator().manual_seed(23)
    for label, (size, masks, added, scale) in {
        "plain": (777, 0, 0, 1000.0),
        "masks": (4099, 5, 3, 2.0**20),
        "one-word": (1, 2, 0, 3.5),
        "no-words": (0, 2, 1, 1.0),
        "whole-steps": (2048, 1, 1, 4.0),
        "largest": (100, 3, 2, 2.0**31 - 2.0),
    }.items():
        before = torch.randn(2 * size, generator=draw)[::2]
        after = before + 0.5 * torch.randn(size, generator=draw)
        if label == "whole-steps":  # where one bit of rounding would show
            before, after = torch.zeros(size), torch.randint(-8, 9, (size,), generator=draw) / 4.0
        streams = torch.randint(-(1 << 31), 1 << 31, (masks + 1, size + 3), generator=draw, dtype=torch.int64).int()
        arguments = (torch.zeros(size, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), before, after)
        yield Case("mask_update", label, torch.float32, (*arguments, streams[:, :size], added, scale, 1.0))
        if size > 10:
            odd = after.clone()
            odd[3], odd[5], odd[7] = math.inf, -math.inf, math.nan
            arguments = (*arguments[:3], odd)
            yield Case("mask_update", f"nan-{label}", torch.float32, (*arguments, streams[:, :size], added, scale, 1.0))
