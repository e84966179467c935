"""The run is the run that was begun: what it depends on is known by content, at every start and in every command."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from faults import await_
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from fedpft import cli
from fedpft.config import ServerConfig, SiloConfig, SimulationConfig, load_server_config
from fedpft.digests import Digests
from fedpft.errors import CheckpointError, ConfigError, DataError, ModelError, QuorumLost
from fedpft.server import construction, identity
from fedpft.server.ledger import Ledger
from fedpft.server.run import run
from fedpft.silo.run import run as run_silo

TEXTS = [f"the {color} {thing} moves" for color in ("red", "green") for thing in ("bird", "fish", "tree")]
Edit = Callable[[Path, dict[str, Any]], object]


def write_inputs(directory: Path, fm: Path) -> dict[str, Any]:
    """The owner's files in a directory; returns a server.yaml for them."""
    shutil.copytree(fm, directory / "fm")
    (directory / "labels.txt").write_text("\n".join(tiny.LABELS), encoding="utf-8")
    (directory / "public.csv").write_text("text\n" + "\n".join(TEXTS), encoding="utf-8")
    (directory / "test.csv").write_text("text,label\n" + "\n".join(f"{t},sea" for t in TEXTS), encoding="utf-8")
    return {
        "out": "out",
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "threads": 1,
        "model": {"path": "fm", "labels": "labels.txt", "max_tokens": 12},
        "distillation": {"steps": 1, "batch": 2, "closed_form_samples": 0},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"rounds": 1},
        "federation": {"silos": ["north"], "round_deadline_seconds": 0.05},
        "public_data": "public.csv",
        "test_data": "test.csv",
    }


