"""`fedpft doctor`: what is in order, what worries and what is wrong, line by line, and the exit code."""

import errno
import json
import os
import shutil
import socket
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fedpft.wire  # isort: skip  (sets gRPC's environment before grpc is imported)
import grpc
import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from fedpft import atomic, cli, doctor
from fedpft.config import (
    AdapterSection,
    RoundSettings,
    ServerTlsSection,
    TrainingSection,
    load_server_config,
    load_silo_config,
)
from fedpft.digests import Digests
from fedpft.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    DataError,
    FedPFTError,
    InternalFault,
    ModelError,
    PortInUse,
    RefusedByServer,
    ServerUnreachable,
)
from fedpft.provision import provision, renew, revoke
from fedpft.server import identity
from fedpft.server.admission import Admission
from fedpft.server.construction import build_proxy, load_owner
from fedpft.server.ledger import Ledger
from fedpft.server.servicer import FederationServicer
from fedpft.silo.connection import Enrolment
from fedpft.silo.ondisk import DataOnDisk
from fedpft.silo.work import Joined, Work, opened
from fedpft.wire.channel import SERVER_OPTIONS, listen
from fedpft.wire.hello import Greeting, Terms
from fedpft.wire.v1.federation_pb2_grpc import add_FederationServiceServicer_to_server

TERMS = Terms("sequence-classification", ("0", "1"), max_tokens=8, characters_per_token=2.0)


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "check_operators", lambda: [])  # tests/test_kernels.py has them all


@pytest.fixture
def kits(tmp_path):
    provision(tmp_path / "kits", ["north"])
    return tmp_path / "kits"


@pytest.fixture
def address(kits):
    """A server that answers Hello."""
    kit = kits / "server"
    files = {name: kit / f"{name}.pem" for name in ("ca", "certificate", "key")}
    section = ServerTlsSection(**files, revoked=kit / "revoked.json")
    servicer = FederationServicer(None, None, None, None, "", "", Admission(section, lambda silo, reason: None), TERMS)
    server = grpc.server(ThreadPoolExecutor(1), options=SERVER_OPTIONS)
    add_FederationServiceServicer_to_server(servicer, server)
    port = listen(server, "127.0.0.1:0", section)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def silo_yaml(kits, address):
    path = kits / "silos/north/silo.yaml"
    path.write_text(path.read_text().replace("127.0.0.1:8470", address))
    (path.parent / "data.csv").write_text("text,label\ngood,1\nbad,0\n")
    return path


@pytest.fixture
def server_yaml(kits, tmp_path):
    for name, content in {
        "labels.txt": "no\nyes\n",
        "public.csv": "text\none\ntwo\n",
        "test.csv": "text,label\none,yes\n",
    }.items():
        (kits / name).write_text(content)
    tiny.write_model("bert", kits / "model")
    values = yaml.safe_load((kits / "server/tls.yaml").read_text()) | {
        "listen": "127.0.0.1:0",
        "out": "out",
        "model": {"path": "model", "labels": "labels.txt", "max_tokens": 12},
        "federation": {"silos": ["north"]},
        "public_data": "public.csv",
        "test_data": "test.csv",
    }
    (kits / "server.yaml").write_text(json.dumps(values))
    return kits / "server.yaml"


@pytest.fixture
def examine(capsys, monkeypatch):
    """Runs the command; returns its exit code and what it says about each subject."""

    def examined(path=None):
        monkeypatch.setattr("sys.argv", ["fedpft", "doctor", *(["--config", str(path)] if path else [])])
        code = cli.main()
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        assert {line[0] for line in lines} <= {"ok", "warning", "WRONG"}
        return code, {subject: (verdict, text) for verdict, subject, text in lines}

    return examined


def verdicts(found):
    return {subject: verdict for subject, (verdict, _) in found.items()}


SILO = ["certificate", "key", "connection", "clock", "privacy", "data", "device", "work", "federation", "disk"]
SERVER = ["certificate", "key", "revoked", "listen", "labels", "model", "proxy", "privacy", "data", "device", "out"]
SERVER += ["run", "disk"]
ANYWHERE = ["versions", "kernels"]


def test_without_a_configuration_the_machine_is_looked_at(examine):
    code, found = examine()
    assert code == 0
    assert verdicts(found) == dict.fromkeys(ANYWHERE, "ok")
    assert f"fedpft {fedpft.__version__}" in found["versions"][1]


