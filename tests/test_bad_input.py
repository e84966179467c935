"""What the owner's side does with input that cannot be right: one line that names place and remedy, an exit code,
and nothing written. The silos' side is in test_service.py, files and YAML are in test_batches.py and test_config.py.
"""

import errno
import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from safetensors.torch import load_file, save_file

from fedpft import cli, doctor
from fedpft.command import run_command
from fedpft.config import load_server_config
from fedpft.server.run import run
from fedpft.server.service import FederationServer

Fault = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def settings(fm_directory: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """A server.yaml that is right, with its files beside it."""
    texts = [f"the {color} {thing} moves" for color in ("red", "green") for thing in ("bird", "fish", "tree")]
    (tmp_path / "labels.txt").write_text("\n".join(tiny.LABELS), encoding="utf-8")
    (tmp_path / "public.csv").write_text("text\n" + "\n".join(texts), encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\n" + "\n".join(f"{t},sea" for t in texts), encoding="utf-8")
    return {
        "out": "out",
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "model": {"path": str(fm_directory("bert")), "labels": "labels.txt", "max_tokens": 12},
        "distillation": {"steps": 1, "batch": 2},
        "federation": {"silos": ["north"], "round_deadline_seconds": 0.05},
        "public_data": "public.csv",
        "test_data": "test.csv",
    }


def outcome(settings: dict[str, Any], directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line of a server with these settings."""
    path = directory / "server.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    code = run_command(lambda: run(load_server_config(path)) and None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return code, lines[0]


def test_a_federation_without_its_silos_ends_by_itself(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = outcome(settings, tmp_path, capsys)
    assert code == 12
    assert "north" in line
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_server_says_what_of_the_fm_goes_out_before_it_listens(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    said_already = []

    def start(server: FederationServer) -> str:
        said_already.extend(caplog.messages)
        return listen(server)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        listen = FederationServer.start
        patch.setattr(FederationServer, "start", start)
        outcome(settings, tmp_path, capsys)
    line = next(line for line in said_already if line.startswith("the silos receive"))
    assert "embeddings 100%, attention 100%, ffn 75%, norms 100%" in line


def _unsupported(settings: dict[str, Any], directory: Path) -> None:
    (directory / "fm").mkdir()
    (directory / "fm" / "config.json").write_text(json.dumps({"model_type": "t5"}), encoding="utf-8")
    settings["model"]["path"] = "fm"


def _no_model(settings: dict[str, Any], directory: Path) -> None:
    settings["model"]["path"] = "nowhere"


def _long_texts(settings: dict[str, Any], directory: Path) -> None:
    settings["model"]["max_tokens"] = 41


def _fm(settings: dict[str, Any], directory: Path) -> Path:
    """A copy of the FM that a fault may be put into."""
    settings["model"]["path"] = "fm"
    return Path(shutil.copytree(tiny.write_model("bert", directory / "fm-of-others"), directory / "fm"))


def _no_pooler_and_no_layer(settings: dict[str, Any], directory: Path) -> None:
    weights = _fm(settings, directory) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if ".layer.1.output." not in name}
    save_file(kept, weights, metadata={"format": "pt"})


def _foreign_tokens(settings: dict[str, Any], directory: Path) -> None:
    tokenizer = tiny.processor("bert")
    tokenizer.add_tokens(["ice"])
    tokenizer.save_pretrained(_fm(settings, directory))


def _odd_vocabulary(settings: dict[str, Any], directory: Path) -> None:
    fm = _fm(settings, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (fm / name).unlink()
    words = "\n".join(f"{word} 1" for word in tiny.WORDS)
    (fm / "vocab.txt").write_text(words, encoding="utf-8")
    (fm / "bpe.codes").write_text("t h 1\n", encoding="utf-8")
    (fm / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}', encoding="utf-8")


def _one_label(settings: dict[str, Any], directory: Path) -> None:
    (directory / "labels.txt").write_text("sea\n", encoding="utf-8")


def _whole_fm(settings: dict[str, Any], directory: Path) -> None:
    settings["proxy"] = {"neurons": "all"}


def _too_many_neurons(settings: dict[str, Any], directory: Path) -> None:
    settings["proxy"] = {"neurons": tiny.F + 1}


def _no_such_layer(settings: dict[str, Any], directory: Path) -> None:
    settings["proxy"] = {"keep_layers": [0, tiny.L]}


def _strange_label(settings: dict[str, Any], directory: Path) -> None:
    (directory / "test.csv").write_text("text,label\nthe red bird,sea\nthe blue fish,see\n", encoding="utf-8")


def _empty_corpus(settings: dict[str, Any], directory: Path) -> None:
    (directory / "public.csv").write_text("", encoding="utf-8")


def _latin_corpus(settings: dict[str, Any], directory: Path) -> None:
    (directory / "public.csv").write_bytes(b"text\nthe red bird\nla premi\xe8re\n")


def _doubled_label(settings: dict[str, Any], directory: Path) -> None:
    (directory / "labels.txt").write_text("earth\nsea\nearth\n", encoding="utf-8")


def _typo(settings: dict[str, Any], directory: Path) -> None:
    settings["distilation"] = settings.pop("distillation")


def _missing_certificate(settings: dict[str, Any], directory: Path) -> None:
    del settings["insecure_loopback"]
    settings["tls"] = {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"}


def _no_proxy(settings: dict[str, Any], directory: Path) -> None:
    settings["proxy_path"] = "nowhere"


FAULTS: list[tuple[Fault, int, list[str]]] = [
    (_unsupported, 5, ["'t5'", "architectures.py"]),
    (_no_model, 5, ["nowhere", "config.json"]),
    (_long_texts, 5, ["max_tokens is 41", "40"]),
    (_no_pooler_and_no_layer, 5, ["bert.encoder.layer.1.output"]),
    (_foreign_tokens, 5, ["'ice'", "20 rows"]),
    (_odd_vocabulary, 5, ["bpe.codes"]),
    (_one_label, 4, ["labels.txt", "'sea'"]),
    (_whole_fm, 5, ["every FFN neuron", "proxy.allow_whole"]),
    (_too_many_neurons, 5, [str(tiny.F + 1), str(tiny.F)]),
    (_no_such_layer, 5, ["keep_layers", str(tiny.L)]),
    (_strange_label, 4, ["test.csv:3", "'see'", "'sea'"]),
    (_empty_corpus, 4, ["public.csv", "empty"]),
    (_latin_corpus, 4, ["public.csv:3", "UTF-8"]),
    (_doubled_label, 4, ["labels.txt:3", "'earth'"]),
    (_typo, 3, ["'distilation'", "'distillation'"]),
    (_missing_certificate, 6, ["pem"]),
    (_no_proxy, 5, ["nowhere", "build-proxy"]),
]
every_fault = pytest.mark.parametrize(("fault", "code", "names"), FAULTS)


@every_fault
def test_a_fault_is_named_in_one_line_and_nothing_is_written(
    fault: Fault,
    code: int,
    names: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(settings, tmp_path)
    found, line = outcome(settings, tmp_path, capsys)
    assert found == code
    assert not [name for name in names if name not in line], line
    assert " -> " in line, "the line carries a remedy"
    assert not (tmp_path / "out").exists()


@every_fault
def test_the_doctor_finds_the_same_fault(
    fault: Fault,
    code: int,
    names: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "check_operators", lambda: [])  # they take a second, and are not what is broken here
    fault(settings, tmp_path)
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert run_command(lambda: doctor.examine(path)) == code
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert any(all(name in line for name in names) for line in wrong), wrong
    assert not (tmp_path / "out").exists()


def test_a_taken_port_is_found_before_the_proxy_is_built(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings["listen"] = f"127.0.0.1:{taken.getsockname()[1]}"
        code, line = outcome(settings, tmp_path, capsys)
    assert code == 11
    assert settings["listen"] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["file", "link"])
@pytest.mark.parametrize(
    "command",
    [
        ["plug-in", "--config", "server.yaml"],
        ["build-proxy", "--config", "server.yaml"],
        ["provision", "--silos", "north"],
        ["demo", "--quick"],
    ],
    ids=lambda command: command[0],
)
def test_a_place_that_is_no_directory_is_found_before_there_is_anything_to_write(
    command: list[str],
    way: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (tmp_path / "there").write_text("") if way == "file" else (tmp_path / "there").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fedpft", *command, "--out", "there"])
    monkeypatch.setattr("fedpft.server.apart.load_owner", lambda _: pytest.fail("it loads the FM first"))
    assert cli.main() == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "there: is " in line
    assert "change `--out`" in line


def test_what_breaks_in_a_product_is_explained_where_it_is_written(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "server.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr("fedpft.server.apart.load_owner", fail)
    monkeypatch.setattr("sys.argv", ["x", "plug-in", "--config", str(tmp_path / "server.yaml"), "--out", str(tmp_path)])
    assert cli.main() == 1
    assert f"error: {tmp_path}: no space left on device -> make room there" in capsys.readouterr().err


def test_a_file_system_that_cannot_keep_a_ledger_is_found_before_the_fm_is_loaded(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda _, **options: connect(":memory:", **options))
    monkeypatch.setattr("fedpft.server.run.load_owner", lambda *_: pytest.fail("it loads the FM first"))
    code, line = outcome(settings, tmp_path, capsys)
    assert code == 3
    assert "lacks what SQLite needs" in line
    assert not (tmp_path / "out").exists()