def config_of(directory: Path, settings: dict[str, Any]) -> ServerConfig:
    (directory / "server.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_server_config(directory / "server.yaml")


@pytest.fixture
def settings(fm_directory: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    return write_inputs(tmp_path, fm_directory("bert"))


def begin(directory: Path, settings: dict[str, Any]) -> None:
    """A run of which no silo has heard: begun, and stopped before its first round."""
    with pytest.raises(QuorumLost):
        run(config_of(directory, settings))


@pytest.fixture
def begun(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    begin(tmp_path, settings)
    return settings


def same_but_for(path: Path, before: bytes, after: bytes) -> None:
    """Other bytes, with the same size and the same mtime."""
    times, content = path.stat(), path.read_bytes()
    assert len(before) == len(after)
    assert before in content
    path.write_bytes(content.replace(before, after))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    same_but_for(path, content[-16:], content[-16:-1] + bytes([content[-1] ^ 1]))


CHANGES: dict[str, tuple[Edit, list[str]]] = {
    "weights": (
        lambda d, _: flip_last_byte(d / "fm/model.safetensors"),
        ["model.path", "model.safetensors was changed"],
    ),
    "config": (lambda d, _: same_but_for(d / "fm/config.json", b"0.3", b"0.2"), ["config.json was changed"]),
    "tokenizer": (lambda d, _: same_but_for(d / "fm/tokenizer.json", b"stone", b"stine"), ["tokenizer.json"]),
    "added": (lambda d, _: (d / "fm/generation_config.json").write_text("{}"), ["generation_config.json was added"]),
    "gone": (lambda d, _: shutil.rmtree(d / "fm"), ["config.json is gone"]),
    "labels": (
        lambda d, _: (d / "labels.txt").write_text("\n".join(reversed(tiny.LABELS))),
        ["model.labels", "labels.txt): it was changed"],
    ),
    "public": (lambda d, _: same_but_for(d / "public.csv", b"red", b"blu"), ["public_data", "public.csv): it was"]),
    "test": (lambda d, _: same_but_for(d / "test.csv", b"sea", b"sky"), ["test_data", "test.csv): it was changed"]),
    "no test data": (lambda d, s: s.pop("test_data"), ["test_data (not in server.yaml): it is gone"]),
    "two": (
        lambda d, _: (flip_last_byte(d / "fm/model.safetensors"), same_but_for(d / "test.csv", b"red", b"blu")),
        ["model.safetensors was changed; test_data"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_files(change: str, begun: dict[str, Any], tmp_path: Path) -> None:
    edit, names = CHANGES[change]
    edit(tmp_path, begun)
    with pytest.raises(CheckpointError, match="holds a run that was begun with other files") as caught:
        run(config_of(tmp_path, begun))
    assert not [name for name in names if name not in caught.value.message], caught.value.message
    assert "another `out`" in caught.value.remedy


@pytest.mark.parametrize("key", ["neurons", "importance", "importance_samples", "spread"])
def test_a_run_does_not_go_on_with_another_proxy_section(key: str, begun: dict[str, Any], tmp_path: Path) -> None:
    other = {"neurons": 20, "importance": "variance", "importance_samples": 8, "spread": "global"}
    with pytest.raises(ConfigError, match=rf"begun with another proxy\.{key} "):
        run(config_of(tmp_path, begun | {"proxy": {key: other[key]}}))


def test_a_run_does_not_go_on_with_another_aggregation(begun: dict[str, Any], tmp_path: Path) -> None:
    settings = begun | {"aggregation": {"optimizer": "adam"}}
    with pytest.raises(ConfigError, match=r"begun with another aggregation\.optimizer -> set it back"):
        run(config_of(tmp_path, settings))
    begin(tmp_path, begun | {"aggregation": {"mean": "weighted"}})  # which it was, without a word


def test_test_data_that_is_added_later_is_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    begin(tmp_path, {key: value for key, value in settings.items() if key != "test_data"})
    with pytest.raises(CheckpointError, match=r"test_data .*test\.csv\): it was added"):
        run(config_of(tmp_path, settings))


def test_the_same_files_elsewhere_are_the_same_run(begun: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name in ("fm", "labels.txt", "public.csv", "test.csv"):
        shutil.move(tmp_path / name, tmp_path / "moved" / f"other-{name}")
    begun["model"] |= {"path": "moved/other-fm", "labels": "moved/other-labels.txt"}
    begun |= {"public_data": "moved/other-public.csv", "test_data": "moved/other-test.csv"}
    begin(tmp_path, begun)


def test_what_loading_does_not_read_may_change(begun: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "fm" / "README.md").write_text("a model")
    (tmp_path / "fm" / ".cache").mkdir()
    (tmp_path / "fm" / ".cache" / "x.json").write_text("{}")
    (tmp_path / "labels.txt").write_text("\r\n".join(tiny.LABELS) + "\r\n", encoding="utf-8")
    os.utime(tmp_path / "fm" / "config.json")
    begin(tmp_path, begun)


def test_an_fm_that_is_linked_is_known_by_what_the_link_leads_to(settings: dict[str, Any], tmp_path: Path) -> None:
    """As the cache of a hub has it: a directory of links into another, here itself linked."""
    shutil.move(tmp_path / "fm", tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for blob in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / blob.name).symlink_to(blob)
    (tmp_path / "fm").symlink_to(tmp_path / "snapshot", target_is_directory=True)
    begin(tmp_path, settings)
    begin(tmp_path, settings)
    flip_last_byte(tmp_path / "blobs" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        run(config_of(tmp_path, settings))


def test_a_run_may_lie_in_the_fms_directory(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["out"] = "fm/out"
    begin(tmp_path, settings)
    begin(tmp_path, settings)


def test_an_image_that_was_replaced_is_another_run(fm_directory: Callable[[str], Path], tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, fm_directory("vit"))
    settings["model"]["task"] = "image-classification"
    for index in range(4):
        Image.new("RGB", (8, 8), (50 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "public.csv").write_text("image\n0.png\n1.png\n")
    (tmp_path / "test.csv").write_text("image,label\n2.png,sea\n3.png,sky\n")
    begin(tmp_path, settings)
    shutil.copy2(tmp_path / "1.png", tmp_path / "3.png")
    with pytest.raises(CheckpointError, match=r"test_data .*test\.csv\): an image that it names was changed"):
        run(config_of(tmp_path, settings))


def test_a_run_that_has_lost_its_ledger_keeps_its_proxy(begun: dict[str, Any], tmp_path: Path) -> None:
    for path in (tmp_path / "out").glob("ledger.sqlite*"):
        path.unlink()
    before = (tmp_path / "out" / "proxy" / "record.json").stat()
    with pytest.raises(CheckpointError, match="it is empty, but its run has begun"):
        run(config_of(tmp_path, begun))
    assert (tmp_path / "out" / "proxy" / "record.json").stat().st_ctime_ns == before.st_ctime_ns


@pytest.mark.parametrize("edited", ["record.json", "bundle/proxy.json", "selection.safetensors", "bundle/notes.txt"])
def test_a_proxy_that_was_edited_is_another_run(edited: str, begun: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "out" / "proxy" / edited
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    with pytest.raises(CheckpointError, match="is not the proxy that this run began with"):
        run(config_of(tmp_path, begun))


def test_a_proxy_that_is_named_now_must_be_the_one_of_before(begun: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: is not the proxy that this run began with"):
        run(config_of(tmp_path, begun | {"proxy_path": "nowhere"}))
    shutil.copytree(tmp_path / "out" / "proxy", tmp_path / "elsewhere")
    begin(tmp_path, begun | {"proxy_path": "elsewhere"})


def test_digests_are_kept_from_one_start_to_the_next(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpft.digests.SETTLED_NS", -1)
    begin(tmp_path, settings)
    kept = json.loads((tmp_path / "out" / "digests.json").read_text())["files"]
    assert str(tmp_path / "fm" / "model.safetensors") in kept
    read: list[str] = []
    monkeypatch.setattr("hashlib.file_digest", lambda file, _: read.append(file.name))
    begin(tmp_path, settings)
    assert read == []


def test_a_ledger_of_an_earlier_version_is_refused_by_name(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("fedpft.server.ledger.FORMAT", "1")
        Ledger(tmp_path / "out", {}).close()
    with pytest.raises(CheckpointError, match="written by another version of fedpft"):
        run(config_of(tmp_path, settings))


def test_a_file_that_is_written_to_while_it_is_loaded_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = construction.loading.load_model

    def loading(*arguments: Any, **named: Any) -> Any:
        loaded = load(*arguments, **named)
        flip_last_byte(tmp_path / "fm" / "model.safetensors")
        return loaded

    monkeypatch.setattr(construction.loading, "load_model", loading)
    with pytest.raises(ModelError, match=r"changed while it was read: model\.path .*model\.safetensors was changed"):
        run(config_of(tmp_path, settings))
    assert not (tmp_path / "out").exists()


def test_test_data_that_is_written_to_while_it_is_loaded_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(construction, "make_fit", lambda *_: same_but_for(tmp_path / "test.csv", b"red", b"blu"))
    with pytest.raises(DataError, match=r"changed while it was read: test_data"):
        run(config_of(tmp_path, settings))


def test_a_loaded_fm_stays_as_it_was_read(settings: dict[str, Any], tmp_path: Path) -> None:
    owner = construction.load_owner(config_of(tmp_path, settings), Digests())
    before, path = tiny.snapshot(owner.model), tmp_path / "fm" / "model.safetensors"
    with path.open("r+b") as file:  # in place: a map of the file would show it
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size - file.tell()))
    assert tiny.changed(before, owner.model.state_dict()) == set()


def _keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= _keys(kind, f"{prefix}{name}.")
    return found


def test_every_path_of_server_yaml_is_known_by_content_or_may_change() -> None:
    assert {*identity.CHANGEABLE, *identity.BY_CONTENT} <= _keys(SimulationConfig)
    values = {"out": "/o", "listen": "127.0.0.1:0", "insecure_loopback": True, "federation": {"silos": ["a"]}}
    values |= {"model": {"path": "/secret/p", "labels": "/secret/l"}, "public_data": "/secret/d"}
    values |= {"test_data": "/secret/t", "proxy_path": "/secret/x"}
    simulated = values | {"simulation": {"data": "/secret/s"}}
    assert "/secret" not in json.dumps(identity.settings(SimulationConfig.model_validate(simulated)))
    kept = identity.settings(ServerConfig.model_validate(values))
    assert "/secret" not in json.dumps(kept)
    assert kept["model"] == {"task": "sequence-classification", "dtype": "auto", "max_tokens": 64}
    assert kept["sample_fraction"] == 1.0
    assert "federation" not in kept


# --- proxies that were built before -----------------------------------------------------------------------------------


@pytest.fixture
def fedpft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command; returns its exit code and its error line."""

    def command(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fedpft", *map(str, arguments)])
        code = cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return code, "".join(lines)

    return command


@pytest.fixture
def with_proxy(settings: dict[str, Any], tmp_path: Path, fedpft: Any) -> dict[str, Any]:
    """A proxy of the FM, made by `fedpft build-proxy`, and a server.yaml that names it."""
    config_of(tmp_path, settings)
    assert fedpft("build-proxy", "--config", tmp_path / "server.yaml", "--out", tmp_path / "proxy")[0] == 0
    return settings | {"proxy_path": "proxy"}


def test_a_proxy_goes_with_the_fm_that_it_was_cut_from(with_proxy: dict[str, Any], tmp_path: Path) -> None:
    begin(tmp_path, with_proxy)


def test_a_proxy_of_another_fm_is_refused_before_anything_begins(with_proxy: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "fm")
    tiny.write_model("bert", tmp_path / "fm", seed=1)
    with pytest.raises(ModelError, match=r"proxy: was cut from another FM than .*fm: model\.safetensors was changed"):
        run(config_of(tmp_path, with_proxy))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("edited", ["bundle/proxy.json", "selection.safetensors", "bundle/notes.txt"])
def test_a_proxy_that_was_edited_after_it_was_built_is_refused(
    edited: str, with_proxy: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "proxy" / edited
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    with pytest.raises(ModelError, match=rf"proxy: is not as it was built: {edited} was (changed|added)"):
        run(config_of(tmp_path, with_proxy))


def test_a_proxy_for_other_lengths_of_text_is_refused(with_proxy: dict[str, Any], tmp_path: Path) -> None:
    with_proxy["model"]["max_tokens"] = 9
    with pytest.raises(ModelError, match=r"built for texts of 12 tokens, model\.max_tokens is 9"):
        run(config_of(tmp_path, with_proxy))


def test_a_proxy_of_an_earlier_version_is_taken_with_a_warning(
    with_proxy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "proxy" / "record.json"
    record = json.loads(path.read_text())
    del record["model"], record["files"]
    path.write_text(json.dumps(record))
    begin(tmp_path, with_proxy)
    assert caplog.text.count("does not say which FM it was cut from: made by an earlier version, not checked") == 1


@pytest.mark.parametrize("to", [[], ["--out", "{}/out/../out/proxy"]])
def test_the_proxy_of_a_run_is_not_built_anew(
    to: list[str], begun: dict[str, Any], tmp_path: Path, fedpft: Any
) -> None:
    config = config_of(tmp_path, begun | {"seed": 1})
    before = (tmp_path / "out" / "proxy" / "record.json").read_bytes()
    code, line = fedpft("build-proxy", "--config", tmp_path / "server.yaml", *(part.format(tmp_path) for part in to))
    assert code == ConfigError.exit_code
    assert f"is the proxy of the run in {config.out}" in line
    assert (tmp_path / "out" / "proxy" / "record.json").read_bytes() == before
    assert fedpft("build-proxy", "--config", tmp_path / "server.yaml", "--out", tmp_path / "new")[0] == 0


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_once(fm_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the owner's files, and a finished run of theirs in out/."""
    directory = tmp_path_factory.mktemp("finished")
    settings = write_inputs(directory, fm_directory("bert"))
    settings["federation"]["round_deadline_seconds"] = 300
    config, address = config_of(directory, settings), directory / "out" / "address"
    (directory / "north.csv").write_text("text,label\n" + "\n".join(f"{text},sky" for text in TEXTS))
    server = threading.Thread(target=run, args=[config])
    server.start()
    await_("the server's address", address.exists)
    values = {"server": address.read_text().strip(), "insecure_loopback": True, "insecure_name": "north", "threads": 1}
    run_silo(SiloConfig.model_validate({**values, "data": {"path": directory / "north.csv"}, "work": directory / "w"}))
    server.join()
    return directory


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of one's own; server.yaml's paths are relative to it."""
    return shutil.copytree(finished_once, tmp_path / "finished")


def edited_yaml(directory: Path, **changes: Any) -> Path:
    settings = yaml.safe_load((directory / "server.yaml").read_text())
    (directory / "server.yaml").write_text(yaml.safe_dump(settings | changes))
    return directory / "server.yaml"


COMMANDS = (["plug-in", "--out", "{}/product"], ["evaluate"])


def commands(directory: Path, *more: Any) -> list[list[Any]]:
    return [
        [*(part.format(directory) for part in command), "--config", directory / "server.yaml", *more]
        for command in COMMANDS
    ]


def test_a_finished_run_says_its_table_again_for_its_own_files_alone(finished: Path) -> None:
    config = load_server_config(finished / "server.yaml")
    assert run(config) == json.loads((finished / "out" / "summary.json").read_text())
    flip_last_byte(finished / "fm" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        run(config)


def test_a_finished_run_without_its_summary_is_named(finished: Path) -> None:
    (finished / "out" / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=r"summary\.json: cannot be read"):
        run(load_server_config(finished / "server.yaml"))


def test_what_leaks_is_measured_of_its_own_files_alone(finished: Path, fedpft: Any) -> None:
    command = ["leakage", "--config", finished / "server.yaml", "--quick"]
    assert fedpft(*command)[0] == 0
    found = json.loads((finished / "out" / "leakage" / "leakage.json").read_text())
    assert [each["parts"] for each in found["held"]] == [
        json.loads((finished / "out" / "summary.json").read_text())["holdings"]
    ]
    flip_last_byte(finished / "fm" / "model.safetensors")
    code, line = fedpft(*command)
    assert code == CheckpointError.exit_code
    assert "model.safetensors was changed" in line


def test_an_adapter_goes_with_its_run(finished: Path, fedpft: Any, caplog: pytest.LogCaptureFixture) -> None:
    for command in commands(finished):
        assert fedpft(*command) == (0, "")
    assert "WARNING" not in caplog.text
    shutil.copy(finished / "out" / "adapter.safetensors", finished / "elsewhere.safetensors")
    for command in commands(finished, "--adapter", finished / "elsewhere.safetensors"):
        assert fedpft(*command) == (0, "")


def other_fm(directory: Path) -> None:
    """With the proxy that the run had, which an earlier version could have made: only the adapter knows better."""
    flip_last_byte(directory / "fm" / "model.safetensors")
    path = directory / "out" / "proxy" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {}}))


def other_labels(directory: Path) -> None:
    (directory / "labels.txt").write_text("\n".join(reversed(tiny.LABELS)))
    path = directory / "out" / "proxy" / "bundle" / "proxy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": tiny.LABELS[::-1]}))
    path = directory / "out" / "proxy" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


def other_proxy(directory: Path) -> None:
    config = load_server_config(edited_yaml(directory, proxy={"neurons": 20}))
    owner = construction.load_owner(config, identity.kept_digests(config))
    construction.build_proxy(config, owner, directory / "out" / "proxy")


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another FM": (other_fm, "model.safetensors was changed"),
    "other labels": (other_labels, "model.labels"),
    "another proxy": (other_proxy, "it was made with another proxy"),
    "another scale": (lambda d: edited_yaml(d, adapter={"rank": 2, "alpha": 8}), "adapter.alpha was 4.0"),
    "LoRA elsewhere": (
        lambda d: edited_yaml(d, adapter={"rank": 2, "alpha": 4, "ffn": True}),
        "adapter.ffn was false",
    ),
    "another rank": (lambda d: edited_yaml(d, adapter={"rank": 1, "alpha": 4}), "adapter.rank was 2"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_of_another_run_is_refused(misfit: str, finished: Path, fedpft: Any) -> None:
    shutil.move(finished / "out" / "adapter.safetensors", finished / "its.safetensors")
    change, text = MISFITS[misfit]
    change(finished)
    for command in commands(finished, "--adapter", finished / "its.safetensors"):
        code, line = fedpft(*command)
        assert code == ModelError.exit_code
        assert "its.safetensors: is of another run" in line
        assert text in line
    assert not (finished / "product").exists()


def test_plug_in_into_another_fm_is_refused_by_the_proxy_already(finished: Path, fedpft: Any) -> None:
    flip_last_byte(finished / "fm" / "model.safetensors")
    for command in commands(finished):
        code, line = fedpft(*command)
        assert code == ModelError.exit_code
        assert "was cut from another FM" in line


def test_a_patch_of_another_run_is_refused(finished: Path, fedpft: Any) -> None:
    flip_last_byte(finished / "out" / "patch.safetensors")
    code, line = fedpft("evaluate", "--config", finished / "server.yaml")
    assert code == ModelError.exit_code
    assert "patch.safetensors is not the one that goes with it" in line


def test_other_test_data_is_measured_with_a_warning(
    finished: Path, fedpft: Any, caplog: pytest.LogCaptureFixture
) -> None:
    same_but_for(finished / "test.csv", b"sea", b"sky")
    assert fedpft("evaluate", "--config", finished / "server.yaml")[0] == 0
    assert "its run had other data, so that figures do not compare: test_data" in caplog.text


def test_an_adapter_of_an_earlier_version_is_taken_with_a_warning(
    finished: Path, fedpft: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(load_file(finished / "out" / "adapter.safetensors"), finished / "out" / "adapter.safetensors")
    for command in commands(finished):
        caplog.clear()
        assert fedpft(*command)[0] == 0
        assert caplog.text.count("does not say which run it is of: made by an earlier version, not checked") == 1


@pytest.mark.parametrize("content", [None, b"", b"no tensors"])
def test_what_is_no_adapter_is_named(content: bytes | None, finished: Path, fedpft: Any) -> None:
    path = finished / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    for command in commands(finished, "--adapter", path):
        code, line = fedpft(*command)
        assert code == ModelError.exit_code
        assert "x.safetensors: not an adapter" in line
