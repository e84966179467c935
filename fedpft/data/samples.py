"""The samples of a data file, read and looked at as far as possible before anything else begins. docs/data.md.

A table names texts, or images that lie beside it, and labels. Whatever is wrong with it is one DataError with file and
line, so that an institution can mend its own data without seeing anybody else's; the faults of single rows are
reported together, or those rows are left out.

    n  samples in a file
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fedpft.config import BadRows, ColumnsSection
from fedpft.data.images import describe_dim, open_image
from fedpft.data.rows import RowFaults, alike, closest, is_blank, listed, read_rows, read_text, shown, unusable
from fedpft.errors import DataError

Kind = Literal["text", "image"]  # of an input; also the key under `columns` of its column
KINDS: tuple[Kind, ...] = get_args(Kind)
DECIMAL = re.compile(r"([+-]?\d+)[.,]0+")  # a whole number as a spreadsheet or a data frame may have written it


@dataclass(frozen=True)
class Samples:
    """The rows of a data file that can be used.

    inputs: n texts, or n image paths.
    lines: n line numbers, where each row begins.
    label_names: n labels as the file has them; none for unlabelled samples.
    labels: (n,) int64, index of each label in the label list; None until the list is known, and without labels.
    skipped: rows that were left out because something is wrong with them.
    warnings: of the file as a whole, each with a remedy.
    """

    path: Path
    inputs: list[str]
    lines: list[int]
    label_names: list[str]
    labels: Tensor | None
    skipped: int = 0
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)


class Examination:
    """A data file that has been read, and is looked at the closer the more is known.

    kind: as given; if it was not, what the columns say, and None if they fit both.
    rows: that it has, good and bad.
    faults: of its rows, as far as they are known.
    """

    def __init__(
        self, path: Path, columns: ColumnsSection, kind: Kind | None, *, labelled: bool, encoding: str | None = None
    ) -> None:
        """Reads the file, and looks at its texts or images unless the kind is open.

        Args:
            path: CSV, TSV or the like, or .jsonl.
            columns: which columns hold what.
            kind: whether it holds texts or images; None: the columns decide.
            labelled: whether there is a label column; if not, it is not looked at.
            encoding: of the file, as of :func:`read_text`.

        Raises:
            DataError: the file as a whole cannot be used.
        """
        self.path, self._warnings = path, list[str]()
        inputs: dict[str, str] = {each: getattr(columns, each) for each in KINDS if kind in (None, each)}
        wanted = {"label": columns.label} if labelled else {}
        if kind is not None:
            wanted, inputs = {**inputs, **wanted}, {}
        table = read_rows(path, wanted, any_of=inputs, encoding=encoding)
        self.faults, self.rows = table.faults, len(table.rows) + len(table.faults)
        there = [each for each in KINDS if each in table.roles]
        self.kind = there[0] if len(there) == 1 else None
        values = {role: [row[number] for _, row in table.rows] for number, role in enumerate(table.roles)}
        self._lines = [line for line, _ in table.rows]
        self._labels = [name.strip() for name in values.get("label", [])]
        self._classes: list[int] | None = None
        for line, name in zip(self._lines, self._labels, strict=False):
            self._check_label(line, name)
        self._inputs: list[str] = [] if self.kind is None else values[self.kind]
        if self.kind == "text":
            for line, text in zip(self._lines, self._inputs, strict=True):
                self._check_text(line, text)
        elif self.kind == "image":
            self._inputs = self._check_images(self._inputs)

    def resolve(self, labels: Sequence[str]) -> None:
        """Looks for each row's label in the server's label list."""
        index = {alike(name): number for number, name in enumerate(labels)}
        self._classes = []
        for line, name in zip(self._lines, self._labels, strict=True):
            key = alike(name)
            if key not in index and (decimal := DECIMAL.fullmatch(key)):
                key = decimal[1]
            if key not in index and not is_blank(name) and unusable(name) is None:
                remedy = closest(name, labels, f"use one of its {len(labels)} labels: {listed(labels)}")
                self.faults.add(line, f"label {shown(name)} is not in the server's label list", remedy)
            self._classes.append(index.get(key, -1))

    def fault(self, bad_rows: BadRows = "refuse", way_out: str = "") -> DataError | None:
        """What speaks against the rows, as far as is known.

        Args:
            bad_rows: whether those that cannot be used speak against the others.
            way_out: what the error adds to its remedy where not all rows are bad.
        """
        if not self.faults or (bad_rows == "skip" and len(self.faults) < self.rows):
            return None
        return self.faults.error(self.rows, way_out if len(self.faults) < self.rows else "")

    def samples(self, bad_rows: BadRows = "refuse", way_out: str = "") -> Samples:
        """The samples that can be used, of a kind that is known; raises what :meth:`fault` returns."""
        if (fault := self.fault(bad_rows, way_out)) is not None:
            raise fault
        kept = [number for number, line in enumerate(self._lines) if line not in self.faults]
        return Samples(
            self.path,
            [self._inputs[number] for number in kept],
            [self._lines[number] for number in kept],
            [self._labels[number] for number in kept] if self._labels else [],
            None if self._classes is None else torch.tensor([self._classes[number] for number in kept]),
            len(self.faults),
            (*self._warnings, *([f"skipped: {self.faults.error(self.rows)}"] if self.faults else [])),
        )

    def _check_label(self, line: int, name: str) -> None:
        if is_blank(name):
            self.faults.add(line, "the label is empty", "give the row a label, or remove the row")
        elif what := unusable(name):
            self.faults.add(line, f"the label holds {what}", "mend or remove the row")

    def _check_text(self, line: int, text: str) -> None:
        if is_blank(text):
            self.faults.add(line, "the text is empty", "fill it in, or remove the row")
        elif what := unusable(text):
            self.faults.add(line, f"the text holds {what}", "mend or remove the row")

    def _check_images(self, names: Sequence[str]) -> list[str]:
        """The paths of the images, each of which was opened and decoded once."""
        dims: list[bool] = []
        paths = []
        for line, name in zip(self._lines, names, strict=True):
            path = str(self.path.parent / name.strip())
            if is_blank(name):
                self.faults.add(line, "the image path is empty", "fill it in, or remove the row")
            elif (found := _existing(self.path.parent, name)) is None:
                remedy = "image paths are relative to the data file's directory"
                remedy += ", with / between directories" if "\\" in name else ""
                self.faults.add(line, f"no image {shown(path)[1:-1]}", remedy)
            else:
                path = str(found)
                try:
                    opened = open_image(found)
                except DataError as error:
                    self.faults.add(line, error.message, error.remedy)
                else:
                    dims += [] if opened.dim is None else [opened.dim]
            paths.append(path)
        if warning := describe_dim(len(dims), sum(dims)):
            self._warnings.append(f"{self.path}: {warning}")
        return paths


def _existing(directory: Path, name: str) -> Path | None:
    """The file of that name; accents in it may be composed in one place and not in the other."""
    for form in (name.strip(), unicodedata.normalize("NFC", name.strip()), unicodedata.normalize("NFD", name.strip())):
        try:
            if (directory / form).is_file():
                return directory / form
        except (OSError, ValueError):  # too long for a name, not allowed in one, or in a directory that is closed
            pass
    return None


def read_labelled(
    path: Path, columns: ColumnsSection, kind: Kind, labels: Sequence[str], encoding: str | None = None
) -> Samples:
    """Reads a labelled data file of which every row has to be in order; arguments and errors as of Examination."""
    examination = Examination(path, columns, kind, labelled=True, encoding=encoding)
    examination.resolve(labels)
    return examination.samples()


def read_unlabelled(path: Path, columns: ColumnsSection, kind: Kind, encoding: str | None = None) -> Samples:
    """Reads the texts or image paths of a public corpus; a label column is not looked at. Raises as read_labelled."""
    return Examination(path, columns, kind, labelled=False, encoding=encoding).samples()


def image_paths(path: Path, columns: ColumnsSection, encoding: str | None = None) -> list[Path]:
    """The images that a data file names, which may be missing. Raises DataError if the file itself cannot be read."""
    table = read_rows(path, {"image": columns.image}, encoding=encoding)
    return [_existing(path.parent, name) or path.parent / name for _, (name,) in table.rows]


def read_label_list(path: Path, encoding: str | None = None) -> tuple[str, ...]:
    """Reads the server's label list: one label a line, whose order gives the class indices.

    Raises:
        DataError: no such file, no label, an empty line between labels, labels that look the same, or only one.
    """
    lines = re.split(r"\r\n|\r|\n", read_text(path, encoding))
    while lines and is_blank(lines[-1]):
        lines.pop()
    if not lines:
        raise DataError(f"{path}: the file is empty", "put one label on each line")
    labels, faults = [line.strip() for line in lines], RowFaults(path)
    seen: dict[str, int] = {}
    for number, label in enumerate(labels, 1):
        if is_blank(label):
            faults.add(number, "empty line in the label list", "put one label on each line")
        elif what := unusable(label):
            faults.add(number, f"the label holds {what}", "write it anew")
        elif (first := seen.setdefault(alike(label), number)) != number:
            same = "" if label == labels[first - 1] else f", as {shown(labels[first - 1])} to look at"
            faults.add(number, f"label {shown(label)} is in line {first} too{same}", "keep one of the two")
    if faults:
        raise faults.error(len(labels))
    if len(labels) == 1:
        raise DataError(f"{path}: one label, {shown(labels[0])}", "name at least two: there is nothing to tell apart")
    return tuple(labels)
