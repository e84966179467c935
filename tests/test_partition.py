"""A labelled file dealt out to silos: who gets what, and files that silos can read.

n samples, N silos, C classes.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from fedpft.config import ColumnsSection, PartitionSection, TaskName
from fedpft.data import partition
from fedpft.data.partition import deal, dirichlet_partition, split_counts, write_split
from fedpft.data.samples import Examination, Samples, read_samples
from fedpft.errors import ConfigError, DataError
from fedpft.seeding import derive_seed
from fedpft.tasks import FORMS, TASKS

COLUMNS = ColumnsSection()
KINDS: dict[str, dict[str, Any]] = {
    "iid": {"kind": "iid"},
    "dirichlet": {"kind": "dirichlet", "concentration": 0.3},
    "dirichlet by column": {"kind": "dirichlet", "concentration": 0.3, "column": "ward"},
    "quantity": {"kind": "quantity", "concentration": 0.3},
    "shards": {"kind": "shards"},
    "column": {"kind": "column", "column": "ward"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def samples_of(targets: Sequence[Any] | None, groups: Sequence[str] | None = None, n: int = 0) -> Samples:
    n = n if targets is None else len(targets)
    texts, lines = [f"text {number}" for number in range(n)], list(range(1, n + 1))
    made = None if targets is None else list(targets)
    return Samples(Path("a.csv"), {"text": texts}, lines, made, groups=None if groups is None else list(groups))


def section(kind: str, **changes: Any) -> PartitionSection:
    return PartitionSection.model_validate(KINDS[kind] | changes)


def same(parts: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))


# --- every kind -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.sampled_from("vwxyz")), min_size=12, max_size=80),
    kind=st.sampled_from(list(KINDS)),
    silos=st.integers(1, 6),
    concentration=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_each_sample_goes_to_one_silo_and_none_is_empty(
    rows: list[tuple[int, str]], kind: str, silos: int, concentration: float, seed: int
) -> None:
    samples = samples_of(*zip(*rows, strict=True))
    if kind == "column":
        silos = min(silos, len(set(samples.groups or ())))
    chosen = section(kind, concentration=concentration)
    parts = deal(chosen, samples, silos, seed)
    assert len(parts) == silos
    assert all(len(part) and part.dtype == torch.int64 and torch.equal(part, part.sort().values) for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(samples)))
    torch.rand(3)
    np.random.default_rng().random()
    assert same(parts, deal(chosen, samples, silos, seed))


@every_kind
def test_another_seed_deals_otherwise(kind: str) -> None:
    samples = samples_of([number % 5 for number in range(200)], [f"ward {number % 40}" for number in range(200)])
    first, other = (deal(section(kind), samples, 8, seed) for seed in (4, 5))
    assert not same(first, other)


@every_kind
def test_a_thousand_silos_get_their_part(kind: str) -> None:
    samples = samples_of([number % 10 for number in range(20_000)], [str(number % 3000) for number in range(20_000)])
    parts = deal(section(kind, concentration=1.0), samples, 1000, 0)
    assert len(parts) == 1000
    assert min(map(len, parts)) >= 1
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(20_000))


@pytest.mark.parametrize("silos", [0, 5])
@every_kind
def test_more_silos_than_samples_are_refused(kind: str, silos: int) -> None:
    with pytest.raises(DataError, match=rf"a\.csv: 4 samples cannot be dealt out to {silos} silos") as raised:
        deal(section(kind), samples_of([0, 1, 0, 1], "vwxy"), silos, 0)
    assert "a sample for each" in raised.value.remedy


@pytest.mark.parametrize("kind", ["dirichlet", "shards"])
@pytest.mark.parametrize("targets", [None, [0.5, 1.0, 2.0], [[1.0], [0.0], [1.0]], [[0, 1], [1], [1, 1]]])
def test_rows_without_one_class_each_are_not_dealt_out_by_class(kind: str, targets: list[Any] | None) -> None:
    with pytest.raises(DataError, match=r"a\.csv: its rows have no single class") as raised:
        deal(section(kind, shards=1), samples_of(targets, n=3), 2, 0)
    assert "iid, quantity or column" in raised.value.remedy
    assert "name a column with kind: dirichlet" in raised.value.remedy


@pytest.mark.parametrize("kind", ["iid", "quantity", "column", "dirichlet by column"])
def test_rows_without_one_class_each_are_dealt_out_otherwise(kind: str) -> None:
    parts = deal(section(kind), samples_of(None, "vwxyz" * 4, n=20), 3, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(20))


# --- evenly, by size, by shards, by column ----------------------------------------------------------------------------


@given(n=st.integers(1, 60), silos=st.integers(1, 60), seed=st.integers(0, 9))
def test_iid_parts_are_of_one_size_and_do_not_depend_on_the_rows(n: int, silos: int, seed: int) -> None:
    silos = min(n, silos)
    parts = deal(section("iid"), samples_of([number % 3 for number in range(n)]), silos, seed)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert same(parts, deal(section("iid"), samples_of(None, n=n), silos, seed))


def test_iid_parts_are_a_shuffle_and_not_the_files_order() -> None:
    parts = deal(section("iid"), samples_of(None, n=300), 3, 0)
    for part in parts:
        assert (part < 150).double().mean() == pytest.approx(0.5, abs=0.15)
        assert not torch.equal(part % 3, part[:1].expand(len(part)) % 3)


def test_quantities_are_the_more_uneven_the_smaller_the_concentration_and_their_content_is_not() -> None:
    samples = samples_of([number // 1000 for number in range(2000)])
    parts = {c: deal(section("quantity", concentration=c), samples, 10, 0) for c in (0.1, 1.0, 1000.0)}
    largest = {c: max(map(len, each)) for c, each in parts.items()}
    assert largest[0.1] > 1.5 * largest[1.0] > 1.5 * 1.5 * largest[1000.0]
    assert largest[1000.0] < 230
    (most,) = (part for part in parts[0.1] if len(part) == largest[0.1])
    assert (most < 1000).double().mean() == pytest.approx(0.5, abs=0.06)  # four standard errors of its 1,000 rows


def test_a_silo_gets_as_many_shards_of_the_sorted_file_as_were_asked_for() -> None:
    classes = torch.arange(600) % 6
    samples = samples_of(classes.tolist())
    parts = deal(section("shards", shards=2), samples, 6, 0)  # 12 shards of 50: each of one class
    assert [len(part) for part in parts] == [100] * 6
    held = [classes[part].unique().numel() for part in parts]
    assert max(held) == 2
    (one,) = deal(section("shards", shards=3), samples, 1, 0)
    assert one.tolist() == list(range(600))


def test_shards_of_a_class_are_not_its_order_in_the_file() -> None:
    parts = deal(section("shards", shards=1), samples_of([0] * 100), 2, 0)
    assert 30 < (parts[0] < 50).sum() * 100 / 50 < 70


def test_more_shards_than_samples_are_refused() -> None:
    with pytest.raises(DataError, match="9 samples are too few for 10 shards, 5 for each of 2 silos") as raised:
        deal(section("shards", shards=5), samples_of([0] * 9), 2, 0)
    assert "simulation.partition.shards" in raised.value.remedy


def test_as_many_values_as_silos_are_a_silo_each() -> None:
    groups = ["south", "north", "west", "west", "south", "west"]
    for seed in (0, 1):
        parts = deal(section("column"), samples_of(None, groups, 6), 3, seed)
        assert [part.tolist() for part in parts] == [[1], [0, 4], [2, 3, 5]]


@settings(deadline=None)
@given(groups=st.lists(st.integers(0, 9), min_size=5, max_size=60), silos=st.integers(1, 5), seed=st.integers(0, 9))
def test_more_values_than_silos_stay_whole_and_are_grouped_evenly(groups: list[int], silos: int, seed: int) -> None:
    silos = min(silos, len(set(groups)))
    parts = deal(section("column"), samples_of(None, [str(group) for group in groups], len(groups)), silos, seed)
    held = [{groups[index] for index in part.tolist()} for part in parts]
    assert sum(map(len, held)) == len(set(groups)), "a value is at one silo"
    if len(set(groups)) > silos:
        largest = max(map(groups.count, groups))
        assert max(map(len, parts)) <= math.ceil(len(groups) / silos) + largest, "as a list schedule keeps to"


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_values_are_grouped_with_the_smallest(seed: int) -> None:
    groups = "abbcccddddeeeeeffffff"
    parts = deal(section("column"), samples_of(None, groups, len(groups)), 3, seed)
    assert sorted(sorted({groups[index] for index in part.tolist()}) for part in parts) == [
        ["a", "f"],
        ["b", "e"],
        ["c", "d"],
    ]


def test_fewer_values_than_silos_are_refused() -> None:
    with pytest.raises(DataError, match=r"column 'ward' has 2 different values, too few for 3 silos") as raised:
        deal(section("column"), samples_of(None, "vwvw", 4), 3, 0)
    assert "take 2 silos or fewer" in raised.value.remedy


# --- by a Dirichlet ---------------------------------------------------------------------------------------------------


def drawn(labels: Tensor, silos: int, concentration: float, seed: int, draw: int) -> list[list[int]]:
    """One draw, by definition: the members of each class in random order, cut where its shares end."""
    generator = np.random.default_rng(derive_seed(seed, "dirichlet", draw))
    parts: list[list[int]] = [[] for _ in range(silos)]
    for label in labels.unique().tolist():
        members = generator.permutation(np.flatnonzero(labels.numpy() == label))
        shares = generator.dirichlet(np.full(silos, concentration))
        cuts = (np.cumsum(shares[:-1]) * len(members)).round().astype(int)
        for part, dealt in zip(parts, np.split(members, cuts), strict=True):
            part += dealt.tolist()
    return [sorted(part) for part in parts]


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 5), min_size=12, max_size=80),
    silos=st.integers(1, 4),
    concentration=st.sampled_from([0.3, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_the_first_draw_in_which_no_silo_is_empty_counts(
    labels: list[int], silos: int, concentration: float, seed: int
) -> None:
    parts = [part.tolist() for part in dirichlet_partition(labels, silos, concentration, seed)]
    for draw in range(partition.PARTITION_DRAWS):
        expected = drawn(torch.tensor(labels), silos, concentration, seed, draw)
        if all(expected):
            assert parts == expected
            return
    raise AssertionError("these settings are to need no repair")


def test_where_every_draw_leaves_silos_empty_the_fullest_draw_is_repaired_by_one_sample_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partition, "PARTITION_DRAWS", 10)
    labels, silos = torch.arange(300) % 2, 60
    draws = [drawn(labels, silos, 0.1, 3, draw) for draw in range(10)]
    best = min(draws, key=lambda parts: parts.count([]))
    assert 0 < best.count([]) < max(parts.count([]) for parts in draws)
    parts = [part.tolist() for part in dirichlet_partition(labels, silos, 0.1, 3)]
    assert all(parts)
    assert sorted(index for part in parts for index in part) == list(range(300))
    moved = sum(len(set(before) - set(after)) for before, after in zip(best, parts, strict=True))
    assert moved == best.count([])
    assert all(after == before or len(after) == 1 or len(before) > 5 for before, after in zip(best, parts, strict=True))


def test_silos_that_outnumber_a_classes_samples_have_equal_chances() -> None:
    labels = torch.arange(20_000) % 4000  # five samples each
    sizes = torch.tensor([len(part) for part in dirichlet_partition(labels, 50, 100.0, 0, turned=True)])
    assert sizes.min() > 400 - 6 * 20
    assert sizes.max() < 400 + 6 * 20  # as of 20,000 throws: a standard deviation of 20


def test_the_draws_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_seeds: list[int] = []
    monkeypatch.setattr(partition, "derive_seed", lambda *of: drawn_seeds.append(1) or derive_seed(*of))
    monkeypatch.setattr(partition, "MOST_SHARES", 7 * 10 * 2)
    dirichlet_partition([0] * 9 + [1], 10, 1e-6, 0)
    assert len(drawn_seeds) == 7


def test_as_many_silos_as_samples_have_one_each() -> None:
    assert sorted(part.tolist() for part in dirichlet_partition([0] * 10, 10, 1e-6, 0)) == [[i] for i in range(10)]


def test_a_column_takes_the_place_of_the_label() -> None:
    groups = ["b", "a", "c", "a"] * 20
    parts = deal(section("dirichlet by column"), samples_of([0] * 80, groups), 4, 7)
    assert same(parts, dirichlet_partition(["abc".index(group) for group in groups], 4, 0.3, 7))


def test_a_small_concentration_is_more_uneven_than_a_large_one() -> None:
    labels = torch.arange(2000) % 10

    def unevenness(concentration: float) -> float:
        counts = torch.stack(
            [labels[part].bincount(minlength=10) for part in dirichlet_partition(labels, 4, concentration, 0)]
        )
        return counts.double().std(dim=0).mean().item()

    assert unevenness(0.1) > 2 * unevenness(100.0)


@pytest.mark.parametrize(("silos", "concentration"), [(4, 1.0), (0, 1.0), (2, 0.0)])
def test_an_impossible_partition_is_refused(silos: int, concentration: float) -> None:
    with pytest.raises(DataError, match="cannot be dealt out"):
        dirichlet_partition([0, 1, 2], silos, concentration, 0)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_largest_concentration_is_even(kind: str) -> None:
    """Of far larger ones numpy's draws overflow, and one silo gets everything."""
    parts = deal(section(kind, concentration=1e9), samples_of([label % 3 for label in range(300)]), 5, 0)
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    with pytest.raises(ValidationError, match="concentration"):
        section(kind, concentration=1e300)


