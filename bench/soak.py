"""`python -m bench.soak`: a long federation of real processes whose server and silos are killed at random.

The same federation runs twice, a tiny ViT on scikit-learn's digits over mutual TLS: first undisturbed, then with
`kill -9` of the server or of a silo at times drawn from a seed; whatever was killed is started again with the same
command line. At the end both adapters must be the same, bit for bit, and the server's memory flat:

- undisturbed, the median of its resident memory over the last fifth of the rounds is at most 5 % above that over the
  second fifth;
- its peak in the disturbed run is at most 10 % above that in the undisturbed one.
"""

import argparse
import contextlib
import json
import random
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.measure import provenance

Row = dict[str, Any]

SERVER = "server"
SERVER_SHARE = 0.3  # of the kills
GROWTH, DISTURBED_GROWTH = 1.05, 1.10
POLL_SECONDS = 0.05
MIB = 1 << 20


@dataclass(frozen=True)
class Kill:
    """Who is killed how many seconds after a round was closed."""

    round: int
    victim: str
    seconds: float


def plan(silos: Sequence[str], rounds: int, kills: int, seed: int) -> list[Kill]:
    """The first kill is the server's, the second a silo's; all others are drawn."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(1, rounds - rounds // 10) for _ in range(kills))
    victims = [SERVER, draw.choice(silos)]
    victims += [SERVER if draw.random() < SERVER_SHARE else draw.choice(silos) for _ in range(kills)]
    return [Kill(moment, victim, draw.uniform(0.0, 1.0)) for moment, victim in zip(moments, victims, strict=False)]


def prepare(root: Path, silos: Sequence[str], rounds: int, seed: int) -> tuple[Row, dict[str, Path]]:
    """Writes model, data and certificates; returns server.yaml without `out` and `listen`, and each silo's data."""
    import torch
    import transformers

    from fedpft.demo import corpora
    from fedpft.provision import provision

    torch.manual_seed(seed)
    model = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=4,
        num_labels=10,
    )
    transformers.ViTForImageClassification(model).save_pretrained(root / "model")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(root / "model")
    data = corpora.prepare_digits(
        root / "data",
        silos=silos,
        images=1600,
        test_images=20,
        public_images=64,
        concentration=10.0,
        seed=seed,
    )
    provision(root / "kits", list(silos))
    settings = {
        "seed": seed,
        "tls": _tls(root / "kits" / "server"),
        "threads": 1,
        "model": {"path": str(root / "model"), "labels": str(data.labels), "task": "image-classification"},
        "proxy": {"neurons": 40},
        "distillation": {"steps": 2, "closed_form_samples": 16, "weight_term": 0.0},
        "alignment": {"every_rounds": 10, "steps": 1},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"rounds": rounds, "local_epochs": 0.2, "batch": 8},
        "federation": {"silos": list(silos)},
        "public_data": str(data.public),
    }
    return settings, data.silos


