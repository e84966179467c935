"""One labelled file dealt out to silos, as unevenly as real ones have it: docs/simulation.md.

n  samples in the file
N  silos
C  classes
"""

import heapq
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpft import atomic
from fedpft.config import PartitionSection
from fedpft.data.rows import GROUP
from fedpft.data.samples import Samples
from fedpft.errors import ConfigError, DataError
from fedpft.seeding import derive_seed

PARTITION_DRAWS = 1000
MOST_SHARES = 50_000_000  # of all draws together: what takes seconds
KIND = "simulation.partition.kind"

Owners = NDArray[np.int64]  # (n,), of each sample the number of its silo


def deal(section: PartitionSection, samples: Samples, silos: int, seed: int) -> list[Tensor]:
    """Deals samples out to silos as a `partition` section says.

    Args:
        samples: read with the section's column, if it names one.

    Returns:
        For each silo the sorted indices of its samples, int64; each sample is in exactly one, and none is empty.

    Raises:
        DataError: these samples cannot be dealt out so.
    """
    if not 0 < silos <= len(samples):
        raise DataError(
            f"{samples.path}: {len(samples)} samples cannot be dealt out to {silos} silos",
            "take at least one silo, and a sample for each",
        )
    match section.kind:
        case "iid":
            return _parts(_iid(len(samples), silos, seed), silos)
        case "quantity":
            return _parts(_quantity(len(samples), silos, section.concentration, seed), silos)
        case "shards":
            return _parts(_shards(samples, silos, section.shards, seed), silos)
        case "column":
            return _parts(_by_group(samples, silos, str(section.column), seed), silos)
        case "dirichlet":
            labels = _classes(samples) if section.column is None else _groups(samples)[1]
            return dirichlet_partition(labels, silos, section.concentration, seed, turned=True)