# --- files for silos --------------------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "warm?"}, {"role": "assistant", "content": "\u2028no, \u51b7"}]
# task -> label list, and rows as JSON lines have them
ROWS: dict[str, tuple[TaskName, tuple[str, ...], list[dict[str, Any]]]] = {
    "texts": (
        "sequence-classification",
        ("a", "7"),
        [{"text": ' two\r\nlines, "quoted" ', "label": " a"}, {"text": "\u51b7\ufeff", "label": 7.0}],
    ),
    "label lists": (
        "multi-label-classification",
        ("a", "b"),
        [{"text": "x", "labels": []}, {"text": "y", "labels": "a|b"}, {"text": "z", "labels": ["b"]}],
    ),
    "numbers": (
        "regression",
        (),
        [{"text": "x", "label": 0.1}, {"text": "y", "label": -2}, {"text": "z", "label": "1e2"}],
    ),
    "words": (
        "token-classification",
        ("O", "B-X"),
        [{"words": "a b", "tags": "O B-X"}, {"words": ["c\u00a0d"], "tags": ["O"]}],
    ),
    "images": (
        "image-classification",
        ("a", "b"),
        [{"image": "e\u0301.png", "label": "a"}, {"image": "f/g.png", "label": "b"}],
    ),
    "conversations": ("causal-lm", (), [{"messages": TALK}, {"messages": json.dumps(TALK * 2)}]),
    "completions": ("causal-lm", (), [{"prompt": "", "completion": " x"}, {"prompt": "y\n", "completion": "z"}]),
    "language": ("causal-lm", (), [{"text": "x"}, {"text": "y"}]),
}
every_kind_of_row = pytest.mark.parametrize("what", ROWS)


