"""The bench of the method's changes: on tiny stand-ins, and its arithmetic against what it stands for."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from bench import accuracy
from bench.paper import cells, worlds
from bench.paper.worlds import World
from fedpft.demo.run import merged
from fedpft.tasks import TASKS

ACCURACY, LOSS = (TASKS[name].headline for name in ("sequence-classification", "causal-lm"))
SETTINGS = {
    "model": {"task": "sequence-classification", "max_tokens": 16},
    "distillation": {"closed_form_samples": 4, "steps": 1, "batch": 4},
    "alignment": {"every_rounds": 1, "steps": 1, "batch": 4},
    "training": {"rounds": 2, "batch": 4},
    "federation": {"sample_fraction": 0.5},
    "simulation": {"silos": 4, "partition": {"kind": "iid"}},
}
TINY = World(
    "tiny",
    "bert",
    "animals",
    layers=3,
    hidden=tiny.D,
    ffn=tiny.F,
    settings=SETTINGS,
    origin={"model": {}, "data": {"train": 32}},
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(worlds, "worlds", lambda: [TINY])
    tiny.write_model("bert", tmp_path / "data" / "models" / "bert")
    directory = tmp_path / "data" / "animals"
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", 32), ("test", 12), ("public", 12)):
        rows = [
            {"text": " ".join(generator.choice(tiny.WORDS[4:], 8)), "label": tiny.LABELS[number % len(tiny.LABELS)]}
            for number in range(count)
        ]
        (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (directory / "labels.txt").write_text("\n".join(tiny.LABELS), encoding="utf-8")
    return tmp_path


def asked(tmp_path: Path, *words: str) -> Any:
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--data", str(tmp_path / "data")]
    return accuracy.parse([*words, "--model", "bert", "--task", "animals", "--threads", "1", *places])


def test_the_rivals_are_run_once_and_shown_side_by_side(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.run(asked(data))
    table = capsys.readouterr().out
    first = (data / "out" / "accuracy.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in first.splitlines()]
    assert [record["method"] for record in records] == ["fedpft", "paper", "full_model", *accuracy.LAYER_DROPS]
    for record in records:
        for row in ("proxy", "plugged_in"):
            outcomes = record["outcomes"][row]
            assert sum(found for found, _ in outcomes) / 12 == pytest.approx(record["metrics"][row]["accuracy"])
        assert record["metrics"].keys() >= {"proxy", "plugged_in"}
    gaps = records[0]["gaps"]
    assert [stage["stage"] for stage in gaps][:2] == ["cut", "distilled"]
    assert all(len(stage["task_cosine"]) == len(stage["gradient_cosine"]) == 2 for stage in gaps)
    assert not any((data / "work" / "cells").iterdir())
    for name in ("| fedpft |", "| full_model |", "| layer_drop |", "majority"):
        assert name in table
    accuracy.run(asked(data))
    assert (data / "out" / "accuracy.jsonl").read_text(encoding="utf-8") == first


@pytest.mark.slow
def test_the_dials_are_drawn(data: Path) -> None:
    accuracy.run(asked(data, "--change", "dials"))
    records = cells.read_records(data / "out" / "accuracy.jsonl")
    sent = {record["method"]: record["parameters"]["proxy_transformer"] for record in records.values()}
    assert sent["K = F / 16"] < sent["K = F / 8"] < sent["fedpft"] <= sent["K = F / 2"] < sent["K = F / 1"]
    svg = (data / "out" / "accuracy-dials-bert-animals.svg").read_text(encoding="utf-8")
    assert "neurons kept" in svg
    assert "plugged-in" in svg


def test_one_row_of_one_seed_can_be_run_alone(data: Path) -> None:
    accuracy.run(asked(data, "--row", "full_model"))
    records = cells.read_records(data / "out" / "accuracy.jsonl")
    assert [record["method"] for record in records.values()] == ["full_model"]


def test_every_change_of_every_world_is_a_valid_simulation(tmp_path: Path) -> None:
    files = worlds.Files(tmp_path, tmp_path, tmp_path, tmp_path, None)
    for world in worlds.worlds():
        planned = accuracy.table(world, list(accuracy.CHANGES), [0, 1])
        assert len({cell.key for cell in planned}) >= len(planned) / 2 + 1
        for cell in planned:
            cells._config(cell, files, tmp_path / "out", "cpu", None)


def test_a_quick_world_has_a_quarter_of_the_rows() -> None:
    small = accuracy.quick(TINY)
    assert small.origin["data"]["train"] == 8
    assert small.settings["training"]["rounds"] == 1
    assert worlds.digest(small.origin) != worlds.digest(TINY.origin)


def record(**rows: list[tuple[float, float]]) -> dict[str, Any]:
    return {"outcomes": rows}


def test_a_difference_is_that_of_paired_rows() -> None:
    generator = np.random.default_rng(1)
    ours, theirs = (generator.integers(0, 2, 200).astype(float) for _ in range(2))
    both = record(a=[(x, 1.0) for x in ours], b=[(x, 1.0) for x in theirs])
    found = accuracy.compared([both], [both], ("a", "b"), ACCURACY)
    assert found.value == pytest.approx((ours - theirs).mean())
    assert found.error == pytest.approx((ours - theirs).std(ddof=1) / math.sqrt(200))
    same = accuracy.compared([both], [both], ("a", "a"), ACCURACY)
    assert (same.value, same.error) == (0.0, 0.0)


def test_less_loss_is_better_and_rows_weigh_as_many_tokens_as_they_have() -> None:
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 40, 300).astype(float)
    losses = [tokens * generator.uniform(2.0, 3.0, 300), tokens * generator.uniform(3.0, 4.0, 300)]
    both = record(a=list(zip(losses[0], tokens, strict=True)), b=list(zip(losses[1], tokens, strict=True)))
    found = accuracy.compared([both], [both], ("a", "b"), LOSS)
    assert found.value == pytest.approx((losses[1] - losses[0]).sum() / tokens.sum())
    draws = [generator.integers(0, 300, 300) for _ in range(2000)]
    bootstrap = np.std([(losses[1] - losses[0])[i].sum() / tokens[i].sum() for i in draws])
    assert found.error == pytest.approx(bootstrap, rel=0.15)


def test_seeds_share_their_test_rows() -> None:
    rows = [(float(number % 2), 1.0) for number in range(50)]
    none = [(0.0, 1.0)] * 50
    once = accuracy.compared([record(a=rows)], [record(b=none)], ("a", "b"), ACCURACY)
    twice = accuracy.compared([record(a=rows)] * 2, [record(b=none)] * 2, ("a", "b"), ACCURACY)
    assert twice == once, "the same rows again tell nothing new"


def test_the_way_counts_from_layer_drop_to_the_full_model() -> None:
    def of(value: float) -> dict[int, Any]:
        return {0: {"metrics": {"plugged_in": {"loss": value}}}}

    rows = {accuracy.LAYER_DROPS[1]: of(4.0), accuracy.FULL_MODEL: of(3.0), "x": of(3.25)}
    assert accuracy.way(rows["x"], rows, LOSS) == "75%"
    assert accuracy.way(rows["x"], rows | {accuracy.LAYER_DROPS[0]: of(5.0)}, LOSS) == "75%", "from the better one"
    assert accuracy.way(rows["x"], rows | {accuracy.LAYER_DROPS[0]: of(3.5)}, LOSS) == "50%"
    assert accuracy.way(rows["x"], {}, LOSS) == ""
    assert accuracy.way(rows["x"], {"x": rows["x"], accuracy.FULL_MODEL: of(3.0)}, LOSS) == ""


def test_settings_that_a_world_has_are_kept() -> None:
    (cell, *_) = accuracy.table(TINY, [], [3])
    assert cell.seed == 3
    assert cell.settings["training"] == SETTINGS["training"]
    assert merged(cell.settings, {"evaluation": {"gap_samples": 0}})["evaluation"]["gap_samples"] == 0
