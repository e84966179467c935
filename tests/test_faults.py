"""Faults of every kind at every moment of a federation, on real processes over loopback."""

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from faults import Deployment, Link, await_

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are watched through /proc")

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


# --- the federation ---------------------------------------------------------------------------------------------------


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
    return Deployment(
        directory, server_settings(root) | changes, {name: silo_settings(root, name) for name in SILOS}
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


def test_undisturbed(inputs: Path, tmp_path: Path) -> None:
    import time
    t = time.time()
    with deployment(inputs, tmp_path) as d:
        d.server.start()
        await_("address", lambda: (d.out / "address").exists())
        print("addr", time.time() - t)
        for s in d.silos.values():
            s.start()
        d.await_end()
        print(time.time() - t)
        for p in d.parties:
            print(p.log)
            print("\n".join(p.steps))
        for l in d.links.values():
            print(l.up.passed, l.down.passed)
    assert 0
