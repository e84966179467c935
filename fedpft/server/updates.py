"""What a silo sends back from a round, the look at all of it before it counts, and the mean.

The tensors stay on disk: server memory holds one tensor of each kind at a time, however many silos there are; for
the robust means that tensor of every silo.
K neurons of a layer of the proxy.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedpft.aggregation.mean import normalized_mean, weighted_mean
from fedpft.aggregation.robust import krum, median, squared_distances, trimmed_mean
from fedpft.config import AggregationSection
from fedpft.errors import InvalidUpdate
from fedpft.finite import is_finite
from fedpft.model.adapters import Adapter
from fedpft.privacy.fixedpoint import Layout
from fedpft.wire.encoding import ENCODINGS, Encoding, decode, layout
from fedpft.wire.tensors import Spec, TensorFile

log = logging.getLogger(__name__)

COUNTS = frozenset({"skipped_rows", "cut_texts", "cut_completions"})  # of the silo's data: the same in every round
METRICS = COUNTS | {"train_loss", "seconds", "tokens", "label_diversity"}
LARGEST_COUNT = 1 << 48  # of samples or tokens: whatever is summed over silos stays far from the end of int64
WEIGHT_UNITS = 1 << 20
HEADER_BYTES = 1 << 20  # of an update's file, beside ENTRY_BYTES
ENTRY_BYTES = 512  # for the name and the place of a tensor

_REMEDY = "run the same version of fedpft on both sides"
_DIVERGED = "lower the learning rate, look at the data"


@dataclass(frozen=True)
class Update:
    """A silo's update of one round; its tensors are read when they are asked for.

    samples: n_i, the update's weight in the mean.
    metrics: of METRICS those that the silo shares.
    path: what the silo sent.
    start: the adapter that the round began with, as the silos got it; opened once for all of its updates.
    encoding: how the change from there travels.
    """

    silo: str
    samples: int
    metrics: dict[str, float]
    path: Path
    start: TensorFile
    encoding: Encoding = "exact"

    @functools.cached_property
    def file(self) -> TensorFile:
        """What the silo sent."""
        return TensorFile(self.path)

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """The tensors of the adapter, before and after the round."""
        return _adapter_specs(self.start)

    def start_tensor(self, name: str) -> Tensor:
        """A tensor of the adapter before the round."""
        return self.start.tensor("adapter", name)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the trained adapter, of the shape and dtype that it had before the round."""
        return decode(
            self.specs[name],
            self.encoding,
            start=lambda: self.start_tensor(name),
            stored=lambda group: self.file.tensor(group, name),
        )

    @property
    def adapter(self) -> Adapter:
        """The trained adapter, all of it."""
        return {name: self.tensor(name) for name in self.specs}

    @property
    def inactivity(self) -> dict[str, Tensor] | None:
        """ "<layer>": (K,) int64 inactive tokens, "<layer>.tokens": out of how many, () int64, or (K,) where it is not
        the same for all.

        None if it was not asked for, or the silo keeps it to itself.
        """
        names = [name.removeprefix("inactivity/") for name in self.file.specs if name.startswith("inactivity/")]
        return {name: self.file.tensor("inactivity", name) for name in names} or None


def aggregate(updates: Sequence[Update], settings: AggregationSection, batch: int) -> Adapter:
    """The mean of a round's trained adapters, the same in whatever order they are given.

    Args:
        updates: at least `settings.fewest_updates`.
        batch: samples of one of a silo's local steps.
    """
    ordered = sorted(updates, key=lambda update: update.silo)
    if settings.mean == "krum":
        ordered = _kept_by_krum(ordered, settings.byzantine)
    # What stays is allocated before what goes: otherwise the heap is left with holes between the results.
    mean = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in ordered[0].specs.items()}
    weights = _weights(ordered, settings)
    for name, tensor in mean.items():
        tensor.copy_(_mean(name, ordered, weights, settings, batch))
    return mean