def read(what: str, directory: Path, group: str | None = None) -> Samples:
    """The samples of a file that is written as such files come, each row with a number."""
    name, labels, rows = ROWS[what]
    (directory / "f").mkdir(parents=True)
    for image in ("\u00e9.png", "f/g.png"):
        Image.new("RGB", (4, 4)).save(directory / image)
    path = directory / "all.jsonl"
    path.write_text("".join(json.dumps(row | {"ward": n}) + "\n" for n, row in enumerate(rows)), encoding="utf-8")
    return read_samples(path, COLUMNS, TASKS[name].forms, TASKS[name].reader(labels), group=group)


@every_kind_of_row
def test_a_silo_reads_from_its_file_what_it_was_dealt(what: str, tmp_path: Path) -> None:
    samples = read(what, tmp_path / "whole", group="ward")
    parts = {"north.east": torch.tensor([1]), "_7": torch.tensor(list({*range(len(samples))} - {1}))}
    write_split(samples, parts, tmp_path / "new" / "split")
    task, labels, _ = ROWS[what]
    assert sorted(path.name for path in (tmp_path / "new" / "split").iterdir()) == ["_7.jsonl", "north.east.jsonl"]
    for silo, part in parts.items():
        dealt = samples.subset(part)
        path = tmp_path / "new" / "split" / f"{silo}.jsonl"
        silos_own = Examination(path, COLUMNS, FORMS, first_counts=False)  # as a silo looks, before it knows the task
        assert silos_own.form in TASKS[task].forms
        silos_own.resolve(TASKS[task].reader(labels))
        again = silos_own.samples()
        assert (again.values, again.targets, again.labels) == (dealt.values, dealt.targets, dealt.labels)
        assert (again.warnings, again.groups) == ((), None)
        assert (
            read_samples(path, COLUMNS, TASKS[task].forms, TASKS[task].reader(labels), group="group").groups
            == dealt.groups
        )


