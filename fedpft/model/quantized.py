"""Frozen weights held in 8 or 4 bits, dense only where an operator computes with them; by bitsandbytes, imported here.

Each row of a weight is cut into blocks of BLOCK values, the last filled up with zeros. Of a block its largest size is
kept in float32, and of each value in it the nearest of some multiples of that: k/127 of it for k = -127 ... 127
("int8"), or the 16 of NormalFloat ("int4"; Dettmers et al. 2023, arXiv 2305.14314). No row depends on another, so that
a weight is the same whatever rows of it were written in whatever order, as long as the values are.

O rows, I columns, as the tensor has them.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedpft.config import FewBits
from fedpft.errors import ConfigError
from fedpft.model.architectures import architecture_of, layers_of, layers_path
from fedpft.model.subffn import SubFFN

BLOCK = 64
AT_ONCE = 2**16  # values: on a CPU bitsandbytes takes up to 128 bytes for each while it looks for the nearest
_MATRICES = ("w_in", "w_gate", "w_out")
_aten = torch.ops.aten


class QuantizedWeight(Tensor):
    """A matrix in few bits. To autograd it is one tensor, so a layer keeps the few bits for its backward pass.

    Every operator gets it dense, in its dtype, for as long as it runs; but for `t`, which stays a view in few bits, so
    that `nn.Linear` keeps no more. What writes to it writes whole rows, and quantises them.

    Attributes:
        form: how it is held.
        codes: (O, C) uint8, C = I rounded up to whole blocks, or half of that.
        scales: (O, blocks of a row) float32.
        columns: I.
        turned: whether this is the transpose, (I, O).
    """

    form: FewBits
    codes: Tensor
    scales: Tensor
    columns: int
    turned: bool

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, form: FewBits, columns: int, dtype: torch.dtype, turned: bool = False
    ) -> "QuantizedWeight":
        """From parts, as :func:`quantized` makes them."""
        size, strides = (len(codes), columns), (columns, 1)
        if turned:
            size, strides = size[::-1], strides[::-1]
        made: QuantizedWeight = Tensor._make_wrapper_subclass(
            cls, size, strides=strides, dtype=dtype, device=codes.device
        )
        made.codes, made.scales, made.form, made.columns, made.turned = codes, scales, form, columns, turned
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Does for an operator what the class says."""
        own = args[0] if args and isinstance(args[0], QuantizedWeight) else None
        if own is not None and func in (_aten.detach.default, _aten.alias.default):
            return own._like(own.codes, own.scales)
        if own is not None and func is _aten.t.default:
            return own._like(own.codes, own.scales, turned=not own.turned)
        if own is not None and func is _aten.clone.default:
            return own._like(own.codes.clone(), own.scales.clone())
        if own is not None and func is _aten._to_copy.default:
            parts = (each.to(kwargs.get("device"), copy=True) for each in (own.codes, own.scales))
            return own._like(*parts, dtype=kwargs.get("dtype"))
        if own is not None and func is _aten.copy_.default:
            return own._write(slice(None), args[1])
        if own is not None and func is _aten.index_copy_.default and args[1] == 0:
            return own._write(args[2], args[3])
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and isinstance(value, QuantizedWeight):
                raise TypeError(f"{func}: a quantized weight has no views, and is written whole or by rows")
        dense_args, dense_kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.dense, (args, kwargs or {}))
        return func(*dense_args, **dense_kwargs)

    def dense(self) -> Tensor:
        """As a plain tensor, anew each time."""
        padded = _dequantized(self.codes, self.scales, self.form, self.dtype)
        rows = padded[:, : self.columns].contiguous()
        return rows.t() if self.turned else rows

    @property
    def held_bytes(self) -> int:
        """What it takes."""
        return self.codes.nbytes + self.scales.nbytes

    def __repr__(self) -> str:  # type: ignore[override]  # torch's looks at views
        return f"QuantizedWeight({self.form}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def _like(
        self, codes: Tensor, scales: Tensor, *, dtype: torch.dtype | None = None, turned: bool | None = None
    ) -> "QuantizedWeight":
        turned = self.turned if turned is None else turned
        return QuantizedWeight(codes, scales, self.form, self.columns, dtype or self.dtype, turned)

    def _write(self, rows: Tensor | slice, values: Tensor) -> "QuantizedWeight":
        if self.turned:
            raise TypeError("the transpose of a quantized weight cannot be written to")
        values = values.dense() if isinstance(values, QuantizedWeight) else values
        made = quantized(values.to(self.device, self.dtype), self.form)
        self.codes[rows], self.scales[rows] = made.codes, made.scales
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """By this `nn.Module.to` knows that it has to swap it, not to write into it."""
        return ["codes", "scales"], (self.form, self.columns, self.dtype, self.turned)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], rest: Any, _size: Any, _stride: Any) -> "QuantizedWeight":
        """The inverse."""
        return QuantizedWeight(parts["codes"], parts["scales"], *rest)


