"""Faults of every kind at every moment of a federation, on real processes over loopback.

    {server, silo} x {before, during, after}
    x {enrol, proxy download, training, upload, aggregation, alignment, plug-in}
    x {kill -9, of one process or of all, pause, connection cut, slow link, duplicate, corrupt byte}

MOMENTS names the moments, FAULTS the faults, `makes_sense` says which pairs are left out and why. Whatever happens,
every run has to end as the undisturbed one did (`check`): the same bytes, every update counted once, every process
well, nothing half-written left. `make test` has them in chains, many faults in one federation; the slow tests have
each of them alone. Below are those with more to say: stops by hand, late silos, torn files, TLS.
"""

import contextlib
import hashlib
import itertools
import random
import re
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from faults import PATIENCE, Deployment, Link, Party, await_

from fedpft import audit
from fedpft.errors import CheckpointError, ConfigError
from fedpft.provision import provision
from fedpft.proxy.bundle import apply_patch, load_proxy
from fedpft.wire.tensors import read_tensors

SILOS = ("north", "south")
CHUNK = 1 << 20


# --- the link itself --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def echo(directory: Path) -> Iterator[Path]:
    """A server that sends back what it receives; yields the file with its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = directory / "address"
    address.write_text(f"127.0.0.1:{listener.getsockname()[1]}\n", encoding="utf-8")

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield address
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextlib.contextmanager
def linked(directory: Path) -> Iterator[Link]:
    with echo(directory) as address, contextlib.closing(Link(address)) as link:
        yield link


def dial(link: Link) -> socket.socket:
    host, _, port = link.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60.0)


def receive(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := connection.recv(size - len(found))):
        found += data
    return found


@pytest.mark.parametrize("rate", [None, 4e5])
def test_link_passes_all_bytes_and_counts_them(tmp_path: Path, rate: float | None) -> None:
    sent = random.Random(0).randbytes(100_000)
    with linked(tmp_path) as link, dial(link) as silo:
        link.slow(rate)
        threading.Thread(target=silo.sendall, args=(sent,), daemon=True).start()
        assert receive(silo, len(sent)) == sent
        assert (link.up.passed, link.down.passed, link.connections) == (100_000, 100_000, 1)


@pytest.mark.parametrize("reset", [True, False])
def test_link_holds_at_a_byte_and_cuts_there(tmp_path: Path, reset: bool) -> None:
    with linked(tmp_path) as link:
        with dial(link) as silo:
            link.hold(down=70_000)
            silo.sendall(bytes(100_000))
            link.await_held()
            assert len(receive(silo, 70_000)) == link.down.passed == 70_000
            link.cut(reset=reset)
            if reset:
                with pytest.raises(ConnectionResetError):
                    silo.recv(1)
            else:
                assert silo.recv(1) == b""
        link.release()
        with dial(link) as silo:
            silo.sendall(b"again")
            assert receive(silo, 5) == b"again"


def test_link_lets_go_what_it_held(tmp_path: Path) -> None:
    with linked(tmp_path) as link, dial(link) as silo:
        link.hold(up=10)
        silo.sendall(b"0123456789abcdef")
        link.await_held()
        assert receive(silo, 10) == b"0123456789"
        link.release()
        assert receive(silo, 6) == b"abcdef"


def test_link_damages_one_byte(tmp_path: Path) -> None:
    with linked(tmp_path) as link, dial(link) as silo:
        link.flip(up=70_000)
        silo.sendall(bytes(100_000))
        received = receive(silo, 100_000)
        assert [place for place, byte in enumerate(received) if byte] == [70_000]


def test_link_finds_a_server_that_came_back_elsewhere(tmp_path: Path) -> None:
    with linked(tmp_path) as link:
        with echo(tmp_path), dial(link) as silo:
            silo.sendall(b"here")
            assert receive(silo, 4) == b"here"
        with dial(link) as silo:
            assert silo.recv(1) == b""
        with echo(tmp_path), dial(link) as silo:
            silo.sendall(b"there")
            assert receive(silo, 5) == b"there"


# --- the federation ---


def write_inputs(root: Path) -> None:
    """A BERT of 3 layers, D 32, F 64, whose embedding makes the proxy a transfer of many chunks; texts of two silos."""
    config = tiny.CONFIGS["bert"]()
    config.num_hidden_layers, config.num_labels, config.vocab_size = 3, len(tiny.LABELS), 40_000
    transformers.set_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(root / "model")
    tiny.processor("bert").save_pretrained(root / "model")
    (root / "labels.txt").write_text("\n".join(tiny.LABELS) + "\n", encoding="utf-8")
    draw = random.Random(0)
    for name, rows in {"north": 40, "south": 30, "public": 32, "test": 20}.items():
        lines = ["text,label"]
        lines += [f"{' '.join(draw.choices(tiny.WORDS[4:], k=8))},{draw.choice(tiny.LABELS)}" for _ in range(rows)]
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def server_settings(root: Path) -> dict[str, Any]:
    return {
        "seed": 5,
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "threads": 1,
        "model": {"path": str(root / "model"), "labels": str(root / "labels.txt"), "max_tokens": 12},
        "proxy": {"neurons": 40},
        "distillation": {"closed_form_samples": 16, "steps": 2, "batch": 8},
        "alignment": {"counts": "silos", "every_rounds": 1, "steps": 2, "batch": 8},
        "adapter": {"rank": 1024, "alpha": 1024},  # an update of several chunks
        "training": {"rounds": 2, "local_epochs": 1.0, "batch": 10, "learning_rate": 0.01},
        "federation": {"silos": list(SILOS)},
        "public_data": str(root / "public.csv"),
        "test_data": str(root / "test.csv"),
    }


def silo_settings(root: Path, name: str) -> dict[str, Any]:
    return {
        "insecure_loopback": True,
        "insecure_name": name,
        "data": {"path": str(root / f"{name}.csv")},
        "threads": 1,
    }


def with_kits(root: Path, directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings of server and silos, with TLS in place of insecure_loopback."""
    provision(directory / "kits", SILOS)

    def kit(name: str) -> dict[str, Any]:
        return {"tls": {part: str(directory / "kits" / name / f"{part}.pem") for part in ("ca", "certificate", "key")}}

    server = server_settings(root) | kit("server")
    silos = {name: silo_settings(root, name) | kit(f"silos/{name}") for name in SILOS}
    for settings in (server, *silos.values()):
        settings["insecure_loopback"] = False
        settings.pop("insecure_name", None)
    return server, silos


