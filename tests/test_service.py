"""Server and silo over real sockets: TLS, transfers, refusals. The adapters are plain tensors, no model is needed."""

import contextlib
import datetime
import errno
import io
import json
import shutil
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fedpft import atomic, audit, command
from fedpft.config import (
    AdapterSection,
    FederationSection,
    ModelSection,
    RoundSettings,
    ServerConfig,
    ServerTlsSection,
    SiloConfig,
    SiloDataSection,
    TlsSection,
    TrainingSection,
)
from fedpft.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    DataError,
    InvalidUpdate,
    ModelError,
    PortInUse,
    QuorumLost,
    RefusedByServer,
    RoundOver,
    ServerUnreachable,
    StaleProxy,
)
from fedpft.federation import DeadlinePassed, EnrolmentDeadlinePassed, SiloFailed
from fedpft.provision import Authority, provision, revoke
from fedpft.server import service, servicer
from fedpft.server.ledger import Ledger
from fedpft.server.service import FederationServer
from fedpft.silo import __main__ as silo_command
from fedpft.silo.connection import ServerConnection
from fedpft.silo.run import run
from fedpft.training import LocalResult
from fedpft.wire import transfer
from fedpft.wire.hello import Terms, greet
from fedpft.wire.tensors import read_tensors, write_tensors
from fedpft.wire.v1 import federation_pb2 as pb

SETTINGS = RoundSettings(seed=0, adapter=AdapterSection(), training=TrainingSection(), inactive_below=0.01)
ADAPTER = {"lora_A": torch.ones(2, 3), "head": torch.zeros(4, dtype=torch.bfloat16)}
TERMS = Terms("sequence-classification", ("1", "2"), 64, 4.0)
COUNTS = {"1": torch.tensor([0, 3, 5]), "1.tokens": torch.tensor(5)}
LONG_SECONDS = 60.0  # no test waits so long unless it fails


@pytest.fixture(scope="session")
def kits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kits")
    provision(directory, ["north", "south", "west"])
    return directory


def tls(kit):
    return TlsSection(ca=kit / "ca.pem", certificate=kit / "certificate.pem", key=kit / "key.pem")


@pytest.fixture
def bundle(tmp_path):
    directory = tmp_path / "bundle"
    directory.mkdir()
    description = {"format": 1, "neurons": [3, 3], "compressed": [1]}
    (directory / "proxy.json").write_text(json.dumps(description))
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 5000)  # more than one chunk
    return directory


def server_config(tmp_path, section, **changes):
    federation = {"silos": ("north", "south"), "round_deadline_seconds": LONG_SECONDS} | changes.pop("federation", {})
    values = {
        "out": tmp_path / "out",
        "listen": "127.0.0.1:0",
        "tls": section and section.model_dump(),
        "insecure_loopback": section is None,
        "model": ModelSection(path=tmp_path, labels=tmp_path),
        "federation": FederationSection(**federation),
        "public_data": tmp_path,
    }
    return ServerConfig(**(values | changes))


@pytest.fixture
def start(tmp_path, bundle):
    """Starts a server without TLS; at the end every silo is told to go, so that no thread is left behind."""
    with contextlib.ExitStack() as stack:

        def started(section=None, **changes):
            config = server_config(tmp_path, section, **changes)
            server = FederationServer(config, bundle, SETTINGS, Ledger(config.out, {}), TERMS)
            stack.callback(server.close)
            return server, server.start()

        yield started


def silo_config(tmp_path, address, name, section=None, **changes):
    values = {
        "server": address,
        "tls": section,
        "insecure_loopback": section is None,
        "insecure_name": name if section is None else None,
        "data": SiloDataSection(path=tmp_path / "data.csv"),
        "work": tmp_path / f"work-{name}",
        "connect_timeout_seconds": LONG_SECONDS,
    }
    config = SiloConfig(**(values | changes))
    config.work.mkdir(exist_ok=True)
    return config


@pytest.fixture
def dial(tmp_path):
    """A silo's connection, enrolled."""
    with contextlib.ExitStack() as stack:

        def dialed(address, name, section=None, *, enrol=True, **changes):
            connection = ServerConnection(silo_config(tmp_path, address, name, section, **changes))
            stack.callback(connection._channel.close)
            if enrol:
                connection.enrol(7)
            return connection

        yield dialed


@pytest.fixture
def background():
    with ThreadPoolExecutor(4) as pool:
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named)


def result(value=1.0, samples=7, adapter=None, inactivity=None, **metrics):
    trained = adapter or {name: torch.full_like(tensor, value) for name, tensor in ADAPTER.items()}
    return LocalResult(trained, samples, {"train_loss": 0.5} | metrics, inactivity)


def submit(silo, round, result, *, version=0):
    """What `fedpft.silo.run` does with a round's result."""
    path = silo._config.work / "update.safetensors"
    write_tensors(path, {"adapter": result.adapter, "inactivity": result.inactivity or {}})
    file = transfer.payload(path)
    header = pb.UpdateHeader(
        round=round,
        proxy_version=version,
        samples=result.samples,
        metrics=result.metrics,
        file=file.announcement(),
    )
    return silo.submit(header, file)


def fetch(silo, file, group):
    return read_tensors(silo.fetch(file, silo._config.work / "received", f"{file.sha256.hex()}.safetensors"), group)


