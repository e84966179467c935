"""Rows of tables as spreadsheets and programs write them: CSV and its relatives, JSON lines, Parquet (docs/data.md).

A fault of a file as a whole is one DataError with file and line. Faults of single rows are collected in RowFaults, so
that one reading shows all of them.
"""

import codecs
import csv
import difflib
import io
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fedpft.config import BadRows
from fedpft.errors import DataError

Row = tuple[int, list[Any]]
Form = tuple[str, ...]  # the roles of the columns that make a row, which are the keys under `columns` in the YAML file
GROUP = "group"  # the role of a column that is no part of a sample, by which a file is dealt out
GROUP_KEY = "simulation.partition.column"

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|", ".txt": "\t,;|"}  # the likeliest first
KINDS = (*SEPARATORS, ".jsonl", ".parquet")  # of data files, by their suffix
SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n"])"?[^\S\r\n]*(\r\n|\r|\n)', re.IGNORECASE)  # as Excel writes and reads it
LONGEST_FIELD = 1 << 26  # characters; the csv module's own limit, 131,072, is short for a document
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
STREAMED = ("utf-8", "utf-16", "utf-32")  # of lines in other encodings the file is held in memory
ROWS_AT_ONCE = 1024  # of Parquet
HELD_BYTES = 64 << 20  # of files; the rows of larger ones are read again whenever they are wanted
NO_TEXT = {b"PK\x03\x04": "a workbook or a ZIP archive", b"\xd0\xcf\x11\xe0": "an old workbook", b"\x1f\x8b": "gzipped"}
SAVE_AS_CSV = "in a spreadsheet program save it as CSV UTF-8; unpack an archive"
NAME_THE_ENCODING = (
    "name its encoding, such as cp1252 (Windows, Western Europe), in silo.yaml as data.encoding or in server.yaml as "
    "encoding; or save it as UTF-8"
)
UNCLOSED = "unexpected end of data"  # what the csv module says of a quote that is open at the end of the file
SHOWN_FAULTS = 10
SHOWN_CHARACTERS = 60
# Format characters that are seen: signs around Arabic, Syriac and Kaithi numbers.
VISIBLE_FORMATS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
# Letters and marks that are not: joiners, fillers, variation selectors.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
HYPHENS = str.maketrans("\u2010\u2011", "--")


