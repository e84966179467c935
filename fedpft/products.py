"""Products of matrices in narrow types, on a CPU that may have no instructions for them."""

import torch
from torch import Tensor

WIDENED = 1024  # rows of a matrix at a time


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds left @ right, (n, k) and (k, m), to (n, m), rounded once to its type. In place.

    On a CPU bfloat16 and float16 are widened, some rows of `right` at a time. A processor without instructions for them
    multiplies them one by one where `right` lies by rows, some fifty times as slowly; and one that has them comes to
    other bits.

    Args:
        left: of any type.
    """
    if total.device.type != "cpu" or total.dtype not in (torch.bfloat16, torch.float16):
        return total.addmm_(left.to(right.dtype), right)
    found = total.float()
    for first in range(0, len(right), WIDENED):
        part = slice(first, first + WIDENED)
        found.addmm_(left[:, part].float(), right[part].float())
    return total.copy_(found)