def put(server, path, group, tensors):
    write_tensors(path, {group: tensors})
    server._ledger.enter_file(path)


def run_round(server, round, adapter=ADAPTER, *, count_inactivity=False):
    """What `fedpft.server.run` does for a round."""
    put(server, server._ledger.adapter_path(round - 1), "adapter", adapter)
    return server.run_round(round, count_inactivity=count_inactivity)


def publish(server, tensors):
    version = len(server._ledger.recorded("alignment")) + 1
    put(server, server._ledger.patch_path(version), "patch", tensors)
    put(server, server._ledger.snapshot_path(version), "patch", tensors | {"all": torch.ones(1)})
    server._ledger.record("alignment", None, {})
    return server.publish_patch()


def next_round(connection):
    task = connection.next_assignment()
    assert task.WhichOneof("task") == "train"
    return task.train


# --- the whole way ----------------------------------------------------------------------------------------------------


def rows(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\ngood,1\n")
    return SiloDataSection(path=tmp_path / "data.csv")


def take_part(connection, value):
    """A silo without a model: what it does in each round is to send `value`. Returns what it saw."""
    enrolment = connection.enrol(int(value))
    seen = {"settings": enrolment.settings, "proxy": connection.fetch_proxy(enrolment), "patches": [], "adapters": []}
    while (task := connection.next_assignment()).WhichOneof("task") == "train":
        train = task.train
        if train.proxy_version:
            seen["patches"].append(
                (fetch(connection, train.patch, "patch"), fetch(connection, train.snapshot, "patch"))
            )
        seen["adapters"].append(fetch(connection, train.adapter, "adapter"))
        counts = COUNTS if train.count_inactivity else None
        answer = result(value, int(value), inactivity=counts)
        assert submit(connection, train.round, answer, version=train.proxy_version)
    return seen | {"end": task.WhichOneof("task")}


def test_two_silos_take_part_over_tls(start, dial, kits, bundle, background, tmp_path):
    server, address = start(tls(kits / "server"))
    assert (tmp_path / "out/address").read_text() == f"{address}\n"
    silos = [
        background(take_part, dial(address, name, tls(kits / "silos" / name), enrol=False), value)
        for name, value in (("south", 2.0), ("north", 1.0))
    ]
    server.wait_for_silos()
    first = run_round(server, 1, count_inactivity=True)
    assert [(update.silo, update.samples) for update in first] == [("north", 1), ("south", 2)]
    assert [update.adapter["lora_A"].mean().item() for update in first] == [1.0, 2.0]
    assert first[0].adapter["head"].dtype == torch.bfloat16
    assert first[0].metrics == {"train_loss": 0.5}
    assert all(torch.equal(first[0].inactivity[name], count) for name, count in COUNTS.items())
    files = sorted(path.name.partition("-")[0] for path in (tmp_path / "out/updates/round-1").iterdir())
    assert files == ["north", "south"]
    assert publish(server, {"norm": torch.full((2,), 3.0)}) == 1
    assert publish(server, {"norm": torch.full((2,), 4.0)}) == 2
    second = run_round(server, 2, {name: tensor + 1 for name, tensor in ADAPTER.items()})
    assert second[0].inactivity is None
    assert not (tmp_path / "out/updates/round-1").exists(), "one round's updates are kept, not all"
    server.close_round()
    server.finish()
    for silo in silos:
        seen = silo.result()
        assert seen["end"] == "finished"
        assert seen["settings"] == SETTINGS
        assert {p.name: p.read_bytes() for p in seen["proxy"].iterdir()} == {
            p.name: p.read_bytes() for p in bundle.iterdir()
        }
        ((patch, snapshot),) = seen["patches"]
        assert patch["norm"][0].item() == snapshot["norm"][0].item() == 4.0
        assert snapshot.keys() - patch.keys() == {"all"}
        assert [adapter["lora_A"][0, 0].item() for adapter in seen["adapters"]] == [1.0, 2.0]
    assert server.bytes_down > 2 * sum(path.stat().st_size for path in bundle.iterdir())
    assert server.bytes_up > 4 * sum(tensor.nbytes for tensor in ADAPTER.values())
    assert not (tmp_path / "out/updates").exists()


def test_the_proxy_is_fetched_once(start, dial, bundle):
    server, address = start()
    silo = dial(address, "north", enrol=False)
    enrolment = silo.enrol(1)
    directory = silo.fetch_proxy(enrolment)
    sent = server.bytes_down
    assert silo.fetch_proxy(enrolment) == directory
    assert server.bytes_down == sent
    (directory / "proxy.json").write_text("spoiled")
    silo.fetch_proxy(enrolment)
    assert (directory / "proxy.json").read_bytes() == (bundle / "proxy.json").read_bytes()


def test_a_silo_that_starts_again_goes_on_with_its_round(start, dial, background):
    server, address = start(federation={"silos": ("north",)})
    dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    assert next_round(dial(address, "north")).round == 1
    again = dial(address, "north")
    assert next_round(again).round == 1
    assert submit(again, 1, result())
    assert [update.silo for update in outcome.result()] == ["north"]


# --- one process for a silo -------------------------------------------------------------------------------------------


def test_the_same_kit_from_another_work_directory_is_refused_and_the_first_notices_nothing(
    start, dial, background, tmp_path
):
    server, address = start(federation={"silos": ("north",)})
    first = dial(address, "north")
    polling = background(first.next_assignment)
    for _ in range(2):
        with pytest.raises(RefusedByServer, match="north takes part already, from another work directory") as caught:
            run(silo_config(tmp_path, address, "north", work=tmp_path / "second", data=rows(tmp_path)))
        assert "stop one of the two" in caught.value.remedy
    assert server._files.inbox._samples["north"] == 7, "the second's are not the first's"
    assert server._live._federation.present == {"north"}, "though the second said that it leaves"
    refused = [entry.fields for entry in audit.read(tmp_path / "out/audit.jsonl") if entry.event == "refused"]
    assert refused == [{"peer": "north", "reason": "north takes part already, from another work directory"}] * 2
    outcome = background(run_round, server, 1)
    assert submit(first, polling.result().train.round, result())
    assert len(outcome.result()) == 1


def test_a_silo_moves_to_another_work_directory_once_the_first_has_left(start, dial, tmp_path):
    server, address = start(federation={"silos": ("north",)})
    first = dial(address, "north")
    first.leave()
    dial(address, "north", work=tmp_path / "second").enrol(9)
    assert server._files.inbox._samples["north"] == 9
    for call in (first.next_assignment, lambda: submit(first, 1, result())):
        with pytest.raises(
            RefusedByServer, match="another process takes part as north now, with another work"
        ) as caught:
            call()
        assert "stop one of the two" in caught.value.remedy
    first.leave()
    assert server._live._federation.present == {"north"}, "only the one that takes part can leave"


def test_a_process_that_starts_again_in_its_work_directory_takes_over_at_once(start, dial, background):
    server, address = start(federation={"silos": ("north",)})
    killed = dial(address, "north")
    outcome = background(run_round, server, 1)
    next_round(killed)
    again = dial(address, "north")
    assert submit(again, next_round(again).round, result())
    assert len(outcome.result()) == 1


def test_of_two_copies_of_a_work_directory_the_older_process_is_told(start, dial, tmp_path):
    _, address = start(federation={"silos": ("north",)})
    original = dial(address, "north")
    shutil.copytree(tmp_path / "work-north", tmp_path / "copy")
    dial(address, "north", work=tmp_path / "copy")
    with pytest.raises(RefusedByServer, match="with a copy of this work directory"):
        original.next_assignment()


def test_a_refused_update_that_cannot_be_deleted_is_refused_all_the_same(start, dial, background, monkeypatch):
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(InvalidUpdate):
        submit(north, 1, result(float("nan")))
    with pytest.raises(QuorumLost):
        outcome.result()


def test_the_server_ends_when_it_cannot_keep_an_update_and_its_silo_tries_again(start, dial, background, monkeypatch):
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north", connect_timeout_seconds=0.2)
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)

    def full(_):
        raise CheckpointError("ledger.sqlite: cannot be written (database or disk is full)", "make room")

    monkeypatch.setattr(server._ledger, "enter_update", full)
    with pytest.raises(ServerUnreachable, match="the server cannot use its own files"):
        submit(north, 1, result())
    with pytest.raises(CheckpointError, match="disk is full"):
        outcome.result()


