"""Whether tensors hold numbers only: what is not is found where it arises, and not by those who get it."""

from collections.abc import Callable, Mapping

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one of integers never does."""
    # A sum of finite numbers may overflow, but none that is finite has other addends; and it is far quicker.
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def not_finite(tensors: Mapping[str, Tensor], then: Callable[[], object] = lambda: None) -> str | None:
    """The name of the first of some tensors that holds NaN or infinity; None if there is none.

    Args:
        then: called after each that does not, such as to give its memory back.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            return name
        then()
    return None
