"""What a silo sends back from a round, and the look at all of it before it counts.

K neurons of a layer of the proxy.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedpft import adapters
from fedpft.errors import InvalidUpdate, ModelError
from fedpft.wire.tensors import check_groups, read_tensors

OVERHEAD_BYTES = 1 << 20  # names, shapes and offsets in an update's file


@dataclass(frozen=True)
class Update:
    """A silo's accepted update of one round.

    The tensors stay on disk, so that the server's memory does not grow with the number of silos: `adapter` and
    `inactivity` read the file each time they are asked for. The file is there until the next round starts.

    samples: n_i, the update's weight in the mean.
    metrics: train_loss, seconds, tokens.
    """

    silo: str
    samples: int
    metrics: dict[str, float]
    path: Path

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The trained adapter."""
        return read_tensors(self.path, "adapter")

    @property
    def inactivity(self) -> dict[str, Tensor] | None:
        """ "<layer>": (K,) int64 inactive tokens, "<layer>.tokens": () int64 out of how many; None if not asked for."""
        return read_tensors(self.path, "inactivity") or None


def compressed_neurons(bundle: Path) -> dict[int, int]:
    """For each compressed layer of the proxy its K, from the bundle's proxy.json."""
    try:
        description = json.loads((bundle / "proxy.json").read_text(encoding="utf-8"))
        return {int(layer): int(description["neurons"][layer]) for layer in description["compressed"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{bundle / 'proxy.json'}: cannot be read ({error})", "build the proxy again") from None


def largest_update_bytes(adapter: Mapping[str, Tensor], neurons: Mapping[int, int]) -> int:
    """No valid update's file is larger."""
    content = sum(tensor.nbytes for tensor in adapter.values()) + sum(8 * (count + 1) for count in neurons.values())
    return content + OVERHEAD_BYTES


def check_update(update: Update, like: dict[str, Tensor], neurons: Mapping[int, int]) -> None:
    """Looks at everything in an update.

    Args:
        like: an adapter with the names, shapes and dtypes that the update's must have.
        neurons: for each layer whose inactivity was asked for its K.

    Raises:
        InvalidUpdate: naming silo and tensor.
        TransferCorrupt: the file is none.
    """
    if update.samples < 1:
        raise InvalidUpdate(f"{update.silo}: the update says it was trained on no sample", "give the silo data")
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            raise InvalidUpdate(
                f"{update.silo}: metric {name!r} is {value}", "lower the learning rate, look at the data"
            )
    check_groups(update.path, {"adapter", "inactivity"})
    adapters.check(update.adapter, like, update.silo)
    _check_inactivity(update.inactivity or {}, neurons, update.silo)


def _check_inactivity(counts: dict[str, Tensor], neurons: Mapping[int, int], silo: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {str(layer): (count,) for layer, count in neurons.items()}
    shapes |= {f"{layer}.tokens": () for layer in neurons}
    remedy = "run the same version of fedpft on both sides"
    if odd := sorted(counts.keys() ^ shapes.keys()):
        fault = "unknown" if odd[0] in counts else "missing"
        raise InvalidUpdate(f"{silo}: inactivity {odd[0]!r} is {fault}", remedy)
    for name, tensor in counts.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.int64:
            raise InvalidUpdate(
                f"{silo}: inactivity {name!r} is {tuple(tensor.shape)} {tensor.dtype}, not {shapes[name]} torch.int64",
                remedy,
            )
    for layer in neurons:
        tokens = int(counts[f"{layer}.tokens"])
        lowest, highest = (int(bound) for bound in counts[str(layer)].aminmax())
        if tokens < 1 or lowest < 0 or highest > tokens:
            raise InvalidUpdate(
                f"{silo}: inactivity of layer {layer} counts {lowest} to {highest} of {tokens} tokens", remedy
            )