class Unusable(Exception):
    """A row that cannot be used: message and remedy, for whoever knows its file and line and adds it to RowFaults."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message, self.remedy = message, remedy


class RowFaults:
    """What is wrong with single rows of a file."""

    def __init__(self, path: Path, place: Callable[[int], str] | None = None) -> None:
        """Args:
        place: what a row is called in messages, by its line; None: file and line.
        """
        self._path, self._place = path, place
        self._found: dict[int, list[tuple[str, str]]] = {}

    def add(self, line: int, message: str, remedy: str) -> None:
        """Notes a fault of the row that begins in a line; a row may have several."""
        self._found.setdefault(line, []).append((message, remedy))

    def __contains__(self, line: int) -> bool:
        return line in self._found

    def __len__(self) -> int:
        """The number of rows that have a fault."""
        return len(self._found)

    def against(self, rows: int, bad_rows: BadRows = "refuse", way_out: str = "") -> DataError | None:
        """What speaks against going on with the other rows; None if nothing does.

        Args:
            rows: that the file has, good and bad.
            bad_rows: whether those that cannot be used speak against the others.
            way_out: what the error adds to its remedy where not all rows are bad.
        """
        some_left = len(self) < rows
        if not self or (bad_rows == "skip" and some_left):
            return None
        return self.error(rows, way_out if some_left else "")

    def error(self, rows: int, way_out: str = "") -> DataError:
        """All of it in one line.

        Args:
            rows: that the file has, good and bad.
            way_out: what else can be done than to mend the rows.
        """
        found = [(line, *fault) for line in sorted(self._found) for fault in self._found[line]]
        remedies = list(dict.fromkeys(remedy for *_, remedy in found))
        if len(found) == 1:
            ((line, message, remedy),) = found
            place = self._place(line) if self._place else f"{self._path}:{line}"
            return DataError(f"{place}: {message}", remedy + way_out)
        shown = [
            f"{self._place(line) if self._place else f'{self._path.name}:{line}'}: {message}"
            for line, message, _ in found[:SHOWN_FAULTS]
        ]
        more = [f"and {len(found) - SHOWN_FAULTS} faults more"] if len(found) > SHOWN_FAULTS else []
        return DataError(
            f"{self._path}: {len(self)} of {rows} rows cannot be used: {'; '.join(shown + more)}",
            "; ".join(remedies[:3]) + way_out,
        )


@dataclass
class Table:
    """The columns of a file that were asked for.

    roles: which they are, the keys under `columns` in the YAML file.
    rows: for each row the line where it begins, or in Parquet its number from 1, and its values in the order of
        `roles`: strings, or what JSON can say, objects as dicts. A null is an empty string, as an empty cell is.
        A list; of a file of more than HELD_BYTES what reads them, once, unless its kind has to be read whole.
    faults: of the rows that are not among them, as far as those were read.
    """

    roles: tuple[str, ...]
    faults: RowFaults
    rows: Iterable[Row] = field(default_factory=list)


def read_text(path: Path, encoding: str | None = None) -> str:
    """The file's text, without a byte order mark.

    Args:
        encoding: a codec of Python; None: UTF-8. A byte order mark says it better, and goes before it.

    Raises:
        DataError: it is missing, empty or not so encoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if not data.strip():
        raise _empty(path)
    codec = _codec(path, data, encoding)
    try:
        text = data.decode(codec).removeprefix("\ufeff").removesuffix("\x1a")  # DOS's end of a file
    except UnicodeDecodeError as error:
        line = len(_lines(data[: error.start].decode(codec, "replace")))
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not {codec.upper()}", NAME_THE_ENCODING
        ) from None
    except UnicodeError as error:  # punycode's, which names no byte
        raise DataError(f"{path}: is not {codec.upper()} ({one_line(error)})", NAME_THE_ENCODING) from None
    if not text.strip():
        raise _empty(path)
    return text


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty", "write a header line and one row a sample")


def _codec(path: Path, start: bytes, encoding: str | None) -> str:
    """How a file is encoded that begins so; DataError if it is no text."""
    if what := next((what for magic, what in NO_TEXT.items() if start.startswith(magic)), None):
        raise DataError(f"{path}: is {what}, not text", SAVE_AS_CSV)
    codec = next((codec for mark, codec in MARKS if start.startswith(mark)), encoding)
    if codec is None and start[:1024].count(0) * 4 > len(start[:1024]):
        likely = "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
        raise DataError(
            f"{path}: has zero bytes between the letters, as UTF-16 without a byte order mark has",
            f"set data.encoding in silo.yaml, or encoding in server.yaml, to {likely}; or save it as UTF-8",
        )
    return codec or "utf-8"


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file", "give the path of the data file")
    return DataError(f"{path}: cannot be read ({error.strerror})", "make it a file that this user may read")


def read_rows(path: Path, forms: Sequence[Form], columns: Mapping[str, str], encoding: str | None = None) -> Table:
    """Reads the columns that are asked for.

    Args:
        forms: what a row may consist of. The columns of one of them must be there, and those of all that are, are read.
        columns: role -> column.
        encoding: as of :func:`read_text`; Parquet has none.

    Raises:
        DataError: the file as a whole cannot be used.
    """
    kind, asked = path.suffix.lower(), _Columns(forms, columns)
    if kind == ".parquet" or path.is_dir():
        table = _arrow_table(path, asked)
    elif kind == ".jsonl":
        table = _json_table(path, encoding, asked)
    elif kind in SEPARATORS:
        table = _csv_table(path, read_text(path, encoding), kind, asked)
    else:
        raise DataError(
            f"{path}: unknown kind of data file {kind!r}", f"use .csv, .tsv, .jsonl or .parquet; {SAVE_AS_CSV}"
        )
    if not table.rows and not table.faults:
        raise no_rows(path)
    return table