# --- who may come in --------------------------------------------------------------------------------------------------


def test_an_unknown_silo_is_refused_with_the_reason(start, dial, kits):
    _, address = start(tls(kits / "server"))
    with pytest.raises(RefusedByServer, match="'west' takes part") as caught:
        dial(address, "west", tls(kits / "silos/west"))
    assert "federation.silos" in caught.value.remedy


def test_a_silo_that_has_not_enrolled_gets_nothing(start, dial):
    _, address = start()
    silo = dial(address, "north", enrol=False)
    proxy = pb.File(name="proxy.json", sha256=bytes(32), total_bytes=1)
    for ask in (silo.next_assignment, lambda: fetch(silo, proxy, "adapter"), lambda: submit(silo, 1, result())):
        with pytest.raises(RefusedByServer, match="has not enrolled"):
            ask()


def test_another_version_of_the_package_is_refused(start, dial):
    _, address = start()
    silo = dial(address, "north", enrol=False)
    with pytest.raises(RefusedByServer, match=r"north runs fedpft 99\.1\.0, the server"):
        silo._ask(silo._stub.Enrol, pb.EnrolRequest(samples=1, package_version="99.1.0"))


def test_hello_says_what_the_data_must_be_like_and_refuses_another_version(start, dial):
    server, address = start()
    assert greet(address, None, name="north", timeout_seconds=LONG_SECONDS).terms == TERMS
    assert not server._live._federation.present, "it is free"
    silo = dial(address, "north", enrol=False)
    with pytest.raises(RefusedByServer, match=r"north runs fedpft 99\.1\.0, the server"):
        silo._ask(silo._stub.Hello, pb.HelloRequest(package_version="99.1.0"))


def write_kit(directory, files):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    (directory / "key.pem").chmod(0o600)
    return directory


def test_a_silo_of_another_authority_finds_the_server_strange(start, dial, kits, tmp_path):
    _, address = start(tls(kits / "server"))
    kit = write_kit(tmp_path / "kit", Authority.create().kit("north", hosts=None, days=1))
    with pytest.raises(CertificateError, match=r"certificate of the server .* is not accepted"):
        dial(address, "north", tls(kit))


