"""The samples of a data file, read and looked at as far as possible before anything else begins. docs/data.md.

Whatever is wrong with a file is one DataError with file and line, so that an institution can mend its own data without
seeing anybody else's; the faults of single rows are reported together, or those rows are left out.

What a column may hold follows from its role alone, and is checked here; what its values mean, the task says.

    n  samples in a file
"""

import json
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpft.config import BadRows, ColumnsSection
from fedpft.data.chat import check_messages
from fedpft.data.images import ImageFile, describe_dim
from fedpft.data.imagesets import SHARD, files_in, is_image_set, read_image_set
from fedpft.data.rows import (
    GROUP,
    KINDS,
    Form,
    RowFaults,
    Table,
    Unusable,
    alike,
    is_blank,
    no_rows,
    one_line,
    read_rows,
    read_text,
    shown,
    unusable,
)
from fedpft.digests import Digests, combined
from fedpft.errors import DataError


@dataclass(frozen=True)
class Reader:
    """How a task reads what a sample shall come to.

    roles: whose values it looks at.
    read: is given those, of one row; raises Unusable.
    labels: the task's label list.
    """

    roles: Form
    read: Callable[..., Any]
    labels: tuple[str, ...] = ()


class _Cursor:
    """Goes through the rows of a file that is too large to be held; each step back begins at its first row again."""

    def __init__(self, path: Path, read: Callable[[], Table], columns: Mapping[str, str], lines: Sequence[int]) -> None:
        """Args:
        read: the table of `path` anew.
        columns: role -> column, of those that are looked at.
        lines: where each row begins.
        """
        self._path, self._read, self._columns, self._lines = path, read, columns, lines
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._at, self._row = len(lines), dict[str, Any]()

    def row(self, number: int) -> dict[str, Any]:
        """Its values by role, None for one that cannot be used; DataError if there is no such row any more."""
        if number < self._at:
            self._rows, self._at = self._again(), -1
        while self._at < number:
            if (row := next(self._rows, None)) is None:
                raise self.changed()
            self._row, self._at = row, self._at + 1
        return self._row

    def changed(self) -> DataError:
        """What to say if the file is another than the one that was looked at."""
        return DataError(f"{self._path}: changed while it was read", "start again when nothing writes there")

    def _again(self) -> Iterator[dict[str, Any]]:
        table, lines = self._read(), iter(self._lines)
        for line, values in table.rows:
            if next(lines, None) != line:
                raise self.changed()
            yield {
                role: _or_none(LOOKS[role], values[table.roles.index(role)], column)
                for role, column in self._columns.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        """For another process, where it begins at the first row."""
        return {**vars(self), "_rows": iter(()), "_at": len(self._lines), "_row": {}}


class Column(Sequence[Any]):
    """Values that are read from the file whenever they are asked for: quickly only in the order of the rows."""

    def __init__(self, cursor: _Cursor, role: str, numbers: Sequence[int], *, usable: bool = False) -> None:
        """Args:
        numbers: of the rows whose values they are.
        usable: all of them were when they were looked at.
        """
        self._cursor, self._role, self._numbers, self._usable = cursor, role, numbers, usable

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        value = self._cursor.row(self._numbers[index])[self._role]
        if value is None and self._usable:
            raise self._cursor.changed()
        return value

    def chosen(self, numbers: Sequence[int]) -> "Column":
        """Those alone, in that order, all of which can be used."""
        rows = array("q", (self._numbers[number] for number in numbers))
        return Column(self._cursor, self._role, rows, usable=True)


def _chosen(values: Sequence[Any], numbers: Sequence[int]) -> Sequence[Any]:
    return values.chosen(numbers) if isinstance(values, Column) else [values[number] for number in numbers]


class _Texts(Sequence[str]):
    """Put together when they are asked for."""

    def __init__(self, columns: Sequence[Sequence[Any]], length: int) -> None:
        self._columns, self._length = columns, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index >= self._length:
            raise IndexError(index)
        return " ".join(word for column in self._columns for word in _strings(column[index]))


@dataclass(frozen=True)
class Samples:
    """The rows of a data file that can be used.

    values: for each role of the form n values: texts, ImageFile objects, labels as the file has them, lists, ...
    lines: n line numbers, where each row begins.
    targets: what a task makes of each row's labels; None if it has none, or they were not asked for.
    labels: the label list that they are of, if the task has one.
    groups: what each row has in a column that is no part of a sample, such as a speaker, if one was asked for.
    skipped: rows that were left out because something is wrong with them.
    warnings: of the file as a whole, each with a remedy.
    """

    path: Path
    values: dict[str, Sequence[Any]]
    lines: Sequence[int]
    targets: list[Any] | None
    skipped: int = 0
    warnings: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, role: str) -> Sequence[Any]:
        return self.values[role]

    def subset(self, chosen: Tensor) -> "Samples":
        """Those samples alone, in that order, as if no others had been in the file.

        Args:
            chosen: (m,) int64.
        """
        numbers: list[int] = chosen.tolist()
        return Samples(
            self.path,
            {role: _chosen(values, numbers) for role, values in self.values.items()},
            _chosen(self.lines, numbers),
            None if self.targets is None else list(_chosen(self.targets, numbers)),
            labels=self.labels,
            groups=None if self.groups is None else list(_chosen(self.groups, numbers)),
        )

    def texts(self) -> Sequence[str]:
        """All words of each sample, labels left out; put together when they are asked for."""
        columns = [values for role, values in self.values.items() if role not in ("image", *LABELLING)]
        return _Texts(columns, len(self))

    def contents(self) -> Iterator[Any]:
        """All that is known of each sample, as JSON could have it: what is made of the same is the same."""
        yield list(self.values)
        for number in range(len(self)):
            target = None if self.targets is None else self.targets[number]
            yield [*(column[number] for column in self.values.values()), target]