def largest_update_bytes(start: TensorFile, neurons: Mapping[int, int]) -> int:
    """No valid update of a round that began with this adapter is larger, in any encoding."""
    content = sum(
        max(sum(ENTRY_BYTES + spec.nbytes for spec in layout(like, encoding).values()) for encoding in ENCODINGS)
        for like in _adapter_specs(start).values()
    )
    counts = sum(8 * 2 * count + 2 * ENTRY_BYTES for count in neurons.values())
    return content + counts + HEADER_BYTES


def check_update(
    update: Update, neurons: Mapping[int, int], max_norm: float | None = None, most_samples: int | None = None
) -> None:
    """Looks at everything in an update, tensor by tensor.

    Args:
        neurons: for each layer whose inactivity was asked for its K. A silo may keep all of it to itself.
        max_norm: largest L2 norm of the change to the adapter.
        most_samples: that the silo can have trained on in a round.

    Raises:
        InvalidUpdate: naming silo and tensor.
        TransferCorrupt: the file is none.
    """
    _check_numbers(update, min(most_samples or LARGEST_COUNT, LARGEST_COUNT))
    counts = [name for name in update.file.specs if name.startswith("inactivity/")]
    wanted = {
        f"{group}/{name}": spec
        for name, like in update.specs.items()
        for group, spec in layout(like, update.encoding).items()
    }
    if counts:
        wanted |= {f"inactivity/{layer}": Spec(torch.int64, (count,)) for layer, count in neurons.items()}
        for layer, count in neurons.items():  # of each neuron, if the silo does not have all of them
            name, each = f"inactivity/{layer}.tokens", Spec(torch.int64, (count,))
            wanted[name] = each if update.file.specs.get(name) == each else Spec(torch.int64, ())
    _check_specs(update, wanted)
    _check_change(update, max_norm)
    if counts:
        _check_inactivity(update, neurons)


def adapter_shapes(start: TensorFile) -> dict[str, tuple[int, ...]]:
    """Of the tensors of an adapter's file."""
    return {name: spec.shape for name, spec in _adapter_specs(start).items()}


def vector_bytes(layout: Layout) -> int:
    """No file of a vector of secure aggregation is larger."""
    return 4 * layout.words + HEADER_BYTES


def check_vector(update: Update, words: int) -> None:
    """Looks at a vector of secure aggregation, which tells nothing but its length.

    Raises:
        InvalidUpdate: naming the silo: it is something else, or says more than it should.
        TransferCorrupt: the file is none.
    """
    if update.samples or update.metrics:
        raise InvalidUpdate(f"{update.silo}: tells its samples or metrics, which only their sum should", _REMEDY)
    _check_specs(update, {"masked/words": Spec(torch.int32, (words,))})


def _mean(
    name: str, updates: Sequence[Update], weights: Sequence[int], settings: AggregationSection, batch: int
) -> Tensor:
    """Of one tensor. The robust means of single values need it of all silos at once, the others of one at a time."""
    tensors = (update.tensor(name) for update in updates)
    if settings.mean == "trimmed":
        return trimmed_mean(list(tensors), settings.trimmed(len(updates)))
    if settings.mean == "median":
        return median(list(tensors))
    terms = ((tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight)
    if settings.weights == "steps":
        return normalized_mean(updates[0].start_tensor(name), terms, batch)
    return weighted_mean(terms)


def _weights(updates: Sequence[Update], settings: AggregationSection) -> list[int]:
    """How much each update counts in a mean that is not of single values."""
    if settings.mean == "krum" or settings.weights == "equal":
        return [1] * len(updates)
    return _diverse(updates) if settings.weights == "diversity" else [update.samples for update in updates]


def _diverse(updates: Sequence[Update]) -> list[int]:
    """n_i times the diversity of silo i's labels, in WEIGHT_UNITS; if it does not tell that, times the others' mean.

    The idea is FedDisco's (Ye et al. 2023, arXiv 2305.19229), which lowers n_i by how far the shares of the classes are
    from all silos'. If no two labels differ anywhere, or nobody tells, n_i alone.
    """
    told = [update.metrics.get("label_diversity") for update in updates]
    known = [value for value in told if value is not None]
    usual = sum(known) / len(known) if known else 0.0
    weights = [
        round(WEIGHT_UNITS * update.samples * (usual if value is None else value))
        for update, value in zip(updates, told, strict=True)
    ]
    return weights if any(weights) else [update.samples for update in updates]


def _kept_by_krum(updates: Sequence[Update], byzantine: int) -> list[Update]:
    """Reads every update once before its mean is taken: the choice is of whole updates."""
    distances = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0].specs:
        distances += squared_distances([update.tensor(name) for update in updates])
    kept = [updates[number] for number in krum(distances, byzantine)]
    log.info("krum leaves out %s", ", ".join(update.silo for update in updates if update not in kept) or "nobody")
    return kept