def no_rows(path: Path) -> DataError:
    """Of a file in which nothing is wrong, and nothing is."""
    return DataError(f"{path}: a header but no rows", "write one row a sample")


class _Columns:
    """Finds the columns that are asked for among those that a file has."""

    def __init__(self, forms: Sequence[Form], columns: Mapping[str, str]) -> None:
        self._forms, self._columns = forms, columns

    def present(self, there: Sequence[str]) -> int:
        """How many columns of the form that fits best are there."""
        return max(len(form) - len(missing) for form, missing in self._missing(there))

    def all_in(self, there: Sequence[str]) -> bool:
        """Whether nothing is missing."""
        return any(not missing for _, missing in self._missing(there))

    def find(self, there: Sequence[str]) -> dict[str, int]:
        """Role -> position; _Missing if no form is whole, or there is a column twice."""
        found = self._missing(there)
        whole = [form for form, missing in found if not missing]
        if whole:
            roles = dict.fromkeys(role for form in whole for role in form)
            return {role: self._position(there, self._columns[role]) for role in roles}
        most = self.present(there)
        roles = dict.fromkeys(missing[0] for form, missing in found if len(form) - len(missing) == most)
        ours = " nor ".join(repr(self._columns[role]) for role in roles)
        keys = " or ".join(_key(role) for role in roles)
        remedy = f"set {keys} to the one that holds {'it' if len(roles) > 1 else f'the {next(iter(roles))}'}"
        for role in roles:
            remedy = closest(self._columns[role], there, remedy, f" (set {_key(role)})")
        raise _Missing(f"no column {ours} among {listed(there)}", remedy)

    def _missing(self, there: Sequence[str]) -> list[tuple[Form, list[str]]]:
        names = {_column_name(name) for name in there}
        return [(form, [role for role in form if alike(self._columns[role]) not in names]) for form in self._forms]

    def _position(self, there: Sequence[str], column: str) -> int:
        names = [_column_name(name) for name in there]
        if names.count(alike(column)) > 1:
            raise _Missing(f"column {column!r} is there twice", "rename one of the two")
        return names.index(alike(column))


class _Missing(Exception):
    """Message and remedy: of the file if it has one header, of a row if each has its own."""


def _key(role: str) -> str:
    """Where the YAML file says what the column is called."""
    return GROUP_KEY if role == GROUP else f"columns.{role}"


def _column_name(cell: str) -> str:
    """A header cell without what a spreadsheet may have put around it."""
    return alike(alike(cell).strip('"'))


# --- separated values -------------------------------------------------------------------------------------------------


def _csv_table(path: Path, text: str, kind: str, columns: _Columns) -> Table:
    """Read with the separator by which the wanted columns are in the header line.

    A header of one column shows no separator. Then it is the one by which most rows have one field, too.
    """
    separators, first_line = SEPARATORS[kind], 1
    if said := SEPARATOR_LINE.match(text):
        separators, first_line, text = said[1], 2, text[said.end() :]
    faults: list[DataError] = []
    headers: dict[str, tuple[int, list[str]]] = {}
    for separator in separators:
        try:
            headers[separator] = next(_records(path, text, separator, first_line), (first_line, []))
        except DataError as error:
            faults.append(error)
    if not headers:
        raise faults[0]
    if not text.strip(f" \r\n{SEPARATORS[kind]}"):
        raise DataError(f"{path}: the file is empty", "write a header line and one row a sample")
    fitting = [separator for separator, (_, header) in headers.items() if columns.all_in(header)]
    if not fitting:
        likeliest = max(headers, key=lambda each: (columns.present(headers[each][1]), len(headers[each][1])))
        fitting = [likeliest]
    tables: list[Table] = []
    for separator in fitting:
        try:
            tables.append(_separated(path, text, separator, first_line, columns))
        except DataError as error:
            faults.append(error)
            continue
        if not tables[-1].faults:
            break
    if not tables:
        raise faults[0]
    return min(tables, key=lambda table: len(table.faults))