LABELLING = ("label", "labels", "tags")  # roles of what is to be learned
LONG = ("text", "words", "messages", "prompt", "completion")  # roles whose values are not held of a large file


class Examination:
    """A data file that has been read, and is looked at the closer the more is known.

    form: of its rows; None if they have the columns of several, and nobody said which counts.
    rows: that it has, good and bad.
    faults: of its rows, as far as they are known.
    """

    def __init__(
        self,
        path: Path,
        columns: ColumnsSection,
        forms: Sequence[Form],
        *,
        first_counts: bool = True,
        encoding: str | None = None,
        group: str | None = None,
    ) -> None:
        """Reads the file, and looks at each column of which it is certain that it will be used.

        Args:
            path: CSV, TSV or the like, .jsonl or .parquet; or images without a table.
            columns: which columns hold what.
            forms: what a row may consist of.
            first_counts: whether the first of several forms that all are there counts, or only the next look will tell.
            encoding: of the file, as of :func:`read_text`.
            group: the column of :attr:`Samples.groups`; one of the form's own may be it, too.

        Raises:
            DataError: the file as a whole cannot be used.
        """
        self.path, self._warnings = path, list[str]()
        grouping, names = ((), {}) if group is None else ((GROUP,), {GROUP: group})
        wanted, known = [(*form, *grouping) for form in forms], columns.model_dump() | names
        table = _read_table(path, wanted, known, encoding)
        is_held = isinstance(table.rows, list)
        self.faults = table.faults
        there = [form for form in forms if table.rows == [] or not table.roles or set(form) <= set(table.roles)]
        if first_counts:
            there = there[:1]
        # A form that is part of another one which is there as well says nothing against that.
        widest = [form for form in there if not any(set(form) < set(other) for other in there)]
        self.form = widest[0] if len(widest) == 1 else None
        certain = [role for role in widest[0] if all(role in form for form in widest)] if widest else []
        certain.sort(key=lambda role: role in LABELLING)
        self._lines: MutableSequence[int] = [] if is_held else array("q")
        self._targets: list[Any] | None = None
        self._labels: tuple[str, ...] = ()
        self._groups: list[Any] | None = None if group is None else []
        self._values: dict[str, Sequence[Any]] = {}
        held: dict[str, list[Any]] = {role: [] for role in certain if is_held or role not in LONG}
        dims, bad = list[bool](), 0
        for line, values in table.rows:
            self._lines.append(line)
            for role in certain:
                value = values[table.roles.index(role)]
                if role == "image":
                    found = self._looked_at(line, self._look_at_image, value, dims)
                else:
                    found = self._looked_at(line, LOOKS[role], value, known[role])
                if role in held:
                    held[role].append(found)
            if self._groups is not None:
                self._groups.append(self._looked_at(line, _group, values[table.roles.index(GROUP)], group))
            bad += line in self.faults
        self.rows = len(self._lines) + len(self.faults) - bad
        if not self.rows:
            raise no_rows(path)
        if warning := describe_dim(len(dims), sum(dims)):
            self._warnings.append(f"{path}: {warning}")
        cursor = _Cursor(
            path,
            partial(_read_table, path, wanted, known, encoding),
            {role: known[role] for role in certain if role not in held},
            self._lines,
        )
        for role in certain:
            self._values[role] = held[role] if role in held else Column(cursor, role, range(len(self._lines)))

    def resolve(self, reader: Reader | None) -> None:
        """Reads each row's label as the task does; None if it has none."""
        if reader is None:
            return
        self._labels = reader.labels
        columns = [self._values[role] for role in reader.roles]
        self._targets = [
            None if None in values else self._looked_at(line, reader.read, *values)
            for line, *values in zip(self._lines, *columns, strict=True)
        ]

    def fault(self, bad_rows: BadRows = "refuse", way_out: str = "") -> DataError | None:
        """What speaks against the rows, as far as is known.

        Args:
            bad_rows: whether those that cannot be used speak against the others.
            way_out: what the error adds to its remedy where not all rows are bad.
        """
        return self.faults.against(self.rows, bad_rows, way_out)

    def samples(self, bad_rows: BadRows = "refuse", way_out: str = "") -> Samples:
        """The samples that can be used, of a form that is known; raises what :meth:`fault` returns."""
        if (fault := self.fault(bad_rows, way_out)) is not None:
            raise fault
        kept: Sequence[int] = range(len(self._lines))
        if self.faults:
            kept = [number for number, line in enumerate(self._lines) if line not in self.faults]
        return Samples(
            self.path,
            {role: _chosen(values, kept) for role, values in self._values.items()},
            self._lines if len(kept) == len(self._lines) else _chosen(self._lines, kept),
            None if self._targets is None else list(_chosen(self._targets, kept)),
            len(self.faults),
            (*self._warnings, *([f"skipped: {self.faults.error(self.rows)}"] if self.faults else [])),
            self._labels,
            None if self._groups is None else list(_chosen(self._groups, kept)),
        )

    def _looked_at(self, line: int, look: Callable[..., Any], *given: Any) -> Any:
        try:
            return look(*given)
        except Unusable as found:
            self.faults.add(line, found.message, found.remedy)
            return None

    def _look_at_image(self, name: Any, dims: list[bool]) -> ImageFile:
        """Where it is; it was opened and decoded once. Adds to `dims`, of an image of 16 bits, whether it is dim."""
        try:
            image, opened = (name if isinstance(name, ImageFile) else self._image_of(name)).look()
        except DataError as error:
            raise Unusable(error.message, error.remedy) from None
        dims.extend([] if opened.dim is None else [opened.dim])
        return image

    def _image_of(self, name: Any) -> ImageFile:
        name = _seen("image", name, "image path", "fill it in, or remove the row")
        if (found := _existing(self.path.parent, name)) is None:
            remedy = "image paths are relative to the data file's directory"
            remedy += ", with / between directories" if "\\" in name else ""
            raise Unusable(f"no image {shown(str(self.path.parent / name.strip()))[1:-1]}", remedy)
        return ImageFile(str(found))