def test_a_silo_in_order(examine, silo_yaml, address):
    code, found = examine(silo_yaml)
    assert verdicts(found) == dict.fromkeys([*ANYWHERE, "configuration", *SILO], "ok")
    assert code == 0
    assert "north, 364 days left" in found["certificate"][1]
    assert f"{address} answers: TLS 1.3, both certificates accepted" in found["connection"][1]
    assert "2 labelled rows" in found["data"][1]
    assert not (silo_yaml.parent / "work").exists(), "a look changes nothing"


def test_a_server_in_order(examine, server_yaml):
    code, found = examine(server_yaml)
    assert verdicts(found) == dict.fromkeys([*ANYWHERE, "configuration", *SERVER], "ok")
    assert code == 0
    assert "held in float32, fit for sequence-classification of up to 12 tokens" in found["model"][1]
    assert not (server_yaml.parent / "out").exists(), "a look changes nothing"


@pytest.mark.parametrize(
    ("federation", "said"),
    [
        ({}, "this server learns each silo's adapter"),
        ({"secure_aggregation": True}, "sums over 3 silos or more"),
        (
            {"secure_aggregation": True, "silo_privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0}},
            "epsilon 8 at delta 1e-05 for a whole silo over 4 rounds",
        ),
    ],
    ids=["updates", "sums", "noised sums"],
)
def test_what_a_server_will_learn_of_a_silo(examine, server_yaml, federation, said):
    values = json.loads(server_yaml.read_text()) | {"aggregation": {"weights": "equal"}, "training": {"rounds": 4}}
    values["federation"] = {"silos": ["north", "south", "west"], "min_silos": 3} | federation
    server_yaml.write_text(json.dumps(values))
    code, found = examine(server_yaml)
    assert code == 0
    assert found["privacy"][0] == "ok"
    assert said in found["privacy"][1]


def test_an_operator_that_is_wrong_is_the_machines_fault(examine, monkeypatch):
    class Wrong:
        passed = False

        def __str__(self):
            return "sub_ffn: off by 1"

    monkeypatch.setattr(doctor, "check_operators", lambda: [Wrong()])
    code, found = examine()
    assert code == FedPFTError.exit_code
    assert found["kernels"][0] == "WRONG"
    assert "sub_ffn: off by 1" in found["kernels"][1]


@pytest.mark.parametrize("content", [None, "server: [", "- a\n", "servr: x:1\n"])
def test_a_configuration_that_cannot_be_read_is_a_finding(content, examine, tmp_path):
    path = tmp_path / "silo.yaml"
    if content is not None:
        path.write_text(content)
    code, found = examine(path)
    assert code == ConfigError.exit_code
    assert found["configuration"][0] == "WRONG"
    assert verdicts(found)["kernels"] == "ok"


def test_every_check_is_made_and_the_first_wrong_one_gives_the_exit_code(examine, silo_yaml):
    (silo_yaml.parent / "data.csv").unlink()
    (silo_yaml.parent / "certificate.pem").write_text("nonsense")
    code, found = examine(silo_yaml)
    assert code == CertificateError.exit_code
    assert verdicts(found)["certificate"] == verdicts(found)["data"] == "WRONG"
    assert verdicts(found)["disk"] == "ok"
    (silo_yaml.parent / "certificate.pem").unlink()
    (silo_yaml.parent / "key.pem").unlink()
    assert verdicts(examine(silo_yaml)[1])["key"] == "WRONG"


def test_the_data_alone(examine, silo_yaml):
    (silo_yaml.parent / "data.csv").write_text("text,label\ngood\n")
    code, found = examine(silo_yaml)
    assert code == DataError.exit_code
    assert "data.csv:2" in found["data"][1]


def test_all_that_is_wrong_with_a_silos_data_is_found_with_the_servers_labels(examine, silo_yaml):
    (silo_yaml.parent / "data.csv").write_text("text;label\ngood;1\n;0\nbad;\nworse;2\nworst\n")
    code, found = examine(silo_yaml)
    assert code == DataError.exit_code
    assert "4 of 5 rows" in found["data"][1]
    for fault in (
        ":3: the text is empty",
        ":4: the label is empty",
        ":5: label '2' is not",
        ":6: the row has 1 fields",
    ):
        assert f"data.csv{fault}" in found["data"][1]


def test_without_the_server_the_data_is_looked_at_alone(examine, silo_yaml, address, monkeypatch):
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.2)
    silo_yaml.write_text(silo_yaml.read_text().replace(address, "127.0.0.1:1"))
    assert "2 labelled rows; the server did not say which labels there are" in examine(silo_yaml)[1]["data"][1]
    (silo_yaml.parent / "data.csv").write_text("text;label\n;1\n")
    assert ":2: the text is empty" in examine(silo_yaml)[1]["data"][1]


