"""The measuring instrument: `bench.kernels` end to end on tiny sizes, and what it does with candidates that fail."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels as bench_kernels
from bench import measure, render
from bench.peers import Prepared, close
from fedpft.kernels.schemas import SCHEMAS

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