class Run:
    """One federation: its processes, and what was seen of them."""

    def __init__(
        self, root: Path, name: str, settings: Row, silos: Mapping[str, Path], say: Callable[[str], None]
    ) -> None:
        self.directory, self.say = root / name, say
        self.directory.mkdir()
        self.out = self.directory / "out"
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        files = {SERVER: {**settings, "listen": address, "out": str(self.out)}}
        for silo, data in silos.items():
            files[silo] = {
                "server": address,
                "tls": _tls(root / "kits" / "silos" / silo),
                "data": {"path": str(data)},
                "work": str(self.directory / f"work-{silo}"),
                "threads": 1,
            }
        for party, content in files.items():
            (self.directory / f"{party}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        self.rounds = settings["training"]["rounds"]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.memory: list[tuple[int, int]] = []  # (round, the server's resident bytes)
        self.silo_bytes = 0
        self.begun = time.monotonic()
        for party in files:
            self.start(party)

    def start(self, party: str) -> None:
        """Starts a party, always with the same command line."""
        module = "fedpft.server" if party == SERVER else "fedpft.silo"
        command = [sys.executable, "-m", module, "--config", str(self.directory / f"{party}.yaml")]
        with (self.directory / f"{party}.log").open("ab") as log:
            self.processes[party] = subprocess.Popen(command, stdout=log, stderr=log)

    def watch(self, kills: Sequence[Kill]) -> None:
        """Until all have ended well; kills as planned."""
        waiting, closed, due = list(kills), -1, float("inf")
        while any(process.poll() is None for process in self.processes.values()):
            for party, process in self.processes.items():
                if process.poll():
                    log = (self.directory / f"{party}.log").read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"{party} ended with exit code {process.returncode}:\n{log[-3000:]}")
            if (now := self.closed_rounds()) != closed:
                closed = now
                self._sample(closed)
                if closed and closed % 10 == 0:
                    self.say(f"{closed} of {self.rounds} rounds, server {self.memory[-1][1] / MIB:.0f} MiB")
            if waiting and closed >= waiting[0].round:
                due = min(due, time.monotonic() + waiting[0].seconds)
                if time.monotonic() >= due:
                    self.kill(waiting.pop(0), closed)
                    due = float("inf")
            time.sleep(POLL_SECONDS)
        if waiting:
            raise RuntimeError(f"the run ended before {len(waiting)} of its kills")

    def kill(self, kill: Kill, closed: int) -> None:
        """kill -9, and again the same command line."""
        process = self.processes[kill.victim]
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.say(f"after round {closed}: killed {kill.victim}")
            self.start(kill.victim)

    def closed_rounds(self) -> int:
        """As the ledger has it."""
        path = self.out / "ledger.sqlite"
        if not path.exists():
            return 0
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as ledger:
            try:
                (count,) = ledger.execute("SELECT count(*) FROM journal WHERE kind = 'round'").fetchone()
            except sqlite3.OperationalError:  # the server is just making it
                return 0
            return int(count)

    def close(self) -> None:
        """Nothing of this run outlives it."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def _sample(self, closed: int) -> None:
        if closed and (found := _resident_bytes(self.processes[SERVER].pid)):
            self.memory.append((closed, found))
            silos = (process for party, process in self.processes.items() if party != SERVER)
            self.silo_bytes = max(self.silo_bytes, *(_resident_bytes(process.pid) for process in silos))

    def results(self) -> Row:
        """What this run showed."""
        medians = {
            which: statistics.median(self._between(low, high))
            for which, low, high in (("second fifth", 0.2, 0.4), ("last fifth", 0.8, 1.0))
        }
        return {
            "seconds": time.monotonic() - self.begun,
            "server_bytes": self.memory,
            "server_peak_bytes": max(bytes for _, bytes in self.memory),
            "server_median_bytes": medians,
            "silo_peak_bytes": self.silo_bytes,
        }

    def _between(self, low: float, high: float) -> list[int]:
        return [bytes for round, bytes in self.memory if low * self.rounds < round <= high * self.rounds]


def _resident_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


def _tls(kit: Path) -> Row:
    return {part: str(kit / f"{part}.pem") for part in ("ca", "certificate", "key")}


def soak(work: Path, silos: int, rounds: int, kills: int, seed: int, say: Callable[[str], None]) -> Row:
    """Both runs, and the verdict."""
    names = [f"silo-{number:02d}" for number in range(silos)]
    settings, data = prepare(work, names, rounds, seed)
    planned = plan(names, rounds, kills, seed)
    found, adapters = {}, []
    for name, disturbances in (("undisturbed", []), ("disturbed", planned)):
        say(f"{name}: {silos} silos, {rounds} rounds, {len(disturbances)} kills")
        run = Run(work, name, settings, data, lambda text, name=name: say(f"{name}: {text}"))
        try:
            run.watch(disturbances)
        finally:
            run.close()
        found[name] = run.results()
        adapters.append((run.out / "adapter.safetensors").read_bytes() + (run.out / "patch.safetensors").read_bytes())
    calm, wild = found["undisturbed"], found["disturbed"]
    medians = calm["server_median_bytes"]
    growth = medians["last fifth"] / medians["second fifth"]
    disturbed_growth = wild["server_peak_bytes"] / calm["server_peak_bytes"]
    return {
        "silos": silos,
        "rounds": rounds,
        "seed": seed,
        "kills": [[kill.round, kill.victim, kill.seconds] for kill in planned],
        **found,
        "identical": adapters[0] == adapters[1],
        "growth": growth,
        "disturbed_growth": disturbed_growth,
        "flat": growth <= GROWTH and disturbed_growth <= DISTURBED_GROWTH,
    }


def table(results: Row) -> list[str]:
    """Markdown, from the JSON file alone."""
    victims = [victim for _, victim, _ in results["kills"]]
    calm, wild = results["undisturbed"], results["disturbed"]
    lines = ["| | undisturbed | disturbed |", "| --- | --- | --- |"]
    killed = f"{victims.count(SERVER)} of the server, {len(victims) - victims.count(SERVER)} of silos"
    lines.append(f"| kills | none | {killed} |")
    for title, key in (("server's peak", "server_peak_bytes"), ("largest silo's peak", "silo_peak_bytes")):
        lines.append(f"| {title}, MiB | {calm[key] / MIB:.0f} | {wild[key] / MIB:.0f} |")
    for which in ("second fifth", "last fifth"):
        sizes = [run["server_median_bytes"][which] / MIB for run in (calm, wild)]
        lines.append(f"| server, median of the {which} of the rounds, MiB | {sizes[0]:.0f} | {sizes[1]:.0f} |")
    lines.append(f"| seconds | {calm['seconds']:.0f} | {wild['seconds']:.0f} |")
    same = "the same, bit for bit" if results["identical"] else "DIFFERENT"
    flat = "flat" if results["flat"] else "NOT FLAT"
    lines += [
        "",
        f"{results['silos']} silos, {results['rounds']} rounds, seed {results['seed']}: adapters {same}; "
        f"server's memory {flat} (growth {results['growth']:.3f}, disturbed {results['disturbed_growth']:.3f}).",
    ]
    return lines


def main() -> int:
    """Parses the command line, runs, prints the table, writes the results; 1 if something did not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--silos", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=200, help="at least 10; default: %(default)s")
    parser.add_argument("--kills", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and kills; default: %(default)s")
    parser.add_argument("--work", type=Path, help="where all files lie, in a directory that is deleted; default: /tmp")
    parser.add_argument("--json", type=Path, default=Path("bench/results/soak.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.rounds < 10:
        parser.error("memory is judged over at least 10 rounds")
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files do not outlive this one
    with tempfile.TemporaryDirectory(prefix="fedpft-soak-", dir=arguments.work) as work:
        results = soak(
            Path(work),
            arguments.silos,
            arguments.rounds,
            arguments.kills,
            arguments.seed,
            lambda text: print(f"{time.monotonic() - begun:4.0f} s  {text}", file=sys.stderr, flush=True),
        )
    results = {**provenance("cpu"), **results}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    return 0 if results["identical"] and results["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
