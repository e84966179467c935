"""Parquet files: read as the other tables are, and refused as clearly."""

import datetime
import decimal
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fedpft.config import ColumnsSection
from fedpft.data.rows import read_rows
from fedpft.data.samples import read_samples
from fedpft.errors import DataError
from fedpft.tasks import TASKS

COLUMNS = ColumnsSection()
TEXT = TASKS["sequence-classification"]
LABELS = ("sport", "science")
TEXT_AND_LABEL = {"text": "text", "label": "label"}


def written(directory: Path, columns: dict[str, Any], **settings: Any) -> Path:
    path = directory / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("settings", [{}, {"compression": "zstd", "row_group_size": 1}, {"version": "1.0"}])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_columns_are_read_by_their_names(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    labels = pyarrow.array(["sport", "science"])
    labels = labels.dictionary_encode() if kind == "dictionary" else labels.cast(kind)
    path = written(tmp_path, {"topic": labels, "more": [b"\xff", None], "text": ["first", "second"]}, **settings)
    samples = TEXT.read_labelled(path, ColumnsSection(label="topic"), LABELS, encoding="cp1252")
    assert samples["text"] == ["first", "second"]
    assert samples.targets == [0, 1]
    assert samples.lines == [1, 2]


def test_numbers_lists_and_structs_are_as_in_json_lines(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "a"}, {"role": None, "content": "b"}], None]
    columns = {
        "messages": messages,
        "labels": [["a"], []],
        "label": [7, None],
        "tags": [1.5, 2.0],
        "text": [None, True],
    }
    names = {name: name for name in columns}
    table = read_rows(written(tmp_path, columns), [tuple(names)], names)
    assert table.roles == tuple(names)
    assert table.rows == [
        (1, [[{"role": "user", "content": "a"}, {"role": "", "content": "b"}], ["a"], 7, 1.5, ""]),
        (2, ["", [], "", 2.0, True]),
    ]


def test_a_column_of_groups_is_read_as_text(tmp_path: Path) -> None:
    columns = {"text": ["first", "second"], "label": ["sport", "science"], "ward": [7.0, 8.5], "seen": [b"x", b"y"]}
    path = written(tmp_path, columns)
    assert read_samples(path, COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="ward").groups == ["7", "8.5"]
    assert read_samples(path, COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="text").groups == ["first", "second"]
    with pytest.raises(DataError, match=r"a\.parquet: column 'seen' holds binary, which is no group") as raised:
        read_samples(path, COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="seen")
    assert "set simulation.partition.column to another column" in raised.value.remedy


def test_rows_that_cannot_be_used_are_named_by_number(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": ["a", None, "c"], "label": ["sport", "sport", "sprot"]})
    with pytest.raises(DataError) as raised:
        TEXT.read_labelled(path, COLUMNS, LABELS)
    assert "2 of 3 rows cannot be used: a.parquet:2: the text is empty; a.parquet:3: label 'sprot'" in str(raised.value)


DAY = datetime.date(2026, 1, 1)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([b"sport"], "binary"),
        ([decimal.Decimal("1.5")], r"decimal128\(2, 1\)"),
        ([DAY], "date32"),
        ([datetime.datetime(2026, 1, 1)], "timestamp"),
        ([datetime.timedelta(1)], "duration"),
        ([[b"sport"]], "binary"),
        ([{"name": "sport", "day": DAY}], "date32"),
        (pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())), "map"),
        (pyarrow.array([DAY]).dictionary_encode(), "date32"),
    ],
)
def test_a_column_of_what_json_cannot_say_is_refused(values: Any, kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"text": ["a"], "label": values})
    with pytest.raises(DataError, match=f"a.parquet: column 'label' holds {kind}.*, which is no label") as raised:
        TEXT.read_labelled(path, COLUMNS, LABELS)
    assert "columns.label" in raised.value.remedy
    assert TEXT.read_public(path, COLUMNS)["text"] == ["a"], "nobody asked for the other column"


def test_a_missing_column_is_named_with_the_likeliest(tmp_path: Path) -> None:
    path = written(tmp_path, {"txt": ["a"], "label": ["sport"]})
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text' among txt, label") as raised:
        TEXT.read_labelled(path, COLUMNS, LABELS)
    assert "did you mean 'txt'? (set columns.text)" in raised.value.remedy


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["sport"]], names=["text", "text", "label"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' is there twice"):
        TEXT.read_labelled(tmp_path / "a.parquet", COLUMNS, LABELS)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": pyarrow.array([], "string"), "label": pyarrow.array([], "string")})
    with pytest.raises(DataError, match=r"a\.parquet: a header but no rows"):
        TEXT.read_labelled(path, COLUMNS, LABELS)


def broken(kind: str, content: bytes) -> bytes:
    return {
        "truncated": content[:-20],
        "cut in the middle": content[: len(content) // 2],
        "empty": b"",
        "a CSV file": b"text,label\na,sport\n",
        "encrypted": content[:-4] + b"PARE",
        "damaged": content[:4] + bytes(20) + content[24:],
        "not UTF-8": content.replace(b"ninth", b"nint\xff"),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["truncated", "cut in the middle", "empty", "a CSV file", "encrypted", "damaged", "not UTF-8"]
)
def test_a_file_that_is_no_whole_parquet_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    columns = {"text": ["first", "ninth"], "label": ["sport", "sport"]}
    path = written(tmp_path, columns, compression="none", use_dictionary=False, write_statistics=False)
    assert TEXT.read_labelled(path, COLUMNS, LABELS)["text"] == ["first", "ninth"]
    path.write_bytes(broken(kind, path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet \(.*\)") as raised:
        TEXT.read_labelled(path, COLUMNS, LABELS)
    assert "write it again" in raised.value.remedy
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_a_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet: no such file"):
        read_rows(tmp_path / "a.parquet", [("text",)], TEXT_AND_LABEL)
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(DataError, match=r"a\.parquet: holds neither Parquet files nor images"):
        read_rows(tmp_path / "a.parquet", [("text",)], TEXT_AND_LABEL)


def test_without_pyarrow_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as raised:
        read_rows(path, [("text",)], TEXT_AND_LABEL)
    assert raised.value.remedy == "pip install 'fedpft[parquet]'"