def test_bad_rows_that_are_skipped_are_a_worry(examine, silo_yaml):
    (silo_yaml.parent / "data.csv").write_text("text,label\ngood,1\n,1\nbad,7\n")
    values = yaml.safe_load(silo_yaml.read_text())
    values["data"]["bad_rows"] = "skip"
    silo_yaml.write_text(yaml.safe_dump(values))
    code, found = examine(silo_yaml)
    assert code == 0
    assert found["data"][0] == "warning"
    assert "1 labelled rows of 2 labels" in found["data"][1]
    assert "skipped: " in found["data"][1]
    assert "2 of 3 rows" in found["data"][1]


def test_how_many_texts_will_be_cut_is_estimated_and_counted_once_the_tokenizer_is_there(examine, silo_yaml):
    (silo_yaml.parent / "data.csv").write_text(f"text,label\n{'bird ' * 7},1\n{'b' * 30},1\nbad,0\n")
    found = examine(silo_yaml)[1]["data"][1]
    assert "about by their characters: 2 of 3 texts are longer than 8 tokens and are cut" in found
    work = Work(silo_yaml.parent / "work")
    work.path.mkdir()
    settings = RoundSettings(seed=0, adapter=AdapterSection(), training=TrainingSection(), inactive_below=0.0)
    joined = Joined(run_id="run", proxy="0123", settings=settings)
    (work.path / "federation.json").write_text(joined.model_dump_json())
    tiny.write_model("bert", work.proxy_path(joined))
    assert "data.csv: 1 of 3 texts are longer than 8 tokens and are cut" in examine(silo_yaml)[1]["data"][1]


def test_a_server_counts_the_texts_that_it_will_cut(examine, server_yaml, kits):
    (kits / "public.csv").write_text(f"text\n{'bird ' * 11}\n{'bird ' * 10}\n")
    found = examine(server_yaml)[1]["data"]
    assert found[0] == "ok"
    assert "public.csv: 1 of 2 texts are longer than 12 tokens and are cut" in found[1]
    assert "test.csv: 0 of 1 texts" in found[1]


def test_what_only_a_tokenizer_finds_is_found_where_there_is_one(examine, server_yaml, kits):
    settings = json.loads((kits / "model/tokenizer_config.json").read_text())
    (kits / "model/tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    code, found = examine(server_yaml)
    assert code == ModelError.exit_code
    assert "no padding token" in found["model"][1]


def test_a_servers_files_may_have_an_encoding_of_their_own(examine, server_yaml, kits):
    (kits / "labels.txt").write_bytes("n\u00e9\noui\n".encode("cp1252"))
    (kits / "test.csv").write_bytes("text;label\none;n\u00e9\n".encode("cp1252"))
    code, found = examine(server_yaml)
    assert code == DataError.exit_code
    assert "labels.txt:1: byte 0xe9 is not UTF-8 -> name its encoding" in found["labels"][1]
    server_yaml.write_text(json.dumps(json.loads(server_yaml.read_text()) | {"encoding": "cp1252"}))
    assert examine(server_yaml)[1]["data"][0] == "ok"


def test_images_that_are_nearly_black_are_a_worry(examine, server_yaml, kits):
    for name, value in (("dim", 4095), ("bright", 65535)):
        Image.fromarray(np.full((2, 2), value, np.uint16)).save(kits / f"{name}.png")
    (kits / "public.csv").write_text("image\ndim.png\nbright.png\n")
    (kits / "test.csv").write_text("image,label\nbright.png,yes\n")
    values = json.loads(server_yaml.read_text())
    values["model"]["task"] = "image-classification"
    shutil.rmtree(kits / "model")
    tiny.write_model("vit", kits / "model")
    server_yaml.write_text(json.dumps(values))
    code, found = examine(server_yaml)
    assert code == 0
    assert found["data"][0] == "warning"
    assert "public.csv: 1 of 2 images of 16 bits use less than a quarter of their range" in found["data"][1]


def test_a_certificate_that_expires_soon_and_a_key_for_all_are_worries(examine, silo_yaml, kits):
    renew(kits, ["north"], days=20)
    (silo_yaml.parent / "key.pem").chmod(0o644)
    code, found = examine(silo_yaml)
    assert code == 0
    assert found["certificate"][0] == found["key"][0] == "warning"
    assert "in 19 days -> renew it" in found["certificate"][1]
    assert "chmod 600" in found["key"][1]


def test_a_revoked_silo_learns_it(examine, silo_yaml, kits):
    revoke(kits, ["north"])
    code, found = examine(silo_yaml)
    assert code == CertificateError.exit_code
    assert "was revoked on" in found["connection"][1]


def test_a_server_that_does_not_answer_is_named(examine, silo_yaml, address, monkeypatch):
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.2)
    silo_yaml.write_text(silo_yaml.read_text().replace(address, "127.0.0.1:1"))
    code, found = examine(silo_yaml)
    assert code == ServerUnreachable.exit_code
    assert "127.0.0.1:1 did not answer" in found["connection"][1]
    assert "clock" not in found


