"""Rows of CSV, TSV and JSON lines files; each fault is one DataError with file and line."""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedpft.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 1 << 26  # characters; the csv module's own limit, 131,072, is short for a document


def read_text(path: Path) -> str:
    """The file's text; raises DataError if it is missing, empty or not UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", "give the path of the data file") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror})", "make it a file that this user may read"
        ) from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty", "write a header line and one row a sample")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8", "save the file with UTF-8 encoding"
        ) from None


def read_rows(path: Path, wanted: list[tuple[str, str]]) -> list[tuple[int, list[str]]]:
    """For each row the line where it begins, and the values of the wanted columns.

    Args:
        wanted: (role, column) pairs; the role is the key under `columns` in the YAML file.
    """
    kind = path.suffix.lower()
    if kind not in (*DELIMITERS, ".jsonl"):
        raise DataError(f"{path}: unknown kind of data file {kind!r}", "use .csv, .tsv or .jsonl")
    text = read_text(path)
    rows = [*(_json_rows(path, text, wanted) if kind == ".jsonl" else _csv_rows(path, text, DELIMITERS[kind], wanted))]
    if not rows:
        raise DataError(f"{path}: a header but no rows", "write one row a sample")
    return rows


def _csv_rows(path: Path, text: str, delimiter: str, wanted: list[tuple[str, str]]) -> Iterator[tuple[int, list[str]]]:
    records = _csv_records(path, text, delimiter)
    line, header = next(records)
    positions = [_column(path, line, header, role, column) for role, column in wanted]
    for line, record in records:
        if len(record) != len(header):
            raise DataError(
                f"{path}:{line}: the row has {len(record)} fields, the header {len(header)}",
                'put fields that hold a separator or a line end between double quotes, and write " in them twice',
            )
        yield line, [record[position] for position in positions]


def _csv_records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, each with the line where it begins."""
    csv.field_size_limit(LONGEST_FIELD)  # of the process: the csv module knows no other
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: malformed row ({error})", "check the double quotes of this row: each that opens must close"
        ) from None


def _column(path: Path, line: int, there: Sequence[str], role: str, column: str) -> int:
    if column not in there:
        raise DataError(
            f"{path}:{line}: no column {column!r} among {listed(there)}",
            closest(column, there, f"set columns.{role} to the one that holds the {role}", f" (set columns.{role})"),
        )
    if there.count(column) > 1:
        raise DataError(f"{path}:{line}: column {column!r} is there twice", "rename one of the two")
    return there.index(column)


def _json_rows(path: Path, text: str, wanted: list[tuple[str, str]]) -> Iterator[tuple[int, list[str]]]:
    # Not splitlines(): it also splits at U+2028 and others, which may stand unescaped inside a JSON string.
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            row = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{line}: malformed JSON ({one_line(error)})", "write one JSON object on each line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: not a JSON object", 'write {"text": ..., "label": ...} on each line')
        values = []
        for role, column in wanted:
            _column(path, line, list(row), role, column)
            value = row[column]
            if role == "label" and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                raise DataError(
                    f"{path}:{line}: {column!r} is {type(value).__name__}, not a string", "write it between quotes"
                )
            values.append(value)
        yield line, values


def closest(given: str, known: Sequence[str], otherwise: str, after: str = "") -> str:
    """A remedy for a name that is not known: the most similar of those that are, or else `otherwise`."""
    guess = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"did you mean {guess[0]!r}?{after}" if guess else otherwise


def listed(names: Sequence[str]) -> str:
    """The names for a message, cut after twelve."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def one_line(error: Exception) -> str:
    """The error's text without line ends."""
    return " ".join(str(error).split())