def deployment(root: Path, directory: Path, **changes: Any) -> Deployment:
    return Deployment(directory, server_settings(root) | changes, {name: silo_settings(root, name) for name in SILOS})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@dataclass(frozen=True)
class Result:
    """What must not depend on any fault.

    files: SHA-256 of all that a federation leaves for good.
    updates: (round, silo, SHA-256, samples) of each that counts.
    down: bytes that went to each silo, over all of its connections.
    """

    files: dict[str, str]
    updates: list[tuple[int, str, str, int]]
    down: dict[str, int]


def result(done: Deployment) -> Result:
    patterns = ("*.safetensors", "merged/*.safetensors", "adapter/*.safetensors", "rounds/*/*", "patches/*")
    paths = [path for pattern in patterns for path in sorted(done.out.glob(pattern))]
    files = {str(path.relative_to(done.out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    with contextlib.closing(sqlite3.connect(done.out / "ledger.sqlite")) as ledger:
        updates = ledger.execute("SELECT round, silo, sha256, samples FROM updates ORDER BY round, silo").fetchall()
    return Result(files, updates, {silo: link.down.passed for silo, link in done.links.items()})


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The undisturbed federation, by commands as a person gives them."""
    with deployment(inputs, tmp_path_factory.mktemp("reference")) as running:
        running.start(as_commands=True)
        running.await_end()
        found = result(running)
        for party in running.parties:
            assert not re.search("Traceback|WARNING|ERROR", party.log), party.log
    assert {"adapter.safetensors", "patch.safetensors", "merged/model.safetensors"} <= found.files.keys()
    assert {"rounds/2/adapter.safetensors", "patches/snapshot-1.safetensors"} <= found.files.keys()
    assert [(round, silo) for round, silo, *_ in found.updates] == [(r, silo) for r in (1, 2) for silo in SILOS]
    return found


def check(done: Deployment, reference: Result, faults: Sequence[str]) -> None:
    """All ended well and as undisturbed, and no byte was fetched twice but those in flight at a fault."""
    done.await_end()
    # At a cut: what came of one chunk, what the kernel held, and the calls that are made again. At a damaged chunk
    # the connection stays, and all that is on its way behind that chunk comes in vain: on loopback that is the rest of
    # the file, which fits into the buffers of the stream, and at most the whole of the largest, with its frames.
    largest = (done.out / "proxy" / "bundle" / "model.safetensors").stat().st_size + (16 << 10)
    in_flight = sum(largest if fault == "corrupt" else CHUNK + (256 << 10) for fault in faults)
    found = result(done)
    assert found.updates == reference.updates
    assert found.files == reference.files
    for silo, link_bytes in found.down.items():
        assert link_bytes <= reference.down[silo] + in_flight, silo
    for party, directory in ((done.server, done.out), *((silo, done.work(silo.name)) for silo in done.silos.values())):
        assert not [path for path in directory.rglob("*") if path.suffix == ".part"], party.name
        assert audit.verify(directory / "audit.jsonl").entries > 0
        assert "Traceback" not in party.log, party.name
    assert not list((done.out / "updates").rglob("*.*"))


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a process halts at a step (faults.Observer), or when a silo's link has carried so many more bytes."""

    phase: str
    when: str
    what: str
    party: str
    step: str = ""
    up: int | None = None
    down: int | None = None

    def arm(self, running: Deployment) -> None:
        if self.step:
            the(running, self.party).halt_at(self.step)
        else:
            running.links[self.party].hold(up=self.up, down=self.down)

    def takes_the_place_of(self, other: "Moment") -> bool:
        """A link has one order at a time: a release meant for the last one could undo the next, if that has come."""
        return not self.step and not other.step and self.party == other.party

    def await_(self, running: Deployment) -> None:
        if self.step:
            the(running, self.party).await_halt()
        else:
            running.links[self.party].await_held()

    def release(self, running: Deployment) -> None:
        if self.step:
            the(running, self.party).release()
        else:
            running.links[self.party].release()


# In the order in which they come. The silo is north; alignment follows on round 1, plug-in on round 2.
MOMENTS = (
    Moment("enrol", "before", "proxy half written", "server", r"^open .*/proxy/bundle/tokenizer"),
    Moment("enrol", "before", "proxy not whole", "server", r"^before replace .*/proxy/record.json"),
    Moment("enrol", "before", "proxy not noted", "server", r"^before sql INSERT INTO journal .*'proxy'"),
    Moment("enrol", "before", "start not noted", "server", r"^after replace .*rounds/0/adapter"),
    Moment("enrol", "before", "first byte", "north", up=0),
    Moment("enrol", "during", "noted, not answered", "server", r"^log north enrolled"),
    Moment("enrol", "after", "answered", "north", r"^log north: enrolled"),
    Moment("proxy download", "before", "first byte", "north", down=2_000),
    Moment("proxy download", "during", "half of it", "north", down=2_500_000),
    Moment("proxy download", "during", "whole, not in place", "north", r"^before replace .*proxy-.*/model.safetensors"),
    Moment("proxy download", "after", "in place", "north", r"^after replace .*proxy-.*/model.safetensors"),
    Moment("training", "before", "adapter there", "north", r"^after replace .*/received/"),
    Moment("training", "during", "step 2", "north", r"^optimizer step 2 "),
    Moment("training", "after", "update written, not noted", "north", r"^before replace .*/update.json"),
    Moment("upload", "before", "noted, not offered", "north", r"^after replace .*/update.json"),
    Moment("upload", "during", "half of it", "north", up=1_500_000),
    Moment("upload", "during", "whole, not counted", "server", r"^before sql INSERT INTO updates .*'north'"),
    Moment("upload", "after", "counted, not acknowledged", "server", r"^after sql INSERT INTO updates .*'north'"),
    Moment("aggregation", "before", "all updates there", "server", r"^log round 1: 2 updates"),
    Moment("aggregation", "during", "mean not in place", "server", r"^before replace .*rounds/1/adapter"),
    Moment("aggregation", "after", "mean not entered", "server", r"^after replace .*rounds/1/adapter"),
    Moment("alignment", "before", "mean entered", "server", r"^after sql INSERT OR REPLACE INTO files .*rounds/1/"),
    Moment("alignment", "during", "step 2", "server", r"^optimizer step 1 after neuron-level"),
    Moment("alignment", "during", "patch without snapshot", "server", r"^after replace .*patches/patch-1"),
    Moment("alignment", "during", "snapshot not entered", "server", r"^after replace .*patches/snapshot-1"),
    Moment("alignment", "during", "not recorded", "server", r"^before sql INSERT INTO journal .*'alignment'"),
    Moment("alignment", "after", "recorded", "server", r"^after sql INSERT INTO journal .*'alignment'"),
    Moment(
        "alignment", "after", "round closed, updates there", "server", r"^after sql INSERT INTO journal .*'round', 1"
    ),
    Moment("plug-in", "before", "last round closed", "server", r"^after sql INSERT INTO journal .*'round', 2"),
    Moment("plug-in", "during", "model half written", "server", r"^open .*/merged/"),
    Moment("plug-in", "during", "not recorded", "server", r"^before sql INSERT INTO journal .*'finished'"),
    Moment("plug-in", "after", "recorded", "server", r"^after sql INSERT INTO journal .*'finished'"),
)


def the(running: Deployment, name: str) -> Party:
    return running.server if name == "server" else running.silos[name]


def links_of(running: Deployment, party: str) -> list[Link]:
    """A fault of the server's connection hits every silo's, one of the silo's only its own."""
    return list(running.links.values()) if party == "server" else [running.links[party]]


Fault = Callable[[Deployment, str, Moment], AbstractContextManager[None]]


@contextlib.contextmanager
def kill(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """kill -9, and the same command again."""
    the(running, party).kill()
    yield
    the(running, party).start()


@contextlib.contextmanager
def outage(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """kill -9 of every process at once."""
    killed = [each for each in running.parties if each.alive]
    for each in killed:
        each.signal(signal.SIGKILL)
    for each in killed:
        each.kill()
    yield
    for each in killed:
        each.start()


@contextlib.contextmanager
def pause(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """SIGSTOP, and SIGCONT when the others have gone on for a while."""
    the(running, party).signal(signal.SIGSTOP)
    yield
    time.sleep(1.0)
    the(running, party).signal(signal.SIGCONT)


@contextlib.contextmanager
def cut(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """A middlebox forgets the silo's connection; the server's host closes all of its own."""
    for link in links_of(running, party):
        link.cut(reset=party != "server")
    yield


@contextlib.contextmanager
def slow(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """2 MB/s from now on."""
    for link in links_of(running, party):
        link.slow(2e6)
    yield


@contextlib.contextmanager
def duplicate(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """The update counts, and the silo, which cannot know, offers it again."""
    running.links[party].hold(down=0)
    yield
    running.server.await_log(f"{party}: update accepted")
    running.links[party].await_held()
    running.links[party].cut()
    running.links[party].release()
    the(running, party).await_log("the server had this update already")


@contextlib.contextmanager
def corrupt(running: Deployment, party: str, moment: Moment) -> Iterator[None]:
    """One bit of what passes next, deep enough in it to be content."""
    for link in links_of(running, party):
        if moment.phase == "upload":
            link.flip(up=700_000)
        else:
            link.flip(down=700_000)
    yield


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "outage": outage,
    "pause": pause,
    "cut": cut,
    "slow": slow,
    "duplicate": duplicate,
    "corrupt": corrupt,
}


def makes_sense(party: str, moment: Moment, fault: str) -> bool:
    if party == "north" and moment.phase == "plug-in" and moment.when != "before":
        return False  # the silos have been told that it is over, and are gone
    if fault in ("cut", "slow") and moment.phase == "plug-in":
        return False  # nothing passes any more but the farewell, which `kill` covers
    if fault == "slow" and moment.phase not in ("proxy download", "upload", "alignment"):
        return False  # a slow link shows where much passes: the proxy, the update, the patch with the next adapter
    if fault == "outage":
        return party == "server" and moment.phase != "plug-in"  # by then the silos are gone, and `kill` is the same
    if fault == "duplicate":
        return party == "north" and moment.what == "counted, not acknowledged"  # only updates are ever sent twice
    if fault == "corrupt":
        # Where chunks pass. Over bare TCP a flipped bit of HTTP/2 itself may mean anything; TLS has its own test below.
        return moment.what in ("half of it", "noted, not offered", "recorded", "answered") and moment.phase != "plug-in"
    return True


@dataclass(frozen=True)
class Row:
    """Something happens to a party at a moment."""

    party: str
    moment: Moment
    fault: str

    def __str__(self) -> str:
        return f"{self.fault}-{self.party}-{self.moment.when}-{self.moment.phase}-{self.moment.what}".replace(" ", "_")


ROWS = [
    Row(party, moment, fault)
    for fault in FAULTS
    for party in ("server", "north")
    for moment in MOMENTS
    if makes_sense(party, moment, fault)
]


def run(running: Deployment, rows: Sequence[Row]) -> None:
    """The faults of the rows, one after the other, in a federation that is started here."""
    rows[0].moment.arm(running)
    running.start()
    for row, following in itertools.zip_longest(rows, rows[1:]):
        print(f"fault: {row}")
        row.moment.await_(running)
        with FAULTS[row.fault](running, row.party, row.moment):
            if following is not None:
                following.moment.arm(running)
            if following is None or not following.moment.takes_the_place_of(row.moment):
                row.moment.release(running)


# What `make test` has of the table: fault-party, and the moments by their third name.
# Of `kill` alone, and some moments: each fault at every moment is slow.
BRIEF = {
    "server": "half of it; patch without snapshot",
    "north": "noted, not answered; step 2; recorded",
}


@pytest.mark.parametrize("party", BRIEF)
def test_kills_one_after_the_other(party: str, inputs: Path, tmp_path: Path, reference: Result) -> None:
    rows = [row for row in ROWS if (row.party, row.fault) == (party, "kill")]
    rows = [row for row in rows if row.moment.what in BRIEF[party].split("; ")]
    with deployment(inputs, tmp_path) as running:
        run(running, rows)
        check(running, reference, ["kill"] * len(rows))


@pytest.mark.hours
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_fault(row: Row, inputs: Path, tmp_path: Path, reference: Result) -> None:
    with deployment(inputs, tmp_path) as running:
        run(running, [row])
        check(running, reference, [row.fault])


@pytest.mark.slow
@pytest.mark.parametrize("party", ["server", "north"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_moment_in_one_federation(
    fault: str, party: str, inputs: Path, tmp_path: Path, reference: Result
) -> None:
    rows = [row for row in ROWS if (row.party, row.fault) == (party, fault)]
    if not rows:
        pytest.skip("the table has no such rows")
    with deployment(inputs, tmp_path) as running:
        run(running, rows)
        check(running, reference, [fault] * len(rows))


# --- killed again and again -------------------------------------------------------------------------------------------


def undisturbed(running: Deployment) -> Result:
    with running:
        running.start()
        running.await_end()
        return result(running)


@pytest.fixture(scope="module")
def int8_reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same with updates in int8 blocks, whose rounding errors a silo must carry from round to round."""
    return undisturbed(int8_deployment(inputs, tmp_path_factory.mktemp("int8")))


def int8_deployment(inputs: Path, directory: Path) -> Deployment:
    training = server_settings(inputs)["training"] | {"rounds": 3, "update_encoding": "int8"}
    return deployment(
        inputs, directory, training=training, alignment={"counts": "silos", "every_rounds": 2, "steps": 2, "batch": 8}
    )


@pytest.mark.parametrize(
    "stride",
    [
        pytest.param(13, marks=pytest.mark.slow),
        *(pytest.param(stride, marks=pytest.mark.hours) for stride in (1, 2, 3, 5, 7)),
    ],
)
def test_killed_again_and_again(stride: int, inputs: Path, tmp_path: Path, int8_reference: Result) -> None:
    """Each process gets a little further each time, and the others do not wait for it."""
    kills = 0
    with int8_deployment(inputs, tmp_path) as running:
        die_at = dict.fromkeys(running.parties, 0)

        def all_ended() -> bool:
            nonlocal kills
            for party in die_at:
                if party.was_killed:
                    kills += 1
                    die_at[party] += stride
                    party.start(die_at=die_at[party])
            return not any(party.alive for party in die_at)

        for party in die_at:
            die_at[party] = stride
            party.start(die_at=stride)
        await_("all to end", all_ended, patience=10 * PATIENCE)
        check(running, int8_reference, ["kill"] * kills)
    assert kills >= 3


# --- adapters and updates that fit into a chunk, and so come along with a message -------------------------------------


@pytest.fixture(scope="module")
def small_reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return undisturbed(small_deployment(inputs, tmp_path_factory.mktemp("small")))


def small_deployment(inputs: Path, directory: Path) -> Deployment:
    return deployment(inputs, directory, adapter={"rank": 16, "alpha": 16})


@pytest.mark.slow
def test_faults_of_what_comes_along(inputs: Path, tmp_path: Path, small_reference: Result) -> None:
    with small_deployment(inputs, tmp_path) as running:
        server, north, link = running.server, running.silos["north"], running.links["north"]
        north.halt_at(r"^after replace .*/update.json")
        running.start()
        north.await_halt()
        assert 20_000 < (running.work("north") / "update.safetensors").stat().st_size < CHUNK

        link.hold(up=10_000)  # cut in the middle of an offer
        server.halt_at(r"^before sql INSERT INTO updates .*'north'")
        north.release()
        link.await_held()
        link.cut()
        link.release()
        server.await_halt()

        server.kill()  # before the update counts, and before the silo knows that it does
        server.halt_at(r"^after sql INSERT INTO updates .*'north'")
        server.start()
        server.await_halt()
        server.kill()
        north.halt_at(r"^log north: round 1 of 2: the server had this update already")
        server.start()
        north.await_halt()

        link.flip(down=10_000)  # in the adapter that comes with the next task, and in the update
        north.halt_at(r"^after replace .*/update.json")
        north.release()
        north.await_halt()
        assert link.down.flipped.is_set()
        link.flip(up=10_000)
        north.release()
        check(running, small_reference, ["cut", "kill", "kill", "corrupt", "corrupt"])
        assert link.up.flipped.is_set()


# --- the state of the server's optimizer ------------------------------------------------------------------------------

BETA1, BETA2, EPSILON, RATE = 0.5, 0.75, 1e-3, 0.05


def optimizer_deployment(inputs: Path, directory: Path) -> Deployment:
    aggregation = {"optimizer": "yogi", "learning_rate": RATE, "beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON}
    aggregation["weights"] = "samples"  # which check_round_2 knows
    training = server_settings(inputs)["training"] | {"rounds": 3}
    return deployment(inputs, directory, adapter={"rank": 16, "alpha": 16}, training=training, aggregation=aggregation)


def check_round_2(out: Path) -> None:
    """What is there before the round is closed: the formula, written out, leads from the states before to those now."""
    with contextlib.closing(sqlite3.connect(out / "ledger.sqlite")) as ledger:
        counted = ledger.execute("SELECT file, samples FROM updates WHERE round = 2 ORDER BY silo").fetchall()
    trained = [(read_tensors(out / file, "adapter"), samples) for file, samples in counted]
    assert [samples for _, samples in trained] == [40, 30]
    one, two = (out / "rounds" / str(number) for number in (1, 2))
    start, end = (read_tensors(path / "adapter.safetensors", "adapter") for path in (one, two))
    groups = ("first_moment", "second_moment")
    (m, v), (m_now, v_now) = ([read_tensors(path / "optimizer.safetensors", g) for g in groups] for path in (one, two))
    for name, tensor in end.items():
        mean = (sum(update[name].double() * samples for update, samples in trained) / 70).float()
        change = mean.double() - start[name].double()
        first = BETA1 * m[name] + (1 - BETA1) * change
        second = v[name] - (1 - BETA2) * change**2 * torch.sign(v[name] - change**2)
        torch.testing.assert_close(m_now[name], first, rtol=1e-12, atol=1e-20)
        torch.testing.assert_close(v_now[name], second, rtol=1e-12, atol=1e-20)
        stepped = start[name].double() + RATE * first / (second.sqrt() + EPSILON)
        torch.testing.assert_close(tensor, stepped.float(), rtol=2**-23, atol=0)
    assert any(bool(m[name].any()) for name in m), "round 1 left something to carry"


@pytest.mark.slow
def test_the_servers_optimizer_goes_on_where_it_was(inputs: Path, tmp_path: Path) -> None:
    moments = (
        r"^before replace .*rounds/1/optimizer",
        r"^after replace .*rounds/1/optimizer",
        r"^after sql INSERT OR REPLACE INTO files .*rounds/1/optimizer",
        r"^after sql INSERT OR REPLACE INTO files .*rounds/1/adapter",
        r"^log round 2: 2 updates",
        r"^before replace .*rounds/2/adapter",
        r"^before sql INSERT INTO journal .*'round', 2",
        r"^before unlink .*rounds/1/optimizer",
        r"^after sql INSERT OR REPLACE INTO files .*rounds/3/optimizer",
        r"^after sql INSERT INTO journal .*'round', 3",
    )
    reference = undisturbed(optimizer_deployment(inputs, tmp_path / "reference"))
    with optimizer_deployment(inputs, tmp_path) as running:
        server, out = running.server, running.out
        server.halt_at(moments[0])
        running.start()
        for moment, following in itertools.zip_longest(moments, moments[1:]):
            server.await_halt()
            if "'round', 2" in moment:
                check_round_2(out)
            server.kill()
            if "log round 2" in moment:
                state = out / "rounds" / "1" / "optimizer.safetensors"
                content = state.read_bytes()
                damage(state)
                server.start()
                assert server.await_end() == CheckpointError.exit_code
                assert f"error: {state}: is not the file that this run wrote" in server.log
                state.write_bytes(content)
            if following is not None:
                server.halt_at(following)
            server.start()
        check(running, reference, ["kill"] * len(moments))
        assert not list(out.glob("rounds/*/optimizer*")), "nothing goes on from there"
        for directory in (out, *(running.work(silo) for silo in SILOS)):
            files = [entry.fields.get("file", "") for entry in audit.read(directory / "audit.jsonl")]
            assert files
            assert not [file for file in files if "optimizer" in file], "it stays at the server"


# --- stops by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_in_a_round_and_started_again(inputs: Path, tmp_path: Path, reference: Result) -> None:
    with deployment(inputs, tmp_path) as running:
        server, north = running.server, running.silos["north"]
        north.halt_at(r"^optimizer step 2 ")
        running.start()
        north.await_halt()

        second = Party("second-server", "fedpft.server", server.config).start(as_a_command=True)
        assert second.await_end() == ConfigError.exit_code
        assert "in use by another process" in server.log
        twin = Party("second-north", "fedpft.silo", north.config).start()
        assert twin.await_end() == ConfigError.exit_code

        server.signal(signal.SIGTERM)
        assert server.await_end() == 143
        assert "stopped with 0 of 2 rounds closed; the same command goes on from there" in server.log
        north.halt_at(r"^before replace .*/update.json")
        north.release()
        north.await_halt()
        north.signal(signal.SIGTERM)
        north.release()
        assert north.await_end() == 143
        assert "stopped in round 1; run it again, it goes on from there" in north.log

        server.halt_at(r"^before sql INSERT INTO updates .*\(2, 'north'")  # an update arrives while the server stops
        server.start()
        north.start()
        server.await_halt()
        server.signal(signal.SIGINT)
        time.sleep(0.5)
        server.release()
        assert server.await_end() == 130
        assert "stopped with 1 of 2 rounds closed" in server.log

        server.start()
        check(running, reference, ["kill"] * 4)

        server.start()  # once more: the run is over, and nothing happens to it
        assert server.await_end() == 0
        assert server.stdout.splitlines()[-8:] == server.stdout.splitlines()[-16:-8]
        check(running, reference, ["kill"] * 4)


# --- a silo that is late, or away -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_late_silo_is_refused_goes_and_catches_up(inputs: Path, tmp_path: Path) -> None:
    settings = {
        "training": server_settings(inputs)["training"] | {"rounds": 3},
        "federation": {"silos": list(SILOS), "min_silos": 1, "round_deadline_seconds": 12.0},
    }
    with deployment(inputs, tmp_path, **settings) as running:
        server, north, south = running.server, running.silos["north"], running.silos["south"]
        south.halt_at(r"^optimizer step 2 ")
        north.halt_at(r"^optimizer step 2 after north: round 2 of 3 begins")
        running.start()
        south.await_halt()
        north.await_halt()  # round 2: the deadline of round 1 has passed without south
        assert re.search(r"round 1: 1 updates", server.log)
        south.release()
        south.await_log(r"too late: round 1 is over")
        assert "south: refused: round 1 is over" in server.log
        south.kill()
        south.start()
        south.await_log(r"the update of before the restart does not count: round 1 is over")
        carried = running.links["south"].up.passed
        await_("south to ask for its next task", lambda: running.links["south"].up.passed > carried)
        north.release()
        running.await_end()
        found = result(running)
        assert [update[:2] for update in found.updates] == [(1, "north"), (2, "north"), (3, "north"), (3, "south")]
        fetched = [
            entry.fields["file"]
            for entry in audit.read(running.work("south") / "audit.jsonl")
            if "file" in entry.fields
        ]
        assert "snapshot-2.safetensors" in fetched
        assert not [name for name in fetched if name.startswith("patch")]
        one_by_one, at_once = (load_proxy(running.out / "proxy" / "bundle").model for _ in range(2))
        for patch in ("patch-1", "patch-2"):
            apply_patch(one_by_one, read_tensors(running.out / "patches" / f"{patch}.safetensors", "patch"))
        apply_patch(at_once, read_tensors(running.out / "patches" / "snapshot-2.safetensors", "patch"))
        assert not tiny.changed(one_by_one.state_dict(), at_once.state_dict())


# --- files that are not as they were ----------------------------------------------------------------------------------


def damage(path: Path) -> None:
    """One bit in the middle; of the ledger, the half of it that is gone."""
    content = path.read_bytes()
    middle = len(content) // 2
    if path.suffix == ".sqlite":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.slow
def test_files_that_changed_are_named_and_refused_or_made_again(
    inputs: Path, tmp_path: Path, reference: Result
) -> None:
    with deployment(inputs, tmp_path) as running:
        server, north = running.server, running.silos["north"]
        server.halt_at(r"^after sql INSERT INTO updates .*\(2, 'north'")
        running.start()
        server.await_halt()
        for party in running.parties:
            party.kill()

        out = running.out
        with contextlib.closing(sqlite3.connect(out / "ledger.sqlite")) as ledger:
            ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else what is damaged next would lie in the log as well
        (update,) = (out / "updates" / "round-2").glob("north-*")
        inside = ("ledger.sqlite", "rounds/1/adapter.safetensors", "patches/patch-1.safetensors")
        inside += ("patches/snapshot-1.safetensors", "proxy/bundle/model.safetensors", "proxy/selection.safetensors")
        for path in (*(out / name for name in inside), update):
            content = path.read_bytes()
            damage(path)
            server.start()
            assert server.await_end() == CheckpointError.exit_code, path
            named = str(out / "proxy") if "/proxy/" in str(path) else str(path)
            assert f"error: {named}: " in server.log.splitlines()[-1]
            for left in out.glob("ledger.sqlite-*"):
                left.unlink()
            path.write_bytes(content)

        damage(running.work("north") / "update.safetensors")
        (proxy,) = running.work("north").glob("proxy-*/model.safetensors")
        damage(proxy)
        for party in running.parties:
            party.start()
        check(running, reference, ["kill", "corrupt", "corrupt"])
        assert "update.safetensors is not as it was written" in north.log


@pytest.mark.parametrize("fault", ["cut", pytest.param("bit", marks=pytest.mark.slow)])
def test_a_counted_update_that_the_torn_log_of_the_ledger_lost_is_sent_again(
    fault: str, inputs: Path, tmp_path: Path, reference: Result
) -> None:
    """A disk that lies: what came last into ledger.sqlite-wal is not there any more, though the silo was thanked."""
    with deployment(inputs, tmp_path) as running:
        server, north, south = running.server, running.silos["north"], running.silos["south"]
        south.halt_at(r"^optimizer step 2 after south: round 2 of 2 begins")
        running.start()
        south.await_halt()
        north.await_log(r"north: round 2 of 2: sent")
        server.kill()
        ledger, torn = running.out / "ledger.sqlite", running.out / "ledger.sqlite-wal"
        content = torn.read_bytes()

        torn.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        server.start()
        assert server.await_end() == CheckpointError.exit_code
        assert f"error: {ledger}: " in server.log.splitlines()[-1]

        torn.write_bytes(content[:-100] + (b"" if fault == "cut" else bytes([content[-100] ^ 1]) + content[-99:]))
        copies = [shutil.copy(path, tmp_path) for path in (ledger, torn)]
        with contextlib.closing(sqlite3.connect(copies[0])) as left:
            assert left.execute("SELECT round, silo FROM updates").fetchall() == [(1, "north"), (1, "south")]
        server.start()
        south.release()
        check(running, reference, ["kill"])
        assert "audit.jsonl has an update of north in round 2 that the ledger has lost" in server.log


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clocks_that_jump_by_days_change_nothing(inputs: Path, tmp_path: Path, reference: Result) -> None:
    """In the middle of an enrolment, a download and an upload, and between the rounds."""
    with deployment(inputs, tmp_path) as running:
        server, north, link = running.server, running.silos["north"], running.links["north"]
        server.jump(0)
        north.jump(-500)
        link.hold(up=0)
        running.start(as_commands=True)
        link.await_held()
        server.jump(3)
        link.hold(down=2_500_000)
        link.await_held()
        server.jump(-40)
        north.jump(30)
        link.hold(up=1_500_000)
        link.await_held()
        server.jump(400)
        north.jump(-3)
        link.release()
        server.await_log("round 1: 2 updates")
        server.jump(-1)
        check(running, reference, ["jump"])
        times = [entry.time for entry in audit.read(running.out / "audit.jsonl")]
        assert times != sorted(times)


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_damage_under_tls_breaks_the_connection_and_nothing_else(
    inputs: Path, tmp_path: Path, reference: Result
) -> None:
    """A flipped bit in either handshake, in the proxy and in an update."""
    server, silos = with_kits(inputs, tmp_path)
    with Deployment(tmp_path, server, silos) as running:
        north, link = running.silos["north"], running.links["north"]
        north.halt_at(r"^log north: enrolled")
        running.server.halt_at(r"^after replace .*/address")
        running.server.start()
        running.server.await_halt()
        link.flip(up=300)
        running.links["south"].flip(down=700)
        for silo in running.silos.values():
            silo.start()
        running.server.release()
        north.await_halt()
        assert link.up.flipped.is_set()
        assert running.links["south"].down.flipped.wait(PATIENCE), "south may start later than north enrols"
        link.flip(down=2_000_000)
        north.halt_at(r"^after replace .*/update.json")
        north.release()
        north.await_halt()
        assert link.down.flipped.is_set()
        link.flip(up=1_500_000)
        north.release()
        check(running, reference, ["corrupt"] * 4)
        assert link.up.flipped.is_set()


# --- secure aggregation ---


def private(root: Path, directory: Path) -> Deployment:
    server, silos = with_kits(root, directory)
    server["federation"] = server["federation"] | {"secure_aggregation": True}
    return Deployment(
        directory, server, {name: silo | {"require": ["secure_aggregation"]} for name, silo in silos.items()}
    )


@pytest.fixture(scope="module")
def private_reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The undisturbed federation with secure aggregation."""
    with private(inputs, tmp_path_factory.mktemp("private")) as running:
        running.start(as_commands=True)
        running.await_end()
        found = result(running)
        for party in running.parties:
            assert not re.search("Traceback|WARNING|ERROR", party.log), party.log
    assert found.updates == []
    return found


# Of round 1: after each of them the attempt begins anew, or the silos' secrets are lost, or the sum is there.
SUMMING = (
    Moment("sum", "before", "keys not shown", "north", r"^log north: round 1 of 2: loss"),
    Moment("sum", "during", "shares asked for", "server", r"^log round 1, attempt \d+: shares"),
    Moment("sum", "during", "vector not written", "north", r"^before replace .*/vector.safetensors"),
    Moment("sum", "during", "vector half sent", "north", up=1_500_000),
    Moment("sum", "during", "vectors there", "server", r"^log round 1, attempt \d+: signatures"),
    Moment("sum", "during", "enough have signed", "server", r"^log round 1, attempt \d+: reveals"),
    Moment("sum", "during", "about to reveal", "north", r"^after replace .*/opened.json"),
    Moment("sum", "during", "sum not in place", "server", r"^before replace .*rounds/1/sum"),
    Moment("sum", "during", "sum not noted", "server", r"^after replace .*rounds/1/sum"),
    Moment("sum", "after", "sum noted", "server", r"^after sql INSERT INTO journal .*'sum'"),
)


def disturb(running: Deployment, moment: Moment, fault: Fault) -> None:
    moment.await_(running)
    with fault(running, moment.party, moment):
        moment.release(running)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(
            (("shares asked for", kill), ("vector not written", kill), ("about to reveal", kill), ("sum noted", kill)),
            marks=pytest.mark.slow,
        ),
        pytest.param((("keys not shown", outage), ("enough have signed", kill)), marks=pytest.mark.slow),
        (("vector half sent", cut), ("sum not noted", kill)),
    ],
    ids=["one", "two", "three"],
)
def test_a_sum_comes_to_the_same_bits_whoever_is_killed_on_the_way(
    chosen: tuple[tuple[str, Fault], ...], inputs: Path, tmp_path: Path, private_reference: Result
) -> None:
    moments = {moment.what: moment for moment in SUMMING}
    with private(inputs, tmp_path) as running:
        moments[chosen[0][0]].arm(running)
        running.start()
        for (what, fault), following in itertools.zip_longest(chosen, chosen[1:]):
            moments[what].await_(running)
            with fault(running, moments[what].party, moments[what]):
                if following is not None and not moments[following[0]].takes_the_place_of(moments[what]):
                    moments[following[0]].arm(running)
                moments[what].release(running)
        check(running, private_reference, ["kill"] * 12)


@pytest.mark.hours
@pytest.mark.parametrize("fault", [kill, outage, pause, cut], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("moment", SUMMING, ids=lambda moment: moment.what)
def test_a_sum_comes_to_the_same_bits_after_each_fault(
    moment: Moment, fault: Fault, inputs: Path, tmp_path: Path, private_reference: Result
) -> None:
    with private(inputs, tmp_path) as running:
        moment.arm(running)
        running.start()
        disturb(running, moment, fault)
        check(running, private_reference, ["kill"] * 4)


# --- longer than any keep-alive ---------------------------------------------------------------------------------------


@pytest.mark.hours
@pytest.mark.parametrize("party", ["server", "north", "link"])
@pytest.mark.parametrize("what", ["half of it", "step 2", "recorded"])
def test_silence_for_longer_than_the_keepalive(
    what: str, party: str, inputs: Path, tmp_path: Path, reference: Result
) -> None:
    """A machine that sleeps, or a middlebox that drops everything without a word."""
    moment = next(moment for moment in MOMENTS if moment.what == what)
    with deployment(inputs, tmp_path) as running:
        moment.arm(running)
        running.start()
        moment.await_(running)
        if party == "link":
            running.links["north"].hold(up=0, down=0)
        else:
            the(running, party).signal(signal.SIGSTOP)
        if moment.step:
            moment.release(running)
        time.sleep(60.0)
        if party != "link":
            the(running, party).signal(signal.SIGCONT)
        running.links["north"].release()
        check(running, reference, ["cut"])
