"""Token ids that a start finds as an earlier one made them, in a file that is mapped."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import languages
import pytest
import tiny
import torch
from torch import Tensor

from fedpft.config import ColumnsSection
from fedpft.data import cache as data_cache
from fedpft.data import text as data_text
from fedpft.data.batches import EncodedDataset, batches
from fedpft.data.cache import keep, key_of
from fedpft.data.language import LanguageDataset
from fedpft.data.samples import Samples, read_samples
from fedpft.data.text import TextDataset
from fedpft.errors import DataError
from fedpft.tasks import TASKS
from fedpft.tasks.token_classification import TaggedDataset

COLUMNS, LABELS = ColumnsSection(), ("a", "b")
WORDS = tiny.WORDS[4:]
ROWS = 11


def texts(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place) % len(WORDS)] for place in range(1 + number % 5))


def write(path: Path, task: str, rows: int = ROWS) -> Path:
    made: list[dict[str, Any]] = []
    for number in range(rows):
        words = texts(number).split()
        made.append(
            {
                "sequence-classification": {"text": " ".join(words), "label": LABELS[number % 2]},
                "token-classification": {"words": words, "tags": [LABELS[len(word) % 2] for word in words]},
                "causal-lm": {"prompt": f"{words[0]} ", "completion": " ".join(words)},
            }[task]
        )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in made))
    return path


def read(path: Path, task: str) -> Samples:
    return read_samples(path, COLUMNS, TASKS[task].forms, TASKS[task].reader(LABELS))


def tokenizer(task: str = "sequence-classification") -> Any:
    return languages.tokenizer() if task == "causal-lm" else tiny.processor("bert")


def encoded(samples: Samples, cache: Path | None, task: str = "sequence-classification", **more: Any) -> EncodedDataset:
    values = {"processor": tokenizer(task), "max_tokens": 6, "cache": cache} | more
    return TASKS[task].encode(samples, **values)


def tensors(dataset: EncodedDataset) -> dict[str, Tensor]:
    names = ("tokens", "lengths", "starts", "labels", "learned", "tags")
    return {name: found for name in names if (found := getattr(dataset, name, None)) is not None}


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks were tokenised, so far."""
    chunks: list[int] = []
    real = data_text.in_chunks

    def counting(samples: int) -> Any:
        for chunk in real(samples):
            chunks.append(len(chunk))
            yield chunk

    monkeypatch.setattr(data_text, "in_chunks", counting)
    return chunks


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "causal-lm"])
def test_what_was_kept_is_what_would_be_made(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(read(write(tmp_path / "a.jsonl", task), task), None, task)
    monkeypatch.setattr(data_text, "AT_ONCE", 3)  # pieces of several chunks
    kind = {"causal-lm": LanguageDataset, "token-classification": TaggedDataset}.get(task, TextDataset)
    for _ in range(2):
        found = encoded(read(tmp_path / "a.jsonl", task), tmp_path / "cache" / "a.safetensors", task)
        assert type(found) is type(whole) is kind
        ours, theirs = tensors(found), tensors(whole)
        assert ours.keys() == theirs.keys()
        assert all(tiny.same_bits(ours[name], theirs[name]) for name in theirs)
        assert (found.counts, found.cut) == (whole.counts, whole.cut)
        assert found.cut
        pairs = zip(*(batches(data, batch=4, start=5, count=20, seed=1) for data in (found, whole)), strict=True)
        assert all(tiny.same_bits(a[name], b[name]) for a, b in pairs for name in b)


def test_a_second_start_tokenises_nothing(tmp_path: Path, tokenised: list[int]) -> None:
    path = write(tmp_path / "a.jsonl", "sequence-classification")
    for _ in range(2):
        encoded(read(path, "sequence-classification"), tmp_path / "cache/a")
        assert tokenised == [ROWS]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["a"]


def test_a_tokenizer_that_was_used_otherwise_in_between_is_the_same(tmp_path: Path, tokenised: list[int]) -> None:
    samples = read(write(tmp_path / "a.jsonl", "sequence-classification"), "sequence-classification")
    for place in ("saved", "elsewhere"):
        tokenizer().save_pretrained(tmp_path / place)
        loaded = type(tokenizer()).from_pretrained(tmp_path / place)
        encoded(samples, tmp_path / "a", processor=loaded)
        loaded(["x"], truncation=True, max_length=3, padding="max_length")
        encoded(samples, tmp_path / "a", processor=loaded)
    assert tokenised == [ROWS]


def other_text(samples: Samples, more: dict[str, Any]) -> Samples:
    return replace(samples, values=samples.values | {"text": [*samples["text"][:-1], "sun"]})


def other_column(samples: Samples, more: dict[str, Any]) -> Samples:
    return replace(samples, values={"prompt": samples["text"], "label": samples["label"]})


def other_order(samples: Samples, more: dict[str, Any]) -> Samples:
    return samples.subset(torch.arange(ROWS).flip(0))


def other_template(samples: Samples, more: dict[str, Any]) -> Samples:
    more["processor"] = tokenizer()
    more["processor"].chat_template = "{{ messages }}"
    return samples


def other_token(samples: Samples, more: dict[str, Any]) -> Samples:
    more["processor"] = tokenizer()
    more["processor"].add_tokens(["sunny"])
    return samples


def other_length(samples: Samples, more: dict[str, Any]) -> Samples:
    more["max_tokens"] = 5
    return samples


def other_rows(samples: Samples, more: dict[str, Any]) -> Samples:
    more["bad_rows"] = "skip"
    return samples


def other_format(samples: Samples, more: dict[str, Any]) -> Samples:
    data_cache.FORMAT = f"{data_cache.FORMAT}, other"
    return samples


def other_library(samples: Samples, more: dict[str, Any]) -> Samples:
    data_cache.version = lambda name: "0"  # type: ignore[assignment]
    return samples


@pytest.mark.parametrize(
    "change",
    [
        other_text,
        other_column,
        other_order,
        other_template,
        other_token,
        other_length,
        other_rows,
        other_format,
        other_library,
    ],
)
def test_whatever_makes_other_tokens_makes_them_anew(
    change: Callable[[Samples, dict[str, Any]], Samples],
    tmp_path: Path,
    tokenised: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(data_cache, "FORMAT", data_cache.FORMAT)  # so that they are put back
    monkeypatch.setattr(data_cache, "version", data_cache.version)
    samples = read(write(tmp_path / "a.jsonl", "sequence-classification"), "sequence-classification")
    encoded(samples, tmp_path / "kept")
    more: dict[str, Any] = {}
    changed = change(samples, more)
    found = encoded(changed, tmp_path / "kept", **more)
    assert len(tokenised) == 2
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'kept'}: is of other data, another tokenizer or other settings: made anew"
    ]
    whole = encoded(changed, None, **more)
    assert all(tiny.same_bits(tensor, tensors(whole)[name]) for name, tensor in tensors(found).items())


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "empty", "text", "gone"])
def test_a_damaged_file_is_made_anew(
    damage: str, tmp_path: Path, tokenised: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = read(write(tmp_path / "a.jsonl", "sequence-classification"), "sequence-classification")
    before, path = tensors(encoded(samples, tmp_path / "kept")), tmp_path / "kept"
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "cut":
            path.write_bytes(content[:-9])
        case "bit":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "header":
            path.write_bytes(content[:8] + b"x" + content[9:])
        case "empty":
            path.touch()
        case "text":
            path.write_text("anything")
        case "gone":
            pass
    after = tensors(encoded(samples, path))
    assert all(tiny.same_bits(after[name], before[name]) for name in before)
    assert len(tokenised) == 2
    assert len(caplog.records) == (0 if damage == "gone" else 1)
    assert all("is damaged" in record.message for record in caplog.records)
    encoded(samples, path)
    assert len(tokenised) == 2


def test_nothing_is_kept_of_texts_that_are_refused(tmp_path: Path) -> None:
    samples = read(write(tmp_path / "a.jsonl", "sequence-classification"), "sequence-classification")

    class Refusing:
        pad_token_id, save_pretrained = 0, tokenizer().save_pretrained

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] if number == 4 else [7] for number in range(len(texts))]}

    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:5: the tokenizer finds no token"):
            encoded(samples, tmp_path / "cache/a", processor=Refusing())
        assert not list((tmp_path / "cache").iterdir())
    for _ in range(2):
        found = encoded(samples, tmp_path / "cache/a", processor=Refusing(), bad_rows="skip")
        assert (len(found), found.skipped) == (ROWS - 1, 1)
        assert found.labels is not None
        assert found.labels.tolist() == [number % 2 for number in range(ROWS) if number != 4]


def test_nothing_at_all_can_be_kept(tmp_path: Path) -> None:
    for _ in range(2):
        kept = keep(tmp_path / "a", lambda: "key", {"a": torch.int64, "b": torch.bool}, lambda add: {"cut": 0})
        assert {name: tensor.shape for name, tensor in kept.tensors.items()} == {"a": (0,), "b": (0,)}


def test_a_key_tells_values_apart_that_would_join_to_the_same() -> None:
    keys = {key_of(values, tokenizer()) for values in ([["a", "b"]], [["ab"]], [["a"], ["b"]], [["a", ["b"]]])}
    assert len(keys) == 4
