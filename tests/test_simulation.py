"""What is simulated is what a federation of real processes comes to, to the byte, in whatever way it is run."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from faults import PATIENCE, Deployment
from safetensors.torch import load_file

from fedpft import cli
from fedpft.config import RoundSettings, SimulationConfig, load_server_config, load_simulation_config
from fedpft.demo.run import run_federation
from fedpft.errors import ConfigError, DataError, FedPFTError, ModelError, QuorumLost
from fedpft.provision import provision
from fedpft.seeding import derive_seed
from fedpft.server.identity import settings as settings_of_run
from fedpft.server.inbox import Inbox
from fedpft.server.ledger import Ledger
from fedpft.silo.learner import Learner
from fedpft.silo.work import Work
from fedpft.simulation.crew import Job, Post, Worker, crew
from fedpft.simulation.data import SilosData
from fedpft.simulation.run import simulate
from fedpft.simulation.silos import drops_out
from fedpft.wire.v1 import federation_pb2 as pb

Settings = dict[str, Any]


class Killed(BaseException):
    """As `kill -9`: no handler of the code's own catches it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, one labelled file, public and test data."""
    root = tmp_path_factory.mktemp("inputs")
    tiny.write_model("bert", root / "model")
    (root / "labels.txt").write_text("\n".join(tiny.LABELS) + "\n", encoding="utf-8")
    draw = random.Random(0)
    for name, rows in {"train": 90, "public": 32, "test": 20}.items():
        lines = ["text,label,ward"]
        for _ in range(rows):
            words = " ".join(draw.choices(tiny.WORDS[4:], k=draw.randint(2, 9)))
            lines.append(f"{words},{draw.choice(tiny.LABELS)},{draw.choice('abcdefg')}")
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def server_settings(root: Path, **changes: Any) -> Settings:
    settings: Settings = {
        "seed": 5,
        "threads": 1,
        "model": {"path": str(root / "model"), "labels": str(root / "labels.txt"), "max_tokens": 12},
        "proxy": {"neurons": 40},
        "distillation": {"closed_form_samples": 16, "steps": 2, "batch": 8},
        "alignment": {"counts": "silos", "every_rounds": 1, "steps": 2, "batch": 8},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"rounds": 3, "local_epochs": 0.5, "batch": 10, "learning_rate": 0.01},
        "public_data": str(root / "public.csv"),
        "test_data": str(root / "test.csv"),
    }
    for section, values in changes.items():
        merged = isinstance(values, dict) and section in settings
        settings[section] = {**settings[section], **values} if merged else values
    return settings


def written(directory: Path, settings: Settings) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "simulation.yaml"
    path.write_text(yaml.safe_dump({"out": str(directory / "out"), **settings}), encoding="utf-8")
    return path


def simulated(directory: Path, root: Path, simulation: Settings | None = None, **changes: Any) -> SimulationConfig:
    section = {"data": str(root / "train.csv"), "silos": 4} if simulation is None else simulation
    return load_simulation_config(written(directory, server_settings(root, **changes) | {"simulation": section}))


def left(out: Path) -> dict[str, str]:
    """SHA-256 of all that a federation leaves for good."""
    patterns = ("*.safetensors", "merged/*.safetensors", "adapter/*.safetensors", "rounds/*/*", "patches/*")
    paths = [path for pattern in patterns for path in out.glob(pattern)]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def updates(out: Path) -> list[tuple[int, str, str, int]]:
    """(round, silo, SHA-256, samples) of each update that counts."""
    with closing(sqlite3.connect(out / "ledger.sqlite")) as database:
        return database.execute("SELECT round, silo, sha256, samples FROM updates ORDER BY round, silo").fetchall()


def real(directory: Path, config: SimulationConfig, root: Path, **changes: Any) -> tuple[Settings, dict[str, Settings]]:
    """Settings of a server and of silos that have each what they are dealt out in the simulation."""
    dealt = SilosData(config)
    dealt.write(directory / "silos")
    silos = {
        silo: {
            "insecure_loopback": True,
            "insecure_name": silo,
            "data": {"path": str(directory / "silos" / f"{silo}.jsonl")},
            "threads": 1,
        }
        for silo in dealt.config.federation.silos
    }
    federation = {**changes.pop("federation", {}), "silos": list(silos)}
    server = server_settings(root, federation=federation, **changes)
    return server | {"listen": "127.0.0.1:0", "insecure_loopback": True}, silos


