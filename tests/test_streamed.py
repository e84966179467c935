"""Files that are too large to be held: what comes of them is what would come of them if they were."""

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedpft.config import ColumnsSection
from fedpft.data import rows as data_rows
from fedpft.data.batches import batches
from fedpft.data.samples import Column, Examination, Samples, read_samples
from fedpft.data.text import characters_per_token
from fedpft.errors import DataError
from fedpft.silo.ondisk import DataOnDisk
from fedpft.tasks import FORMS, TASKS

COLUMNS, LABELS, ROWS = ColumnsSection(), ("sea", "sky"), 29
TEXT, TAGS = TASKS["sequence-classification"], TASKS["token-classification"]
Write = Callable[[Path, list[dict[str, Any]]], Path]


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    words = tiny.WORDS[4:]
    return [
        {
            "text": " ".join(words[(row * 5 + place) % len(words)] for place in range(1 + row % 7)),
            "label": LABELS[row % 3 == 0],
        }
        for row in range(count)
    ]


def json_lines(path: Path, made: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    ends = ("\n", "\r\n", "\r", "\n\n")
    text = "".join(json.dumps(row) + ends[number % 4] for number, row in enumerate(made))
    (path / "a.jsonl").write_bytes((text + "\x1a").encode(encoding))
    return path / "a.jsonl"


def json_lines_in_utf_16(path: Path, made: list[dict[str, Any]]) -> Path:
    return json_lines(path, made, "utf-16")


def json_lines_in_an_old_encoding(path: Path, made: list[dict[str, Any]]) -> Path:
    return json_lines(path, made, "cp1252")


def parquet(path: Path, made: list[dict[str, Any]], name: str = "a.parquet") -> Path:
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table.write_table(arrow.Table.from_pylist(made), path / name, row_group_size=5)
    return path / name


def parquet_parts(path: Path, made: list[dict[str, Any]]) -> Path:
    (path / "parts").mkdir()
    for number, start in enumerate((0, 9, 11)):
        parquet(path / "parts", made[start : (9, 11, len(made))[number]], f"{number}.parquet")
    return path / "parts"


def saved_dataset(path: Path, made: list[dict[str, Any]]) -> Path:
    """As `Dataset.save_to_disk` leaves it."""
    arrow, directory = pytest.importorskip("pyarrow"), path / "saved"
    directory.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (made[:20], made[20:]), strict=True):
        table = arrow.Table.from_pylist(part)
        with arrow.ipc.new_stream(directory / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=6)
    (directory / "dataset_info.json").write_text("{}")
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return directory


STREAMED = (json_lines, json_lines_in_utf_16, parquet, parquet_parts, saved_dataset)


@pytest.fixture(params=STREAMED, ids=lambda write: write.__name__)
def write(request: pytest.FixtureRequest) -> Write:
    made: Write = request.param
    return made


def held_and_streamed(monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any]) -> tuple[Any, Any]:
    held = read()
    monkeypatch.setattr(data_rows, "HELD_BYTES", 0)
    return held, read()


def read(path: Path, task: Any = TEXT, **more: Any) -> Samples:
    return read_samples(path, COLUMNS, task.forms, task.reader(LABELS), **more)


def plain(samples: Samples) -> Any:
    values = {role: list(column) for role, column in samples.values.items()}
    return values, list(samples.lines), samples.targets, list(samples.texts()), samples.skipped, samples.groups


def test_samples_are_those_of_a_file_that_is_held(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, rows())
    held, streamed = held_and_streamed(monkeypatch, lambda: read(path, group="text"))
    assert isinstance(held["text"], list)
    assert isinstance(streamed["text"], Column)
    assert plain(streamed) == plain(held)
    assert streamed["text"][5:9] == held["text"][5:9]
    chosen = torch.tensor([7, 3, 28, 3])
    assert plain(streamed.subset(chosen)) == plain(held.subset(chosen))
    assert plain(streamed.subset(chosen).subset(torch.tensor([2, 0]))) == plain(held.subset(torch.tensor([28, 7])))
    streamed["text"][4]
    assert plain(pickle.loads(pickle.dumps(streamed))) == plain(held)
    tokenizer = tiny.processor("bert")
    assert len({characters_per_token(samples.texts(), tokenizer, seed=0) for samples in (held, streamed)}) == 1