def certificate_of_another_authority(kits):
    """A silo that trusts the right server, but whose own certificate is somebody else's."""
    return Authority.create().kit("north", hosts=None, days=1) | {"ca.pem": (kits / "server/ca.pem").read_bytes()}


def expired_certificate(kits):
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    return Authority.load(kits / "authority").kit("north", hosts=None, days=30, valid_from=past)


def server_certificate(kits):
    return Authority.load(kits / "authority").kit("north", hosts=["localhost"], days=1)


@pytest.mark.parametrize("forge", [certificate_of_another_authority, expired_certificate, server_certificate])
def test_a_certificate_that_does_not_fit_ends_in_the_handshake(forge, start, dial, kits, tmp_path):
    _, address = start(tls(kits / "server"))
    kit = write_kit(tmp_path / "kit", forge(kits))
    with pytest.raises(CertificateError, match="does not accept"):
        dial(address, "north", tls(kit))


def test_a_server_under_another_host_name_is_not_trusted(start, dial, kits, tmp_path):
    kit = write_kit(tmp_path / "kit", Authority.load(kits / "authority").kit("s", hosts=["fed.example"], days=1))
    _, address = start(tls(kit))
    with pytest.raises(CertificateError, match=r"not accepted: .*127"):
        dial(address, "north", tls(kits / "silos/north"))


def test_a_silo_cannot_pose_as_the_server(start, dial, kits):
    section = tls(kits / "silos/north")
    with pytest.raises(CertificateError, match="not a server's certificate"):
        start(section)


def test_tls_below_1_3_is_refused(start, kits):
    _, address = start(tls(kits / "server"))
    host, port = address.split(":")
    section = tls(kits / "silos/north")

    def negotiated(version):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(section.ca)
        context.load_cert_chain(section.certificate, section.key)
        context.set_alpn_protocols(["h2"])
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection((host, int(port)), timeout=LONG_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host) as secured,
        ):
            return secured.version()

    with pytest.raises((ssl.SSLError, ConnectionError)):
        negotiated(ssl.TLSVersion.TLSv1_2)
    assert negotiated(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


def test_a_server_without_tls_is_no_server_for_a_silo_with_tls(start, dial, kits):
    _, address = start()
    with pytest.raises(CertificateError, match="does not speak TLS"):
        dial(address, "north", tls(kits / "silos/north"))


def test_a_round_does_not_wait_for_a_revoked_silo(start, dial, background, tmp_path, caplog):
    provision(tmp_path / "kits", ["north", "south"])
    kit = tmp_path / "kits/server"
    section = ServerTlsSection(**dict(tls(kit)), revoked=kit / "revoked.json")
    server, address = start(section, federation={"min_silos": 1})
    north, south = (dial(address, name, tls(tmp_path / "kits/silos" / name)) for name in ("north", "south"))
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north), next_round(south)
    revoke(tmp_path / "kits", ["north"])
    assert submit(south, 1, result())
    assert [update.silo for update in outcome.result()] == ["south"]
    assert "north failed: its certificate was revoked" in caplog.text
    with pytest.raises(CertificateError, match="was revoked"):
        submit(north, 1, result())


# --- what may come in -------------------------------------------------------------------------------------------------


def changed(**tensors):
    return {name: tensor.clone() for name, tensor in ADAPTER.items()} | tensors


