"""What each task promises: its data files, its loss, its numbers, and a product that loads where people load it."""

import copy
import csv
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import scipy.stats
import tiny
import torch
import transformers
from PIL import Image
from sklearn import metrics as sklearn_metrics
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from fedpft import doctor
from fedpft.config import AdapterSection, ColumnsSection, load_silo_config
from fedpft.data.samples import Examination, Samples
from fedpft.data.text import TextDataset
from fedpft.demo.run import run_federation
from fedpft.errors import ConfigError, DataError, ModelError
from fedpft.model import adapters
from fedpft.model.loading import load_model
from fedpft.silo.explain import explain
from fedpft.tasks import FORMS, TASKS
from fedpft.tasks.task import ABSENT
from fedpft.tasks.token_classification import TaggedDataset
from fedpft.wire.hello import Terms

COLUMNS = ColumnsSection()
COLORS, THINGS = ("red", "green", "blue"), ("bird", "fish", "tree")
TAGS = ("O", "B-COLOR", "B-THING", "I-THING")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A task at work.

    labels: the label list.
    rows: as JSON lines have them; what there is to learn is in the text or image.
    cells: what a CSV file has in the place of lists.
    targets: of the rows.
    wrong: rows that cannot be used; fields, message, remedy.
    loss: from logits and labels, by definition.
    """

    auto: Any
    labels: tuple[str, ...]
    rows: list[Row]
    targets: list[Any]
    wrong: list[tuple[Row, str, str]]
    loss: Callable[[Tensor, Tensor], Tensor]
    public: tuple[str, ...] = ("text",)
    separator: str = ""
    model_type: str = "bert"


def texts(**fields: Callable[[str, str], Any]) -> list[Row]:
    rows = [{"text": f"the {color} {thing} moves", "c": color, "t": thing} for color in COLORS for thing in THINGS]
    return [{"text": row["text"], **{name: of(row["c"], row["t"]) for name, of in fields.items()}} for row in rows]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)]).mean()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    there = logits.sigmoid()
    return -(labels * there.log() + (1 - labels) * (1 - there).log()).mean()


def tagged_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[labels >= 0], labels[labels >= 0])


CASES: dict[str, Case] = {
    "sequence-classification": Case(
        auto=transformers.AutoModelForSequenceClassification,
        labels=COLORS,
        rows=texts(label=lambda color, _: color),
        targets=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        wrong=[
            ({"text": "a", "label": ""}, "the label is empty", "give the row a label"),
            ({"text": "a", "label": ["red"]}, "'label' is a list, not a string", "quotes"),
            ({"text": "a", "label": "rde"}, "label 'rde' is not in the server's label list", "did you mean 'red'?"),
        ],
        loss=cross_entropy,
    ),
    "multi-label-classification": Case(
        auto=transformers.AutoModelForSequenceClassification,
        labels=("red", "fish", "blue"),
        rows=texts(labels=lambda *both: [name for name in both if name in ("red", "fish", "blue")]),
        targets=[
            *([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]),
            *([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]),
            *([0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]),
        ],
        wrong=[
            ({"text": "a", "labels": ["red", "rde"]}, "label 'rde' is not in the server's", "did you mean 'red'?"),
            ({"text": "a", "labels": ["red", " red\u00a0"]}, "label 'red' is there twice", "keep one"),
            ({"text": "a", "labels": ["red", ""]}, "the label is empty", "give the row a label"),
            ({"text": "a", "labels": ["red", ["fish"]]}, "'labels' is a list, not a string", "quotes"),
            ({"text": "a", "labels": {"red": 1}}, "'labels' is JSON object, not a string", "quotes"),
        ],
        loss=binary_cross_entropy,
        separator="|",
    ),
    "regression": Case(
        auto=transformers.AutoModelForSequenceClassification,
        labels=(),
        rows=texts(label=lambda color, thing: COLORS.index(color) - 0.5 * THINGS.index(thing)),
        targets=[0.0, -0.5, -1.0, 1.0, 0.5, 0.0, 2.0, 1.5, 1.0],
        wrong=[
            ({"text": "a", "label": ""}, "the label is empty", "give the row a label"),
            ({"text": "a", "label": "3,5"}, "the number '3,5' has a comma", "write a decimal point"),
            ({"text": "a", "label": "1,234.5"}, "the number '1,234.5' has a comma", "nothing for thousands"),
            ({"text": "a", "label": "nan"}, "'nan' is not a finite number", "or remove it"),
            ({"text": "a", "label": float("nan")}, "'nan' is not a finite number", "or remove it"),
            ({"text": "a", "label": "-Infinity"}, "'-Infinity' is not a finite number", "or remove it"),
            ({"text": "a", "label": "1e39"}, "the number '1e39' is too large", "3.4e+38"),
            ({"text": "a", "label": "12 mm"}, "'12 mm' is not a number", "without a unit"),
            ({"text": "a", "label": "1_000"}, "'1_000' is not a number", "such as -3.5"),
            ({"text": "a", "label": "\u0663"}, "is not a number", "such as -3.5"),
            ({"text": "a", "label": True}, "'label' is bool, not a string", "quotes"),
        ],
        loss=lambda logits, labels: (logits[:, 0] - labels).square().mean(),
    ),
    "token-classification": Case(
        auto=transformers.AutoModelForTokenClassification,
        labels=TAGS,
        rows=[
            {"words": [*["the"] * (number % 3), color, "cold", thing], "tags": [*["O"] * (number % 3), *TAGS[1:]]}
            for number, (color, thing) in enumerate((color, thing) for color in COLORS for thing in THINGS)
        ],
        targets=[[*[0] * (number % 3), 1, 2, 3] for number in range(9)],
        wrong=[
            ({"words": ["a", "red"], "tags": ["O"]}, "2 words and 1 tags", "give each word one tag"),
            ({"words": "a red", "tags": "O"}, "2 words and 1 tags", "give each word one tag"),
            ({"words": ["a"], "tags": ["B-COLOUR"]}, "tag 'B-COLOUR' is not in", "did you mean 'B-COLOR'?"),
            ({"words": ["a"], "tags": [1.5]}, "'tag' is float, not a string", "quotes"),
            ({"words": [], "tags": ["O"]}, "there are no words", "remove the row"),
            ({"words": " \t", "tags": "O"}, "there are no words", "remove the row"),
            ({"words": ["a"], "tags": ""}, "there are no tags", "fill them in"),
            ({"words": ["a", "\u200b"], "tags": ["O", "O"]}, "the word is empty", "or remove it"),
            ({"words": ["a", "\0"], "tags": ["O", "O"]}, "the word is empty", "or remove it"),
            ({"words": ["a", "b\0"], "tags": ["O", "O"]}, "the word holds a NUL", "mend or remove"),
            ({"words": ["a", 2], "tags": ["O", "O"]}, "'words' is int, not a string", "quotes"),
            ({"words": 7, "tags": ["O"]}, "'words' is int, not a list", "list of strings"),
        ],
        loss=tagged_cross_entropy,
        public=("words",),
        separator=" ",
    ),
    "image-classification": Case(
        auto=transformers.AutoModelForImageClassification,
        labels=COLORS,
        rows=[{"image": f"{color}{shade}.png", "label": color} for color in COLORS for shade in (140, 180, 220)],
        targets=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        wrong=[
            ({"image": "red140.png", "label": ""}, "the label is empty", "give the row a label"),
            ({"image": "rde.png", "label": "red"}, "no image", "relative to the data file's directory"),
        ],
        loss=cross_entropy,
        public=("image",),
        model_type="vit",
    ),
}
FEDERATED = ("token-classification",)  # here; a class or an image a row are in test_run
every_task = pytest.mark.parametrize("name", CASES)


def write(directory: Path, name: str, rows: Sequence[Row], separator: str = "") -> Path:
    """A data file, and the images that it names."""
    path = directory / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            written = csv.DictWriter(file, rows[0])
            written.writeheader()
            for row in rows:
                written.writerow({k: separator.join(v) if isinstance(v, list) else v for k, v in row.items()})
    for row in rows:
        if (image := row.get("image", "")).startswith(COLORS):
            color = next(color for color in COLORS if image.startswith(color))
            pixel = [int(image[len(color) : -4]) if each == color else 0 for each in COLORS]
            Image.new("RGB", (8, 8), tuple(pixel)).save(directory / image)
    return path


@pytest.fixture
def fm(fm_directory: Callable[[str], Path]) -> Callable[[str], nn.Module]:
    """task -> a tiny FM for it."""
    return lambda name: load_model(fm_directory(CASES[name].model_type), name, CASES[name].labels, seed=0)


def encoded(name: str, directory: Path, **settings: Any) -> Any:
    case, task = CASES[name], TASKS[name]
    samples = task.read_labelled(write(directory, "a.jsonl", case.rows), COLUMNS, case.labels)
    return task.encode(samples, tiny.processor(case.model_type), 12, **settings)


def test_every_task_is_tried_and_calls_its_baseline_by_a_name_of_its_own() -> None:
    assert {*CASES, "causal-lm"} == TASKS.keys(), "what has neither label nor head is in test_causal_lm.py"
    meanings: dict[str, set[str]] = {}
    for task in TASKS.values():
        if task.baseline is not None:
            meanings.setdefault(task.baseline[0], set()).add(task.baseline[1])
    assert all(len(said) == 1 for said in meanings.values()), "report.html knows one meaning of a row"


# --- data -------------------------------------------------------------------------------------------------------------


@every_task
def test_csv_and_json_lines_give_the_same_samples(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for path in (write(tmp_path, "a.jsonl", case.rows), write(tmp_path, "a.csv", case.rows, case.separator)):
        samples = TASKS[name].read_labelled(path, COLUMNS, case.labels)
        assert samples.targets == case.targets
        assert len(samples) == len(case.rows)


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, case in CASES.items() for number in range(len(case.wrong))]
)
def test_a_row_that_cannot_be_used_is_one_clear_error(name: str, number: int, tmp_path: Path) -> None:
    case = CASES[name]
    row, message, remedy = case.wrong[number]
    path = write(tmp_path, "a.jsonl", [*case.rows, row])
    with pytest.raises(DataError) as caught:
        TASKS[name].read_labelled(path, COLUMNS, case.labels)
    assert caught.value.message.startswith(f"{path}:{len(case.rows) + 1}: ")
    assert message in caught.value.message
    assert remedy in caught.value.remedy


@every_task
def test_a_batch_holds_what_the_rows_say(name: str, tmp_path: Path) -> None:
    dataset, targets = encoded(name, tmp_path), CASES[name].targets
    chosen = [7, 0, 4]
    labels = dataset.batch(torch.tensor(chosen))["labels"]
    if labels.dim() == 2 and labels.dtype == torch.int64:  # a tag for a token: [CLS] and [SEP] have none
        assert [row[row >= 0].tolist() for row in labels] == [targets[index] for index in chosen]
        assert (labels[:, 0] == -100).all()
    else:
        assert labels.tolist() == [targets[index] for index in chosen]


@pytest.mark.parametrize("written", ["[]", '""', "null", '" "'])
def test_no_label_at_all_means_none_of_them(written: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "labels": {written}}}\n')
    samples = TASKS["multi-label-classification"].read_labelled(path, COLUMNS, ("red", "blue"))
    assert samples.targets == [[0.0, 0.0]]


def test_a_column_of_other_name_may_hold_several_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "a", "topics": ["7", 8]}])
    task = TASKS["multi-label-classification"]
    assert task.read_labelled(path, ColumnsSection(labels="topics"), ("7", "8", "9")).targets == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize(("written", "value"), [("3", 3.0), ("-2.50", -2.5), (".5", 0.5), ("1e-3", 1e-3), ("+7.", 7.0)])
def test_numbers_are_read_as_c_writes_them(written: str, value: float, tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", [{"text": "a", "label": written}])
    assert TASKS["regression"].read_labelled(path, COLUMNS, ()).targets == [value]


@pytest.mark.parametrize(
    ("numbers", "warned"),
    [([0.0, 2.0, 5.0], False), ([48.0, 50.0, 52.0], True), ([-40.0, 0.0, 40.0], True), ([0.51, 0.5, 0.49], True)],
)
def test_numbers_far_from_where_a_head_starts_are_warned_of(numbers: list[float], warned: bool, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "a", "label": number} for number in numbers])
    warnings = TASKS["regression"].read_labelled(path, COLUMNS, ()).warnings
    assert bool(warnings) == warned
    assert not warned or f"mean {sum(numbers) / 3:.4g} and standard deviation" in warnings[0]


def test_public_data_of_tags_may_be_words_or_text(tmp_path: Path) -> None:
    task, tokenizer = TASKS["token-classification"], tiny.processor("bert")
    found = []
    for row in ({"words": ["the", "red", "bird"]}, {"text": "the red bird"}):
        samples = task.read_public(write(tmp_path, "a.jsonl", [row]), COLUMNS)
        batch = task.encode(samples, tokenizer, 12).batch(torch.tensor([0]))
        assert "labels" not in batch
        found.append(batch["input_ids"].tolist())
    assert found[0] == found[1] == [tokenizer("the red bird")["input_ids"]]


@every_task
def test_the_samples_of_the_documentation_are_read(name: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    entry = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    (tmp_path / "scans").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "scans" / "0001.png")
    labels = ("cars", "hockey", "fever", "cough", "healthy", "O", "B-PER", "I-PER")
    found = []
    for kind, suffix in (("csv", "csv"), ("json", "jsonl")):
        path = tmp_path / f"a.{suffix}"
        path.write_text(entry.partition(f"```{kind}\n")[2].partition("```")[0], encoding="utf-8")
        found.append(TASKS[name].read_labelled(path, COLUMNS, labels))
    assert found[0].targets == found[1].targets
    assert list(found[0].texts()) == list(found[1].texts())
    assert f"task: {name}" in entry
    assert TASKS[name].model in entry
    assert TASKS[name].peft_loader in entry


# --- words and their tokens -------------------------------------------------------------------------------------------


def tokenizer_of(model: Any, **parts: Any) -> Any:
    built = Tokenizer(model)
    for part, value in parts.items():
        setattr(built, part, value)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, pad_token="[PAD]", unk_token="[UNK]")


def word_pieces() -> Any:
    """Cuts words into pieces, and x away."""
    vocabulary = ["[PAD]", "[UNK]", "red", "##bird", "##s", "fly", "a"]
    model = models.WordPiece({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]")
    return tokenizer_of(model, normalizer=normalizers.Replace("x", ""), pre_tokenizer=pre_tokenizers.Whitespace())


def byte_pieces() -> Any:
    """As GPT-2 and RoBERTa have them: a blank belongs to the word after it. Cuts x away."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["[PAD]", "[UNK]", *alphabet, "Ġr", "Ġre"])}
    model = models.BPE(vocabulary, [("Ġ", "r"), ("Ġr", "e")])
    blanks = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer_of(model, normalizer=normalizers.Replace("x", ""), pre_tokenizer=blanks)