def _separated(path: Path, text: str, separator: str, first_line: int, columns: _Columns) -> Table:
    faults = RowFaults(path)
    records = _records(path, text, separator, first_line, faults)
    line, header = next(records, (first_line, []))
    try:
        found = columns.find(header)
    except _Missing as missing:
        message, remedy = missing.args
        raise DataError(f"{path}:{line}: {message}", remedy) from None
    rows: list[Row] = []
    # without the empty columns that spreadsheets append
    width = 1 + max(number for number, cell in enumerate(header) if cell.strip() or number in found.values())
    for line, record in records:
        if len(record) < width or any(cell.strip() for cell in record[width:]):
            faults.add(
                line,
                f"the row has {len(record)} fields, the header {width}",
                'put fields that hold a separator or a line end between double quotes, and write " in them twice',
            )
        else:
            rows.append((line, [record[position] for position in found.values()]))
    return Table(tuple(found), faults, rows)


def _records(
    path: Path, text: str, separator: str, first_line: int, faults: RowFaults | None = None
) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the line where it begins.

    Args:
        faults: takes those that are malformed within one line. Where lines may have been swallowed, by a quote that
            does not close in its own, nobody knows which rows there are: that is a fault of the file.
    """
    csv.field_size_limit(LONGEST_FIELD)  # of the process: the csv module knows no other
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = first_line + reader.line_num
        try:
            record = next(reader, None)
        except csv.Error as error:
            reason = str(error).replace("\t", "\\t")
            message, remedy = f"malformed row ({reason})", "check its double quotes: each that opens must close"
            if faults is None or first_line + reader.line_num != line + 1 or UNCLOSED in str(error):
                raise DataError(f"{path}:{line}: {message}", remedy) from None
            faults.add(line, message, remedy)
            continue
        if record is None:
            return
        if any(cell.strip() for cell in record):
            yield line, record


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _json_table(path: Path, encoding: str | None, columns: _Columns) -> Table:
    faults = RowFaults(path)
    roles = next((roles for roles, _ in _json_rows(path, encoding, columns, RowFaults(path))), ())
    rows = (row for _, row in _json_rows(path, encoding, columns, faults))
    return Table(roles, faults, _held([path], rows))


def _held(files: Sequence[Path], rows: Iterator[Row]) -> Iterable[Row]:
    """The rows of small files as a list."""
    return rows if are_large(files) else list(rows)


def are_large(files: Iterable[Path]) -> bool:
    """Whether what is made of them is better not held in memory."""
    return sum(file.stat().st_size for file in files) > HELD_BYTES


def _json_rows(
    path: Path, encoding: str | None, columns: _Columns, faults: RowFaults
) -> Iterator[tuple[tuple[str, ...], Row]]:
    """The rows, each with the roles that the first one has."""
    roles: tuple[str, ...] = ()
    keys: list[str] | None = None  # of the row that was looked at last: as a rule all have the same
    found: dict[str, int] = {}
    for line, written in enumerate(_text_lines(path, encoding), 1):
        if not written.strip():
            continue
        try:
            row = json.loads(written, object_pairs_hook=tuple)  # pairs, so that a key that is there twice shows
        except (ValueError, RecursionError) as error:
            faults.add(line, f"malformed JSON ({one_line(error)})", "write one JSON object on each line")
            continue
        if not isinstance(row, tuple):
            faults.add(line, "not a JSON object", 'write {"text": ..., "label": ...} on each line')
            continue
        try:
            if (there := [key for key, _ in row]) != keys:
                found = columns.find(there)
                keys = there
            values = [_plain(row[position][1]) for position in found.values()]
            roles = roles or tuple(found)
            if tuple(found) != roles:
                raise _Missing(f"other columns than the rows above: {listed(there)}", "write the same")
        except _Missing as missing:
            faults.add(line, *missing.args)
        else:
            yield roles, (line, values)


def _text_lines(path: Path, encoding: str | None) -> Iterator[str]:
    """The lines of :func:`read_text`, without what ends them; its errors, when the line is reached."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
            if start.strip() and _codec(path, start, encoding) in STREAMED:
                file.seek(0)
                yield from _decoded_lines(path, file, _codec(path, start, encoding))
                return
    except UnicodeError:
        pass  # read_text says where
    except OSError as error:
        raise _unreadable(path, error) from None
    yield from _lines(read_text(path, encoding))