INVALID = {
    "NaN": (result(adapter=changed(lora_A=torch.full((2, 3), float("nan")))), "north: 'lora_A' holds NaN"),
    "infinity": (result(adapter=changed(lora_A=torch.full((2, 3), float("inf")))), "'lora_A' holds NaN or infinity"),
    "shape": (result(adapter=changed(lora_A=torch.ones(3, 2))), r"'adapter/lora_A' is \(3, 2\)"),
    "dtype": (result(adapter=changed(lora_A=torch.ones(2, 3).half())), r"torch\.float16"),
    "name": (result(adapter=changed(extra=torch.ones(1))), "unknown tensor 'adapter/extra'"),
    "lacking": (result(adapter={"lora_A": torch.ones(2, 3)}), "lacks the tensor 'adapter/head'"),
    "no samples": (result(samples=0), "trained on 0 samples"),
    "metric": (result(train_loss=float("nan")), "'train_loss' is nan"),
    "huge": (result(adapter=changed(extra=torch.ones(600_000))), "bytes, at most"),
    "half of the counts": (result(inactivity={"1": COUNTS["1"]}), "lacks the tensor 'inactivity/1.tokens'"),
    "count above tokens": (result(inactivity=COUNTS | {"1": torch.tensor([0, 3, 6])}), "0 to 6 of 5 tokens"),
    "count below zero": (result(inactivity=COUNTS | {"1": torch.tensor([0, -3, 5])}), "-3 to 5 of 5 tokens"),
    "count shape": (result(inactivity=COUNTS | {"1": torch.tensor([0, 3])}), r"is \(2,\) torch.int64, not \(3,\)"),
    "count dtype": (result(inactivity=COUNTS | {"1": torch.ones(3)}), r"torch\.float32, not"),
    "count layer": (result(inactivity=COUNTS | {"0": torch.ones(3)}), "unknown tensor 'inactivity/0'"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_update_is_refused_and_the_round_goes_on(fault, start, dial, background):
    bad, message = INVALID[fault]
    server, address = start(federation={"min_silos": 1})
    north, south = dial(address, "north"), dial(address, "south")
    server.wait_for_silos()
    outcome = background(run_round, server, 1, count_inactivity=True)
    next_round(north), next_round(south)
    with pytest.raises(InvalidUpdate, match=message) as caught:
        submit(north, 1, bad)
    assert "out/updates" not in str(caught.value)
    assert submit(south, 1, result(inactivity=COUNTS))
    assert [update.silo for update in outcome.result()] == ["south"]
    with pytest.raises(RoundOver):
        submit(north, 1, result(inactivity=COUNTS))


def test_an_update_that_was_trained_on_more_than_the_silo_has_now_counts(start, dial, background):
    """The data has shrunk since; the server remembers what a silo can have had, over a restart of its own too."""
    server, address = start(federation={"silos": ("north",)})
    before = dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(before)
    server.close()
    server._live.handle(SiloFailed("north", "the test is through with this server"))
    with pytest.raises(QuorumLost):
        outcome.result()
    again, _ = start(listen=address, federation={"silos": ("north",)})
    north = dial(address, "north", enrol=False)
    north.enrol(3)
    with pytest.raises(InvalidUpdate, match="trained on 8 samples, not on 1 to 7"):
        submit(north, 1, result(samples=8))
    again.close()

    third, _ = start(listen=address, federation={"silos": ("north",)})
    north.enrol(3)
    assert submit(north, 1, result(samples=7))
    assert [update.samples for update in third.run_round(1, count_inactivity=False)] == [7]


def test_an_invalid_update_that_costs_the_quorum_is_named(start, dial, background, caplog):
    server, address = start()
    north, _ = dial(address, "north"), dial(address, "south")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)
    with pytest.raises(InvalidUpdate):
        submit(north, 1, INVALID["NaN"][0])
    with pytest.raises(QuorumLost, match=r"round 1 .*north: 'lora_A' holds NaN"):
        outcome.result()
    assert "north failed" in caplog.text


def test_counts_that_nobody_asked_for_are_refused(start, dial, background):
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)
    with pytest.raises(InvalidUpdate, match="unknown tensor 'inactivity/1'"):
        submit(north, 1, result(inactivity=COUNTS))
    with pytest.raises(QuorumLost):
        outcome.result()


def test_the_same_update_twice_counts_once(start, dial, background):
    server, address = start()
    north, south = dial(address, "north"), dial(address, "south")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north), next_round(south)
    assert submit(north, 1, result(1.0))
    assert not submit(north, 1, result(9.0))
    assert submit(south, 1, result())
    assert [update.adapter["lora_A"][0, 0].item() for update in outcome.result()] == [1.0, 1.0]
    assert not submit(north, 1, result()), "even after the round"


def test_a_late_update_is_refused_and_the_silo_takes_part_in_the_next_round(start, dial, background, monkeypatch):
    server, address = start(federation={"min_silos": 1})
    north, south = dial(address, "north"), dial(address, "south")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north), next_round(south)
    south.leave()
    assert submit(north, 1, result())
    assert [update.silo for update in outcome.result()] == ["north"]
    with pytest.raises(RoundOver, match="round 1 is over"):
        submit(south, 1, result())
    monkeypatch.setattr(servicer, "POLL_SECONDS", 0.0)
    assert south._ask(south._stub.NextTask, pb.NextTaskRequest()).WhichOneof("task") == "wait"
    outcome = background(run_round, server, 2)
    assert next_round(south).round == 2
    withdrawn = pb.File(name="adapter.safetensors", sha256=bytes(32), total_bytes=1)
    with pytest.raises(RoundOver, match="no such file"):
        fetch(south, withdrawn, "adapter")
    assert submit(south, 2, result())
    assert submit(north, next_round(north).round, result())
    assert [update.silo for update in outcome.result()] == ["north", "south"]


def test_a_stale_proxy_is_refused(start, dial, background):
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north")
    server.wait_for_silos()
    publish(server, {"norm": torch.ones(2)})
    outcome = background(run_round, server, 1)
    assert next_round(north).proxy_version == 1
    with pytest.raises(StaleProxy, match="version 0 of the proxy"):
        submit(north, 1, result())
    with pytest.raises(QuorumLost, match="version 0 of the proxy"):
        outcome.result()


def test_a_damaged_upload_is_sent_again(start, dial, background, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 100)  # so that it is a stream
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)
    send, damaged = north._stub.SendUpdate.future, []

    class DamageOnce:
        @staticmethod
        def future(parts, **options):
            def passing():
                for part in parts:
                    if isinstance(part, bytes) and not damaged:
                        damaged.append(part)
                        part = part[:-1] + b"!"
                    yield part

            return send(passing(), **options)

    monkeypatch.setattr(north._stub, "SendUpdate", DamageOnce)
    assert submit(north, 1, result())
    assert damaged
    assert len(outcome.result()) == 1


