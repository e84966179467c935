"""The measuring instruments, end to end on tiny sizes, and what they do with candidates that fail."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels as bench_kernels
from bench import large, measure, render, secagg, wholesilo
from bench import leakage as bench_leakage
from bench import scale as bench_scale
from bench import soak as bench_soak
from bench import transport as bench_transport
from bench.peers import Prepared, close
from fedpft.errors import FedPFTError
from fedpft.kernels.schemas import SCHEMAS
from fedpft.model import loading
from fedpft.model.architectures import layers_of
from fedpft.provision import provision

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "kernels-cpu.json"
    command = [sys.executable, "-m", "bench.kernels", "--quick", "--threads", "1", "--json", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_every_operator_has_rows(results: dict[str, Any]) -> None:
    wanted = {name for name in SCHEMAS if not name.endswith("_backward")}  # a call runs its backward too
    assert {row["operator"] for row in results["rows"]} == wanted


def test_every_kernel_is_right_and_every_ratio_a_number(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        assert "median_seconds" in row["kernel"], row
        assert row["peers"], row
        for name, peer in row["peers"].items():
            assert "failed" not in peer, (row["case"], name, peer)
            assert "not_run" in peer or (math.isfinite(peer["ratio"]) and peer["ratio"] > 0), (row["case"], name, peer)
        low, high = row["kernel"]["quartiles_seconds"]
        assert low <= row["kernel"]["median_seconds"] <= high


def test_the_file_says_where_and_with_what_it_was_measured(results: dict[str, Any]) -> None:
    assert {"date", "commit", "dirty", "machine", "versions"} <= results.keys()
    assert {"cpu", "cores", "caches_bytes", "threads"} <= results["machine"].keys()
    assert {"python", "torch", "compiler", "fedpft"} <= results["versions"].keys()


def test_the_file_alone_is_enough_to_print_and_to_plot(results: dict[str, Any], tmp_path: Path) -> None:
    text = "\n".join(render.tables(results))
    for row in results["rows"]:
        assert f"| {row['case']}" in text
    assert text.count("left out by --quick") >= 1
    render.plot(results, tmp_path / "plot.svg")
    assert "neuron_saliency" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_peers_that_fail_are_shown() -> None:
    values = torch.arange(4.0)

    def broken() -> None:
        raise ValueError("no such epilogue")

    def build() -> Prepared:
        runs: dict[str, Any] = {
            "kernel": lambda: [values],
            "wrong": lambda: [values + 1],
            "broken": broken,
            "no": "why",
        }
        return Prepared(runs, lambda _, found: close(found, [values], 1e-5), values.nbytes)

    rows = (bench_kernels.Comparison("kernel", ("wrong", "broken", "no")),)
    case = bench_kernels.Case("neuron_saliency", "any", torch.float32, build, rows, "one call", "read", values.nbytes)
    (row,) = bench_kernels.measured(case, "cpu", measure.Bandwidth("cpu"), quick=True)
    assert row["peers"]["wrong"]["failed"].startswith("wrong result")
    assert row["peers"]["broken"] == {"failed": "ValueError: no such epilogue"}
    assert row["peers"]["no"] == {"not_run": "why"}
    assert "wrong result" in render.line(row)


def test_a_result_that_is_not_a_number_is_wrong() -> None:
    assert close([torch.tensor([math.nan])], [torch.tensor([1.0])], 1e-5) == math.inf


def _two_buffers(size: int) -> measure.Run:
    source = torch.ones(size, dtype=torch.uint8)
    return lambda: source.clone().clone()  # the first copy lives until the second is made


def test_peak_memory_is_what_stands_above_the_inputs() -> None:
    size = 48 << 20
    assert measure.peak_bytes(_two_buffers, size) == pytest.approx(2 * size, rel=0.1)


def test_candidates_are_timed_in_turns_over_all_sets() -> None:
    calls: list[tuple[int, str]] = []
    sets = [{name: lambda i=i, name=name: calls.append((i, name)) for name in "ab"} for i in range(3)]
    times = measure.interleaved(*sets, budget_seconds=0.0, least=4)
    assert [name for _, name in calls] == ["a", "b"] * 5  # one round warms up
    assert [i for i, _ in calls] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert times["a"].repetitions == 4


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("transport")
    command = [
        sys.executable,
        "-m",
        "bench.transport",
        "--quick",
        "--work",
        str(place),
        "--json",
        str(place / "x.json"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    assert [path.name for path in place.iterdir()] == ["x.json"]
    found: dict[str, Any] = json.loads((place / "x.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_every_transfer_stands_beside_its_bare_stream(transport: dict[str, Any]) -> None:
    rows = {(row["way"], row["silos"], row["kind"]): row for row in transport["transfers"]}
    assert rows.keys() == {(w, 2, k) for w in ("down", "up") for k in ("bare", "bare, kept", "ours")}
    for row in rows.values():
        assert all(seconds > 0 for seconds in row["seconds"])
        assert (
            row["of_bare"]
            == row["total_bytes_per_second"] / rows[row["way"], row["silos"], "bare"]["total_bytes_per_second"]
        )


@pytest.mark.slow
def test_memory_and_rounds_are_measured_for_each_number_of_silos(transport: dict[str, Any]) -> None:
    assert [row["silos"] for row in transport["memory"]] == [row["silos"] for row in transport["empty"]] == [2]
    for row in transport["memory"]:
        assert row["server"]["peak_bytes"] >= row["server"]["before_bytes"] > 0
    assert all(len(row["round_seconds"]) == 2 for row in transport["empty"])
    assert [row["silos"] for row in transport["others"]] == [1, 3, 3]


@pytest.mark.slow
def test_the_transport_file_alone_is_enough_for_its_page(transport: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- measured -->\nold\n<!-- /measured -->\nbelow\n", encoding="utf-8")
    bench_transport.write_docs(transport, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n<!-- measured -->\nMeasured on")
    assert text.endswith("|\n<!-- /measured -->\nbelow\n")
    assert "old" not in text
    assert "NVIDIA FLARE 2.9" in text


def test_kills_are_drawn_from_the_seed() -> None:
    silos = ["a", "b", "c"]
    drawn = bench_soak.plan(silos, rounds=50, kills=12, seed=1)
    assert drawn == bench_soak.plan(silos, rounds=50, kills=12, seed=1) != bench_soak.plan(silos, 50, 12, seed=2)
    assert len(drawn) == 12
    assert [kill.round for kill in drawn] == sorted(kill.round for kill in drawn)
    assert drawn[0].victim == bench_soak.SERVER
    assert {kill.victim for kill in drawn[1:]} > {bench_soak.SERVER}
    assert all(1 <= kill.round < 45 for kill in drawn)


@pytest.mark.parametrize(("name", "how"), [("llama", ""), ("mpnet", ""), ("llama", ", packed")])
def test_a_silos_steps_are_those_of_transformers_trainer(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench_scale.QUICK[name]
    bench_scale.write_model(case, tmp_path)
    found = bench_scale.silo_agreement(case, tmp_path, "cpu", how)
    assert found["loss"] < 1e-5
    monkeypatch.setitem(bench_scale.TOLERANCES, "adapter", 0.0)
    with pytest.raises(FedPFTError, match="adapter differs by"):
        bench_scale.silo_agreement(case, tmp_path, "cpu", how)


def test_a_silos_row_is_compared_with_the_trainer_that_does_the_same() -> None:
    def row(seconds: float, peak_bytes: int) -> dict[str, Any]:
        step = {"median_seconds": seconds, "quartiles_seconds": (seconds, seconds)}
        return {"step": step, "tokens_per_second": 100 / seconds, "weights_bytes": 1 << 20, "peak_bytes": peak_bytes}

    rows = {
        "a: fedpft": row(1.0, 10 << 20),
        "a: fedpft, checkpointing": row(2.0, 5 << 20),
        "a: Trainer + peft": row(2.0, 40 << 20),
        "b: fedpft, checkpointing": row(2.0, 5 << 20),
        "b: Trainer + peft": row(2.0, 40 << 20),
        "b: Trainer + peft, checkpointing": row(4.0, 20 << 20),
        "b: fedpft, int4, packed": row(1.0, 5 << 20),
        "b: Trainer + peft, packed": row(3.0, 10 << 20),
    }
    lines = bench_scale.silo_table({"rows": rows}).splitlines()[2:]
    assert [line.split(" | ")[-2:] for line in lines] == [
        ["2.00", "0.25 |"],
        ["1.00", "0.12 |"],  # MPNet's case: transformers has no checkpointing for it
        ["1.00", "1.00 |"],
        ["2.00", "0.25 |"],
        ["1.00", "1.00 |"],
        ["1.00", "1.00 |"],
        ["3.00", "0.50 |"],
        ["1.00", "1.00 |"],
    ]


# --- an FM that is larger than memory ---------------------------------------------------------------------------------


def test_the_checkpoint_of_bench_large_is_a_model(tmp_path: Path) -> None:
    size = large.write_checkpoint(tmp_path, layers=2, hidden=128, ffn=256)
    assert len(loading.weight_files(tmp_path)) == 3  # what is outside of the layers, and each
    assert size == sum(file.stat().st_size for file in loading.weight_files(tmp_path))
    fm = loading.load_model(tmp_path, "causal-lm", (), seed=0, hold="disk")
    assert len(layers_of(fm)) == 2
    processor = loading.load_processor(tmp_path, "causal-lm")
    assert processor("w0 w29999 other")["input_ids"] == [2, 30001, 1]


def test_a_process_is_watched_phase_by_phase() -> None:
    held = "import sys, time; a = bytearray({mib} << 20); print({line!r}, file=sys.stderr, flush=True); time.sleep(0.6)"
    code = "\n".join([held.format(mib=200, line="cutting the proxy"), "del a", held.format(mib=1, line="closed form")])
    watched = large.Watched()
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        watched.follow(process, "it")
    assert [phase.name for phase in watched.phases] == ["start", "cutting", "closed form"]
    assert watched.phases[1].anonymous_bytes > 200 << 20 > watched.phases[2].anonymous_bytes


def test_what_grows_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"grown": name, "factor": factor, "seconds": 3.0, "peak_bytes": 1 << 30}
        | {"reading_seconds": 0.5, "checkpoint_bytes": 1 << 29}
        for name, factor in [("", 1), *((name, 2) for name in large.BASE)]
    ]
    large.draw(rows, tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    assert all(word in drawn for word in ("layers", "public rows", "times as large", "MiB"))


def test_secure_aggregation_is_measured_on_sums_that_are_right(tmp_path: Path) -> None:
    provision(tmp_path / "kits", [f"silo-0{number}" for number in range(4)])
    for dropped in (0, 1):
        row = secagg.attempt(4, 1000, dropped, tmp_path / "kits", tmp_path)
        assert row["of_them_vector_bytes"] > 4000
        assert row["up_bytes"] > row["of_them_vector_bytes"]
        assert all(seconds >= 0 for side in ("silo", "server") for seconds in row[f"{side}_seconds"].values())


def test_the_table_of_attacks_sets_guessing_beside_each_and_leaves_out_what_is_not_seen() -> None:
    def finding(sees: str, goal: str, value: float) -> dict[str, Any]:
        place = {"attacker": "the server", "sees": sees, "goal": goal, "measure": "AUC"}
        return {**place, "value": value, "guess": 0.5, "error": 0.05, "more": True}

    goal = bench_leakage.UPDATES[0]
    findings = [finding("single updates", goal, 0.7), finding("sums", goal, 0.55), finding("an update", "texts", 0.9)]
    run = {"findings": findings, "wall_seconds": 60.0, "cpu_seconds": 30.0}
    private = {**run, "findings": [{**each, "value": 0.51} for each in findings]}
    lines = bench_leakage.table({"plain": run, "private": private, "seed-1": run}).splitlines()
    cells = "**0.700** (0.500 ± 0.100) | 0.550 (0.500 ± 0.100) | 0.510 (0.500 ± 0.100) | 0.510 (0.500 ± 0.100)"
    assert lines[2] == f"| the server | single updates | {goal} | AUC | {cells} |"
    assert lines[3] == (
        "| the server | an update | texts | AUC | **0.900** (0.500 ± 0.100) | - | 0.510 (0.500 ± 0.100) | - |"
    )
    assert f"| single updates | {goal} | AUC | **0.700** (0.500 ± 0.100) | **0.700** (0.500 ± 0.100) | 0.700 |" in lines
    assert "| private | 60 | 30 |" in lines


def test_noise_costs_few_silos_more_than_many() -> None:
    """Two classes that a head tells apart with ease: without noise always, of few silos at a low epsilon by chance."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 2
    features = torch.cat([torch.nn.functional.one_hot(labels).float(), torch.rand(240, 30, generator=draw)], 1)
    data = wholesilo.Data(features, labels)
    few, many = wholesilo.rows(data, data, (3,), 2), wholesilo.rows(data, data, (120,), 2)
    assert few[0]["accuracies"] == many[0]["accuracies"] == [1.0]
    assert [row["epsilon"] for row in many] == [None, *wholesilo.EPSILONS]
    assert min(many[1]["accuracies"]) > max(few[2]["accuracies"])
    assert "| 120 | 2 | 1.000 |" in wholesilo.table({"rows": many})
