"""`python -m bench.secagg`: what secure aggregation costs, by stage, and the bytes that a silo moves for it.

All silos of a round run one after the other in this process, with certificates and messages as they are on the wire,
and with vectors in files; what is missing are the wire and the training. Each row is a whole attempt, once with all
silos and once with one that drops out after its shares were sent, whose masks the server then takes off. The sum is
compared with that of the integers.

    silos, parameters      10 and 300,000: the demo's adapter. 64 and 10,000,000: as large as it gets
    silo_seconds           of one silo, the median: keys, shares, masks (their keys), vector (quantised and masked
                           in one pass; beside it: quantised alone), signature, reveal
    server_seconds         of the server: sum (reads the vectors), secrets (from the shares), unmask
    up_bytes, down_bytes   of one silo: messages, and the vector

Then rounds over loopback and TLS without training, with and without secure aggregation, each silo a thread: what is
between them is what a round takes longer. It is to be held against the training, minutes in the demo.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.measure import provenance
from fedpft.config import (
    AdapterSection,
    AggregationSection,
    FederationSection,
    ModelSection,
    RoundSettings,
    SecureTerms,
    ServerConfig,
    ServerTlsSection,
    SiloConfig,
    SiloDataSection,
    TlsSection,
    TrainingSection,
)
from fedpft.privacy import fixedpoint
from fedpft.privacy.fixedpoint import Contribution, Layout
from fedpft.privacy.masking import CHUNK_WORDS, Streams, add_masks
from fedpft.privacy.secagg import Context, Roster, SiloAttempt, masks_of_sum
from fedpft.provision import provision
from fedpft.server.ledger import Ledger
from fedpft.server.service import FederationServer
from fedpft.server.summing import sum_of
from fedpft.silo.connection import ServerConnection
from fedpft.silo.run import submit
from fedpft.silo.summing import Summing
from fedpft.silo.work import Work
from fedpft.wire.hello import Terms
from fedpft.wire.messages import message_of
from fedpft.wire.signatures import Signer, Verifier
from fedpft.wire.tensors import read_tensors, write_tensors
from fedpft.wire.v1 import federation_pb2 as pb

RESULTS = Path(__file__).parent / "results" / "secagg.json"
SIZES = ((10, 300_000), (64, 10_000_000))
QUICK = ((4, 20_000),)
ROUNDS = 5
TERMS = SecureTerms(most_samples=100_000, max_entry=1.0, threshold_fraction=0.5, min_silos=2, weights="samples")


class Clock:
    """Seconds by stage, of each silo or of the server."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds what the body takes."""
        begun = time.perf_counter()
        yield
        self.seconds[stage].append(time.perf_counter() - begun)

    def medians(self) -> dict[str, float]:
        """By stage, in milliseconds' precision."""
        return {stage: round(statistics.median(found), 4) for stage, found in self.seconds.items()}


def attempt(silos: int, parameters: int, dropped: int, kits: Path, work: Path) -> dict[str, Any]:
    """One row; AssertionError if the sum is not that of the integers."""
    names = [f"silo-{number:02}" for number in range(silos)]
    layout = Layout.of({"adapter": (parameters,)}, {})
    context = Context("bench", 1, 0, bytes(32), TERMS)
    local, server, up, down = Clock(), Clock(), 0, 0
    parties, verifier = {}, Verifier(kits / "server" / "ca.pem")
    for name in names:
        signer = Signer(kit(kits / "silos" / name))
        with local.timed("keys"):
            parties[name] = SiloAttempt(context, name, signer.certificate, signer.sign, verifier.name)
    roster_message = pb.Roster(keys=[message_of(each.keys()) for each in parties.values()])
    keys = [each.keys() for each in parties.values()]
    up += message_of(keys[0]).ByteSize()
    down += roster_message.ByteSize()
    sealed = {}
    for name, party in parties.items():
        with local.timed("shares"):
            sealed[name] = party.shares(keys)
    up += pb.SealedShares(by_silo=sealed[names[0]]).ByteSize()
    survivors, wanted = names[dropped:], torch.zeros(layout.words, dtype=torch.int32)
    for name in survivors:
        received = {other: sealed[other][name] for other in names if other != name}
        what, key = contribution(name, layout), fixedpoint.rounding_key(0, name, 1)
        with local.timed("quantise alone"):
            wanted += fixedpoint.encode(what, layout, TERMS, key)[0]
        with local.timed("masks"):
            masks = parties[name].masks(received)
        with local.timed("vector"):
            words, _ = fixedpoint.encode(what, layout, TERMS, key, masks)
        write_tensors(work / f"{name}.safetensors", {"masked": {"words": words}})
    down += pb.SealedShares(by_silo=received).ByteSize()
    vector_bytes = (work / f"{name}.safetensors").stat().st_size
    signatures = {}
    for name in survivors:
        with local.timed("signature"):
            signatures[name] = parties[name].sign(survivors)
    named = pb.Survivors(silos=survivors)
    down += 2 * named.ByteSize() + pb.Signatures(by_silo=signatures).ByteSize()
    up += len(signatures[survivors[0]])
    reveals = {}
    for name in survivors:
        with local.timed("reveal"):
            reveals[name] = parties[name].reveal(survivors, signatures)
    up += pb.Reveal(by_silo=reveals[survivors[0]]).ByteSize() + vector_bytes
    with server.timed("sum"):
        total = sum_of([work / f"{name}.safetensors" for name in survivors])
    with server.timed("secrets"):
        masks = masks_of_sum(Roster(context, keys), names, survivors, reveals)
    with server.timed("unmask"):
        add_masks(total, masks, -1)
    assert torch.equal(total, wanted), "the sum is not that of the integers"
    return {
        "silos": silos,
        "parameters": parameters,
        "dropped": dropped,
        "silo_seconds": local.medians(),
        "server_seconds": server.medians(),
        "up_bytes": up,
        "of_them_vector_bytes": vector_bytes,
        "down_bytes": down,
    }


