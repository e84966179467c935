"""Encoding, batching and drawing of silo data. Reading: test_samples.py, test_images.py."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedpft.data.batches import (
    EncodedDataset,
    batches,
    evaluation_batches,
    round_window,
    sample,
    training_order,
)
from fedpft.data.images import ImageFile
from fedpft.data.samples import Samples
from fedpft.data.text import characters_per_token
from fedpft.errors import DataError, ModelError
from fedpft.tasks import TASKS

TEXT, IMAGE = TASKS["sequence-classification"], TASKS["image-classification"]


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


def samples_of(inputs: Sequence[Any], targets: list[int] | None = None, *, role: str = "text") -> Samples:
    return Samples(Path("a.csv"), {role: list(inputs)}, list(range(2, 2 + len(inputs))), targets)


def texts_of(lengths: list[int]) -> EncodedDataset:
    """A dataset whose sample i has label i and `lengths[i]` words."""
    samples = samples_of([" ".join(["w"] * n) for n in lengths], list(range(len(lengths))))
    return TEXT.encode(samples, WordTokenizer(), 10_000)


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_images_are_encoded_in_order(tmp_path: Path) -> None:
    for name, value in (("dark.png", 0), ("light.png", 255)):
        Image.new("L", (4, 3), value).save(tmp_path / name)
    images = [ImageFile(str(tmp_path / name)).look()[0] for name in ("dark.png", "light.png")]
    samples = samples_of(images, [0, 1], role="image")
    dataset = IMAGE.encode(dataclasses.replace(samples, skipped=2), PixelScaler(), 64)
    batch = dataset.batch(torch.tensor([1, 0]))
    assert batch["pixel_values"].shape == (2, 3, 3, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == [1.0, 0.0]
    assert batch["labels"].tolist() == [1, 0]
    assert dataset.skipped == 2


def test_a_batch_is_padded_to_its_own_longest_text() -> None:
    dataset = TEXT.encode(samples_of(["a", "bb ccc dd", "ee f"], [2, 0, 1]), WordTokenizer(), 4)
    batch = dataset.batch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[101, 2, 1, 102], [101, 1, 102, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert dataset.batch(torch.tensor([1]))["input_ids"].tolist() == [[101, 2, 3, 102]]
    assert dataset.lengths.tolist() == [3, 4, 4]


def test_unlabelled_batches_have_no_labels() -> None:
    assert TEXT.encode(samples_of(["a"]), WordTokenizer(), 4).batch(torch.tensor([0])).keys() == {
        "input_ids",
        "attention_mask",
    }


def test_more_texts_than_are_tokenized_at_once_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpft.data.text.AT_ONCE", 3)
    assert texts_of([3, 1, 2, 5, 4, 1, 7]).lengths.tolist() == [5, 3, 4, 7, 6, 3, 9]


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = WordTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(ModelError, match="no padding token"):
        TEXT.encode(samples_of(["a"]), tokenizer, 4)


class TildeIsNothing(WordTokenizer):
    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        found = super().__call__(texts, truncation, max_length)["input_ids"]
        return {"input_ids": [[] if text == "~" else ids for text, ids in zip(texts, found, strict=True)]}


def test_every_text_without_tokens_is_named() -> None:
    with pytest.raises(
        DataError, match=r"a\.csv: 2 of 3 rows .* a\.csv:3: the tokenizer finds no token in '~'; a\.csv:4"
    ):
        TEXT.encode(samples_of(["a", "~", "~"]), TildeIsNothing(), 4)


def test_texts_without_tokens_are_left_out_where_bad_rows_are() -> None:
    samples = dataclasses.replace(samples_of(["~", "a", "bb"], [0, 1, 2]), skipped=4)
    dataset = TEXT.encode(samples, TildeIsNothing(), 4, bad_rows="skip")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 2]
    assert dataset.batch(torch.tensor([1]))["input_ids"].tolist() == [[101, 2, 102]]
    assert dataset.skipped == 5
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        TEXT.encode(samples_of(["~", "~"]), TildeIsNothing(), 4, bad_rows="skip")


@pytest.mark.parametrize("at_once", [2, 100])
def test_texts_that_were_cut_are_counted(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpft.data.text.AT_ONCE", at_once)
    texts = ["a b", "a b c", "a", "a b c d e", "a b"]  # and two special tokens each
    assert [TEXT.encode(samples_of(texts), WordTokenizer(), longest).cut for longest in (4, 5, 7)] == [2, 1, 0]


def test_characters_per_token_are_those_of_a_sample_anywhere_in_the_file() -> None:
    assert characters_per_token(["aaaa bbbb"] * 3, WordTokenizer(), seed=0) == 9 / 4
    mixed = ["a"] * 1000 + ["a" * 300] * 1000
    assert 30 < characters_per_token(mixed, WordTokenizer(), seed=0) < 70  # of three tokens each


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
    some = torch.cat([indices for indices, _ in evaluation_batches(dataset, 2, torch.tensor([0, 2, 3]))])
    assert some.tolist() == [3, 2, 0]


def test_a_sample_is_the_same_for_one_seed_and_purpose_and_takes_from_everywhere() -> None:
    drawn = sample(1000, 100, 0, "test")
    assert torch.equal(drawn, sample(1000, 100, 0, "test"))
    assert not torch.equal(drawn, sample(1000, 100, 1, "test"))
    assert not torch.equal(drawn, sample(1000, 100, 0, "gap"))
    assert len(set(drawn.tolist())) == 100
    assert drawn.tolist() == sorted(drawn.tolist())
    assert all(len(drawn[(drawn >= part) & (drawn < part + 250)]) > 10 for part in (0, 250, 500, 750))


@pytest.mark.parametrize("wanted", [None, 5, 6])
def test_a_sample_of_all_is_all_in_order(wanted: int | None) -> None:
    assert sample(5, wanted, 0, "test").tolist() == [0, 1, 2, 3, 4]