def _decoded_lines(path: Path, file: IO[bytes], codec: str) -> Iterator[str]:
    before: str | None = None
    empty = True
    for line in io.TextIOWrapper(file, codec, newline=None):
        if before is None:
            line = line.removeprefix("\ufeff")
        else:
            yield before.removesuffix("\n")
        empty, before = empty and not line.strip(), line
    if empty or before is None:
        raise _empty(path)
    yield before.removesuffix("\n").removesuffix("\x1a")  # DOS's end of a file


def _plain(value: Any) -> Any:
    """The value with its objects as dicts, of which the last of equal keys wins; a null is an empty cell."""
    if isinstance(value, tuple | dict):
        pairs = value.items() if isinstance(value, dict) else value
        return {key: _plain(each) for key, each in pairs}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return "" if value is None else value


def _lines(text: str) -> list[str]:
    """Split where a line ends on some system. Not splitlines(): U+2028 and others may stand inside a JSON string."""
    return re.split(r"\r\n|\r|\n", text)


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


ARROW_INFO = "dataset_info.json"  # in a directory that `datasets` saved
ARROW_STATE = "state.json"  # there, too: the names of its files
ARROW_SPLITS = "dataset_dict.json"  # in a directory with several of those


def _arrow_table(path: Path, columns: _Columns) -> Table:
    """Of a Parquet file; of a directory with several, or with a data set as `datasets` saves it, all rows in a row."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow", "pip install 'fedpft[parquet]'") from None
    files = _arrow_files(path)
    roles: tuple[str, ...] = ()
    for file in files:
        with _reading_arrow(file), _arrow_file(file) as (schema, _):
            found = columns.find(schema.names)
            for role, position in found.items():
                if (odd := _beyond_json(schema.types[position], pyarrow.types)) is not None:
                    raise _Missing(
                        f"column {schema.names[position]!r} holds {odd}, which is no {role}",
                        f"write strings, numbers, or lists or structs of them; or set {_key(role)} to another column",
                    )
            roles = roles or tuple(found)
            if tuple(found) != roles:
                raise _Missing(f"other columns than in {files[0].name}: {listed(schema.names)}", "write the same")
    first_rows = [1]  # of each file and of what follows it, as far as they were read

    def read() -> Iterator[Row]:
        line = 0
        for number, file in enumerate(files):
            with _reading_arrow(file), _arrow_file(file) as (schema, batches):
                found = columns.find(schema.names)
                names = [schema.names[position] for position in found.values()]
                for batch in batches(list(dict.fromkeys(names))):
                    for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                        line += 1
                        yield line, [_plain(value) for value in row]
            first_rows[number + 1 :] = [line + 1]

    def place(line: int) -> str:
        number = bisect_right(first_rows, line) - 1
        return f"{files[number]}:{line - first_rows[number] + 1}"

    return Table(roles, RowFaults(path, place if path.is_dir() else None), _held(files, read()))


def _arrow_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / ARROW_SPLITS).exists():
        raise DataError(f"{path}: holds several data sets, as `datasets` saves them", "name one: a directory in it")
    if (path / ARROW_INFO).exists():
        try:
            return [path / file["filename"] for file in json.loads(read_text(path / ARROW_STATE))["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path / ARROW_STATE}: does not name the data set's files", "save it again") from None
    files = sorted(each for each in path.iterdir() if each.suffix.lower() == ".parquet")
    if not files:
        raise DataError(f"{path}: holds neither Parquet files nor images nor what `datasets` saves", "name a data file")
    return files


@contextmanager
def _reading_arrow(file: Path) -> Iterator[None]:
    """What is wrong with a file, as a DataError."""
    import pyarrow

    try:
        yield
    except _Missing as missing:
        message, remedy = missing.args
        raise DataError(f"{file}: {message}", remedy) from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        kind = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
        raise DataError(
            f"{file}: cannot be read as {kind} ({one_line(error)})", "write it again, whole and without encryption"
        ) from None


@contextmanager
def _arrow_file(file: Path) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
    """Its schema, and what reads some columns of it a batch at a time."""
    from pyarrow import ipc
    from pyarrow.parquet import ParquetFile

    try:
        opened = file.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from None
    with opened:
        if file.suffix.lower() == ".parquet":
            parquet = ParquetFile(opened)
            yield parquet.schema_arrow, lambda names: parquet.iter_batches(ROWS_AT_ONCE, columns=names)
        else:
            stream = ipc.open_stream(opened)
            yield stream.schema, lambda names: (batch.select(names) for batch in stream)


def _beyond_json(kind: Any, types: Any) -> str | None:
    """What in a type of Arrow's JSON could not say; None if there is nothing."""
    if types.is_dictionary(kind):  # the categories of a data frame
        return _beyond_json(kind.value_type, types)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _beyond_json(kind.value_type, types)
    if types.is_struct(kind):
        return next((odd for part in kind.fields if (odd := _beyond_json(part.type, types)) is not None), None)
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return None if any(each(kind) for each in (*plain, types.is_string_view, types.is_null)) else str(kind)