def tagged(tokenizer: Any, words: Sequence[list[str]], max_tokens: int = 40, **settings: Any) -> Any:
    """Every word of a row has a tag of its own: its number."""
    targets = [list(range(len(row))) for row in words]
    samples = Samples(Path("a.jsonl"), {"words": list(words)}, list(range(1, len(words) + 1)), targets)
    return TASKS["token-classification"].encode(samples, tokenizer, max_tokens, **settings)


def pieces(tokenizer: Any, dataset: Any, index: int) -> list[tuple[str, int]]:
    batch = dataset.batch(torch.tensor([index]))
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    return list(zip(tokens, batch["labels"][0].tolist(), strict=True))


def test_the_first_piece_of_a_word_carries_its_tag() -> None:
    tokenizer = word_pieces()
    dataset = tagged(tokenizer, [["redbirds", "fly", "x", "a-a", "red"], ["a"]])
    assert pieces(tokenizer, dataset, 0) == [
        *(("red", 0), ("##bird", -100), ("##s", -100), ("fly", 1)),  # the third word has no token
        *(("a", 3), ("[UNK]", -100), ("a", -100), ("red", 4)),
    ]
    padded = dataset.batch(torch.tensor([1, 0]))["labels"]
    assert padded[0].tolist() == [0] + 7 * [-100]