# --- what a column may hold -------------------------------------------------------------------------------------------


def _seen(column: str, value: Any, what: str, remedy: str) -> str:
    """The value, if it is a string of which something can be seen."""
    if not isinstance(value, str):
        raise Unusable(f"{column!r} is {_kind(value)}, not a string", "write it between quotes")
    if is_blank(value):
        raise Unusable(f"the {what} is empty", remedy)
    return value


def _string(column: str, value: Any, what: str, remedy: str) -> str:
    """The same, if a tokenizer and a file can take it, too."""
    if fault := unusable(_seen(column, value, what, remedy)):
        raise Unusable(f"the {what} holds {fault}", "mend or remove the row")
    return str(value)


def _text(value: Any, column: str) -> str:
    return _string(column, value, "text", "fill it in, or remove the row")


def _prompt(value: Any, column: str) -> str:
    """May be empty: then the completion is all there is."""
    return value if value == "" else _string(column, value, "prompt", "leave it empty, or fill it in")


def _completion(value: Any, column: str) -> str:
    return _string(column, value, "completion", "fill it in, or remove the row")


def _messages(value: Any, column: str) -> Any:
    """A list of objects; in a table, whose cells hold text, as JSON."""
    if isinstance(value, str) and not is_blank(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Unusable(f"{column!r} is not JSON ({one_line(error)})", "write a list of objects") from None
    check_messages(value)
    return value


def _label(value: Any, column: str) -> Any:
    """A name, or a number that is not whole; a program may know only decimals, and write 7.0 for 7."""
    if isinstance(value, float) and not value.is_integer():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value))
    return sys.intern(_string(column, value, "label", "give the row a label, or remove the row").strip())


def _labels(value: Any, column: str) -> list[Any]:
    """A list, or one string of names with | between them; with nothing in it: none of the labels."""
    if isinstance(value, str):
        value = [] if is_blank(value) else value.split("|")
    return [_label(each, column) for each in (value if isinstance(value, list) else [value])]