def test_what_fits_into_a_chunk_comes_along_and_is_recorded(start, dial, background, tmp_path):
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    task = next_round(north)
    north._stub.FetchFile = north._stub.SendUpdate = None
    adapter = north.fetch(task.adapter, tmp_path / "received")
    assert transfer.payload(adapter).sha256 == task.adapter.sha256
    assert submit(north, 1, result())
    (update,) = outcome.result()
    arrived = transfer.payload(update.path)
    for log, event, file in (
        (tmp_path / "out", "sent", task.adapter),
        (tmp_path / "work-north", "received", task.adapter),
        (tmp_path / "work-north", "sent", arrived),
        (tmp_path / "out", "received", arrived),
    ):
        (entry,) = [entry for entry in audit.read(log / "audit.jsonl") if entry.event == event]
        assert (entry.fields["bytes"], entry.fields["sha256"]) == (file.total_bytes, file.sha256.hex())
    assert (server.bytes_down, server.bytes_up) == (task.adapter.total_bytes, arrived.total_bytes)


def test_a_damaged_offer_is_sent_again(start, dial, background, monkeypatch):
    server, address = start(federation={"silos": ("north",)})
    north = dial(address, "north")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)
    offer, damage = north._stub.OfferUpdate, [b"x", b""]

    def damaged(request, **options):
        broken = pb.OfferUpdateRequest()
        broken.CopyFrom(request)
        if damage:
            broken.update.file.content = request.update.file.content[:-1] + damage.pop()
        return offer(broken, **options)

    monkeypatch.setattr(north._stub, "OfferUpdate", damaged)
    assert submit(north, 1, result())
    assert not damage
    assert not submit(north, 1, result())
    assert len(outcome.result()) == 1


# --- ends -------------------------------------------------------------------------------------------------------------


def test_silos_that_stay_silent_lose_the_quorum_by_name(start, dial):
    server, address = start(federation={"round_deadline_seconds": 0.2})
    dial(address, "north")
    with pytest.raises(QuorumLost, match="missing: south"):
        server.wait_for_silos()
    dial(address, "south")
    with pytest.raises(QuorumLost, match=r"north: no update before the deadline; south: no update"):
        run_round(server, 1)


@pytest.mark.parametrize("failure", ["it left", "the deadline"])
def test_with_a_lower_quorum_a_lost_round_goes_on_at_once_after_a_restart(
    failure, start, dial, background, monkeypatch, tmp_path
):
    silos = {"silos": ("north", "south", "west")}
    server, address = start(federation=silos)
    north, south, west = (dial(address, name) for name in silos["silos"])
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north)
    assert submit(north, 1, result(2.0))
    west.leave() if failure == "it left" else server._live.handle(DeadlinePassed(1))
    with pytest.raises(QuorumLost, match=f"west: .*{failure}") as caught:
        outcome.result()
    left = 2 if failure == "it left" else 1
    assert f"set federation.min_silos to {left} to go on without them" in caught.value.remedy
    assert "start the server again: it goes on from where it was" in caught.value.remedy
    monkeypatch.setattr(service, "CLOSING_SECONDS", 0.0)
    server.close()

    again, _ = start(listen=address, federation={**silos, "min_silos": left})
    outcome = background(again.run_round, 1, count_inactivity=False)
    if failure == "it left":
        assert submit(south, next_round(south).round, result(3.0))
    updates = outcome.result(LONG_SECONDS / 2)  # and not after another deadline
    assert [update.silo for update in updates] == ["north", "south"][:left]


def test_a_round_with_too_few_updates_for_the_mean_is_lost_naming_the_key(start, dial, background):
    """Nobody is thanked for an update that no median could be made of."""
    silos = ("north", "south", "west")
    server, address = start(federation={"silos": silos}, aggregation={"mean": "median"})
    north, south, west = (dial(address, name) for name in silos)
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    for silo in (north, south):
        assert submit(silo, next_round(silo).round, result())
    west.leave()
    with pytest.raises(QuorumLost, match=r"round 1 needs 3 updates and cannot get them .west: ") as caught:
        outcome.result()
    assert "aggregation.mean takes no fewer than 3 updates" in caught.value.remedy
    with pytest.raises(QuorumLost, match=r"round 2 needs 3 updates and cannot get them .west: not there"):
        run_round(server, 2)


@pytest.mark.parametrize("failure", ["it left", "the deadline"])
def test_a_silo_that_was_not_picked_takes_over_and_does_so_after_a_restart(
    failure, start, dial, background, monkeypatch
):
    server, address = start(federation={"sample_fraction": 0.5})
    silos = {name: dial(address, name) for name in ("north", "south")}
    server.wait_for_silos()
    (first,) = server._live._federation.pick(1)
    (second,) = silos.keys() - {first}
    waiting = background(silos[second].next_assignment)
    outcome = background(run_round, server, 1)
    assert next_round(silos[first]).round == 1
    silos[first].leave() if failure == "it left" else server._live.handle(DeadlinePassed(1))
    assert waiting.result(servicer.POLL_SECONDS / 2).train.round == 1, "it is woken, and need not ask again"
    assert server._ledger.last_round().silos == (second,)
    monkeypatch.setattr(service, "CLOSING_SECONDS", 0.0)
    server.close()
    server._live.handle(SiloFailed(second, "the test is through with this server"))
    with pytest.raises(QuorumLost):
        outcome.result()

    again, _ = start(listen=address, federation={"sample_fraction": 0.5})
    outcome = background(again.run_round, 1, count_inactivity=False)
    assert submit(silos[second], next_round(silos[second]).round, result())
    assert [update.silo for update in outcome.result()] == [second]