def test_a_word_is_tokenized_as_in_its_text() -> None:
    tokenizer = byte_pieces()
    found = pieces(tokenizer, tagged(tokenizer, [["red", "red", "é", "b"]]), 0)
    assert [piece for piece, _ in found] == tokenizer.tokenize("red red é b")
    assert found == [
        *(("r", 0), ("e", -100), ("d", -100), ("Ġre", 1), ("d", -100)),
        *(("Ġ", -100), ("Ã", 2), ("©", -100), ("Ġ", -100), ("b", 3)),  # a blank alone is no word's
    ]


def test_a_blank_after_a_word_without_a_token_is_not_that_words() -> None:
    tokenizer = byte_pieces()
    found = pieces(tokenizer, tagged(tokenizer, [["b", "x", "c"]]), 0)
    assert found == [("b", 0), ("Ġ", -100), ("Ġ", -100), ("c", 2)]


def test_words_that_were_cut_away_carry_nothing_and_the_row_is_counted() -> None:
    dataset = tagged(word_pieces(), [["redbirds", "fly", "a"], ["a", "a"]], max_tokens=4)
    assert dataset.tags_of(0) == [0, 1]
    assert dataset.tags_of(1) == [0, 1]
    assert dataset.cut == 1


@pytest.mark.parametrize("tokenizer", [word_pieces(), byte_pieces()], ids=["nothing", "a blank"])
def test_a_row_of_which_no_word_has_a_token_is_refused_or_left_out(tokenizer: Any) -> None:
    words = [["a"], ["x", "xx"], ["red", "x"]]
    with pytest.raises(DataError, match=r"a\.jsonl:2: the tokenizer finds no token in 'x xx'"):
        tagged(tokenizer, words)
    dataset = tagged(tokenizer, words, bad_rows="skip")
    assert (len(dataset), dataset.skipped) == (2, 1)
    assert [dataset.tags_of(index) for index in range(2)] == [[0], [0]]
    assert all(TASKS["token-classification"].weight(dataset.batch(torch.tensor([index]))) for index in range(2))


