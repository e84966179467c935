"""How a trained adapter travels: bit for bit, or as its change in the round with fewer bits.

    exact      "adapter": the tensor as it is
    bfloat16   "delta": trained - start + residual, as bfloat16
    int8       "delta": the same as int8, flat, and "scale": one float32 for each BLOCK consecutive values

What is rounded off stays at the silo as the next round's residual, so that no part of a change is lost, only late
(error feedback: Seide et al., 2014; Karimireddy et al., arXiv 1901.09847). Tensors that are not floating-point, or are
empty, are exact in every encoding.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from fedpft.errors import InvalidUpdate
from fedpft.finite import is_finite
from fedpft.kernels import dequantize_accumulate, quantize_blocks
from fedpft.wire.tensors import Group, Spec

Encoding = Literal["exact", "bfloat16", "int8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
BLOCK = 256


def encode(
    trained: Mapping[str, Tensor], start: Mapping[str, Tensor], encoding: Encoding, residual: Mapping[str, Tensor]
) -> tuple[dict[Group, dict[str, Tensor]], dict[str, Tensor]]:
    """An update's groups of tensors, and what was rounded off, float32.

    Args:
        trained, start: adapter after and before the round, of the same names, shapes and dtypes, on the CPU.
        residual: what an earlier call rounded off; empty in a silo's first round, and always for "exact".

    Raises:
        InvalidUpdate: a trained tensor, or what the server would make of it, is not finite.
    """
    groups: dict[Group, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        wanted = tensor.double() + residual[name] if name in residual else tensor
        stored = _encoded(wanted, start[name], encoding)
        begun = functools.partial(start.__getitem__, name)
        arrived = decode(Spec.of(start[name]), encoding, start=begun, stored=stored.__getitem__)
        if not is_finite(arrived):
            raise InvalidUpdate(
                f"after the training {name!r} holds NaN, infinity or a change too large for {encoding}",
                "lower the learning rate, look at the data",
            )
        if "delta" in stored:
            left[name] = (wanted.double() - arrived.double()).float()
        for group, part in stored.items():
            groups.setdefault(group, {})[name] = part
    return groups, left


def decode(like: Spec, encoding: Encoding, *, start: Callable[[], Tensor], stored: Callable[[Group], Tensor]) -> Tensor:
    """A trained tensor of an adapter, of the shape and dtype that it had at the start of the round.

    Args:
        like: that shape and dtype.
        start: the tensor then; not asked for where it travels exactly.
        stored: group -> the tensor that is stored there under this one's name, of the spec that `layout` says.
    """
    if "delta" not in layout(like, encoding):
        return stored("adapter")
    delta = stored("delta")
    if encoding == "int8":
        total = torch.zeros(torch.Size(like.shape).numel())
        dequantize_accumulate(total, delta, stored("scale"), 1.0, BLOCK)
        delta = total.view(like.shape)
    return (start().double() + delta.double()).to(like.dtype)


def layout(like: Spec, encoding: Encoding) -> dict[Group, Spec]:
    """The groups in which a tensor of an adapter is stored, and as what."""
    values = torch.Size(like.shape).numel()
    if encoding == "exact" or not like.dtype.is_floating_point or values == 0:
        return {"adapter": like}
    if encoding == "bfloat16":
        return {"delta": Spec(torch.bfloat16, like.shape)}
    return {"delta": Spec(torch.int8, (values,)), "scale": Spec(torch.float32, (-(-values // BLOCK),))}


def _encoded(wanted: Tensor, start: Tensor, encoding: Encoding) -> dict[Group, Tensor]:
    if "delta" not in layout(Spec.of(start), encoding):
        return {"adapter": wanted}
    delta = (wanted.double() - start.double()).float()
    if encoding == "bfloat16":
        return {"delta": delta.bfloat16()}
    q, scales = quantize_blocks(delta.flatten(), BLOCK)
    return {"delta": q, "scale": scales}
