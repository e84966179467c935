"""`python -m bench.transport`: how fast files and rounds cross the wire, beside a bare gRPC stream, and in what memory.

A server and up to 16 silos, each a process of its own, talk over mutual TLS on loopback. There is no model: proxies and
adapters are random numbers, and a silo sends a file back at once. In turns with every transfer the same processes run

    bare          a plain grpcio stream of messages of the same size with the same TLS and options, sent from memory and
                  thrown away
    bare, kept    the same stream, hashed with SHA-256, written to a file and synced: what a receiver cannot do without
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import fedpft.wire  # noqa: F401  isort: skip  (sets gRPC's environment before grpc is imported)
import grpc

from fedpft import atomic
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
from fedpft.provision import provision
from fedpft.wire import transfer
from fedpft.wire.channel import SERVER_OPTIONS, dial, listen
from fedpft.wire.v1 import federation_pb2 as pb

Row = dict[str, Any]
Steps = Generator[Any, None, Any]

MIB, GIB, MB = 1 << 20, 1 << 30, 1e6
DOCS = Path(__file__).parents[1] / "docs" / "transport.md"
TENSOR_BYTES = 4 << 20  # adapters are made of tensors of this size
SAMPLES = 7
BARE_BLOCKS = 64  # different messages, so that the sender reads from memory and not from a cache

# Real processes on loopback, one run each, on two cores of the kind that transport.json names.
PEERS = {
    "Flower 1.42": {"empty_seconds": 9.5, "one": 31, "three": 42},
    "NVIDIA FLARE 2.9": {"empty_seconds": 2.5, "one": 67, "three": 117},
}


@dataclass(frozen=True)
class Scale:
    """Sizes in bytes.

    silos: how many take part at once, in turn; the same for transfers, memory and empty rounds.
    repetitions: of the transfers, for each number of silos.
    proxy, adapter: what goes to each silo, and what comes back; `large`: what comes back from a single silo.
    model: the adapter of the case that other systems were measured with; one and three silos.
    """

    silos: tuple[int, ...]
    repetitions: tuple[int, ...]
    proxy: int
    adapter: int
    large: int
    model: int
    small: int
    tiny: int
    rounds: int


FULL = Scale((1, 4, 16), (3, 1, 1), GIB, 64 * MIB, GIB, 268_000_000, 1_000_000, 16_000, 20)
QUICK = Scale((2,), (1,), 5 * MIB, 3 * MIB, 4 * MIB, 2 * MIB, 100_000, 4_000, 2)


# --- a process: it takes one JSON line for each step, and answers each with one ---------------------------------------


class Process:
    """A process of this module, and the two pipes to it."""

    def __init__(self, role: str, log: Path) -> None:
        with log.open("ab") as sink:
            command = [sys.executable, "-m", "bench.transport", "--role", role]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            )
        self._log = log

    def send(self, message: Any = None) -> None:
        """A command, or the word to go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """Its next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended early:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)

    def ask(self, message: Any = None) -> Any:
        """Sends and receives."""
        self.send(message)
        return self.receive()

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def serve_steps(role: str) -> None:
    """Runs in the process: each command is a generator, and each of its values waits for the word to go on."""
    commands = {name: globals()[f"{role}_{name}"] for name in ROLES[role]}
    for line in sys.stdin:
        name, arguments = json.loads(line)
        steps: Steps = commands[name](**arguments)
        while True:
            try:
                print(json.dumps(next(steps)), flush=True)
            except StopIteration as end:
                print(json.dumps(end.value), flush=True)
                break
            sys.stdin.readline()


def _peak_bytes() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def _forget_peak() -> int:
    """From now on the peak is that of what follows; returns what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- bare streams -----------------------------------------------------------------------------------------------------


