"""Reading, encoding, batching and partitioning of silo data."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedpft.config import ColumnsSection, Task
from fedpft.datasets import (
    EncodedDataset,
    batches,
    dirichlet_partition,
    encode,
    evaluation_batches,
    read_label_list,
    read_labelled,
    read_unlabelled,
    round_window,
    training_order,
)
from fedpft.errors import DataError, ModelError

COLUMNS = ColumnsSection()
TEXT: Task = "sequence-classification"
IMAGE: Task = "image-classification"
LABELS = ("sport", "science")


class WordTokenizer:
    """Stands in for a tokenizer: one token a word, its length, between 101 and 102."""

    pad_token_id: int | None = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [[101, *map(len, text.split()[: max_length - 2]), 102] for text in texts]}


class PixelScaler:
    """Stands in for an image processor: RGB, scaled to 0 ... 1."""

    def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        assert images.mode == "RGB"
        pixels = torch.tensor(list(images.tobytes())).reshape(images.height, images.width, 3).permute(2, 0, 1)
        return {"pixel_values": (pixels / 255)[None]}


def written(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts_of(lengths: list[int]) -> EncodedDataset:
    """A dataset whose sample i has label i and `lengths[i]` words."""
    return encode([" ".join(["w"] * n) for n in lengths], torch.arange(len(lengths)), WordTokenizer(), TEXT, 10_000)


# --- reading ----------------------------------------------------------------------------------------------------------


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
    assert samples.inputs == ["first", 'second, with\na line end and "quotes"']
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1]
    assert samples.labels.dtype == torch.int64
    assert len(samples) == 2


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b"\xef\xbb\xbftext,label\r\nfirst,sport\r\nsecond,science\r\n")
    samples = read_labelled(path, COLUMNS, TEXT, LABELS)
    assert samples.inputs == ["first", "second"]
    assert samples.lines == [2, 3]


def test_labels_may_be_resolved_later(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nfirst,sport\nsecond,science\n")
    samples = read_labelled(path, COLUMNS, TEXT, None)
    assert samples.labels is None
    resolved = samples.resolve(("science", "sport")).labels
    assert resolved is not None
    assert resolved.tolist() == [1, 0]


def test_a_label_may_be_a_number_in_json(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "first", "label": 7}\n')
    assert read_labelled(path, COLUMNS, TEXT, ["7"]).label_names == ["7"]


def test_columns_are_found_by_their_configured_names(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "id,topic,body\n1,sport,first\n")
    assert read_labelled(path, ColumnsSection(text="body", label="topic"), TEXT, LABELS).inputs == ["first"]


def test_unlabelled_data_needs_no_label_column(tmp_path: Path) -> None:
    assert read_unlabelled(written(tmp_path, "a.csv", "text\nfirst\nsecond\n"), COLUMNS, TEXT) == ["first", "second"]


def test_a_field_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n")
    assert len(read_unlabelled(path, COLUMNS, TEXT)[0]) == 200_000


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
    with pytest.raises(DataError, match="cannot be read"):
        read_unlabelled(tmp_path / "a.csv", COLUMNS, TEXT)


def test_the_label_list_keeps_its_order(tmp_path: Path) -> None:
    assert read_label_list(written(tmp_path, "labels.txt", "b\na\r\nc d\n\n")) == ("b", "a", "c d")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "the file is empty"), ("a\n\nb\n", ":2: empty line"), ("a\nb\na\n", ":3: label 'a' is in line 1 too")],
)
def test_a_bad_label_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_label_list(written(tmp_path, "labels.txt", content))


# --- images -----------------------------------------------------------------------------------------------------------


def image_file(directory: Path, name: str, value: int) -> Path:
    path = directory / name
    Image.new("L", (4, 3), value).save(path)
    return path


def test_images_are_found_beside_the_data_file_and_encoded(tmp_path: Path) -> None:
    image_file(tmp_path, "dark.png", 0)
    image_file(tmp_path, "light.png", 255)
    path = written(tmp_path, "a.csv", "image,label\ndark.png,sport\nlight.png,science\n")
    samples = read_labelled(path, COLUMNS, IMAGE, LABELS)
    dataset = encode(samples.inputs, samples.labels, PixelScaler(), IMAGE, 64)
    batch = dataset.batch(torch.tensor([1, 0]))
    assert batch["pixel_values"].shape == (2, 3, 3, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == [1.0, 0.0]
    assert batch["labels"].tolist() == [1, 0]


def test_a_missing_image_is_named_with_its_line(tmp_path: Path) -> None:
    image_file(tmp_path, "dark.png", 0)
    path = written(tmp_path, "a.csv", "image,label\ndark.png,sport\ngone.png,sport\n")
    with pytest.raises(DataError, match=r"a\.csv:3: no image .*gone\.png"):
        read_labelled(path, COLUMNS, IMAGE, LABELS)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_an_unreadable_image_is_named_with_its_line(tmp_path: Path, damage: str) -> None:
    whole = image_file(tmp_path, "a.png", 9).read_bytes()
    written(tmp_path, "a.png", whole[: len(whole) // 2] if damage == "cut" else b"no image at all")
    path = written(tmp_path, "a.csv", "image\na.png\n")
    with pytest.raises(DataError, match=r"a\.csv:2: image .*a\.png cannot be read") as raised:
        read_unlabelled(path, COLUMNS, IMAGE)
    assert "\n" not in str(raised.value)


def test_an_image_that_only_fails_to_decode_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"image .*a\.jpg cannot be read"):
        encode([str(path)], None, PixelScaler(), IMAGE, 64)


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_own_longest_text() -> None:
    dataset = encode(["a", "bb ccc dd", "ee f"], torch.tensor([2, 0, 1]), WordTokenizer(), TEXT, 4)
    batch = dataset.batch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[101, 2, 1, 102], [101, 1, 102, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert dataset.batch(torch.tensor([1]))["input_ids"].tolist() == [[101, 2, 3, 102]]
    assert dataset.lengths.tolist() == [3, 4, 4]


def test_unlabelled_batches_have_no_labels() -> None:
    assert encode(["a"], None, WordTokenizer(), TEXT, 4).batch(torch.tensor([0])).keys() == {
        "input_ids",
        "attention_mask",
    }


def test_more_texts_than_are_tokenized_at_once_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpft.datasets.TOKENIZED_AT_ONCE", 3)
    assert texts_of([3, 1, 2, 5, 4, 1, 7]).lengths.tolist() == [5, 3, 4, 7, 6, 3, 9]


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = WordTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(ModelError, match="no padding token"):
        encode(["a"], None, tokenizer, TEXT, 4)


def test_a_text_without_tokens_is_refused() -> None:
    class Empty(WordTokenizer):
        def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
            return {"input_ids": [[1], []]}

    with pytest.raises(DataError, match="sample 2: the tokenizer finds no token in '~'"):
        encode(["a", "~"], None, Empty(), TEXT, 4)


# --- batching ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 40),
    start=st.integers(0, 130),
    count=st.integers(1, 90),
    batch=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_each_position_of_a_window_is_in_exactly_one_batch(
    samples: int, start: int, count: int, batch: int, seed: int
) -> None:
    dataset = texts_of([1 + (7 * i) % 11 for i in range(samples)])
    made = [b["labels"].tolist() for b in batches(dataset, batch=batch, start=start, count=count, seed=seed)]
    assert sorted(itertools.chain(*made)) == sorted(training_order(samples, start, count, seed).tolist())
    assert len(made) == -(-count // batch)


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 30), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_the_order_goes_on_from_window_to_window(samples: int, cuts: list[int], seed: int) -> None:
    whole = training_order(samples, 0, sum(cuts), seed)
    start = 0
    for count in cuts:
        assert torch.equal(training_order(samples, start, count, seed), whole[start : start + count])
        start += count
    for epoch in whole.split(samples)[: sum(cuts) // samples]:  # type: ignore[no-untyped-call]
        assert sorted(epoch.tolist()) == list(range(samples))


def test_batches_depend_on_the_seed_and_nothing_else() -> None:
    dataset = texts_of([1 + i % 13 for i in range(100)])

    def drawn(seed: int) -> list[list[int]]:
        torch.rand(3)
        random.random()
        return [b["labels"].tolist() for b in batches(dataset, batch=8, start=50, count=100, seed=seed)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_batches_hold_little_padding_and_come_in_no_order_of_length() -> None:
    dataset = texts_of([1 + (37 * i) % 101 for i in range(640)])
    made = [b["attention_mask"] for b in batches(dataset, batch=16, start=0, count=640, seed=0)]
    real = sum(int(mask.sum()) for mask in made)
    assert real / sum(mask.numel() for mask in made) > 0.9
    widths = [mask.shape[1] for mask in made]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("samples", "local_epochs", "count"), [(10, 1.0, 10), (10, 0.25, 3), (10, 2.0, 20), (3, 0.01, 1)]
)
def test_every_round_takes_the_same_share(samples: int, local_epochs: float, count: int) -> None:
    windows = [round_window(samples, local_epochs, number) for number in range(4)]
    assert windows == [(number * count, count) for number in range(4)]


def test_evaluation_sees_each_sample_once_and_shortest_first() -> None:
    dataset = texts_of([5, 1, 3, 2, 4])
    made = list(evaluation_batches(dataset, 2))
    assert torch.cat([indices for indices, _ in made]).tolist() == [1, 3, 2, 4, 0]
    assert all(torch.equal(batch["labels"], indices) for indices, batch in made)
    assert sorted(torch.cat([indices for indices, _ in evaluation_batches(dataset, 2, samples=3)]).tolist()) == [
        0,
        1,
        2,
    ]


# --- partitioning -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 5), min_size=12, max_size=80),
    silos=st.integers(1, 4),
    concentration=st.sampled_from([0.3, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_a_partition_gives_each_sample_to_one_silo(
    labels: list[int], silos: int, concentration: float, seed: int
) -> None:
    parts = dirichlet_partition(labels, silos, concentration, seed)
    assert len(parts) == silos
    assert all(len(part) for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))


def test_a_partition_is_the_same_for_the_same_seed() -> None:
    labels = torch.arange(200) % 5
    first, again, other = (dirichlet_partition(labels, 3, 1.0, seed) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_small_concentration_is_more_uneven_than_a_large_one() -> None:
    labels = torch.arange(2000) % 10

    def unevenness(concentration: float) -> float:
        counts = torch.stack(
            [labels[part].bincount(minlength=10) for part in dirichlet_partition(labels, 4, concentration, 0)]
        )
        return counts.double().std(dim=0).mean().item()

    assert unevenness(0.1) > 2 * unevenness(100.0)


def test_an_empty_silo_is_drawn_again() -> None:
    for seed in range(20):
        assert all(len(part) for part in dirichlet_partition([0, 0, 0, 1, 1], 3, 0.2, seed))


@pytest.mark.parametrize(("silos", "concentration"), [(4, 1.0), (0, 1.0), (2, 0.0)])
def test_an_impossible_partition_is_refused(silos: int, concentration: float) -> None:
    with pytest.raises(DataError, match="cannot be dealt out"):
        dirichlet_partition([0, 1, 2], silos, concentration, 0)


def test_a_partition_that_no_draw_gives_is_refused() -> None:
    with pytest.raises(DataError, match="no draw of 1000"):
        dirichlet_partition([0] * 10, 10, 1e-6, 0)
