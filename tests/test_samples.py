"""What institutions bring as data files: spreadsheets of the world, JSON lines, bad rows, labels that look the same."""

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedpft.config import ColumnsSection, TaskName
from fedpft.data.rows import Form, alike
from fedpft.data.samples import Examination, Samples, read_label_list, read_samples
from fedpft.errors import DataError
from fedpft.tasks import TASKS, Task

COLUMNS = ColumnsSection()
TEXT, IMAGE = TASKS["sequence-classification"], TASKS["image-classification"]
FORMS = (*TEXT.forms, *IMAGE.forms)
LABELS = ("sport", "science")


def written(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_labelled(
    path: Path, columns: ColumnsSection, task: Task, labels: Sequence[str], encoding: str | None = None
) -> Samples:
    return task.read_labelled(path, columns, labels, encoding)


def read_unlabelled(path: Path, columns: ColumnsSection, task: Task, encoding: str | None = None) -> Samples:
    return task.read_public(path, columns, encoding)


def examination_of(path: Path) -> Examination:
    """As a silo looks at its file before the server has named the task."""
    return Examination(path, COLUMNS, FORMS, first_counts=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\nfirst,sport\n\n"second, with\na line end and ""quotes""",science\n'),
        ("a.tsv", 'label\ttext\nsport\tfirst\nscience\t"second, with\na line end and ""quotes"""\n'),
        (
            "a.jsonl",
            '{"text": "first", "label": "sport"}\n'
            '{"label": "science", "text": "second, with\\na line end and \\"quotes\\"", "more": 1}\n',
        ),
    ],
)
def test_every_format_gives_the_same_samples(tmp_path: Path, name: str, content: str) -> None:
    samples = read_labelled(written(tmp_path, name, content), COLUMNS, TEXT, LABELS)
    assert samples["text"] == ["first", 'second, with\na line end and "quotes"']
    assert samples.targets == [0, 1]
    assert len(samples) == 2


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b"\xef\xbb\xbftext,label\r\nfirst,sport\r\nsecond,science\r\n")
    samples = read_labelled(path, COLUMNS, TEXT, LABELS)
    assert samples["text"] == ["first", "second"]
    assert samples.lines == [2, 3]