def test_simulation_gives_the_bytes_of_real_processes(inputs: Path, tmp_path: Path) -> None:
    section = {
        "data": str(inputs / "train.csv"),
        "silos": 5,
        "partition": {"kind": "dirichlet", "concentration": 0.5},
    }
    changes: Settings = {
        "proxy": {"importance": "leverage", "spread": "global"},
        "federation": {"sample_fraction": 0.5},
        "training": {"update_encoding": "int8"},
    }
    config = simulated(tmp_path / "simulated", inputs, section, **changes)
    server, silos = real(tmp_path / "real", config, inputs, **changes)
    federated = run_federation(tmp_path / "real", server, silos)
    summary = simulate(config)

    assert left(config.out) == left(tmp_path / "real" / "out")
    assert "patches/patch-2.safetensors" in left(config.out), "the proxy was aligned"
    neurons = json.loads((config.out / "proxy" / "bundle" / "proxy.json").read_text(encoding="utf-8"))["neurons"]
    assert len(set(neurons[1:3])) == 2, "its layers are of different sizes"
    assert updates(config.out) == updates(tmp_path / "real" / "out")
    assert summary["metrics"] == federated["metrics"]
    assert summary["bytes"] == federated["bytes"]
    assert summary["data"] == federated["data"]


def test_simulation_gives_the_sum_that_silos_come_to_under_masks(inputs: Path, tmp_path: Path) -> None:
    section = {"data": str(inputs / "train.csv"), "silos": 4, "partition": {"kind": "dirichlet"}}
    changes: Settings = {
        "federation": {"sample_fraction": 0.75, "secure_aggregation": True},
        "aggregation": {"optimizer": "momentum"},
        "training": {"rounds": 2},
    }
    config = simulated(tmp_path / "simulated", inputs, section, **changes)
    server, silos = real(tmp_path / "real", config, inputs, **changes)
    provision(tmp_path / "kits", list(silos))
    kits = {"server": tmp_path / "kits" / "server"} | {name: tmp_path / "kits" / "silos" / name for name in silos}
    tls = {
        name: {"tls": {part: str(kit / f"{part}.pem") for part in ("ca", "certificate", "key")}}
        for name, kit in kits.items()
    }
    without = {"insecure_loopback", "insecure_name"}
    server = {key: value for key, value in server.items() if key not in without} | tls["server"]
    silos = {
        name: {key: value for key, value in silo.items() if key not in without}
        | tls[name]
        | {"require": ["secure_aggregation"]}
        for name, silo in silos.items()
    }
    federated = run_federation(tmp_path / "real", server, silos)
    summary = simulate(config)

    assert left(config.out) == left(tmp_path / "real" / "out")
    assert "patches/patch-1.safetensors" in left(config.out), "by the sum of the inactivity counts"
    assert summary["metrics"] == federated["metrics"]
    assert summary["bytes"] == federated["bytes"]
    assert summary["data"]["silos"] == federated["data"]["silos"] == {}, "nothing of a single silo"
    assert updates(tmp_path / "real" / "out") == []