def test_the_deadline_begins_anew_for_silos_that_take_the_place_of_others(start, dial):
    server, address = start(federation={"sample_fraction": 0.5, "round_deadline_seconds": 0.2})
    dial(address, "north"), dial(address, "south")
    with pytest.raises(QuorumLost, match=r"north: no update before the deadline; south: no update"):
        run_round(server, 1)


def test_a_server_that_goes_away_in_the_middle_is_unreachable(start, dial, monkeypatch):
    server, address = start()
    north = dial(address, "north", connect_timeout_seconds=0.2)
    monkeypatch.setattr(service, "CLOSING_SECONDS", 0.0)
    server.close()
    with pytest.raises(ServerUnreachable, match=r"did not answer for 0\.2 s \(connection refused\)"):
        north.next_assignment()


def test_a_round_goes_on_after_a_restart_with_what_it_had(start, dial, background, monkeypatch):
    server, address = start()
    north, south = dial(address, "north"), dial(address, "south")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north), next_round(south)
    assert submit(north, 1, result(2.0))
    monkeypatch.setattr(service, "CLOSING_SECONDS", 0.0)
    server.close()
    server._live.handle(SiloFailed("south", "the test is through with this server"))
    with pytest.raises(QuorumLost):
        outcome.result()

    again, _ = start(listen=address)
    assert not submit(north, 1, result(9.0)), "it counts, though this server never saw it; north enrolled by itself"
    assert next_round(south).attempt == 1
    assert submit(south, 1, result(3.0)), "what was trained for the first attempt is as good"
    updates = again.run_round(1, count_inactivity=False)
    assert [update.adapter["lora_A"][0, 0].item() for update in updates] == [2.0, 3.0]
    outcome = background(run_round, again, 2)
    assert submit(north, next_round(north).round, result())
    assert submit(south, next_round(south).round, result())
    assert len(outcome.result()) == 2


def test_a_restart_between_rounds_waits_for_those_that_were_there(start, dial, background, monkeypatch):
    server, address = start(federation={"silos": ("north", "south", "west")})
    silos = [dial(address, name) for name in ("north", "south", "west")]
    silos[2].leave()
    server._live.handle(EnrolmentDeadlinePassed())
    outcome = background(run_round, server, 1)
    for silo in silos[:2]:
        assert submit(silo, next_round(silo).round, result())
    assert len(outcome.result()) == 2
    put(server, server._ledger.adapter_path(1), "adapter", ADAPTER)
    monkeypatch.setattr(service, "CLOSING_SECONDS", 0.0)
    server.close()
    again, _ = start(listen=address, federation={"silos": ("north", "south", "west")})
    polls = [background(silo.next_assignment) for silo in silos[:2]]
    again.wait_for_silos()
    outcome = background(run_round, again, 2)
    for silo, poll in zip(silos, polls, strict=False):
        assert submit(silo, poll.result().train.round, result())
    assert [update.silo for update in outcome.result()] == ["north", "south"]


def broken_off(start, dial, background):
    """A server that has gone, and has left an open round with the update of north alone; returns its address."""
    server, address = start()
    north, south = dial(address, "north"), dial(address, "south")
    server.wait_for_silos()
    outcome = background(run_round, server, 1)
    next_round(north), next_round(south)
    assert submit(north, 1, result())
    server.close()
    server._live.handle(SiloFailed("south", "the test is through with this server"))
    with pytest.raises(QuorumLost):
        outcome.result()
    return address


def test_a_restart_compares_the_audit_log_with_the_ledger(start, dial, background, tmp_path, caplog):
    address = broken_off(start, dial, background)
    path = tmp_path / "out/audit.jsonl"
    *before, line = path.read_bytes().splitlines(keepends=True)
    assert b'"received"' in line
    path.write_bytes(b"".join(before))  # as if it had been killed before it came to write it
    with audit.AuditLog(path) as log:
        log.append("received", peer="south", round=1, verdict="accept")
    for _ in range(2):
        server, _ = start(listen=address)
        server.close()
    _, late = [entry for entry in audit.read(path) if entry.event == "received"]
    assert late.fields.pop("late")
    assert late.fields == {name: value for name, value in json.loads(line).items() if name in late.fields}
    assert late.fields.keys() == {"peer", "file", "round", "bytes", "sha256", "verdict"}
    assert caplog.text.count(f"{path} has an update of south in round 1 that the ledger has lost") == 2


def test_the_audit_log_of_another_run_is_named(start, dial, background, tmp_path):
    address = broken_off(start, dial, background)
    path = tmp_path / "out/audit.jsonl"
    path.unlink()
    with audit.AuditLog(path) as log:
        log.append("started", run="another")
    with pytest.raises(CheckpointError, match=r"audit\.jsonl: is the log of another run"):
        start(listen=address)


def test_an_audit_log_that_is_gone_is_missed(start, dial, background, tmp_path, caplog):
    address = broken_off(start, dial, background)
    assert "does not say that this run was started" not in caplog.text
    (tmp_path / "out/audit.jsonl").unlink()
    start(listen=address)
    assert caplog.text.count("audit.jsonl: does not say that this run was started before") == 1


@pytest.mark.parametrize("file", ["rounds/0/adapter.safetensors", "updates"])
def test_a_torn_file_of_an_open_round_is_named(file, start, dial, background, monkeypatch, tmp_path):
    broken_off(start, dial, background)
    path = next((tmp_path / "out/updates/round-1").iterdir()) if file == "updates" else tmp_path / "out" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=path.name) as caught:
        start()
    assert "backup" in caught.value.remedy