def test_a_tokenizer_that_does_not_know_whence_its_tokens_come_is_refused() -> None:
    class Slow:
        pad_token_id, is_fast = 0, False

    with pytest.raises(ModelError, match=r"tokenizer \(Slow\) cannot tell which word") as caught:
        tagged(Slow(), [["a"]])
    assert "tokenizer.json" in caught.value.remedy


# --- loss -------------------------------------------------------------------------------------------------------------


@every_task
def test_the_loss_is_its_definition(name: str, fm: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model, dataset = fm(name), encoded(name, tmp_path)
    batch = dataset.batch(torch.arange(len(dataset)))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    wanted = CASES[name].loss(tiny.logits(model, inputs), batch["labels"])
    assert float(TASKS[name].loss(model, batch)) == pytest.approx(float(wanted), rel=1e-5)


COUNTS = {  # of CASES' rows
    "sequence-classification": [3, 3, 3],
    "image-classification": [3, 3, 3],
    "multi-label-classification": [[6, 6, 6], [3, 3, 3]],
    "token-classification": [9, 9, 9, 9],
}


@pytest.mark.parametrize("name", COUNTS)
def test_labels_are_counted(name: str, tmp_path: Path) -> None:
    dataset = encoded(name, tmp_path)
    counts = TASKS[name].label_counts(dataset, len(CASES[name].labels))
    assert (counts.tolist(), counts.dtype) == (COUNTS[name], torch.int64)
    more = TASKS[name].label_counts(dataset, len(CASES[name].labels) + 2)
    assert more.shape[-1] == len(CASES[name].labels) + (2 if counts.dim() == 1 else 0), "a class that the silo lacks"


def test_every_task_with_a_label_list_counts_its_labels_and_no_other_does() -> None:
    assert COUNTS.keys() == {name for name, task in TASKS.items() if task.label_list}
    for name in TASKS.keys() - COUNTS.keys():
        with pytest.raises(NotImplementedError, match=f"{name} has no classes"):
            TASKS[name].label_counts(dataset_of(torch.zeros(3)), 1)


def test_a_words_tag_that_was_cut_away_is_not_counted() -> None:
    dataset = tagged(tiny.processor("bert"), [["red", "bird", "moves", "the"]], max_tokens=4)
    assert TASKS["token-classification"].label_counts(dataset, 3).sum() == 2


@pytest.mark.parametrize("name", COUNTS)
def test_a_shifted_loss_is_that_of_shifted_logits_and_of_no_shift_the_models_own(
    name: str, fm: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    task, model, dataset = TASKS[name], fm(name), encoded(name, tmp_path)
    classes, batch = len(CASES[name].labels), dataset.batch(torch.arange(9))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    plain = task.shifted_loss(model, batch, torch.zeros(classes))
    torch.testing.assert_close(plain, task.loss(model, batch), rtol=1e-6, atol=0)
    counts = task.label_counts(dataset, classes)
    counts[-1] *= 50  # the last class, or having a label at all: far from even
    shift = task.logit_shift(counts)
    assert (shift.shape, shift.dtype) == ((classes,), torch.float32)
    found = float(task.shifted_loss(model, batch, shift))
    assert found == pytest.approx(
        float(CASES[name].loss(tiny.logits(model, inputs) + shift, batch["labels"])), rel=1e-5
    )
    assert abs(found - float(plain)) > 0.1


def test_a_label_is_shifted_by_the_odds_of_having_it() -> None:
    task = TASKS["multi-label-classification"]
    labels = torch.zeros(1000, 3)
    labels[:900, 0] = labels[:500, 1] = 1.0
    counts = task.label_counts(dataset_of(labels), 3)
    shift = task.logit_shift(counts)
    assert shift.tolist() == pytest.approx([math.log(9), 0.0, ABSENT - math.log(2)], abs=1e-2)


@every_task
def test_a_batch_in_parts_has_the_gradient_of_the_whole(
    name: str, fm: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    task, model, dataset = TASKS[name], fm(name), encoded(name, tmp_path)
    model.requires_grad_(True)

    def gradients(lots: Iterator[Tensor]) -> list[Tensor]:
        model.zero_grad()
        whole = task.weight(dataset.batch(torch.arange(len(dataset))))
        for lot in lots:
            part = dataset.batch(lot)
            (task.loss(model, part) * (task.weight(part) / whole)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    at_once = gradients(iter([torch.arange(9)]))
    in_parts = gradients(iter([torch.tensor([8, 0]), torch.tensor([3]), torch.tensor([1, 2, 4, 5, 6, 7])]))
    assert max(float(g.abs().max()) for g in at_once) > 1e-3
    for a, b in zip(at_once, in_parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # sums in another order


@every_task
def test_a_loss_can_be_had_without_labels(name: str, fm: Callable[[str], nn.Module], tmp_path: Path) -> None:
    task, model, dataset = TASKS[name], fm(name), encoded(name, tmp_path)
    inputs = {key: value for key, value in dataset.batch(torch.arange(9)).items() if key != "labels"}
    classes = int(model.config.num_labels)  # type: ignore[arg-type, union-attr]
    first, again, other = (
        task.with_any_labels(inputs, classes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], other["labels"])
    labels = dataset.batch(torch.arange(9))["labels"]
    assert (first["labels"].shape, first["labels"].dtype) == (labels.shape, labels.dtype)
    assert len(first["labels"].unique()) > 2 or classes == 1 or labels.is_floating_point()
    loss = float(task.loss(model, first))
    assert loss == pytest.approx(float(CASES[name].loss(tiny.logits(model, inputs), first["labels"])), rel=1e-5)
    if first["labels"].dim() == 2 and "attention_mask" in inputs and labels.dtype == torch.int64:
        assert torch.equal(first["labels"] >= 0, inputs["attention_mask"].bool()), "padding has no tag"


def categorical(logits: Tensor, wanted: Tensor) -> Tensor:
    return torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (wanted, logits)))


def yes_or_no(logits: Tensor, wanted: Tensor) -> Tensor:
    return torch.distributions.kl_divergence(*(torch.distributions.Bernoulli(logits=x) for x in (wanted, logits)))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence-classification": categorical,
    "image-classification": categorical,
    "token-classification": categorical,
    "multi-label-classification": yes_or_no,
    "regression": lambda logits, wanted: (logits - wanted)[:, 0] ** 2,
}


@every_task
def test_a_model_is_as_far_from_a_teacher_as_their_answers_diverge(
    name: str, fm: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    task, model, dataset = TASKS[name], fm(name), encoded(name, tmp_path)
    teacher = tiny.randomise(copy.deepcopy(model.requires_grad_(True)), seed=1)
    batch = dataset.batch(torch.arange(len(dataset)))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, wanted = (tiny.logits(each, inputs) for each in (model, teacher))
    real = inputs["attention_mask"].bool() if logits.dim() == 3 else ...
    each = DIVERGENCES[name](logits, wanted)[real]
    loss = task.soft_loss(model, teacher, batch)
    assert float(loss.detach()) == pytest.approx(float(each.mean()), rel=1e-4)
    assert float(task.soft_loss(model, model, batch).detach()) == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].model_type == "bert"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "llama"])