def dirichlet_partition(
    labels: Tensor | Sequence[int] | Owners, silos: int, concentration: float, seed: int, *, turned: bool = False
) -> list[Tensor]:
    """Deals samples out to silos so that each class is spread unevenly: its shares are drawn from a Dirichlet.

    A draw that leaves a silo empty is drawn again. With many silos every draw does: then, of PARTITION_DRAWS or fewer,
    the one with the fewest empty silos counts, and each of those gets one sample of the silo that has most.

    Args:
        labels: (n,) class indices.
        concentration: of the symmetric Dirichlet; near 0 one silo gets nearly all of a class, large is even.
        turned: whether a class with fewer samples than silos begins at a random silo. Otherwise rounding leaves the
            first and the last silos without any of it.

    Returns:
        As of :func:`deal`.

    Raises:
        DataError: if there is no such partition.
    """
    classes = np.asarray(labels)
    if not 0 < silos <= len(classes) or concentration <= 0:
        raise DataError(
            f"{len(classes)} samples cannot be dealt out to {silos} silos with concentration {concentration}",
            "take at least one silo, a sample for each, and a concentration above 0",
        )
    _, counts = np.unique(classes, return_counts=True)
    of_each = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
    owners, fewest = np.zeros(len(classes), np.int64), silos
    for draw in range(max(1, min(PARTITION_DRAWS, MOST_SHARES // (silos * len(of_each))))):
        generator = np.random.default_rng(derive_seed(seed, "dirichlet", draw))
        sizes, dealt = np.zeros(silos, np.int64), []
        for of_class in of_each:
            members = generator.permutation(of_class)
            each = _split(len(members), generator.dirichlet(np.full(silos, concentration)))
            if turned and len(members) < silos:
                each = np.roll(each, generator.integers(silos))
            dealt.append((members, each))
            sizes += each
        if (empty := int((sizes == 0).sum())) < fewest:
            fewest = empty
            for members, each in dealt:
                owners[members] = np.repeat(np.arange(silos), each)
        if not empty:
            break
    return _parts(_filled(owners, silos), silos)


def _filled(owners: Owners, silos: int) -> Owners:
    """Each empty silo gets the last sample of what is then the largest, of several such the first."""
    sizes = np.bincount(owners, minlength=silos)
    for empty in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        owners[np.flatnonzero(owners == largest)[-1]] = empty
        sizes[largest], sizes[empty] = sizes[largest] - 1, 1
    return owners


def _iid(samples: int, silos: int, seed: int) -> Owners:
    """At random, in sizes that differ by at most one."""
    owners = np.empty(samples, np.int64)
    owners[np.random.default_rng(derive_seed(seed, "iid")).permutation(samples)] = np.arange(samples) % silos
    return owners


def _quantity(samples: int, silos: int, concentration: float, seed: int) -> Owners:
    """At random: one sample each, and shares from a Dirichlet of all others."""
    generator = np.random.default_rng(derive_seed(seed, "quantity"))
    order = generator.permutation(samples)
    sizes = 1 + _split(samples - silos, generator.dirichlet(np.full(silos, concentration)))
    owners = np.empty(samples, np.int64)
    owners[order] = np.repeat(np.arange(silos), sizes)
    return owners


def _shards(samples: Samples, silos: int, each: int, seed: int) -> Owners:
    """The file sorted by class is cut into equal shards, of which a silo gets some at random."""
    shards = silos * each
    if shards > len(samples):
        raise DataError(
            f"{samples.path}: {len(samples)} samples are too few for {shards} shards, {each} for each of {silos} silos",
            "lower simulation.partition.shards, or take fewer silos",
        )
    classes, generator = _classes(samples), np.random.default_rng(derive_seed(seed, "shards"))
    order = generator.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]  # the order in the file means nothing within a class
    owners = np.empty(len(classes), np.int64)
    for members, silo in zip(np.array_split(order, shards), generator.permutation(shards) % silos, strict=True):
        owners[members] = silo
    return owners


def _by_group(samples: Samples, silos: int, column: str, seed: int) -> Owners:
    """Each value of the column at one silo: the N values sorted as texts, or more of them evenly by rows.

    For that the largest goes first, each to the silo that has fewest rows by then.
    """
    names, groups = _groups(samples)
    if len(names) < silos:
        raise DataError(
            f"{samples.path}: column {column!r} has {len(names)} different values, too few for {silos} silos",
            f"take {len(names)} silos or fewer, or another {KIND}",
        )
    if len(names) == silos:
        return groups
    sizes = np.bincount(groups)
    order = np.random.default_rng(derive_seed(seed, "column")).permutation(len(names))
    loads = [(0, silo) for silo in range(silos)]
    silo_of = np.empty(len(names), np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        load, silo = loads[0]
        silo_of[group] = silo
        heapq.heapreplace(loads, (load + int(sizes[group]), silo))
    return silo_of[groups]


def _split(samples: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N,) sizes that are in all so many samples, as near to the (N,) shares as whole numbers are."""
    cuts = (np.cumsum(shares[:-1]) * samples).round().astype(np.int64)
    return np.diff(cuts, prepend=0, append=samples)


def _parts(owners: Owners, silos: int) -> list[Tensor]:
    ends = np.cumsum(np.bincount(owners, minlength=silos))
    order = torch.from_numpy(np.argsort(owners, kind="stable"))
    return [part.clone() for part in order.tensor_split(torch.from_numpy(ends[:-1]))]


def _classes(samples: Samples) -> Owners:
    """(n,) class indices; DataError if a sample may have none, several or a number."""
    targets = samples.targets
    if targets is None or not all(type(target) is int for target in targets):
        raise DataError(
            f"{samples.path}: its rows have no single class each, by which they could be dealt out",
            f"set {KIND} to iid, quantity or column; or name a column with kind: dirichlet",
        )
    return np.asarray(targets, np.int64)


def _groups(samples: Samples) -> tuple[list[str], Owners]:
    """The different groups, sorted as texts, and (n,) which of them each sample is of."""
    assert samples.groups is not None, "to be read with the section's column"
    names = sorted(set(samples.groups))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[name] for name in samples.groups], np.int64)


# --- what was dealt out -----------------------------------------------------------------------------------------------


def split_counts(samples: Samples, parts: Mapping[str, Tensor], labels: Sequence[str]) -> dict[str, Any]:
    """Who has what, for the report: `curves["split"]` of :func:`fedpft.report.page.write_report`.

    Args:
        parts: silo -> (m,) int64, which samples it has.
        labels: C names, of samples with one class each. Others are counted by their groups, if they have any.
    """
    if labels and samples.targets is not None and all(type(target) is int for target in samples.targets):
        names, kinds = list(labels), np.asarray(samples.targets, np.int64)
    elif samples.groups is not None:
        names, kinds = _groups(samples)
    else:
        return {"labels": [], "silos": {silo: [len(part)] for silo, part in parts.items()}}
    counts = {silo: np.bincount(kinds[part.numpy()], minlength=len(names)) for silo, part in parts.items()}
    return {"labels": names, "silos": {silo: count.tolist() for silo, count in counts.items()}}


def write_split(samples: Samples, parts: Mapping[str, Tensor], directory: Path) -> None:
    """Writes what each silo has to a file of its own, SILO.jsonl, under the default names of the columns.

    Images stay where they are: what is written is their whole path. Groups are written, too, if there are any.

    Args:
        parts: silo -> (m,) int64, which samples it has.

    Raises:
        ConfigError: one of the files is there already, or images stand in a shard; then none is written.
    """
    if any(image.member for image in samples.values.get("image", ())):
        raise ConfigError(f"{samples.path}: holds images that no row of a table can name", "unpack it into a directory")
    paths = {silo: directory / f"{silo}.jsonl" for silo in parts}
    if there := next((path for path in paths.values() if os.path.lexists(path)), None):
        raise ConfigError(f"{there}: is there already", "write to another directory, or remove what is in this one")
    for silo, part in parts.items():
        dealt = samples.subset(part)
        columns = dealt.values | ({} if dealt.groups is None else {GROUP: dealt.groups})
        if "image" in columns:
            columns["image"] = [str(Path(image.path).absolute()) for image in columns["image"]]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        atomic.write_text(paths[silo], "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
