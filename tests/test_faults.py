"""Faults of every kind at every moment of a federation, on real processes over loopback.

    {server, silo} x {before, during, after} x {enrol, proxy download, training, upload, aggregation, alignment, plug-in}
    x {kill -9, pause, connection cut, slow link, duplicate, corrupt byte}

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
import transformers
from faults import Deployment, Link, Party

from fedpft import audit

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
        "alignment": {"every_rounds": 1, "steps": 2, "batch": 8},
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

    files: SHA-256 of all that a federation leaves for good. updates: (round, silo, SHA-256, samples) of each that counts.
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
    with deployment(inputs, tmp_path_factory.mktemp("reference")) as undisturbed:
        undisturbed.start(as_commands=True)
        undisturbed.await_end()
        found = result(undisturbed)
        for party in undisturbed.parties:
            assert not re.search("Traceback|WARNING|ERROR", party.log), party.log
    assert {"adapter.safetensors", "patch.safetensors", "merged/model.safetensors"} <= found.files.keys()
    assert {"rounds/2/adapter.safetensors", "patches/snapshot-1.safetensors"} <= found.files.keys()
    assert [(round, silo) for round, silo, *_ in found.updates] == [(r, silo) for r in (1, 2) for silo in SILOS]
    return found


def check(done: Deployment, reference: Result, faults: Sequence[str]) -> None:
    """All ended well and as undisturbed, and no byte was fetched twice but those in flight at a fault."""
    # At a cut: what came of one chunk, what the kernel held, and the calls that are made again. At a damaged chunk
    # the connection stays, and what is on its way behind that chunk comes in vain.
    in_flight = sum((4 << 20) if fault == "corrupt" else CHUNK + (256 << 10) for fault in faults)
    done.await_end()
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
            row.moment.release(running)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_fault(row: Row, inputs: Path, tmp_path: Path, reference: Result) -> None:
    with deployment(inputs, tmp_path) as running:
        run(running, [row])
        check(running, reference, [row.fault])


@pytest.mark.parametrize("party", ["server", "north"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_row(fault: str, party: str, inputs: Path, tmp_path: Path, reference: Result) -> None:
    rows = [row for row in ROWS if (row.party, row.fault) == (party, fault)]
    if not rows:
        pytest.skip("only a silo sends anything twice")
    with deployment(inputs, tmp_path) as running:
        run(running, rows)
        check(running, reference, [fault] * len(rows))
