"""Results bit for bit, for tests that compare runs of one kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def bits(values: Any) -> list[bytes]:
    """The bytes of every tensor in a tree, whatever its strides and its device."""
    tensors = [value.cpu().reshape(-1) for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [t.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes() for t in tensors]