def test_labels_may_be_resolved_later(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nfirst,sport\nsecond,science\n")
    examination = Examination(path, COLUMNS, TEXT.forms)
    assert examination.samples().targets is None
    examination.resolve(TEXT.reader(("science", "sport")))
    assert examination.samples().targets == [1, 0]


@pytest.mark.parametrize("label", ["7", "7.0", '"7"', '"7.0"'])
def test_a_label_may_be_a_number_in_json(label: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", f'{{"text": "first", "label": {label}}}\n')
    assert read_labelled(path, COLUMNS, TEXT, ["1", "7"]).targets == [1]


def test_columns_are_found_by_their_configured_names(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "id,topic,body\n1,sport,first\n")
    assert read_labelled(path, ColumnsSection(text="body", label="topic"), TEXT, LABELS)["text"] == ["first"]


def test_unlabelled_data_needs_no_label_column(tmp_path: Path) -> None:
    assert read_unlabelled(written(tmp_path, "a.csv", "text\nfirst\nsecond\n"), COLUMNS, TEXT)["text"] == [
        "first",
        "second",
    ]


def test_a_field_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n")
    assert len(read_unlabelled(path, COLUMNS, TEXT)["text"][0]) == 200_000


FAULTS: dict[str, tuple[str, str | bytes | None, str, str]] = {
    "missing file": ("a.csv", None, "a.csv: no such file", "path"),
    "empty file": ("a.csv", "", "a.csv: the file is empty", "header"),
    "blank file": ("a.csv", "\n \n", "a.csv: the file is empty", "header"),
    "no rows": ("a.csv", "text,label\n", "a.csv: a header but no rows", "row"),
    "unknown suffix": ("a.xlsx", "text,label\n", "a.xlsx: unknown kind of data file '.xlsx'", ".csv"),
    "not UTF-8": ("a.csv", b"text,label\nfirst,sport\ncaf\xe9,sport\n", "a.csv:3: byte 0xe9 is not UTF-8", "UTF-8"),
    "missing column": (
        "a.csv",
        "txt,label\nfirst,sport\n",
        "a.csv:1: no column 'text' among txt, label",
        "did you mean 'txt'? (set columns.text)",
    ),
    "missing column, nothing like it": (
        "a.csv",
        "text,b\nfirst,sport\n",
        "a.csv:1: no column 'label' among text, b",
        "set columns.label to",
    ),
    "column twice": ("a.csv", "text,label,text\na,sport,b\n", "a.csv:1: column 'text' is there twice", "rename"),
    "empty text": ("a.csv", 'text,label\nfirst,sport\n"  ",sport\n', "a.csv:3: the text is empty", "remove"),
    "empty label": ("a.csv", "text,label\nfirst,\n", "a.csv:2: the label is empty", "label"),
    "unknown label": (
        "a.csv",
        'text,label\n"two\nlines",sport\nnext,sciense\n',
        "a.csv:4: label 'sciense' is not in the server's label list",
        "did you mean 'science'?",
    ),
    "unknown label, nothing like it": (
        "a.csv",
        "text,label\nfirst,zzz\n",
        "a.csv:2: label 'zzz'",
        "use one of its 2 labels: sport, science",
    ),
    "too few fields": ("a.csv", "text,label\nfirst\n", "a.csv:2: the row has 1 fields, the header 2", "quotes"),
    "too many fields": ("a.csv", "text,label\na, b,sport\n", "a.csv:2: the row has 3 fields, the header 2", "quotes"),
    "open quote": ("a.csv", 'text,label\nfirst,sport\n"open,sport\n', "a.csv:3: malformed row", "quotes"),
    "text after a quote": ("a.csv", 'text,label\n"a"b,sport\n', "a.csv:2: malformed row", "quotes"),
    "text after a quote, between tabs": (
        "a.tsv",
        'text\tlabel\n"a"b\tsport\n',
        "a.tsv:2: malformed row ('\\t' expected",
        "quotes",
    ),
    "malformed JSON": (
        "a.jsonl",
        '{"text": "a", "label": "sport"}\n{"text": \n',
        "a.jsonl:2: malformed JSON",
        "one JSON object",
    ),
    "JSON that is no object": ("a.jsonl", "[1]\n", "a.jsonl:1: not a JSON object", '{"text"'),
    "JSON without the key": (
        "a.jsonl",
        '{"text": "a", "label": "sport"}\n\n{"text": "a", "lable": "sport"}\n',
        "a.jsonl:3: no column 'label' among text, lable",
        "did you mean 'lable'?",
    ),
    "JSON text that is a number": ("a.jsonl", '{"text": 1, "label": "sport"}\n', "a.jsonl:1: 'text' is int", "quotes"),
    "JSON label that is no whole number": (
        "a.jsonl",
        '{"text": "a", "label": 1.5}\n',
        "a.jsonl:1: 'label' is float",
        "quotes",
    ),
    "JSON label that is NaN": ("a.jsonl", '{"text": "a", "label": NaN}\n', "a.jsonl:1: 'label' is float", "quotes"),
    "JSON label that is infinite": (
        "a.jsonl",
        '{"text": "a", "label": 1e999}\n',
        "a.jsonl:1: 'label' is float",
        "quotes",
    ),
    "JSON label that is an object": (
        "a.jsonl",
        '{"text": "a", "label": {}}\n',
        "a.jsonl:1: 'label' is JSON object",
        "",
    ),
    "JSON text that is null": ("a.jsonl", '{"text": null, "label": "sport"}\n', "a.jsonl:1: the text is empty", "fill"),
    "JSON key twice": (
        "a.jsonl",
        '{"text": "a", "text": "b", "label": "sport"}\n',
        "a.jsonl:1: column 'text' is there twice",
        "rename",
    ),
    "JSON number of 5,000 digits": (
        "a.jsonl",
        f'{{"text": {"1" * 5000}}}\n',
        "a.jsonl:1: malformed JSON",
        "one JSON object",
    ),
    "JSON nested without end": ("a.jsonl", f"{'[' * 100_000}\n", "a.jsonl:1: malformed JSON", "one JSON object"),
    "half a character": (
        "a.jsonl",
        '{"text": "a \\ud800", "label": "sport"}\n',
        "a.jsonl:1: the text holds half a character (the lone surrogate '\\ud800')",
        "mend or remove",
    ),
    "half a character in a label": (
        "a.jsonl",
        '{"text": "a", "label": "sport\\udfff"}\n',
        "a.jsonl:1: the label holds half a character",
        "mend or remove",
    ),
    "half a character in a key": (
        "a.jsonl",
        '{"\\ud800": "a"}\n',
        "a.jsonl:1: no column 'text' among \\ud800",
        "columns.text",
    ),
    "NUL": ("a.csv", "text,label\na\0b,sport\n", "a.csv:2: the text holds a NUL character", "mend or remove"),
    "text that only seems to be there": (
        "a.csv",
        "text,label\n\u200b\u2060\u00a0,sport\n",
        "a.csv:2: the text is empty",
        "fill",
    ),
    "label that only seems to be there": ("a.csv", "text,label\na,\u200b\n", "a.csv:2: the label is empty", "label"),
    "label in other case": (
        "a.csv",
        "text,label\na,SPORT\n",
        "a.csv:2: label 'SPORT' is not in the server's label list",
        "did you mean 'sport'?",
    ),
    "label as long as a text": ("a.csv", f"text,label\na,{'x' * 5000}\n", f"a.csv:2: label '{'x' * 60}...'", "sport"),
    "an empty table": ("a.csv", ";;;\n;;;\n", "a.csv: the file is empty", "header"),
    "only a byte order mark": ("a.csv", b"\xff\xfe", "a.csv: the file is empty", "header"),
    "a workbook": (
        "a.csv",
        b"PK\x03\x04\x14\0",
        "a.csv: is a workbook or a ZIP archive, not text",
        "save it as CSV UTF-8",
    ),
    "an old workbook": (
        "a.csv",
        b"\xd0\xcf\x11\xe0\xa1",
        "a.csv: is an old workbook, not text",
        "save it as CSV UTF-8",
    ),
    "UTF-16 cut short": (
        "a.csv",
        "text,label\na,sport".encode("utf-16")[:-1],
        "a.csv:2: byte 0x74 is not UTF-16",
        "cp1252",
    ),
    "UTF-16 without a mark": (
        "a.csv",
        "text,label\na,sport\n".encode("utf-16-le"),
        "a.csv: has zero bytes between the letters",
        "to utf-16-le",
    ),
    "JSON label that is true": ("a.jsonl", '{"text": "a", "label": true}\n', "a.jsonl:1: 'label' is bool", "quotes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_data_is_one_line_with_place_and_remedy(tmp_path: Path, fault: str) -> None:
    name, content, message, remedy = FAULTS[fault]
    path = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(DataError) as raised:
        read_labelled(path, COLUMNS, TEXT, LABELS)
    assert f"{tmp_path}/{message}" in raised.value.message
    assert remedy in raised.value.remedy
    assert "\n" not in str(raised.value)


def test_a_directory_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DataError, match="holds neither Parquet files nor images"):
        read_unlabelled(tmp_path / "a.csv", COLUMNS, TEXT)


def test_the_label_list_keeps_its_order(tmp_path: Path) -> None:
    assert read_label_list(written(tmp_path, "labels.txt", "b\na\r\nc d\n\n")) == ("b", "a", "c d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\u200b\n", "the file is empty"),
        ("a\n\nb\n", ":2: empty line"),
        ("a\nb\na\n", ":3: label 'a' is in line 1 too"),
        ("a b\nc\na\u00a0\u200b b\n", ":3: label 'a.*b' is in line 1 too, as 'a b' to look at"),
        ("a label\0\n", ":1: the label holds a NUL"),
        ("a\n\nb\na\n", "2 of 4 rows .* labels.txt:2: empty line .* labels.txt:4: label 'a' is in line 1 too"),
    ],
)
def test_a_bad_label_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_label_list(written(tmp_path, "labels.txt", content))


def test_the_label_list_may_be_as_old_macs_and_windows_write_it(tmp_path: Path) -> None:
    assert read_label_list(written(tmp_path, "a.txt", "a\rb\r")) == ("a", "b")
    assert read_label_list(written(tmp_path, "b.txt", "h\u00e4\r\nb".encode("utf-16"))) == ("h\u00e4", "b")
    assert read_label_list(written(tmp_path, "c.txt", "h\u00e4\nb".encode("cp1252")), "cp1252") == ("h\u00e4", "b")


# --- as spreadsheets write it -----------------------------------------------------------------------------------------

SPREADSHEETS: dict[str, tuple[str, str | bytes]] = {
    "semicolons": ("a.csv", 'text;label\n"one; two, three";sport\nnext;science\n'),
    "tabs in .csv": ("a.csv", "text\tlabel\none; two, three\tsport\nnext\tscience\n"),
    "bars": ("a.csv", "text|label\none; two, three|sport\nnext|science\n"),
    "commas in .tsv": ("a.tsv", 'text,label\n"one; two, three",sport\nnext,science\n'),
    "sep= before the header": ("a.csv", 'sep=;\r\ntext;label\r\n"one; two, three";sport\r\nnext;science\r\n'),
    "sep= of an odd separator": ("a.csv", '"sep=^"\ntext^label\none; two, three^sport\nnext^science\n'),
    "Excel's Unicode text": (
        "a.txt",
        'text\tlabel\r\n"one; two, three"\tsport\r\nnext\tscience\r\n'.encode("utf-16"),
    ),
    "UTF-16, big end first": (
        "a.tab",
        codecs.BOM_UTF16_BE + 'text\tlabel\r\n"one; two, three"\tsport\nnext\tscience'.encode("utf-16-be"),
    ),
    "UTF-32": ("a.csv", 'text;label\n"one; two, three";sport\nnext;science\n'.encode("utf-32")),
    "two byte order marks": ("a.csv", b"\xef\xbb\xbf" * 2 + b'"text";"label"\n"one; two, three";sport\nnext;science\n'),
    "old Mac line ends": ("a.csv", 'text;label\r"one; two, three";sport\rnext;science\r'),
    "room around the header": ("a.csv", 'text\u00a0; label \n"one; two, three";sport\nnext;science\n'),
    "quotes within the header": ("a.csv", 'text, "label"\n"one; two, three",sport\nnext,science\n'),
    "empty columns": ("a.csv", 'text;label;;;\n"one; two, three";sport;;;\nnext;science;;;\n;;;;\n'),
    "empty columns in some rows": ("a.csv", ' ;;\ntext;label\n"one; two, three";sport;;\nnext;science\n;;\n\n'),
    "an end of file as DOS writes it": ("a.csv", 'text;label\r\n"one; two, three";sport\r\nnext;science\r\n\x1a'),
    "quotes everywhere": ("a.csv", '"text","label"\n"one; two, three","sport"\n"next","science"\n'),
    "JSON, old Mac line ends": (
        "a.jsonl",
        '{"text": "one; two, three", "label": "sport"}\r{"text": "next", "label": "science", "text\u200b2": NaN}',
    ),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_a_table_is_read_as_spreadsheets_of_the_world_write_it(kind: str, tmp_path: Path) -> None:
    samples = read_labelled(written(tmp_path, *SPREADSHEETS[kind]), COLUMNS, TEXT, LABELS)
    assert samples["text"] == ["one; two, three", "next"]
    assert samples.targets == [0, 1]


def test_lines_are_counted_with_the_separator_line_and_old_line_ends(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'sep=;\rtext;label\r"two\rlines";sport\rlast;\r')
    with pytest.raises(DataError, match=r"a\.csv:5: the label is empty"):
        read_labelled(path, COLUMNS, TEXT, LABELS)
    path = written(tmp_path, "b.csv", "text;label\ra;sport\rcaf\xe9;sport\r".encode("cp1252"))
    with pytest.raises(DataError, match=r"b\.csv:3: byte 0xe9 is not UTF-8"):
        read_labelled(path, COLUMNS, TEXT, LABELS)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("rows", [["one, two", "three"], ["one; two", "three"], ["one, two; three", "x\ty, z"]])
def test_one_column_needs_no_separator(rows: list[str], name: str, tmp_path: Path) -> None:
    assert read_unlabelled(written(tmp_path, name, "\n".join(["text", *rows])), COLUMNS, TEXT)["text"] == rows


def test_an_encoding_that_is_named_is_used_and_the_error_says_how_to_name_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text;label\nd\u00e9j\u00e0 vu;sport\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"in silo\.yaml as data\.encoding or in server\.yaml as encoding") as raised:
        read_labelled(path, COLUMNS, TEXT, LABELS)
    assert "cp1252" in raised.value.remedy
    assert read_labelled(path, COLUMNS, TEXT, LABELS, "cp1252")["text"] == ["d\u00e9j\u00e0 vu"]
    marked = written(tmp_path, "b.csv", b"\xef\xbb\xbf" + "text\nd\u00e9j\u00e0\n".encode())
    assert read_unlabelled(marked, COLUMNS, TEXT, "cp1252")["text"] == ["d\u00e9j\u00e0"], "its mark says it better"
    with pytest.raises(DataError, match="is not PUNYCODE"):
        read_unlabelled(written(tmp_path, "c.csv", b"text,-\n"), COLUMNS, TEXT, "punycode")


# --- bad rows ---------------------------------------------------------------------------------------------------------

MANY = "text,label\n" + "a,sport\n,sport\nb,\nc,spurt\nd\n" * 4 + "e,science\n"


def test_the_first_ten_faults_are_named_together_and_all_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_labelled(written(tmp_path, "a.csv", MANY), COLUMNS, TEXT, LABELS)
    message = raised.value.message
    assert f"{tmp_path}/a.csv: 16 of 21 rows cannot be used" in message
    lines = [int(line) for line in re.findall(r"a\.csv:(\d+): (?:the|label)", message)]
    assert lines == [3, 4, 5, 6, 8, 9, 10, 11, 13, 14]
    assert message.endswith("; and 6 faults more")
    assert "\n" not in str(raised.value)


def test_all_faults_of_a_row_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows .* a\.csv:2: the text is empty; a\.csv:2: label 'x' is not"):
        read_labelled(written(tmp_path, "a.csv", "text,label\n\u200b,x\na,sport\n"), COLUMNS, TEXT, LABELS)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    examination = examination_of(written(tmp_path, "a.csv", MANY))
    assert len(examination.faults) == 12
    examination.resolve(TEXT.reader(LABELS))
    samples = examination.samples("skip")
    assert samples["text"] == ["a", "a", "a", "a", "e"]
    assert samples.targets == [0, 0, 0, 0, 1]
    assert samples.lines == [2, 7, 12, 17, 22]
    assert samples.skipped == 16
    assert "16 of 21 rows" in samples.warnings[0]


def test_a_file_of_bad_rows_only_is_refused_in_any_case(tmp_path: Path) -> None:
    examination = examination_of(written(tmp_path, "a.csv", "text,label\n,sport\na,\n"))
    with pytest.raises(DataError, match="2 of 2 rows") as raised:
        examination.samples("skip", "; the way out")
    assert "way out" not in raised.value.remedy


@pytest.mark.parametrize(
    ("content", "message"), [("text\na\n", "no column 'label'"), ('text,label\n"a,sport\n', "malformed row")]
)
def test_a_fault_of_the_whole_file_is_refused_in_any_case(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        examination_of(written(tmp_path, "a.csv", content))


def test_a_row_whose_quotes_are_wrong_is_one_row_unless_it_may_have_swallowed_others(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'text,label\na,sport\n"b" c,sport\nd,science\n"e"f,\n')
    samples = examination_of(path).samples("skip")
    assert (samples["text"], samples.lines, samples.skipped) == (["a", "d"], [2, 4], 2)
    for rows in ('"b,sport\nd,science\n', '"b,sport\nd,science\ne"f,sport\n', '"b,sport'):
        with pytest.raises(DataError, match=r"a\.csv:3: malformed row"):
            examination_of(written(tmp_path, "a.csv", f"text,label\na,sport\n{rows}"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_the_columns_say_what_the_samples_are(name: str, tmp_path: Path) -> None:
    def found(*columns: str) -> Form | None:
        Image.new("L", (4, 4)).save(tmp_path / "x.png")
        row = dict.fromkeys(columns, "x.png")
        lines = [str(row).replace("'", '"')] if name.endswith("jsonl") else [",".join(columns), ",".join(row.values())]
        path = written(tmp_path, name, "\n".join(lines))
        examination = examination_of(path)
        if (fault := examination.fault()) is not None:
            raise fault
        return examination.form

    assert found("text", "label") == ("text", "label")
    assert found("label", "image", "more") == ("image", "label")
    assert found("image", "text", "label") is None
    with pytest.raises(DataError, match="no column 'text' nor 'image' among body, label") as raised:
        found("body", "label")
    assert "columns.text or columns.image" in raised.value.remedy
    with pytest.raises(DataError, match="no column 'text' nor 'image' among Text, label") as raised:
        found("Text", "label")
    assert raised.value.remedy == "did you mean 'Text'? (set columns.text)"


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("h\u00e4", "ha\u0308"),
        ("a b", "a\u00a0b"),
        ("a b", " a  b\t"),
        ("a b", "a\u202fb\u3000"),
        ("ab", "a\u200bb"),
        ("ab", "\ufeffa\u00adb\u200e"),
        ("a-b", "a\u2011b"),
        ("\u2764", "\u2764\ufe0f"),
        ("K", "\u212a"),
        ("a", "a\0"),
        ("1", "1.0"),
        ("1", "1,00"),
        ("-1", "-1.0"),
    ],
)
def test_labels_that_look_the_same_are_the_same(one: str, other: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", f"text;label\na;{other}\nb;{one}\n")
    examination = Examination(path, COLUMNS, TEXT.forms)
    examination.resolve(TEXT.reader(["0", one]))
    found = examination.samples("skip" if "\0" in other else "refuse")
    assert found.targets is not None
    assert set(found.targets) == {1}


@pytest.mark.parametrize(("one", "other"), [("a", "A"), ("a b", "ab"), ("\u0430", "a"), ("1", "1.5"), ("1", "01")])
def test_labels_that_look_different_are_not_the_same(one: str, other: str, tmp_path: Path) -> None:
    assert alike(one) != alike(other)
    with pytest.raises(DataError, match="is not in the server's label list"):
        read_labelled(written(tmp_path, "a.csv", f"text;label\na;{other}\n"), COLUMNS, TEXT, [one])


def test_a_decimal_is_its_own_label_where_the_list_has_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\na,1.0\nb,1\n")
    assert read_labelled(path, COLUMNS, TEXT, ["1", "1.0"]).targets == [1, 0]


# --- image paths ------------------------------------------------------------------------------------------------------


def test_images_are_found_beside_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("dark.png", "sub/h\u00e4ll.png"):
        Image.new("L", (4, 3)).save(tmp_path / name)
    path = written(tmp_path, "a.csv", "image,label\ndark.png ,sport\nsub/ha\u0308ll.png,science\n")
    samples = read_labelled(path, COLUMNS, IMAGE, LABELS)
    assert [image.path for image in samples["image"]] == [
        str(tmp_path / "dark.png"),
        str(tmp_path / "sub/h\u00e4ll.png"),
    ]


@pytest.mark.parametrize("name", ["gone.png", "sub", "x" * 5000, "a\0.png", "\\ud800.png"])
def test_a_missing_image_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("L", (4, 3)).save(tmp_path / "dark.png")
    path = written(tmp_path, "a.jsonl", f'{{"image": "dark.png"}}\n{{"image": "{name}"}}\n'.replace("\0", "\\u0000"))
    with pytest.raises(DataError, match=r"a\.jsonl:2: no image "):
        read_unlabelled(path, COLUMNS, IMAGE)


def test_windows_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="with / between directories"):
        read_unlabelled(written(tmp_path, "a.csv", "image\nsub\\a.png\n"), COLUMNS, IMAGE)


@pytest.mark.parametrize("damage", ["cut", "text", "pixels cut"])
def test_all_unreadable_images_are_named_with_their_lines(tmp_path: Path, damage: str) -> None:
    noise = Image.effect_noise((64, 64), 50)
    for name in ("a", "b", "c"):
        noise.save(tmp_path / f"{name}.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    for name in ("a", "c"):
        content = {"cut": whole[:100], "text": b"no image at all", "pixels cut": whole[:900]}[damage]
        written(tmp_path, f"{name}.jpg", content)
    path = written(tmp_path, "a.csv", "image\na.jpg\nb.jpg\nc.jpg\n\u200b\n")
    with pytest.raises(
        DataError, match=r"3 of 4 rows .*a\.csv:2: image .*a\.jpg cannot be read.*a\.csv:4.*a\.csv:5"
    ) as raised:
        read_unlabelled(path, COLUMNS, IMAGE)
    assert "\n" not in str(raised.value)
    examination = Examination(path, COLUMNS, IMAGE.public_forms)
    assert [image.path for image in examination.samples("skip")["image"]] == [str(tmp_path / "b.jpg")]


def test_dim_16_bit_images_are_a_warning_of_the_file(tmp_path: Path) -> None:
    for name, value in (("dim", 4095), ("bright", 65535)):
        Image.fromarray(np.full((2, 2), value, np.uint16)).save(tmp_path / f"{name}.png")
    Image.new("L", (4, 3)).save(tmp_path / "plain.png")
    path = written(tmp_path, "a.csv", "image\ndim.png\nbright.png\nplain.png\n")
    (warning,) = read_unlabelled(path, COLUMNS, IMAGE).warnings
    assert warning.startswith(f"{path}: 1 of 2 images of 16 bits use less than a quarter of their range")
    assert read_unlabelled(written(tmp_path, "b.csv", "image\nbright.png\nplain.png\n"), COLUMNS, IMAGE).warnings == ()


# --- a column by which a file is dealt out ----------------------------------------------------------------------------

GROUPED = {
    "a.csv": "text;Ward ;label\nfirst;north;sport\nsecond; St.  Ann\u200b;science\nthird;7;sport\n",
    "a.jsonl": '{"Ward": "north", "text": "first", "label": "sport"}\n{"text": "second", "label": "science", '
    '"Ward": "St. Ann"}\n{"text": "third", "label": "sport", "Ward": 7.0}\n',
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_column_of_groups_is_read_beside_the_samples(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, GROUPED[name])
    samples = read_samples(path, COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="Ward")
    assert samples.groups == ["north", "St. Ann", "7"]
    assert samples.values.keys() == {"text", "label"}
    assert list(samples.texts()) == ["first", "second", "third"]
    assert TEXT.read_labelled(path, COLUMNS, LABELS).groups is None


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_groups(name: TaskName, tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"text": "a", "image": "a.png", "words": ["a"], "tags": ["1"], "label": 1, "labels": ["1"], "messages": talk}
    path = written(tmp_path, "a.jsonl", f"{json.dumps(row | {'ward': 'north'})}\n")
    assert read_samples(path, COLUMNS, TASKS[name].forms, TASKS[name].reader(("0", "1")), group="ward").groups == [
        "north"
    ]


@pytest.mark.parametrize(
    ("value", "group"),
    [("2", "2"), ("2.0", "2"), ("2.5", "2.5"), ("true", "true"), ('"2.0"', "2.0"), ("1e400", "Infinity")],
)
def test_a_number_is_taken_as_its_text(value: str, group: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", f'{{"text": "first", "label": "sport", "ward": {value}}}\n')
    assert read_samples(path, COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="ward").groups == [group]


def test_a_column_of_the_sample_may_be_that_of_the_groups(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nfirst,sport\nsecond,science\n")
    samples = read_samples(path, COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="label")
    assert (samples.groups, samples.targets) == (["sport", "science"], [0, 1])


@pytest.mark.parametrize(
    ("name", "content", "message", "remedy"),
    [
        (
            "a.csv",
            "text,label,wrad\nfirst,sport,1\n",
            "a.csv:1: no column 'ward' among text, label, wrad",
            "did you mean 'wrad'? (set simulation.partition.column)",
        ),
        (
            "a.csv",
            "text,label,b\nfirst,sport,1\n",
            "a.csv:1: no column 'ward' among text, label, b",
            "set simulation.partition.column to the one that holds the group",
        ),
        (
            "a.jsonl",
            '{"text": "first", "label": "sport", "ward": "x"}\n{"text": "first", "label": "sport"}\n',
            "a.jsonl:2: no column 'ward' among text, label",
            "set simulation.partition.column",
        ),
        ("a.csv", "text,label,ward\na,sport,1\nb,sport, \n", "a.csv:3: the cell of 'ward' is empty", "fill it in"),
        ("a.csv", "text,label,ward,ward\na,sport,1,2\n", "a.csv:1: column 'ward' is there twice", "rename one"),
        (
            "a.jsonl",
            '{"text": "a", "label": "sport", "ward": null}\n{"text": "b", "label": "sport", "ward": NaN}\n',
            "2 of 2 rows cannot be used: a.jsonl:1: the cell of 'ward' is empty; a.jsonl:2: the cell of 'ward'",
            "fill it in",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": "sport", "ward": ["x"]}\n',
            "a.jsonl:1: 'ward' is a list, not a string",
            "between quotes",
        ),
    ],
)
def test_groups_that_cannot_be_used_are_one_clear_error(
    name: str, content: str, message: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        read_samples(written(tmp_path, name, content), COLUMNS, TEXT.forms, TEXT.reader(LABELS), group="ward")
    assert message in raised.value.message
    assert remedy in raised.value.remedy


def test_groups_of_rows_that_are_skipped_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label,ward\nfirst,sport,1\n,sport,2\nthird,science,3\n")
    examination = Examination(path, COLUMNS, TEXT.forms, group="ward")
    samples = examination.samples("skip")
    assert (samples.groups, samples.lines, samples.skipped) == (["1", "3"], [2, 4], 1)


def test_a_subset_holds_all_of_its_samples_and_nothing_of_the_others(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label,ward\nfirst,sport,1\n,sport,2\nthird,science,3\nfourth,sport,4\n")
    examination = Examination(path, COLUMNS, TEXT.forms, group="ward")
    examination.resolve(TEXT.reader(LABELS))
    whole = examination.samples("skip")
    assert whole.skipped == len(whole.warnings) == 1
    values = {"text": ["fourth", "first"], "label": ["sport", "sport"]}
    assert whole.subset(torch.tensor([2, 0])) == Samples(path, values, [5, 2], [0, 0], 0, (), LABELS, ["4", "1"])
    bare = Samples(path, {"text": ["first", "second"]}, [1, 2], None)
    assert bare.subset(torch.tensor([1])) == Samples(path, {"text": ["second"]}, [2], None)