def quantized(weight: Tensor, form: FewBits) -> QuantizedWeight:
    """A weight of finite values, (O, I), where it is now; ConfigError if bitsandbytes cannot be used."""
    parts = [_quantized(rows, form) for rows in weight.detach().split(max(1, AT_ONCE // weight.shape[1]))]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return QuantizedWeight(codes, scales, form, weight.shape[1], weight.dtype)


def quantizable(model: nn.Module) -> set[str]:
    """The names of what may be held so: a proxy's attention projections, and the matrices of its FFNs."""
    path, attention = layers_path(model), architecture_of(model).attention
    names = {f"{path}{layer}.{each}.weight" for layer in range(len(layers_of(model))) for each in attention}
    for name, module in model.named_modules():
        if isinstance(module, SubFFN):
            names |= {f"{name}.{each}" for each in _MATRICES if getattr(module, each) is not None}
    return names


def held_bytes(parameters: Iterable[Tensor]) -> int:
    """What some parameters take in memory."""
    return sum(each.held_bytes if isinstance(each, QuantizedWeight) else each.nbytes for each in parameters)


def dense_bytes(parameters: Iterable[Tensor]) -> int:
    """What they would take as they were."""
    return sum(each.numel() * each.element_size() for each in parameters)


def library() -> Any:
    """bitsandbytes; ConfigError if it is not there."""
    try:
        import bitsandbytes.functional
    except Exception as error:  # whatever a library says that was built for another machine
        raise ConfigError(
            f"limits.weights needs bitsandbytes, which cannot be imported ({type(error).__name__}: {error})",
            "pip install 'fedpft[quantized]', or leave limits.weights out",
        ) from None
    return bitsandbytes.functional


@functools.cache
def _code(form: FewBits, device: torch.device) -> Tensor:
    """The shares of a block's largest value that there are, ascending, float32."""
    made = library().get_4bit_type("nf4", device=device) if form == "int4" else library().create_linear_map(True)
    code: Tensor = made.to(device)
    return code


def _state(scales: Tensor, form: FewBits, shape: torch.Size, dtype: torch.dtype) -> Any:
    """What bitsandbytes wants to know of codes that it made."""
    kind: Mapping[str, str] = {"quant_type": "nf4"} if form == "int4" else {}
    code = _code(form, scales.device)
    return library().QuantState(absmax=scales.flatten(), shape=shape, code=code, blocksize=BLOCK, dtype=dtype, **kind)


def _quantized(weight: Tensor, form: FewBits) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    blocks = math.ceil(columns / BLOCK)
    padded = nn.functional.pad(weight, (0, blocks * BLOCK - columns)).contiguous()
    if form == "int4":
        codes, state = library().quantize_4bit(padded, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    else:
        codes, state = library().quantize_blockwise(padded, code=_code(form, weight.device), blocksize=BLOCK)
    return codes.view(rows, -1), state.absmax.view(rows, blocks)


def _dequantized(codes: Tensor, scales: Tensor, form: FewBits, dtype: torch.dtype) -> Tensor:
    rows, blocks = scales.shape
    shape = torch.Size((rows, blocks * BLOCK))
    state = _state(scales, form, shape, dtype)
    if form == "int4":
        dense: Tensor = library().dequantize_4bit(codes.view(-1, 1), state)
    else:
        dense = library().dequantize_blockwise(codes, state)
    return dense.view(shape)