def _adapter_specs(start: TensorFile) -> dict[str, Spec]:
    return {stored.removeprefix("adapter/"): spec for stored, spec in start.specs.items()}


def _check_numbers(update: Update, most_samples: int) -> None:
    silo = update.silo
    if not 1 <= update.samples <= most_samples:
        raise InvalidUpdate(
            f"{silo}: the update says it was trained on {update.samples} samples, not on 1 to {most_samples}",
            "restart the silo if its data changed",
        )
    if unknown := update.metrics.keys() - METRICS:
        raise InvalidUpdate(f"{silo}: metric {min(unknown)!r} is unknown", _REMEDY)
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            raise InvalidUpdate(f"{silo}: metric {name!r} is {value}", _DIVERGED)
        if name == "label_diversity" and not 0.0 <= value <= 1.0:
            raise InvalidUpdate(f"{silo}: metric {name!r} is {value}, not in [0, 1]", _REMEDY)
        if name in COUNTS and not (0 <= value <= LARGEST_COUNT and value.is_integer()):
            raise InvalidUpdate(f"{silo}: metric {name!r} is {value}, no count", _REMEDY)


def _check_specs(update: Update, wanted: Mapping[str, Spec]) -> None:
    found = update.file.specs
    if odd := sorted(found.keys() ^ wanted.keys()):
        fault = "has an unknown" if odd[0] in found else "lacks the"
        raise InvalidUpdate(f"{update.silo}: the update {fault} tensor {odd[0]!r}", _REMEDY)
    for name, spec in wanted.items():
        if found[name] != spec:
            raise InvalidUpdate(f"{update.silo}: {name!r} is {found[name]}, not {spec}", _REMEDY)


def _check_change(update: Update, max_norm: float | None) -> None:
    squares = 0.0
    for name, like in update.specs.items():
        if "scale" in layout(like, update.encoding) and not bool((update.file.tensor("scale", name) >= 0.0).all()):
            raise InvalidUpdate(f"{update.silo}: a scale of {name!r} is negative or no number", _REMEDY)
        tensor = update.tensor(name)
        if not is_finite(tensor):
            raise InvalidUpdate(f"{update.silo}: {name!r} holds NaN or infinity", _DIVERGED)
        if max_norm is not None:
            squares += float((tensor.double() - update.start_tensor(name).double()).square().sum())
    if max_norm is not None and not math.sqrt(squares) <= max_norm:
        raise InvalidUpdate(
            f"{update.silo}: the L2 norm of the change is {math.sqrt(squares):.6g}, more than {max_norm:.6g}", _DIVERGED
        )


def _check_inactivity(update: Update, neurons: Mapping[int, int]) -> None:
    for layer in neurons:
        tokens, counts = (update.file.tensor("inactivity", name) for name in (f"{layer}.tokens", str(layer)))
        (fewest, most), (lowest, highest) = ([int(bound) for bound in each.aminmax()] for each in (tokens, counts))
        if not (fewest >= 0 and 1 <= most <= LARGEST_COUNT and lowest >= 0 and bool((counts <= tokens).all())):
            raise InvalidUpdate(
                f"{update.silo}: inactivity of layer {layer} counts {lowest} to {highest} of {most} tokens", _REMEDY
            )
