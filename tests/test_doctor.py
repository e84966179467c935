"""`fedpft doctor`: what is in order, what worries and what is wrong, line by line, and the exit code."""

import errno
import json
import os
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import fedpft.wire  # isort: skip  (sets gRPC's environment before grpc is imported)
import grpc
import pytest
import yaml

from fedpft import atomic, cli, doctor
from fedpft.config import ServerTlsSection
from fedpft.errors import (
    CertificateError,
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
from fedpft.server.admission import Admission
from fedpft.server.servicer import FederationServicer
from fedpft.wire.channel import SERVER_OPTIONS, listen
from fedpft.wire.hello import Greeting
from fedpft.wire.v1.federation_pb2_grpc import add_FederationServiceServicer_to_server


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
    servicer = FederationServicer(None, None, None, None, "", "", Admission(section, lambda silo, reason: None))
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
        "model/config.json": "{}",
        "labels.txt": "no\nyes\n",
        "public.csv": "text\none\ntwo\n",
        "test.csv": "text,label\none,yes\n",
    }.items():
        (kits / name).parent.mkdir(exist_ok=True)
        (kits / name).write_text(content)
    values = yaml.safe_load((kits / "server/tls.yaml").read_text()) | {
        "listen": "127.0.0.1:0",
        "out": "out",
        "model": {"path": "model", "labels": "labels.txt"},
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


SILO = ["certificate", "key", "connection", "clock", "data", "device", "work", "disk"]
SERVER = ["certificate", "key", "revoked", "listen", "model", "data", "device", "out", "disk"]
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
    assert not (server_yaml.parent / "out").exists(), "a look changes nothing"


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


def test_a_check_that_fails_itself_does_not_stop_the_others(examine, silo_yaml, monkeypatch):
    monkeypatch.setattr("fedpft.doctor.read_rows", lambda *_: {}["a cell"])
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