def test_batches_are_those_of_a_file_that_is_held(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = write(tmp_path, rows()), []
    for samples in held_and_streamed(monkeypatch, lambda: read(path)):
        for cache in (None, tmp_path / "cache"):
            dataset = TEXT.encode(samples, tiny.processor("bert"), 6, cache=cache)
            found.append(list(batches(dataset, batch=4, start=11, count=2 * ROWS, seed=2)))
        (tmp_path / "cache").unlink()
    assert all(
        tiny.same_bits(a[name], b[name]) for other in found for a, b in zip(found[0], other, strict=True) for name in a
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"text": "", "label": "sea"},
        {"text": "sun", "label": "river"},
        {"text": "sun\0", "label": " "},
        {"text": "sun", "label": ""},
    ],
)
def test_faults_are_those_of_a_file_that_is_held(
    fault: dict[str, str], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows()
    made[4] = made[22] = fault
    path = write(tmp_path, made)

    def found(bad_rows: Any) -> Any:
        examination = Examination(path, COLUMNS, FORMS, first_counts=False)
        examination = Examination(path, COLUMNS, TEXT.forms) if examination.form is None else examination
        examination.resolve(TEXT.reader(LABELS))
        error = examination.fault()
        assert error is not None
        return error.message, error.remedy, examination.rows, plain(examination.samples(bad_rows))

    held, streamed = held_and_streamed(monkeypatch, lambda: found("skip"))
    assert streamed == held
    assert "2 of 29 rows" in held[0]


def test_faults_of_rows_that_cannot_be_read_are_those_of_a_file_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "sun", "label": "sea"}\nnothing\n[1]\n{"label": "sky"}\n{"text": "sky", "label": "sky"}\n'
    )
    held, streamed = held_and_streamed(monkeypatch, lambda: read(path, bad_rows="skip"))
    assert plain(held) == plain(streamed)
    assert held.skipped == 3
    assert held.warnings == streamed.warnings


@pytest.mark.parametrize(
    "content",
    [b"", b" \n \n", b"\n", b"nothing\n", b'{"text": "a"}\n', b'{"text": "\xff"}', b"PK\3\4"],
)
def test_what_is_wrong_with_the_file_as_a_whole_is_said_in_the_same_words(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)

    def said() -> tuple[str, str]:
        with pytest.raises(DataError) as raised:
            read(path)
        return raised.value.message, raised.value.remedy

    held, streamed = held_and_streamed(monkeypatch, said)
    assert held == streamed


def test_a_byte_far_into_the_file_that_is_not_of_its_encoding_has_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_rows, "HELD_BYTES", 0)
    path = json_lines(tmp_path, rows(900))
    path.write_bytes(path.read_bytes()[:-1] + b'{"text": "\xe9", "label": "sea"}')
    line = path.read_bytes().decode("latin-1").replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    with pytest.raises(DataError, match=rf"a\.jsonl:{line}: byte 0xe9 is not UTF-8"):
        read(path)


def test_an_old_encoding_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = json_lines_in_an_old_encoding(tmp_path, rows())
    held, streamed = held_and_streamed(monkeypatch, lambda: read(path, encoding="cp1252"))
    assert plain(held) == plain(streamed)


@pytest.mark.parametrize("change", ["shorter", "faulty", "gone"])
def test_a_file_that_changes_between_two_readings_is_named(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_rows, "HELD_BYTES", 0)
    path = json_lines(tmp_path, rows())
    samples = read(path)
    match change:
        case "shorter":
            json_lines(tmp_path, rows(7))
        case "faulty":
            json_lines(tmp_path, [*rows()[:9], {"text": "", "label": "sea"}, *rows()[10:]])
        case "gone":
            path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: (changed while it was read|no such file)"):
        TEXT.encode(samples, tiny.processor("bert"), 6)


def test_faults_in_parts_name_the_part(tmp_path: Path) -> None:
    made = rows()
    made[10]["text"] = ""
    path = parquet_parts(tmp_path, made)
    with pytest.raises(DataError, match=r"1\.parquet:2: the text is empty"):
        read(path)
    parquet(path, [{"text": "sun"}], "3.parquet")
    with pytest.raises(DataError, match=r"3\.parquet: no column 'label' among text"):
        read(path)
    (path / "3.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"3\.parquet: cannot be read as Parquet"):
        read(path)


def test_what_datasets_saved_is_read_as_it_says_itself(tmp_path: Path) -> None:
    directory = saved_dataset(tmp_path, rows())
    (directory / "data-00001-of-00002.arrow").write_bytes(b"anything")
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: cannot be read as Arrow"):
        read(directory)
    (directory / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: does not name the data set's files"):
        read(directory)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
    with pytest.raises(DataError, match="holds several data sets") as raised:
        read(tmp_path)
    assert "name one" in raised.value.remedy


def test_a_directory_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match="holds neither Parquet files nor images"):
        read(tmp_path)


def test_a_part_that_is_added_is_a_change_of_the_data(tmp_path: Path) -> None:
    path = parquet_parts(tmp_path, rows())
    data = DataOnDisk(path)
    data.check_read()
    os.link(path / "0.parquet", path / "4.parquet")
    assert data.changed() is not None


def test_memory_does_not_grow_with_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_rows, "HELD_BYTES", 0)
    peaks = []
    for factor in (1, 8):
        made = [{"text": "sun " * 500 * factor, "label": "sea"} for _ in range(200)]
        path = json_lines(tmp_path, made)
        tracemalloc.start()
        samples = read(path)
        assert sum(map(len, samples.texts())) == 200 * 2000 * factor
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200 * 2000  # the texts alone have grown by 2.8 MB