def test_an_abort_reaches_the_silos_with_its_reason(start, dial, background):
    server, address = start(federation={"silos": ("north",)})
    polling = background(dial(address, "north").next_assignment)
    server.wait_for_silos()
    server.abort("the disk at /srv/fed/out is full")
    assert polling.result().aborted.reason == "the disk at out is full"


def test_a_taken_port_is_named(start):
    _, address = start()
    with pytest.raises(PortInUse, match=address):
        start(listen=address)


def test_a_host_that_is_not_this_machines_is_named(start, kits):
    with pytest.raises(PortInUse, match=r"192\.0\.2\.1"):
        start(tls(kits / "server"), listen="192.0.2.1:0")


# --- egress -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intruder", ["fm.bin", "notes.py", ".hidden.json", "directory.json", "link.json"])
def test_nothing_but_plain_files_of_a_proxy_is_ever_sent(intruder, start, bundle, tmp_path):
    path = bundle / intruder
    if intruder == "directory.json":
        path.mkdir()
    elif intruder == "link.json":
        (tmp_path / "secret.json").write_text("secret")
        path.symlink_to(tmp_path / "secret.json")
    else:
        path.write_text("secret")
    with pytest.raises(ModelError, match=intruder):
        start()


def test_a_bundle_without_description_is_no_bundle(start, bundle):
    (bundle / "proxy.json").unlink()
    with pytest.raises(ModelError, match=r"proxy\.json"):
        start()


# --- the silo's command -----------------------------------------------------------------------------------------------


def silo_yaml(tmp_path, address, **changes):
    values = {"server": address, "insecure_loopback": True, "insecure_name": "north", "data": {"path": "data.csv"}}
    path = tmp_path / "silo.yaml"
    path.write_text(json.dumps(values | {"connect_timeout_seconds": 0.2} | changes))
    (tmp_path / "data.csv").write_text("text,label\ngood,1\n")
    return path


def test_an_unreachable_server_is_named_with_its_exit_code(tmp_path, capsys):
    path = silo_yaml(tmp_path, "127.0.0.1:1")
    assert silo_command.main(["--config", str(path)]) == ServerUnreachable.exit_code
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error:")] == [errors[-1]]
    assert "127.0.0.1:1 did not answer for 0.2 s" in errors[-1]


def test_faulty_data_is_found_before_anything_is_sent(start, tmp_path, capsys):
    server, address = start()
    path = silo_yaml(tmp_path, address)
    (tmp_path / "data.csv").write_text("text,label\ngood\n")
    assert silo_command.main(["--config", str(path)]) == DataError.exit_code
    assert "data.csv:2" in capsys.readouterr().err
    assert not server._live._federation.present


def test_an_unwanted_silo_ends_with_the_servers_reason(start, tmp_path, capsys):
    _, address = start()
    path = silo_yaml(tmp_path, address, insecure_name="stranger")
    assert silo_command.main(["--config", str(path)]) == RefusedByServer.exit_code
    assert "federation.silos" in capsys.readouterr().err


def test_a_missing_key_is_found_before_dialing(tmp_path, capsys, kits):
    shutil.copytree(kits / "silos/north", tmp_path / "kit")
    (tmp_path / "kit/key.pem").unlink()
    section = {"ca": "kit/ca.pem", "certificate": "kit/certificate.pem", "key": "kit/key.pem"}
    path = silo_yaml(tmp_path, "127.0.0.1:1", insecure_loopback=False, insecure_name=None, tls=section)
    assert silo_command.main(["--config", str(path)]) == CertificateError.exit_code
    assert "key.pem: no such file" in capsys.readouterr().err


def test_a_proxy_that_cannot_be_loaded_frees_the_round_of_this_silo(start, tmp_path):
    server, address = start(federation={"silos": ("north",)})
    (tmp_path / "data.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(ModelError):
        run(silo_config(tmp_path, address, "north"))
    assert not server._live._federation.present, "it told the server that it leaves"


def test_two_silos_cannot_share_a_work_directory(start, tmp_path, monkeypatch):
    _, address = start()
    (tmp_path / "data.csv").write_text("text,label\ngood,1\n")
    config = silo_config(tmp_path, address, "north")
    with atomic.locked(config.work, "work"), pytest.raises(ConfigError, match="in use by another process"):
        run(config)


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as caught:
        silo_command.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--config" in text
    assert "Exit codes" in text


def test_a_command_ends_with_one_line_and_the_exit_code(capsys):
    def fail():
        raise DataError("data.csv:3: no\nlabel", "add one")

    def interrupt():
        raise KeyboardInterrupt

    assert command.run_command(lambda: None) == 0
    assert command.run_command(fail) == DataError.exit_code
    assert command.run_command(interrupt) == 130
    assert capsys.readouterr().err.splitlines() == ["error: data.csv:3: no label -> add one", "error: interrupted"]


def test_a_name_that_the_terminal_cannot_show_ends_no_command(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert command.run_command(lambda: print("d\udcff.csv: h\u00e4", flush=True)) == 0
    assert shown.buffer.getvalue() == b"d\\udcff.csv: h\\xe4\n"