def test_silo_that_drops_out_is_missing_as_a_real_one_is(inputs: Path, tmp_path: Path) -> None:
    section = {"data": str(inputs / "train.csv"), "silos": 3, "drop_out_fraction": 0.3}
    changes: Settings = {
        "seed": 6,
        "training": {"rounds": 2},
        "federation": {"min_silos": 2},
        "adapter": {"ffn": True},  # which the silos are told, too
    }
    config = simulated(tmp_path / "simulated", inputs, section, **changes)
    server, silos = real(tmp_path / "real", config, inputs, **changes)
    out = [(round, silo) for round in (1, 2) for silo in silos if drops_out(config, round, silo)]
    assert out == [(2, "silo-2")], "of this seed"

    simulate(config)
    with Deployment(tmp_path / "real", server, silos) as running:
        running.start()
        leaving = running.silos["silo-2"]
        leaving.halt_at(r"^log silo-2: round 1 of 2: sent")
        leaving.await_halt()
        received = running.work("silo-2") / "received"
        shutil.rmtree(received)
        received.write_text("no directory: the silo fails in round 2, and says so", encoding="utf-8")
        leaving.release()
        for party in (running.server, running.silos["silo-1"], running.silos["silo-3"]):
            assert party.await_end() == 0
        assert left(config.out) == left(tmp_path / "real" / "out")
        trained = load_file(config.out / "adapter.safetensors")
        assert all(trained[f"bert.encoder.layer.1.intermediate.lora_B.{name}"].any() for name in ("w_in", "w_out"))
        assert updates(config.out) == updates(tmp_path / "real" / "out")


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a simulation in this process, which nothing disturbs."""
    config = simulated(tmp_path_factory.mktemp("alone"), inputs, training={"update_encoding": "int8"})
    simulate(config)
    return config.out


def test_ray_gives_the_same_bytes(alone: Path, inputs: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        config = simulated(tmp_path, inputs, training={"update_encoding": "int8"})
        simulate(config, ray="auto")
    finally:
        ray.shutdown()
    assert left(config.out) == left(alone)


def test_without_ray_or_a_cluster_the_error_says_what_to_do(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="needs ray") as caught:
        simulate(simulated(tmp_path, inputs), ray="auto")
    assert "pip install 'fedpft[ray]'" in caught.value.remedy


MOMENTS: dict[str, tuple[type, str, int]] = {
    "a round has begun": (Ledger, "begin_round", 2),
    "a silo has trained": (Work, "keep_update", 6),
    "its update was looked at": (Inbox, "take_in", 6),
    "its update counts": (Inbox, "keep", 6),
    "its rounding error is kept": (Work, "count_update", 6),
    "its update is deleted": (Work, "drop_update", 6),
    "a round's mean is entered": (Ledger, "enter_file", 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_simulation_that_was_killed_goes_on_to_the_same_bytes(
    moment: str, alone: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after the call of that number, in the second of three rounds."""
    kind, method, last = MOMENTS[moment]
    calls, whole = 0, getattr(kind, method)

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = whole(*arguments, **options)
        if calls == last:
            raise Killed
        return result

    config = simulated(tmp_path, inputs, training={"update_encoding": "int8"})
    with monkeypatch.context() as patched:
        patched.setattr(kind, method, deadly)
        with pytest.raises(Killed):
            simulate(config)
    simulate(config)
    assert left(config.out) == left(alone)
    assert updates(config.out) == updates(alone)


