"""The one way into a file for the silos: nothing goes there but what the proxy, which they have, has a place for.

Whatever a fault elsewhere in the server makes of an adapter or a patch: a tensor of the FM that is not in the proxy has
a name or a shape that the proxy does not have, and is refused before a byte is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedpft.errors import ModelError
from fedpft.finite import not_finite
from fedpft.model.loading import weight_files
from fedpft.wire.tensors import Spec, TensorFile, write_tensors


class Egress:
    """Writes adapters and patches."""

    def __init__(self, bundle: Path, adapter: Mapping[str, Tensor]) -> None:
        """Args:
        bundle: the proxy as it was sent, of whose weights the headers are read.
        adapter: any adapter of that proxy.
        """
        files = weight_files(bundle)
        self._proxy = {name: spec for file in files for name, spec in TensorFile(file).specs.items()}
        self._adapter = {name: Spec.of(tensor) for name, tensor in adapter.items()}

    def write(self, path: Path, group: Literal["adapter", "patch"], tensors: Mapping[str, Tensor]) -> None:
        """Writes a file for the silos; ModelError, naming the tensor, if it holds what they may not get, or NaN."""
        check = {"adapter": self.check_adapter, "patch": self.check_patch}[group]
        check(tensors)
        if (name := not_finite(tensors)) is not None:
            setting = {
                "adapter": "training.learning_rate or aggregation.learning_rate",
                "patch": "alignment.learning_rate",
            }[group]
            raise ModelError(
                f"{name} of the {group} for the silos holds NaN or infinity: it was not written",
                f"start a new run with a lower {setting}",
            )
        write_tensors(path, {group: tensors})

    def check_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """An adapter has all tensors of the proxy's adapter, and no other."""
        for name in sorted(tensors.keys() | self._adapter.keys()):
            found = Spec.of(tensors[name]) if name in tensors else None
            if found is None or found != self._adapter.get(name):
                raise _refused("adapter", name, found, self._adapter.get(name))

    def check_patch(self, tensors: Mapping[str, Tensor]) -> None:
        """A patch has tensors of the proxy, whole or in part, as :func:`fedpft.proxy.bundle.patch` makes them."""
        for key, tensor in tensors.items():
            name, _, kind = key.partition("@")
            allowed = self._proxy.get(name)
            if kind:
                allowed = _part(kind, allowed, tensors.get(f"{name}@rows"))
            if Spec.of(tensor) != allowed:
                raise _refused("patch", key, Spec.of(tensor), allowed)


def _part(kind: str, whole: Spec | None, rows: Tensor | None) -> Spec | None:
    """What the numbers, or the values, of some of a tensor's rows may be: at most all of the rows."""
    if whole is None or rows is None or not whole.shape:
        return None
    count = min(rows.numel(), whole.shape[0])
    parts = {"rows": Spec(torch.int32, (count,)), "values": Spec(whole.dtype, (count, *whole.shape[1:]))}
    return parts.get(kind)


def _refused(kind: str, name: str, found: Spec | None, allowed: Spec | None) -> ModelError:
    there, place = found or "missing", allowed or "no such tensor"
    return ModelError(
        f"{name!r} of the {kind} for the silos is {there}, the proxy has {place}: it was not written",
        "nothing was sent; report it, this is a fault of fedpft",
    )