def test_images_of_a_relative_path_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read("images", tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    samples = TASKS["image-classification"].read_labelled(Path("whole/all.jsonl"), COLUMNS, ("a", "b"))
    write_split(samples, {"north": torch.tensor([0, 1])}, Path("split"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = TASKS["image-classification"].read_labelled(tmp_path / "split" / "north.jsonl", COLUMNS, ("a", "b"))
    assert again.targets == [0, 1]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    samples, parts = samples_of([0, 1]), {"north": torch.tensor([0]), "south": torch.tensor([1])}
    (tmp_path / "south.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"south\.jsonl: is there already") as raised:
        write_split(samples, parts, tmp_path)
    assert "another directory" in raised.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["south.jsonl"]
    assert (tmp_path / "south.jsonl").read_text() == "mine"


# --- who has what -----------------------------------------------------------------------------------------------------

PARTS = {"north": torch.tensor([0, 1, 4]), "south": torch.tensor([2, 3])}
COUNTS: list[tuple[Callable[[], Samples], list[str], dict[str, Any]]] = [
    (lambda: samples_of([2, 0, 0, 2, 2]), ["a", "b", "c"], {"north": [1, 0, 2], "south": [1, 0, 1]}),
    (lambda: samples_of([[1.0]] * 5, "yxyyx"), ["x", "y"], {"north": [2, 1], "south": [0, 2]}),
    (lambda: samples_of(None, n=5), [], {"north": [3], "south": [2]}),
]


@pytest.mark.parametrize(("samples", "names", "counts"), COUNTS, ids=["classes", "groups", "rows"])
def test_what_each_silo_has_is_counted(
    samples: Callable[[], Samples], names: list[str], counts: dict[str, Any]
) -> None:
    assert split_counts(samples(), PARTS, ("a", "b", "c")) == {"labels": names, "silos": counts}