def test_what_the_proxy_weighs_is_counted_though_the_first_round_was_begun_twice(
    alone: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Ledger.begin_round

    def deadly(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        raise Killed

    config = simulated(tmp_path, inputs, training={"update_encoding": "int8"})
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "begin_round", deadly)
        with pytest.raises(Killed):
            simulate(config)
    whole = json.loads((alone / "summary.json").read_text(encoding="utf-8"))
    assert simulate(config)["bytes"] == whole["bytes"]


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_pool_of_processes_ends_with_the_one_that_is_killed_and_another_goes_on(
    alone: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = simulated(tmp_path, inputs, training={"update_encoding": "int8"})
    command = ["fedpft", "simulate", "--config", str(tmp_path / "simulation.yaml")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpft.cli", *command[1:], "--processes", "2"], stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: (config.out / "rounds" / "2").exists() or process.poll() is not None)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    finally:
        process.kill()
        process.wait()
    assert len(children) >= 2
    until(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))
    assert 4 <= len(updates(config.out)) < 12, "some of three rounds"
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 0
    assert "plugged_in" in capsys.readouterr().out
    assert left(config.out) == left(alone)


def test_faults_in_a_process_of_a_pool_are_told_as_they_are(alone: Path, inputs: Path, tmp_path: Path) -> None:
    config = simulated(tmp_path, inputs)
    settings = RoundSettings(seed=5, adapter=config.adapter, training=config.training, inactive_below=0.0)
    post = Post(tmp_path / "nothing", settings, SilosData(config))
    jobs = [Job("silo-1", pb.Train(round=1), alone / "adapter.safetensors", None)]
    pool = crew(post, 2, None)
    try:
        with pytest.raises(ModelError, match="nothing"):
            list(pool.run(jobs))
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid or 0, signal.SIGINT)  # as a terminal does to all at once
        with pytest.raises(ModelError, match="nothing"):
            list(pool.run(jobs))
        for child in children:
            child.kill()
        with pytest.raises(FedPFTError, match="was killed") as caught:
            list(pool.run(jobs))
        assert "fewer --processes" in caught.value.remedy
    finally:
        pool.close()


def test_one_proxy_serves_all_silos(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Learner] = []
    initialise = Learner.__init__

    def counting(learner: Learner, *arguments: Any) -> None:
        made.append(learner)
        initialise(learner, *arguments)

    monkeypatch.setattr(Learner, "__init__", counting)
    config = simulated(tmp_path, inputs, {"data": str(inputs / "train.csv"), "silos": 12}, training={"rounds": 2})
    simulate(config)
    assert len(made) == 1
    assert not (config.out / "silos").exists(), "nothing of them is left on disk"


def test_silo_whose_training_fails_is_named_and_others_take_its_place(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Learner.train

    def failing(learner: Learner, silo: str, *arguments: Any, **options: Any) -> Any:
        if silo == "silo-3":
            raise DataError("round 1, step 1: the training loss is not finite", "look at the data")
        return train(learner, silo, *arguments, **options)

    monkeypatch.setattr(Learner, "train", failing)
    simulate(simulated(tmp_path / "quorum", inputs, federation={"min_silos": 3}))
    assert {silo for _, silo, *_ in updates(tmp_path / "quorum" / "out")} == {"silo-1", "silo-2", "silo-4"}
    with pytest.raises(QuorumLost, match=r"silo-3.*not finite"):
        simulate(simulated(tmp_path / "all", inputs))


def test_quorum_that_is_lost_ends_the_training_and_the_same_command_goes_on(
    alone: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, tried = Learner.train, []

    def failing(learner: Learner, silo: str, dataset: Any, job: Any, *arguments: Any, **options: Any) -> Any:
        tried.append((job.round, silo))
        if (job.round, silo) == (2, "silo-3"):
            raise DataError("its disk was not there", "mount it")
        return train(learner, silo, dataset, job, *arguments, **options)

    config = simulated(tmp_path, inputs, training={"update_encoding": "int8"})
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "train", failing)
        with pytest.raises(QuorumLost, match=r"silo-3: its disk"):
            simulate(config)
    assert tried[-1] == (2, "silo-3"), "nobody trains for a round that is lost"
    simulate(config)
    assert left(config.out) == left(alone)


def test_quorum_lost_to_silos_that_drop_out_is_lost_before_anybody_trains(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "train", lambda *_, **__: pytest.fail("trains for nothing"))
    section = {"data": str(inputs / "train.csv"), "silos": 4, "drop_out_fraction": 0.9}
    with pytest.raises(QuorumLost, match="it dropped out"):
        simulate(simulated(tmp_path, inputs, section, federation={"min_silos": 4}))


def test_update_that_cannot_be_used_counts_in_no_round(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: Settings = {"federation": {"max_update_norm": 1e-9}}
    with pytest.raises(QuorumLost, match="L2 norm of the change"):
        simulate(simulated(tmp_path, inputs, **changes))
    assert updates(tmp_path / "out") == []


def test_a_directory_has_a_file_for_each_silo(inputs: Path, tmp_path: Path) -> None:
    config = simulated(tmp_path / "one", inputs)
    SilosData(config).write(tmp_path / "split")
    simulate(config)
    again = simulated(tmp_path / "many", inputs, {"data": str(tmp_path / "split")})
    simulate(again)
    assert left(config.out) == left(again.out)


@pytest.mark.parametrize(
    ("section", "federation", "message"),
    [
        ({"silos": 3}, {"silos": ["a", "b"]}, "simulation.silos is 3, federation.silos names 2"),
        ({}, {}, "nothing says how many silos share it"),
        ({"silos": 3}, {"min_silos": 4}, "federation.min_silos is 4, but only 3 silos are named"),
        ({"data": "."}, {}, "no data file in this directory"),
        ({"silos": 91}, {}, "90 samples cannot be dealt out to 91 silos"),
        ({"silos": 2, "partition": {"kind": "column", "column": "hospital"}}, {}, "hospital"),
    ],
)
def test_what_cannot_be_dealt_out_is_one_clear_error(
    section: Settings, federation: Settings, message: str, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    section = {"data": str(inputs / "train.csv"), **section}
    if section["data"] == ".":
        section["data"] = str(tmp_path / "empty")
    config = simulated(tmp_path, inputs, section, federation=federation)
    with pytest.raises(FedPFTError, match=message):
        simulate(config)
    assert not (tmp_path / "out" / "ledger.sqlite").exists()


def test_directory_without_a_named_silo_is_refused(inputs: Path, tmp_path: Path) -> None:
    SilosData(simulated(tmp_path, inputs)).write(tmp_path / "split")
    config = simulated(tmp_path, inputs, {"data": str(tmp_path / "split")}, federation={"silos": ["silo-1", "north"]})
    with pytest.raises(ConfigError, match="has no file of north"):
        simulate(config)


@pytest.mark.parametrize(
    ("files", "section", "message", "remedy"),
    [
        ({"a.csv": 2, "a.of-ward-b.csv": 2, "a.tsv": 2}, {}, "2 files of silo 'a'", "leave one"),
        ({"a.csv": 2, "b.csv": 0}, {}, "b.csv: a header but no rows", "write one row a sample"),
        ({"north ward.csv": 2}, {}, "'north ward' is not a name", "call the files otherwise"),
        ({"a.csv": 2}, {"silos": 2}, "deal out one file", "remove the two keys"),
        ({"a.csv": 2}, {"partition": {"kind": "shards"}}, "deal out one file", "remove the two keys"),
    ],
)
def test_directory_of_silos_is_looked_at_before_anything_begins(
    files: dict[str, int], section: Settings, message: str, remedy: str, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in files.items():
        (tmp_path / "data" / name).write_text("text,label\n" + "the bird,sky\n" * rows, encoding="utf-8")
    with pytest.raises(FedPFTError, match=message) as caught:
        simulate(simulated(tmp_path, inputs, {"data": str(tmp_path / "data"), **section}))
    assert remedy in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_rows_of_a_silo_that_are_left_out_are_told(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("text,label\nthe bird,sky\nthe fish,\n", encoding="utf-8")
    data = SilosData(simulated(tmp_path, inputs, {"data": str(tmp_path / "data"), "bad_rows": "skip"}))
    assert data.sizes == {"a": 1}
    assert "a.csv:3: the label is empty" in caplog.text


def test_owner_measures_and_plugs_in_what_was_simulated(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    summary = json.loads((alone / "summary.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["fedpft", "evaluate", "--config", str(alone.parent / "simulation.yaml")])
    assert cli.main() == 0
    assert f"{summary['metrics']['plugged_in']['accuracy']:.4f}" in capsys.readouterr().out
    assert "simulation" not in caplog.text, "who had what data makes no difference"


@pytest.mark.parametrize("update", ["active", "gradient"])
def test_no_silo_counts_where_the_server_can_do_without(update: str, inputs: Path, tmp_path: Path) -> None:
    alignment = {"update": update, **({"counts": "public"} if update == "active" else {})}
    config = simulated(tmp_path, inputs, alignment=alignment, training={"rounds": 2})
    summary = simulate(config)
    assert summary["rounds"][0]["alignment_loss"] > 0
    with closing(sqlite3.connect(config.out / "ledger.sqlite")) as database:
        asked = database.execute("SELECT round, count_inactivity FROM rounds ORDER BY round").fetchall()
    assert asked == [(1, 0), (2, 0)]


PLUG_IN = {"layer_scales": True, "steps": 3, "batch": 8, "learning_rate": 0.01}


def test_refined_product_is_the_same_after_a_kill_and_by_the_commands(
    alone: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins as one that is not refined, dies when the product is measured, and goes on."""
    for changes in ({}, {"plug_in": PLUG_IN}):
        config = simulated(tmp_path, inputs, training={"update_encoding": "int8"}, **changes)
        with monkeypatch.context() as patched:
            patched.setattr("fedpft.server.run.measure_worth", deadly)
            with pytest.raises(Killed):
                simulate(config)
    summary = simulate(config)
    plain = json.loads((alone / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert list(summary["metrics"]) == ["majority", "zero_shot", "proxy", "plugged_in_raw", "plugged_in"]
    assert summary["metrics"]["plugged_in_raw"] == plain["plugged_in"]
    assert summary["seconds"]["refinement"] > 0
    curves = json.loads((config.out / "curves.json").read_text(encoding="utf-8"))
    assert len(curves["refinement"]["layer_scales"]) == tiny.L
    assert len(curves["refinement"]["loss"]) == 3
    ours, theirs = left(config.out), left(alone)
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ == {"merged/model.safetensors", "adapter/adapter_model.safetensors"}, "the federation is the same"

    yaml_file = str(tmp_path / "simulation.yaml")
    monkeypatch.setattr(sys, "argv", ["fedpft", "plug-in", "--config", yaml_file, "--out", str(tmp_path / "again")])
    assert cli.main() == 0
    for name in differ:
        assert (tmp_path / "again" / name).read_bytes() == (config.out / name).read_bytes()
    monkeypatch.setattr(sys, "argv", ["fedpft", "evaluate", "--config", yaml_file])
    assert cli.main() == 0
    assert "plugged_in_raw" in capsys.readouterr().out


def deadly(*_arguments: object) -> None:
    raise Killed


def test_there_is_nothing_to_refine_where_the_proxy_is_the_fm(inputs: Path, tmp_path: Path) -> None:
    whole = {"neurons": "all", "allow_whole": True}
    summary = simulate(simulated(tmp_path, inputs, proxy=whole, plug_in=PLUG_IN, training={"rounds": 1}))
    assert list(summary["metrics"]) == ["majority", "zero_shot", "proxy", "plugged_in"]


def test_a_natural_split_keeps_each_value_of_the_column_together(inputs: Path, tmp_path: Path) -> None:
    config = simulated(
        tmp_path,
        inputs,
        {"data": str(inputs / "train.csv"), "silos": 3, "partition": {"kind": "column", "column": "ward"}},
    )
    data = SilosData(config)
    wards = [set(data.samples(silo).groups or ()) for silo in data.config.federation.silos]
    assert sum(map(len, wards)) == len(set.union(*wards)) == 7
    assert sum(data.sizes.values()) == 90


def test_report_draws_who_has_what(alone: Path) -> None:
    split = json.loads((alone / "curves.json").read_text(encoding="utf-8"))["split"]
    assert split["labels"] == list(tiny.LABELS)
    assert sum(sum(counts) for counts in split["silos"].values()) == 90


def test_run_cannot_go_on_with_another_split(alone: Path, inputs: Path) -> None:
    config = simulated(alone.parent, inputs, {"data": str(inputs / "train.csv"), "silos": 3})
    with pytest.raises(ConfigError, match="begun with another"):
        simulate(config)


def test_server_yaml_is_a_simulation_but_for_its_section(inputs: Path, tmp_path: Path) -> None:
    """listen and tls may stay: nothing listens, and no certificate is read."""
    settings = server_settings(inputs, federation={"silos": ["a", "b"]}) | {
        "listen": "0.0.0.0:1",
        "tls": {name: f"{name}.pem" for name in ("ca", "certificate", "key")},
    }
    load_server_config(written(tmp_path, settings))
    path = written(tmp_path, settings | {"simulation": {"data": str(inputs / "train.csv")}})
    summary = simulate(load_simulation_config(path))
    assert summary["rounds"][-1]["silos"] == 2
    with pytest.raises(ConfigError, match="section 'simulation' is for `fedpft simulate`"):
        load_server_config(path)


def test_threads_and_silos_belong_to_what_a_run_is(inputs: Path, tmp_path: Path) -> None:
    config = SilosData(simulated(tmp_path, inputs)).config
    settings = settings_of_run(config)
    assert settings["simulation"]["threads"] == 1
    assert settings["silos"] == [f"silo-{number}" for number in range(1, 5)]
    assert "data" not in settings["simulation"]


def test_torch_has_its_threads_back_after_a_silo(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    train: Callable[..., Any] = Worker._train
    monkeypatch.setattr(Worker, "_train", lambda *job: (seen.append(torch.get_num_threads()), train(*job))[1])
    threads = torch.get_num_threads()
    settings = server_settings(inputs, training={"rounds": 1}) | {
        "threads": 2,
        "simulation": {"data": str(inputs / "train.csv"), "silos": 2, "threads": 1},
    }
    try:
        simulate(load_simulation_config(written(tmp_path, settings)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {1}


def test_share_of_silos_that_drop_out() -> None:
    draws = [derive_seed(0, "drops out", round, f"silo-{silo}") / 2**63 for round in range(20) for silo in range(100)]
    assert 0.18 < sum(draw < 0.2 for draw in draws) / len(draws) < 0.22