def contribution(name: str, layout: Layout) -> Contribution:
    """What a silo puts in: random numbers."""
    draw = torch.Generator().manual_seed(int(name.rpartition("-")[2]))
    start = {key: torch.randn(shape, generator=draw) for key, shape in layout.shapes}
    trained = {key: tensor + 0.01 * torch.randn(tensor.shape, generator=draw) for key, tensor in start.items()}
    return Contribution(start, trained, 1000, 1000.0, {}, None)


def rounds_over_the_wire(silos: int, parameters: int, kits: Path, work: Path, *, secure: bool) -> list[float]:
    """Seconds of each of ROUNDS rounds in which nobody trains, from its begin to when its mean could be taken."""
    names = tuple(f"silo-{number:02}" for number in range(silos))
    config = ServerConfig(
        out=work / "out",
        listen="127.0.0.1:0",
        tls=ServerTlsSection(**kit(kits / "server").model_dump()),
        model=ModelSection(path=work, labels=work),
        federation=FederationSection(silos=names, secure_aggregation=secure),
        aggregation=AggregationSection(weights="samples"),
        public_data=work,
    )
    settings = RoundSettings(
        seed=0,
        adapter=AdapterSection(),
        training=TrainingSection(),
        inactive_below=0.0,
        secure_aggregation=config.secure_terms,
    )
    (work / "bundle").mkdir(parents=True)
    (work / "bundle" / "proxy.json").write_text(json.dumps({"neurons": [1], "compressed": []}))
    ledger = Ledger(config.out, {})
    terms = Terms("sequence-classification", ("a", "b"), 64, 4.0, secure_aggregation=secure)
    server, seconds = FederationServer(config, work / "bundle", settings, ledger, terms), []
    address = server.start()
    start = {"adapter": torch.randn(parameters)}
    with ThreadPoolExecutor(silos) as pool, contextlib.closing(ledger):
        for name in names:
            pool.submit(take_part, name, address, kit(kits / "silos" / name), work / name, secure)
        server.wait_for_silos()
        for number in range(1, ROUNDS + 1):
            path = ledger.adapter_path(number - 1)
            write_tensors(path, {"adapter": start})
            ledger.enter_file(path)
            begun = time.perf_counter()
            server.run_round(number, count_inactivity=False)
            seconds.append(time.perf_counter() - begun)
            server.close_round()
        server.finish()
        server.close()
    return seconds


def take_part(name: str, address: str, tls: TlsSection, directory: Path, secure: bool) -> None:
    """A silo that sends back, as trained, what it has received, and a little more."""
    directory.mkdir()
    config = SiloConfig(server=address, tls=tls, data=SiloDataSection(path=directory), work=directory)
    work = Work(directory)
    with ServerConnection(config) as server:
        work.join(server.enrol(0 if secure else 1000), name)
        summing = Summing(name, config, work, server, {}) if secure else None
        while (task := server.next_assignment()).WhichOneof("task") != "finished":
            if summing is not None and task.WhichOneof("task") == "stage":
                summing.do(task.stage)
                continue
            train = task.train
            path = server.fetch(train.adapter, *work.received(train.adapter))
            trained = {key: tensor + 0.01 for key, tensor in read_tensors(path, "adapter").items()}
            update = work.keep_update(train, {"adapter": trained}, {}, samples=1000, metrics={}, weight=1000.0)
            if summing is None:
                submit(server, work, update, attempt=train.attempt)
            else:
                summing.begin(train, update, server.settings)


def kit(directory: Path) -> TlsSection:
    """As `fedpft provision` has left it."""
    return TlsSection(ca=directory / "ca.pem", certificate=directory / "certificate.pem", key=directory / "key.pem")


def stream_bytes_per_second() -> float:
    """Of the cipher's key stream, in pieces that stay in the cache."""
    stream, pieces = Streams([bytes(32)]), 8000
    begun = time.perf_counter()
    for _ in range(pieces):
        stream.next(CHUNK_WORDS)
    return pieces * 4 * CHUNK_WORDS / (time.perf_counter() - begun)


def show(row: dict[str, Any], write: Callable[[str], None]) -> None:
    """A line of it."""
    write(f"{row['silos']} silos x {row['parameters']} parameters, {row['dropped']} dropped out")
    for side in ("silo", "server"):
        stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in row[f"{side}_seconds"].items())
        write(f"    {side:<8}{stages} s")
    write(f"    bytes   up {row['up_bytes']}, down {row['down_bytes']}")


def main() -> None:
    """Runs the rows and writes bench/results/secagg.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.secagg", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, and nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for silos, parameters in QUICK if options.quick else SIZES:
            kits = Path(directory) / f"kits-{silos}"
            provision(kits, [f"silo-{number:02}" for number in range(silos)])
            for dropped in (0, 1):
                rows.append(attempt(silos, parameters, dropped, kits, Path(directory)))
                show(rows[-1], print)
        silos, parameters = (QUICK if options.quick else SIZES)[0]
        wire: dict[str, Any] = {"silos": silos, "parameters": parameters}
        for kind, secure in (("plain", False), ("secure", True)):
            place = Path(directory) / kind
            seconds = rounds_over_the_wire(silos, parameters, Path(directory) / f"kits-{silos}", place, secure=secure)
            wire[f"{kind}_seconds"] = round(statistics.median(seconds), 3)
        print(wire)
    if not options.quick:
        facts = {
            "facts": provenance("cpu"),
            "stream_bytes_per_second": stream_bytes_per_second(),
            "rows": rows,
            "wire": wire,
        }
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