def test_another_version_at_the_server_is_named(examine, silo_yaml, monkeypatch):
    monkeypatch.setattr(doctor, "greet", lambda *_, **__: Greeting("99.1.0", 0.0, 0.1))
    code, found = examine(silo_yaml)
    assert code == RefusedByServer.exit_code
    assert "install fedpft 99.1.0" in found["connection"][1]


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_a_clock_that_is_off_worries(ahead, examine, silo_yaml, monkeypatch):
    monkeypatch.setattr(doctor, "greet", lambda *_, **__: Greeting(fedpft.__version__, ahead, 0.1))
    code, found = examine(silo_yaml)
    assert code == 0
    assert found["clock"][0] == "warning"
    assert f"3600 s {'ahead of' if ahead > 0 else 'behind'} this machine's" in found["clock"][1]


def test_clocks_are_compared_over_the_wire(examine, silo_yaml, monkeypatch):
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 3600 * 10**9)  # the server's; the silo asks time.time
    assert examine(silo_yaml)[1]["clock"][0] == "warning"


def test_a_full_disk_worries(examine, silo_yaml, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_BYTES", 1 << 60)
    code, found = examine(silo_yaml)
    assert code == 0
    assert found["disk"][0] == "warning"
    assert "make room" in found["disk"][1]


def test_a_directory_that_cannot_be_written_to_is_named(examine, silo_yaml, server_yaml, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("fcntl.flock", refuse)
    for path, subject in ((silo_yaml, "work"), (server_yaml, "out")):
        code, found = examine(path)
        assert code == ConfigError.exit_code
        assert "cannot be written to (Permission denied)" in found[subject][1]


def test_a_file_system_that_cannot_do_what_is_needed_is_named(examine, silo_yaml, server_yaml, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    for path, subject in ((silo_yaml, "work"), (server_yaml, "out")):
        code, found = examine(path)
        assert code == ConfigError.exit_code
        assert "lacks what is needed to lock and sync" in found[subject][1]


def test_a_file_system_on_which_no_ledger_can_be_kept_is_named(examine, server_yaml, monkeypatch):
    connect = sqlite3.connect

    class WithoutSharedMemory(sqlite3.Connection):
        def execute(self, statement, *values):
            if "journal_mode" in statement:
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *a, **k: connect(*a, **k, factory=WithoutSharedMemory))
    code, found = examine(server_yaml)
    assert code == ConfigError.exit_code
    assert "lacks what SQLite needs (disk I/O error) -> give `out` a directory on a local disk" in found["out"][1]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_place_for_work_that_is_no_directory_is_named(kind, examine, silo_yaml):
    work = silo_yaml.parent / "work"
    work.write_text("") if kind == "file" else work.symlink_to("nowhere")
    code, found = examine(silo_yaml)
    assert code == ConfigError.exit_code
    assert ("is not a directory" if kind == "file" else "is a link to nowhere") in found["work"][1]


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device, examine, silo_yaml):
    silo_yaml.write_text(silo_yaml.read_text() + f"\ndevice: {device}\n")
    code, found = examine(silo_yaml)
    assert code == ConfigError.exit_code
    assert f"device: {device}: " in found["device"][1]
    assert "set `device` to one of this machine's: cpu" in found["device"][1]


def test_the_library_for_weights_in_few_bits_is_looked_for(examine, silo_yaml, monkeypatch):
    silo_yaml.write_text(silo_yaml.read_text() + "\nlimits: {weights: int4}\n")
    code, found = examine(silo_yaml)
    assert code == 0
    assert found["weights"] == ("ok", "int4: bitsandbytes is there")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    code, found = examine(silo_yaml)
    assert code == ConfigError.exit_code
    assert "pip install 'fedpft[quantized]'" in found["weights"][1]


def test_a_servers_fm_is_looked_at_even_where_the_device_is_not_there(examine, server_yaml):
    server_yaml.write_text(json.dumps(json.loads(server_yaml.read_text()) | {"device": "gpu"}))
    code, found = examine(server_yaml)
    assert code == ConfigError.exit_code
    assert {subject for subject, verdict in verdicts(found).items() if verdict != "ok"} == {"device"}


def test_a_check_that_fails_itself_does_not_stop_the_others(examine, silo_yaml, monkeypatch):
    monkeypatch.setattr("fedpft.silo.data.examine", lambda *_: {}["a cell"])
    code, found = examine(silo_yaml)
    assert code == InternalFault.exit_code
    assert "KeyError" in found["data"][1]
    assert "a cell" not in found["data"][1]
    assert verdicts(found)["disk"] == "ok"


def test_a_taken_port_is_wrong_unless_the_server_itself_has_it(examine, server_yaml):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        server_yaml.write_text(server_yaml.read_text().replace("127.0.0.1:0", taken))
        assert examine(server_yaml)[0] == PortInUse.exit_code
        with atomic.locked(server_yaml.parent / "out", "out"):
            code, found = examine(server_yaml)
        assert code == 0
        assert "is running" in found["listen"][1]
        assert examine(server_yaml)[0] == PortInUse.exit_code


def test_a_servers_files_are_looked_at(examine, server_yaml, kits):
    (kits / "test.csv").write_text("text,label\none,perhaps\n")
    assert examine(server_yaml)[0] == DataError.exit_code
    (kits / "model/config.json").unlink()
    (kits / "server/revoked.json").write_text("[")
    code, found = examine(server_yaml)
    assert code == CertificateError.exit_code
    assert verdicts(found)["revoked"] == verdicts(found)["model"] == verdicts(found)["data"] == "WRONG"
    (kits / "server/revoked.json").write_text("[]")
    assert examine(server_yaml)[0] == ModelError.exit_code


# --- a run that was begun, a federation that was joined ---------------------------------------------------------------


def tree(directory):
    """What is there: names, sizes and times of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns)
        for path in directory.rglob("*")
        if path.name != "lock"
    }


@pytest.fixture
def begun(server_yaml):
    """A run that was begun with the files of server.yaml, by a server that was killed."""
    config = load_server_config(server_yaml)
    (config.out / "proxy").mkdir(parents=True)
    ledger = Ledger(config.out, identity.settings(config), identity.contents(config, Digests()))
    (config.out / "proxy" / "record.json").write_text("{}")
    ledger.record("proxy", None, identity.proxy_digest(config.out / "proxy", Digests()))
    (config.out / "rounds").mkdir()
    shutil.copytree(config.out, config.out.with_name("killed"))  # its log was never written back
    ledger.close()
    shutil.rmtree(config.out)
    config.out.with_name("killed").rename(config.out)
    (config.out / "ledger.sqlite-shm").unlink()
    (config.out / "lock").touch()
    assert (config.out / "ledger.sqlite-wal").stat().st_size > 0
    return config.out


def rewrite_config(directory):
    """Other bytes that say the same: it loads, and yet is not the file that it was."""
    path = directory / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def test_a_run_that_the_files_belong_to(examine, server_yaml, begun):
    before = tree(begun)
    code, found = examine(server_yaml)
    assert (code, found["run"][0]) == (0, "ok")
    assert "can be gone on with" in found["run"][1]
    assert tree(begun) == before, "a look changes nothing"


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (rewrite_config, CheckpointError, "config.json was changed"),
        (lambda d: (d / "test.csv").write_text("text,label\none,no\n"), CheckpointError, "test.csv): it was changed"),
        (lambda d: (d / "labels.txt").write_text("yes\nno\n"), CheckpointError, "labels.txt): it was changed"),
        (lambda d: (d / "out/proxy/record.json").unlink(), CheckpointError, "is not the proxy"),
        (lambda d: (d / "out/ledger.sqlite-wal").write_text("torn"), CheckpointError, "ledger.sqlite: cannot be read"),
        (
            lambda d: (d / "server.yaml").write_text((d / "server.yaml").read_text()[:-1] + ', "seed": 3}'),
            ConfigError,
            "another seed",
        ),
    ],
)
def test_a_run_that_the_files_do_not_belong_to_is_named(edit, error, text, examine, server_yaml, begun):
    edit(server_yaml.parent)
    before = tree(begun)
    code, found = examine(server_yaml)
    assert code == error.exit_code
    assert found["run"][0] == "WRONG"
    assert text in found["run"][1]
    assert tree(begun) == before, "a look changes nothing"


def test_a_run_that_goes_on_is_left_alone(examine, server_yaml, begun):
    rewrite_config(server_yaml.parent)
    with atomic.locked(begun, "out"):
        code, found = examine(server_yaml)
    assert code == 0
    assert "a server is running there" in found["run"][1]


@pytest.fixture
def built(server_yaml):
    """A proxy directory that server.yaml names."""
    values = json.loads(server_yaml.read_text()) | {"distillation": {"steps": 0, "closed_form_samples": 0}}
    server_yaml.write_text(json.dumps(values))
    config, directory = load_server_config(server_yaml), server_yaml.parent / "proxy"
    build_proxy(config, load_owner(config, Digests()), directory)
    server_yaml.write_text(json.dumps(values | {"proxy_path": "proxy"}))
    return directory


def test_a_proxy_that_goes_with_the_fm(examine, server_yaml, built):
    code, found = examine(server_yaml)
    assert (code, found["proxy"][0]) == (0, "ok")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (rewrite_config, "was cut from another FM"),
        (lambda d: (d / "proxy/selection.safetensors").write_text("y"), "is not as it was built"),
        (lambda d: (d / "proxy/record.json").unlink(), "not a whole proxy directory"),
        (lambda d: (d / "labels.txt").write_text("yes\nno\n"), "built for other labels"),
        (
            lambda d: (d / "server.yaml").write_text((d / "server.yaml").read_text().replace(": 12", ": 11")),
            "built for texts of 12 tokens",
        ),
    ],
)
def test_a_proxy_that_does_not_go_with_the_fm_is_named(edit, text, examine, server_yaml, built):
    edit(server_yaml.parent)
    code, found = examine(server_yaml)
    assert code == ModelError.exit_code
    assert found["proxy"][0] == "WRONG"
    assert text in found["proxy"][1]


def test_a_proxy_of_an_earlier_version_worries(examine, server_yaml, built):
    record = json.loads((built / "record.json").read_text())
    (built / "record.json").write_text(json.dumps({key: record[key] for key in ("losses", "gaps", "seconds")}))
    code, found = examine(server_yaml)
    assert (code, found["proxy"][0]) == (0, "warning")
    assert "does not say which FM" in found["proxy"][1]


@pytest.fixture
def joined(silo_yaml):
    """The work directory of a silo that has begun with its data."""
    config = load_silo_config(silo_yaml)
    settings = RoundSettings(seed=1, adapter={}, training={}, inactive_below=0.01)
    with opened(config.work) as work:
        work.join(Enrolment(settings, "run", ()), "north")
        work.note_data(DataOnDisk(config.data.path).read)
    return config.work


def test_a_silo_that_goes_on(examine, silo_yaml, joined):
    before = tree(joined)
    code, found = examine(silo_yaml)
    assert (code, found["federation"][0]) == (0, "ok")
    assert "goes on with the federation" in found["federation"][1]
    assert tree(joined) == before, "a look changes nothing"


def test_data_that_changed_since_the_silo_joined_worries(examine, silo_yaml, joined):
    (silo_yaml.parent / "data.csv").write_text("text,label\ngood,1\nbad,1\n")
    code, found = examine(silo_yaml)
    assert (code, found["federation"][0]) == (0, "warning")
    assert "changed since this silo last began with it" in found["federation"][1]


def test_an_image_that_changed_since_the_silo_joined_worries(examine, silo_yaml, joined):
    data, image = silo_yaml.parent / "data.csv", silo_yaml.parent / "a.png"
    data.write_text("image,label\na.png,1\n")
    image.write_bytes(b"1")
    work = Work(joined)
    bundle = work.proxy_path(work.joined())
    bundle.mkdir()
    (bundle / "proxy.json").write_text('{"task": "image-classification"}')
    read = DataOnDisk(data)
    read.add_images([image])
    work.note_data(read.read)
    assert examine(silo_yaml)[1]["federation"][0] == "ok"
    image.write_bytes(b"2")
    assert examine(silo_yaml)[1]["federation"][0] == "warning"


def test_another_silos_work_directory_worries(examine, silo_yaml, joined):
    path = joined / "federation.json"
    path.write_text(path.read_text().replace('"north"', '"south"'))
    code, found = examine(silo_yaml)
    assert (code, found["federation"][0]) == (0, "warning")
    assert "is the work directory of south" in found["federation"][1]