def test_every_architecture_has_a_head_for_the_task(
    name: str, model_type: str, fm_directory: Callable[[str], Path]
) -> None:
    case, task = CASES[name], TASKS[name]
    model = load_model(fm_directory(model_type), name, case.labels, seed=0)  # type: ignore[arg-type]
    assert type(model).__name__.endswith(case.auto.__name__.removeprefix("AutoModel"))
    assert model.config.problem_type == task.problem_type, "pipelines go by it"  # type: ignore[union-attr]
    before = set(dict(model.named_parameters()))
    adapters.attach(model, AdapterSection(rank=2, alpha=4.0), seed=0)
    trained = {parameter for parameter in adapters.extract(model) if ".lora_" not in parameter}
    assert trained, "a head that nobody trains"
    assert trained <= before
    assert {parameter for parameter in before if not parameter.startswith(f"{model.base_model_prefix}.")} == trained
    batch = task.with_any_labels(tiny.batch(model_type), max(1, len(case.labels)), torch.Generator().manual_seed(0))
    assert math.isfinite(task.loss(model, batch).item())
    assert len(task.answers(model, batch)) == 5


# --- metrics ----------------------------------------------------------------------------------------------------------


def dataset_of(labels: Tensor) -> TextDataset:
    return TextDataset(torch.zeros(len(labels)), torch.ones(len(labels)), 0, labels)