def server_bare(kits: str, total: int) -> Steps:
    """Sends `total` bytes to whoever asks, and takes what comes."""
    tail = total % transfer.CHUNK_BYTES
    blocks = [os.urandom(transfer.CHUNK_BYTES) for _ in range(min(BARE_BLOCKS, 1 + total // transfer.CHUNK_BYTES))]

    def down(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for number in range(total // transfer.CHUNK_BYTES):
            yield blocks[number % len(blocks)]
        if tail:
            yield blocks[0][:tail]

    def up(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        for _ in messages:
            pass
        return b""

    def up_kept(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with tempfile.NamedTemporaryFile(dir=kits) as file:
            _keep(messages, file.fileno())
        return b""

    server = grpc.server(ThreadPoolExecutor(2 * FULL.silos[-1]), options=SERVER_OPTIONS)
    handlers = {
        "Down": grpc.unary_stream_rpc_method_handler(down),
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "UpKept": grpc.stream_unary_rpc_method_handler(up_kept),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = listen(server, "127.0.0.1:0", ServerTlsSection(**_tls(Path(kits) / "server")))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def silo_bare(address: str, kit: str, work: str, total: int, *, up: bool, kept: bool) -> Steps:
    """One stream; returns its seconds."""
    with dial(address, TlsSection(**_tls(Path(kit)))) as channel:
        grpc.channel_ready_future(channel).result(60)
        blocks = [os.urandom(transfer.CHUNK_BYTES) for _ in range(BARE_BLOCKS if up else 0)]
        yield
        begun = time.perf_counter()
        if up:
            sizes = [transfer.CHUNK_BYTES] * (total // transfer.CHUNK_BYTES) + [total % transfer.CHUNK_BYTES]
            messages = (blocks[n % BARE_BLOCKS][:size] for n, size in enumerate(sizes))
            channel.stream_unary("/bare/UpKept" if kept else "/bare/Up")(messages)
        else:
            stream = channel.unary_stream("/bare/Down")(b"")
            if kept:
                with (Path(work) / "kept").open("wb") as file:
                    received = _keep(stream, file.fileno())
            else:
                received = sum(len(message) for message in stream)
            assert received == total, received
        return time.perf_counter() - begun


def _keep(messages: Iterator[bytes], file: int) -> int:
    content, received = hashlib.sha256(), 0
    for message in messages:
        content.update(message)
        received += os.write(file, message)
        if received % atomic.RELEASE_BYTES < len(message):
            atomic.release(file)
    os.fsync(file)
    return received


# --- the product's server and silos -----------------------------------------------------------------------------------


def server_federation(
    kits: str, out: str, bundle: str, silos: list[str], adapter: int, rounds: int, *, steps: bool
) -> Steps:
    """A federation of rounds without a model; what is timed is all that a round does beside training and alignment.

    Args:
        adapter: bytes.
        steps: each round begins only when told so.
    """
    from fedpft.server.ledger import Ledger
    from fedpft.server.service import FederationServer
    from fedpft.server.updates import aggregate
    from fedpft.wire.hello import Terms
    from fedpft.wire.tensors import write_tensors

    config = ServerConfig(
        out=Path(out),
        listen="127.0.0.1:0",
        tls=ServerTlsSection(**_tls(Path(kits) / "server")),
        model=ModelSection(path=Path(out), labels=Path(out)),
        federation=FederationSection(silos=tuple(silos)),
        public_data=Path(out),
    )
    settings = RoundSettings(seed=0, adapter=AdapterSection(), training=TrainingSection(), inactive_below=0.01)
    ledger = Ledger(config.out, {})
    if rounds:
        write_tensors(ledger.adapter_path(0), {"adapter": _adapter(adapter, seed=0)})
        ledger.enter_file(ledger.adapter_path(0))
    server = FederationServer(
        config, Path(bundle), settings, ledger, Terms("sequence-classification", ("a", "b"), 64, 4.0)
    )
    before, cpu = _forget_peak(), _cpu_seconds()
    yield server.start()
    server.wait_for_silos()
    seconds: list[float] = []
    adding: list[float] = []
    for number in range(1, rounds + 1):
        if steps:
            yield
        begun = time.perf_counter()
        updates = server.run_round(number, count_inactivity=False)
        arrived = time.perf_counter()
        mean = aggregate(updates, config.aggregation, settings.training.batch)
        write_tensors(ledger.adapter_path(number), {"adapter": mean})
        ledger.enter_file(ledger.adapter_path(number))
        server.close_round()
        seconds.append(time.perf_counter() - begun)
        adding.append(time.perf_counter() - arrived)
    if not rounds:
        yield
    server.finish()
    server.close()
    return {
        "before_bytes": before,
        "peak_bytes": _peak_bytes(),
        "cpu_seconds": _cpu_seconds() - cpu,
        "round_seconds": seconds,
        "aggregation_seconds": adding,
    }


def silo_federation(address: str, kit: str, work: str, adapter: int, seed: int, *, steps: bool) -> Steps:
    """Takes part: fetches the proxy when told to go, then answers each round with the same file."""
    from fedpft.silo.connection import ServerConnection
    from fedpft.wire.tensors import write_tensors

    config = SiloConfig(
        server=address,
        tls=TlsSection(**_tls(Path(kit))),
        data=SiloDataSection(path=Path(work)),
        work=Path(work),
        connect_timeout_seconds=60.0,
    )
    update = config.work / "update.safetensors"
    if adapter:
        write_tensors(update, {"adapter": _adapter(adapter, seed=seed)})
        file = transfer.payload(update)
    fetching: list[float] = []
    sending: list[float] = []
    with ServerConnection(config) as server:
        before = _forget_peak()
        enrolment = server.enrol(SAMPLES)
        yield
        begun = time.perf_counter()
        server.fetch_proxy(enrolment)
        proxy_seconds = time.perf_counter() - begun
        yield proxy_seconds
        while (assignment := server.next_assignment()).WhichOneof("task") == "train":
            begun = time.perf_counter()
            server.fetch(assignment.train.adapter, config.work / "received")
            fetched = time.perf_counter()
            if steps:
                yield
            header = pb.UpdateHeader(
                round=assignment.train.round,
                attempt=assignment.train.attempt,
                samples=SAMPLES,
                file=file.announcement(),
            )
            sent = time.perf_counter()
            server.submit(header, file)
            sending.append(time.perf_counter() - sent)
            fetching.append(fetched - begun)
            if steps:
                yield sending[-1]
            shutil.rmtree(config.work / "received")
    return {
        "proxy_seconds": proxy_seconds,
        "fetch_seconds": fetching,
        "send_seconds": sending,
        "before_bytes": before,
        "peak_bytes": _peak_bytes(),
    }


def _adapter(total: int, seed: int) -> dict[str, Any]:
    """Random float32 tensors of so many bytes together."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    sizes = [TENSOR_BYTES] * (total // TENSOR_BYTES) + ([left] if (left := total % TENSOR_BYTES) else [])
    return {f"layer.{number:03d}.lora": torch.rand(size // 4, generator=generator) for number, size in enumerate(sizes)}


def _tls(kit: Path) -> dict[str, Path]:
    return {part: kit / f"{part}.pem" for part in ("ca", "certificate", "key")}


PARTS = ("down", "up", "memory", "empty", "others")
ROLES = {"server": ("bare", "federation"), "silo": ("bare", "federation")}


# --- measurements -----------------------------------------------------------------------------------------------------


class Bench:
    """All measurements of one scale. The silos' processes live through all of them, each server for one."""

    def __init__(self, scale: Scale, work: Path, say: Callable[[str], None]) -> None:
        self.scale, self.work, self.say = scale, work, say
        self.names = [f"silo-{number:02d}" for number in range(max(*scale.silos, 3))]
        self.kits = work / "kits"
        provision(self.kits, self.names)
        say(f"starting {len(self.names)} silo processes")
        self.silos = [Process("silo", work / f"{name}.log") for name in self.names]

    def close(self) -> None:
        """Ends the processes."""
        for silo in self.silos:
            silo.close()

    def results(self, parts: Sequence[str]) -> Row:
        """What the parts of PARTS measured; says how far it is."""
        scale, found = self.scale, {}
        bundle, small = self._bundle("proxy", scale.proxy), self._bundle("small", 1000)
        for way in ("down", "up"):
            for silos, repetitions in zip(scale.silos, scale.repetitions, strict=True):
                if way in parts:
                    size = scale.proxy if way == "down" else scale.large if silos == 1 else scale.adapter
                    rows = self.transfers(way, silos, size, bundle if way == "down" else small, repetitions)
                    found["transfers"] = found.get("transfers", []) + rows
        if "memory" in parts:
            found["memory"] = [self.memory(silos, bundle) for silos in scale.silos]
        if "empty" in parts:
            found["empty"] = [self.rounds(silos, scale.tiny, scale.rounds, small) for silos in scale.silos]
        if "others" in parts:
            shapes = ((1, scale.model, 2), (3, scale.model, 2), (3, scale.small, scale.rounds))
            found["others"] = [self.rounds(silos, adapter, rounds, small) for silos, adapter, rounds in shapes]
        return {**found, "disk_bytes_per_second": self.disk(scale.proxy)}

    def transfers(self, way: str, silos: int, total: int, bundle: Path, repetitions: int) -> list[Row]:
        """One way to or from so many silos: bare, kept, ours in turns."""
        kinds: dict[str, Callable[[], tuple[float, list[float]]]] = {
            "bare": lambda: self._bare(way, silos, total, kept=False),
            "ours": lambda: self._ours(way, silos, total, bundle),
            "bare, kept": lambda: self._bare(way, silos, total, kept=True),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        each: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(repetitions):
            for kind, run in kinds.items():
                together, alone = run()
                seconds[kind].append(together)
                each[kind] += alone
        rate = {kind: silos * total / statistics.median(found) for kind, found in seconds.items()}
        rows = [
            {
                "way": way,
                "silos": silos,
                "bytes": total,
                "kind": kind,
                "seconds": seconds[kind],
                "total_bytes_per_second": rate[kind],
                "silo_bytes_per_second": statistics.median(total / alone for alone in each[kind]),
                "of_bare": rate[kind] / rate["bare"],
                "of_kept": rate[kind] / rate["bare, kept"],
            }
            for kind in kinds
        ]
        self.say(f"{way}, {silos} silos: " + ", ".join(f"{kind} {rate[kind] / MB:.0f} MB/s" for kind in kinds))
        return rows

    def memory(self, silos: int, bundle: Path) -> Row:
        """Peak resident memory over a proxy's transfer and two rounds."""
        with self._federation(silos, bundle, self.scale.adapter, 2, steps=False) as (server, ready):
            for silo in ready:
                silo.send()
            for silo in ready:
                silo.receive()
            for silo in ready:
                silo.send()
            ends = [silo.receive() for silo in ready]
            end = server.receive()
        self.say(
            f"memory, {silos} silos: server {end['peak_bytes'] / MIB:.0f} MiB, silo {ends[0]['peak_bytes'] / MIB:.0f}"
        )
        return {
            "silos": silos,
            "proxy_bytes": self.scale.proxy,
            "adapter_bytes": self.scale.adapter,
            "server": {key: end[key] for key in ("before_bytes", "peak_bytes")},
            "silo": {key: max(one[key] for one in ends) for key in ("before_bytes", "peak_bytes")},
        }

    def rounds(self, silos: int, adapter: int, rounds: int, bundle: Path) -> Row:
        """Rounds without training: adapters to all silos, updates back, checked, entered, added up, on disk."""
        with self._federation(silos, bundle, adapter, rounds, steps=False) as (server, ready):
            for silo in ready:
                silo.ask()
            for silo in ready:
                silo.send()
            ends = [silo.receive() for silo in ready]
            end = server.receive()
        median = statistics.median(end["round_seconds"])
        self.say(f"rounds of {adapter / MB:g} MB, {silos} silos: {1e3 * median:.1f} ms")
        return {
            "silos": silos,
            "adapter_bytes": adapter,
            "round_seconds": end["round_seconds"],
            "median_seconds": median,
            "bytes_per_second": 2 * silos * adapter / median,
            "median_parts": {
                "fetch": statistics.median(s for one in ends for s in one["fetch_seconds"]),
                "send": statistics.median(s for one in ends for s in one["send_seconds"]),
                "aggregation": statistics.median(end["aggregation_seconds"]),
            },
            "server_cpu_seconds": end["cpu_seconds"] / rounds,
            "server_peak_bytes": end["peak_bytes"],
        }

    def disk(self, total: int) -> float:
        """Bytes a second that one process writes and syncs where the silos keep their files."""
        block, begun = os.urandom(MIB), time.perf_counter()
        with (self.work / "disk").open("wb", buffering=0) as file:
            for _ in range(total // MIB):
                file.write(block)
            os.fsync(file.fileno())
        (self.work / "disk").unlink()
        return total / (time.perf_counter() - begun)

    def _bare(self, way: str, silos: int, total: int, *, kept: bool) -> tuple[float, list[float]]:
        server = Process("server", self.work / "server.log")
        try:
            address = server.ask(("bare", {"kits": str(self.kits), "total": total}))
            chosen = self.silos[:silos]
            for number, silo in enumerate(chosen):
                arguments = self._place(number) | {"address": address, "total": total, "up": way == "up", "kept": kept}
                silo.send(("bare", arguments))
            for silo in chosen:
                silo.receive()
            return _together(chosen)
        finally:
            server.close()
            self._clean()

    def _ours(self, way: str, silos: int, total: int, bundle: Path) -> tuple[float, list[float]]:
        up = way == "up"
        with self._federation(silos, bundle, total if up else 0, int(up), steps=up) as (server, ready):
            if up:
                for silo in ready:
                    silo.ask()
                server.receive()
                server.send()
                for silo in ready:
                    silo.ask()
            found = _together(ready)
            for silo in ready:
                silo.send()
            if not up:
                server.receive()
                server.send()
            for silo in ready:
                silo.receive()
            server.receive()
        return found

    @contextlib.contextmanager
    def _federation(
        self, silos: int, bundle: Path, adapter: int, rounds: int, *, steps: bool
    ) -> Iterator[tuple[Process, list[Process]]]:
        """A server, and silos that are enrolled and wait for the word to fetch the proxy."""
        server = Process("server", self.work / "server.log")
        try:
            arguments = {
                "kits": str(self.kits),
                "out": str(self.work / "out"),
                "bundle": str(bundle),
                "silos": self.names[:silos],
                "adapter": adapter,
                "rounds": rounds,
                "steps": steps,
            }
            address = server.ask(("federation", arguments))
            server.send()
            chosen = self.silos[:silos]
            for number, silo in enumerate(chosen):
                arguments = self._place(number) | {
                    "address": address,
                    "adapter": adapter,
                    "seed": number + 1,
                    "steps": steps,
                }
                silo.send(("federation", arguments))
            for silo in chosen:
                silo.receive()
            yield server, chosen
        finally:
            server.close()
            self._clean()

    def _place(self, number: int) -> Row:
        work = self.work / "silos" / self.names[number]
        work.mkdir(parents=True)
        return {"kit": str(self.kits / "silos" / self.names[number]), "work": str(work)}

    def _bundle(self, name: str, total: int) -> Path:
        directory = self.work / name
        directory.mkdir()
        (directory / "proxy.json").write_text(json.dumps({"format": 1, "neurons": [], "compressed": []}))
        with (directory / "model.safetensors").open("wb") as file:
            for begun in range(0, total, MIB):
                file.write(os.urandom(min(MIB, total - begun)))
        return directory

    def _clean(self) -> None:
        """What one measurement wrote does not burden the disk while the next one runs."""
        for name in ("silos", "out"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        os.sync()


def _together(silos: Sequence[Process]) -> tuple[float, list[float]]:
    """All go at once; seconds until the last is through, and each one's own."""
    begun = time.perf_counter()
    for silo in silos:
        silo.send()
    alone = [silo.receive() for silo in silos]
    return time.perf_counter() - begun, alone


# --- what is shown ----------------------------------------------------------------------------------------------------


def tables(results: Row) -> list[str]:
    """Markdown, from the JSON file alone."""
    machine, versions = results["machine"], results["versions"]
    changes = " with changes" if results["dirty"] else ""
    lines = [
        f"Measured on {machine['cores']} x {machine['cpu']}; grpcio {versions['grpcio']}, "
        f"protobuf {versions['protobuf']}, Python {versions['python']}; commit {results['commit']}{changes}, "
        f"{results['date']}. The disk takes {results['disk_bytes_per_second'] / MB:.0f} MB/s from one process.",
    ]
    for part, table in TABLES.items():
        if part in results:
            lines += ["", *table(results[part])]
    return lines


def _transfer_table(rows: Sequence[Row]) -> list[str]:
    lines = _head("", "silos", "MB each", "bare, MB/s", "bare, kept", "fedpft", "each silo", "of bare", "of bare, kept")
    for ours in (row for row in rows if row["kind"] == "ours"):
        same = {row["kind"]: row for row in rows if (row["way"], row["silos"]) == (ours["way"], ours["silos"])}
        rates = (same[kind]["total_bytes_per_second"] / MB for kind in ("bare", "bare, kept", "ours"))
        lines.append(
            f"| {ours['way']} | {ours['silos']} | {ours['bytes'] / MB:.0f} | "
            + " | ".join(f"{rate:.0f}" for rate in rates)
            + f" | {ours['silo_bytes_per_second'] / MB:.0f} | {ours['of_bare']:.2f} | {ours['of_kept']:.2f} |"
        )
    return lines


def _memory_table(rows: Sequence[Row]) -> list[str]:
    lines = _head(
        "silos",
        "server at its start, MiB",
        "server at its peak",
        "of one silo's",
        "silo at its start",
        "silo at its peak",
    )
    first = rows[0]["server"]["peak_bytes"]
    for row in rows:
        sizes = [row["server"]["before_bytes"] / MIB, row["server"]["peak_bytes"] / MIB]
        silo = [row["silo"]["before_bytes"] / MIB, row["silo"]["peak_bytes"] / MIB]
        lines.append(
            f"| {row['silos']} | {sizes[0]:.0f} | {sizes[1]:.0f} | {row['server']['peak_bytes'] / first:.2f} | "
            f"{silo[0]:.0f} | {silo[1]:.0f} |"
        )
    return lines


def _empty_table(rows: Sequence[Row]) -> list[str]:
    lines = _head(
        "silos",
        "empty round, ms",
        "quartiles",
        "adapter to a silo",
        "update until it counts",
        "sum, on disk",
        "server's CPU",
    )
    for row in rows:
        low, _, high = statistics.quantiles(row["round_seconds"], n=4, method="inclusive")
        parts = row["median_parts"]
        times = (row["median_seconds"], parts["fetch"], parts["send"], parts["aggregation"], row["server_cpu_seconds"])
        cells = [f"{1e3 * seconds:.1f}" for seconds in times]
        cells.insert(1, f"{1e3 * low:.1f} to {1e3 * high:.1f}")
        lines.append(f"| {row['silos']} | {' | '.join(cells)} |")
    return lines


def _peer_table(rows: Sequence[Row]) -> list[str]:
    one, three, small = rows
    size = one["adapter_bytes"] / MB
    lines = _head(
        "",
        f"{small['adapter_bytes'] / MB:.0f} MB, 3 silos: a round, s",
        f"{size:.0f} MB, 1 silo: down + up, MB/s",
        "3 silos, total MB/s",
    )
    for name, peer in PEERS.items():
        lines.append(f"| {name} | {peer['empty_seconds']} | {peer['one']} | {peer['three']} |")
    rates = (one["bytes_per_second"] / MB, three["bytes_per_second"] / MB)
    lines.append(f"| fedpft | {small['median_seconds']:.3f} | {rates[0]:.0f} | {rates[1]:.0f} |")
    return lines


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]


TABLES = {"transfers": _transfer_table, "memory": _memory_table, "empty": _empty_table, "others": _peer_table}


def write_docs(results: Row, path: Path) -> None:
    """Puts the tables between the two marks of docs/transport.md."""
    text = path.read_text(encoding="utf-8")
    begin, end = "<!-- measured -->\n", "<!-- /measured -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(before + begin + "\n".join(tables(results)) + "\n" + end + after, encoding="utf-8")


def main() -> int:
    """Parses the command line, measures, prints the tables, writes the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.transport", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny files, two silos: only whether it works")
    parser.add_argument("--work", type=Path, help="where all files lie, in a directory that is deleted; default: /tmp")
    parser.add_argument("--json", type=Path, help="default: bench/results/transport.json, if all is measured in full")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: write docs/transport.md anew")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, metavar="PART", help=f"some of {PARTS}")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        serve_steps(arguments.role)
        return 0
    if arguments.render:
        write_docs(json.loads(arguments.render.read_text(encoding="utf-8")), DOCS)
        return 0
    from bench.measure import provenance

    begun = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files do not outlive this one
    with tempfile.TemporaryDirectory(prefix="fedpft-transport-", dir=arguments.work) as work:
        bench = Bench(
            QUICK if arguments.quick else FULL,
            Path(work),
            lambda text: print(f"{time.perf_counter() - begun:4.0f} s  {text}", file=sys.stderr, flush=True),
        )
        try:
            results = bench.results(arguments.only)
        finally:
            bench.close()
    origin = provenance("cpu")
    origin["versions"] |= {name: metadata.version(name) for name in ("grpcio", "protobuf")}
    results = {**origin, "quick": arguments.quick, **results}
    path = arguments.json or (
        None if arguments.quick or arguments.only != PARTS else Path("bench/results/transport.json")
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