# --- words ------------------------------------------------------------------------------------------------------------


def alike(text: str) -> str:
    """The same for texts that look the same: composed (NFC), without invisible characters, each white space one blank.

    Upper and lower case look different, and so do the letters of two scripts, even where a font draws them alike.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    seen = "".join(letter for letter in text if _is_seen(letter))
    return " ".join(unicodedata.normalize("NFC", seen).translate(HYPHENS).split())


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen."""
    return not any(_is_seen(letter) and not letter.isspace() for letter in text)


def _is_seen(letter: str) -> bool:
    """Whether a character takes room, white space included."""
    if letter.isspace():
        return True
    hidden = unicodedata.category(letter) in ("Cf", "Cc") and letter not in VISIBLE_FORMATS
    return not hidden and INVISIBLE.match(letter) is None


def unusable(text: str) -> str | None:
    """What in a text no tokenizer and no file could take; None if there is nothing."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character (the lone surrogate {text[error.start]!r})"
    return None


def closest(given: str, known: Sequence[str], otherwise: str, after: str = "") -> str:
    """A remedy for a name that is not known: the most similar of those that are, or else `otherwise`."""
    other_case = [name for name in known if alike(name).casefold() == alike(given).casefold()]
    guess = other_case or difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"did you mean {shown(guess[0])}?{after}" if guess else otherwise


def shown(value: str) -> str:
    """A value from a file for a message: on one line, printable, and not too long."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}...")


def listed(names: Sequence[str]) -> str:
    """The names for a message, cut after twelve."""
    return ", ".join(shown(name)[1:-1] for name in names[:12]) + (", ..." if len(names) > 12 else "")


def one_line(error: Exception) -> str:
    """The error's text without line ends."""
    return " ".join(str(error).split())