@pytest.mark.parametrize("name", ["sequence-classification", "image-classification"])
def test_metrics_of_one_label_are_scikit_learns(name: str) -> None:
    labels, answers = torch.randint(4, (60,)), torch.randint(5, (40,))
    chosen = torch.randperm(60)[:40]
    found = TASKS[name].score(answers.tolist(), dataset_of(labels), chosen)
    truth = labels[chosen].numpy()
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, answers))
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, answers, average="macro"))


def test_metrics_of_several_labels_are_scikit_learns() -> None:
    labels = (torch.rand(60, 6) < 0.3).float()
    labels[:, 5] = 0.0
    answers, chosen = torch.rand(40, 6) < 0.4, torch.randperm(60)[:40]
    answers[:, 5] = False  # a class that does not occur at all has no F1
    answers[:10] = labels[chosen[:10]].bool()
    found = TASKS["multi-label-classification"].score(answers.tolist(), dataset_of(labels), chosen)
    truth = labels[chosen].numpy()
    assert found["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, answers, average="micro"))
    macro = sklearn_metrics.f1_score(truth, answers, average="macro", labels=range(5))
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["exact_match"] == pytest.approx(sklearn_metrics.accuracy_score(truth, answers))
    assert 0.2 < found["exact_match"] < 1.0


def test_several_labels_none_of_which_occurs_are_worth_nothing() -> None:
    nothing = dataset_of(torch.zeros(1, 2))
    found = TASKS["multi-label-classification"].score([[False, False]], nothing, torch.tensor([0]))
    assert found == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


def test_a_class_is_named_where_it_has_more_than_one_half() -> None:
    def model(**_: Tensor) -> Any:
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.tensor([[-0.1, 0.0, 0.1]]))

    assert TASKS["multi-label-classification"].answers(model, {}) == [[False, False, True]]  # type: ignore[arg-type]