def _group(value: Any, column: str) -> str:
    """A name, or a number as it is written; groups that look the same are the same."""
    if value != value:  # what data frames have for nothing among numbers
        value = ""
    if isinstance(value, bool | int | float):
        whole = isinstance(value, float) and value.is_integer()
        return str(int(value)) if whole else json.dumps(value)
    return alike(_string(column, value, f"cell of {column!r}", "fill it in, or remove the row"))


def _words(value: Any, column: str) -> list[str]:
    return [_string(column, word, "word", "give it a letter, or remove it") for word in _split("words", value, column)]


def _tags(value: Any, column: str) -> list[Any]:
    return [_label(tag, column) for tag in _split("tags", value, column)]


def _split(what: str, value: Any, column: str) -> list[Any]:
    """A list, or one string with blanks in between; other white space than ASCII's may belong to a word."""
    found = re.findall(r"[^ \t\r\n]+", value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise Unusable(f"{column!r} is {_kind(value)}, not a list", "write a list of strings")
    if not found:
        raise Unusable(f"there are no {what}", "fill them in, or remove the row")
    return found


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "JSON object", list: "a list"}
    return names.get(type(value), type(value).__name__)


def _strings(value: Any) -> list[str]:
    """All the strings in a value."""
    if isinstance(value, str):
        return [value]
    each = value.values() if isinstance(value, Mapping) else value
    return [string for inner in each for string in _strings(inner)]


# role -> what is made of a value, given the column's name too; images, of which a file has a say as a whole, are apart
LOOKS: dict[str, Callable[[Any, str], Any]] = {
    "text": _text,
    "words": _words,
    "messages": _messages,
    "prompt": _prompt,
    "completion": _completion,
    "label": _label,
    "labels": _labels,
    "tags": _tags,
}


def _or_none(look: Callable[..., Any], *given: Any) -> Any:
    try:
        return look(*given)
    except Unusable:
        return None


def _existing(directory: Path, name: str) -> Path | None:
    """The file of that name; accents in it may be composed in one place and not in the other."""
    for form in (name.strip(), unicodedata.normalize("NFC", name.strip()), unicodedata.normalize("NFD", name.strip())):
        try:
            if (directory / form).is_file():
                return directory / form
        except (OSError, ValueError):  # too long for a name, not allowed in one, or in a directory that is closed
            pass
    return None


def read_samples(
    path: Path,
    columns: ColumnsSection,
    forms: Sequence[Form],
    reader: Reader | None = None,
    encoding: str | None = None,
    *,
    group: str | None = None,
    bad_rows: BadRows = "refuse",
    way_out: str = "",
) -> Samples:
    """Reads a data file whose form is known from the start; arguments and errors as of Examination and its methods."""
    examination = Examination(path, columns, forms, encoding=encoding, group=group)
    examination.resolve(reader)
    return examination.samples(bad_rows, way_out)


def _read_table(path: Path, forms: Sequence[Form], columns: Mapping[str, str], encoding: str | None) -> Table:
    if is_image_set(path):
        return read_image_set(path, forms, columns)
    return read_rows(path, forms, columns, encoding)


def data_digest(path: Path, digests: Digests) -> str:
    """Of the file that a data path names, or of all in a directory with their names: of images these are the labels."""
    if not path.is_dir():
        return digests.of_file(path)
    return combined({file.relative_to(path).as_posix(): digests.of_file(file) for file in files_in(path)})


def image_paths(path: Path, columns: ColumnsSection, encoding: str | None = None) -> list[Path]:
    """The images that a table names, which may be missing; none of an image set, whose own digest has them.

    Raises DataError if the table itself cannot be read.
    """
    if is_image_set(path):
        return []
    table = read_rows(path, [("image",)], columns.model_dump(), encoding)
    names = [name for _, (name,) in table.rows if isinstance(name, str)]
    return [_existing(path.parent, name) or path.parent / name for name in names]


def silo_files(path: Path) -> list[Path]:
    """The data files of simulated silos: the one, or those in a directory; DataError if there is none."""
    if not path.is_dir():
        return [path]
    kinds = (*KINDS, SHARD)
    found = sorted(each for each in path.iterdir() if each.is_file() and each.suffix.lower() in kinds)
    if not found:
        raise DataError(f"{path}: no data file in this directory", f"put one for each silo there: {', '.join(kinds)}")
    silo, files = Counter(each.stem for each in found).most_common(1)[0]
    if files > 1:
        raise DataError(f"{path}: {files} files of silo {silo!r}", "leave one for each silo")
    return found


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