def test_metrics_of_numbers_are_scipys() -> None:
    numbers = torch.randint(6, (60,)) + torch.randint(2, (60,)) / 2  # with ties
    chosen = torch.randperm(60)[:40]
    answers = (numbers[chosen] + torch.randint(4, (40,)) / 4).exp().tolist()
    found = TASKS["regression"].score(answers, dataset_of(numbers), chosen)
    truth = numbers[chosen].numpy()
    assert found["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(truth, answers))
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(truth, answers).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(truth, answers).statistic)
    assert found["pearson"] != pytest.approx(found["spearman"], abs=1e-3)


@pytest.mark.parametrize(("answers", "numbers"), [([1.0, 1.0], [0.0, 2.0]), ([0.0, 2.0], [1.0, 1.0])])
def test_what_is_constant_correlates_with_nothing(answers: list[float], numbers: list[float]) -> None:
    found = TASKS["regression"].score(answers, dataset_of(torch.tensor(numbers)), torch.arange(2))
    assert found == {"rmse": 1.0}


def tag_dataset(names: Sequence[str], rows: Sequence[list[int]]) -> TaggedDataset:
    """Each word one token."""
    tags = torch.tensor([tag for row in rows for tag in row], dtype=torch.int32)
    return TaggedDataset(tags, torch.tensor([len(row) for row in rows]), tags, 0, names)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Of well-formed IOB2: (first word, one after the last, kind)."""
    found = set()
    for first, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = first + 1
            while end < len(tags) and tags[end] == f"I-{tag[2:]}":
                end += 1
            found.add((first, end, tag[2:]))
    return found


def well_formed(words: int, rng: random.Random) -> list[str]:
    tags: list[str] = []
    for _ in range(words):
        inside = [f"I-{tags[-1][2:]}"] if tags and tags[-1] != "O" else []
        tags.append(rng.choice(["O", "B-PER", "B-ORG", *inside, *inside]))
    return tags


NAMES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")


def span_scores(names: Sequence[str], wanted: Sequence[list[str]], given: Sequence[list[str]]) -> dict[str, float]:
    dataset = tag_dataset(names, [[names.index(tag) for tag in tags] for tags in wanted])
    answers = [[names.index(tag) for tag in tags] for tags in given]
    return TASKS["token-classification"].score(answers, dataset, torch.arange(len(wanted)))


def test_metrics_of_tags_are_those_of_whole_spans() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 9) for _ in range(40)]
    wanted, given = ([well_formed(length, rng) for length in lengths] for _ in range(2))
    given[:15] = wanted[:15]
    found = span_scores(NAMES, wanted, given)
    theirs, ours = ({(row, *span) for row, tags in enumerate(each) for span in spans(tags)} for each in (wanted, given))
    precision, recall = len(theirs & ours) / len(ours), len(theirs & ours) / len(theirs)
    assert found["span_precision"] == pytest.approx(precision)
    assert found["span_recall"] == pytest.approx(recall)
    assert found["span_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    hits = [a == b for x, y in zip(wanted, given, strict=True) for a, b in zip(x, y, strict=True)]
    assert found["token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert precision != pytest.approx(recall)


def test_a_words_answer_is_that_of_its_first_token() -> None:
    def model(**_: Tensor) -> Any:
        return transformers.modeling_outputs.TokenClassifierOutput(logits=torch.eye(4).expand(2, 4, 4))

    labels = torch.tensor([[-100, 0, -100, 1], [2, -100, -100, -100]])
    assert TASKS["token-classification"].answers(model, {"labels": labels}) == [[1, 3], [0]]  # type: ignore[arg-type]


@pytest.mark.parametrize("single_and_last", ["SE", "UL"])
def test_other_schemes_come_to_the_same_spans(single_and_last: str) -> None:
    single, last = single_and_last

    def in_scheme(tags: list[str]) -> list[str]:
        found = list(tags)
        for first, end, kind in spans(tags):
            found[first:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - first - 2), f"{last}-{kind}"][: end - first]
            if end - first == 1:
                found[first] = f"{single}-{kind}"
        return found

    rng = random.Random(1)
    wanted, given = ([well_formed(8, rng) for _ in range(20)] for _ in range(2))
    given[:8] = wanted[:8]
    names = ("O", *(f"{prefix}-{kind}" for prefix in f"BI{single}{last}" for kind in ("PER", "ORG")))
    plain = span_scores(NAMES, wanted, given)
    found = span_scores(names, [in_scheme(tags) for tags in wanted], [in_scheme(tags) for tags in given])
    assert [found[key] for key in ("span_f1", "span_precision", "span_recall")] == pytest.approx(
        [plain[key] for key in ("span_f1", "span_precision", "span_recall")]
    )


def test_tags_of_no_span_scheme_are_counted_word_by_word() -> None:
    rng, names = random.Random(2), ("NOUN", "VERB", "ADV", "X", "I")
    wanted, given = ([[rng.choice(names) for _ in range(6)] for _ in range(10)] for _ in range(2))
    given[:5] = wanted[:5]
    found = span_scores(names, wanted, given)
    assert found["span_f1"] == pytest.approx(found["token_accuracy"])
    assert 0.4 < found["token_accuracy"] < 1.0


def test_without_seqeval_the_owner_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    case = CASES["token-classification"]
    with pytest.raises(ConfigError) as caught:
        TASKS["token-classification"].read_labelled(write(tmp_path, "a.jsonl", case.rows), COLUMNS, case.labels)
    assert "pip install 'fedpft[token-classification]'" in caught.value.remedy


def test_baselines_know_nothing_but_the_labels() -> None:
    one = dataset_of(torch.tensor([2, 0, 2, 1]))
    assert TASKS["sequence-classification"].baseline_score(one)["accuracy"] == 0.5
    several = dataset_of(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    found = TASKS["multi-label-classification"].baseline_score(several)  # names the first, and only that
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert found["exact_match"] == 0.25
    numbers = dataset_of(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert TASKS["regression"].baseline_score(numbers) == {"rmse": pytest.approx(5**0.5)}
    tags = tag_dataset(NAMES, [[0, 1, 2], [0], [0, 3]])
    found = TASKS["token-classification"].baseline_score(tags)
    assert (found["span_f1"], found["token_accuracy"]) == (0.0, 0.5)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name in FEDERATED else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_federation_learns_the_task_and_its_product_loads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, task = CASES[name], TASKS[name]
    fm = tiny.write_model(case.model_type, tmp_path / "fm", layers=3)
    settings: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "threads": 1,
        "model": {"path": str(fm), "task": name, "max_tokens": 12},
        "distillation": {"steps": 2, "batch": 4, "weight_term": 0.0},
        "alignment": {"every_rounds": 1, "steps": 1, "batch": 4},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"rounds": 2, "local_epochs": 20.0, "batch": 9, "learning_rate": 0.01},
        "federation": {"silos": ["north"]},
        "public_data": str(write(tmp_path, "public.jsonl", [{k: row[k] for k in case.public} for row in case.rows])),
        "test_data": str(write(tmp_path, "test.jsonl", case.rows)),
    }
    if task.label_list:
        (tmp_path / "labels.txt").write_text("\n".join(case.labels), encoding="utf-8")
        settings["model"]["labels"] = str(tmp_path / "labels.txt")
    silo = {
        "insecure_loopback": True,
        "insecure_name": "north",
        "data": {"path": str(write(tmp_path, "north.csv", case.rows, case.separator))},
        "threads": 1,
        "limits": {"max_batch": 4},
    }
    summary = run_federation(tmp_path / "run", settings, {"north": silo})
    out = tmp_path / "run" / "out"

    assert summary["metrics"]["plugged_in"].keys() == {metric.name for metric in task.metrics}
    assert task.baseline is not None
    baseline, tuned = (summary["metrics"][row][task.headline.name] for row in (task.baseline[0], "plugged_in"))
    assert tuned > baseline if task.headline.more_is_better else tuned < baseline
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(metric.title in page.replace("&#x27;", "'") for metric in task.metrics)
    assert task.baseline[1] in page

    names = {"id2label": dict(enumerate(case.labels or ("value",)))}
    merged = case.auto.from_pretrained(out / "merged").eval()
    assert merged.config.id2label == names["id2label"]
    assert merged.config.problem_type == task.problem_type
    loader = getattr(peft, task.peft_loader)
    loaded = loader.from_pretrained(str(out / "adapter"), **names, ignore_mismatched_sizes=True).eval()
    inputs = tiny.batch(case.model_type)
    torch.testing.assert_close(tiny.logits(loaded, inputs), tiny.logits(merged, inputs), rtol=1e-5, atol=1e-5)
    assert peft.PeftConfig.from_pretrained(out / "adapter").task_type == task.peft

    doctor.examine(tmp_path / "run" / "server.yaml")
    assert "WRONG" not in capsys.readouterr().out
    config = load_silo_config(tmp_path / "run" / "silo-north.yaml")
    said = doctor._silo_data(config, Terms(task.name, case.labels, max_tokens=12, characters_per_token=4.0))
    assert f"{len(case.rows)} labelled rows" in said
    assert (f"of {len(case.labels)} labels" in said) == task.label_list
    assert (f"0 of {len(case.rows)} texts are longer" in said) == task.has_tokens
    assert "classifier" in explain(config), "the head is among what leaves"


def test_a_silo_can_look_at_its_file_before_it_knows_the_task(tmp_path: Path) -> None:
    for name, case in CASES.items():
        path = write(tmp_path, f"{name}.jsonl", case.rows)
        examination = Examination(path, COLUMNS, FORMS, first_counts=False)
        assert examination.form in TASKS[name].forms
        examination.resolve(TASKS[name].reader(case.labels))
        assert examination.samples().targets == case.targets
