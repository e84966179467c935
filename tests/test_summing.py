"""Secure aggregation between server and silos over real sockets with TLS; what silos train is made up."""

import contextlib
import dataclasses
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from fedpft import audit
from fedpft.config import (
    AdapterSection,
    FederationSection,
    ModelSection,
    RoundSettings,
    SecureAggregationSection,
    SecureTerms,
    ServerConfig,
    ServerTlsSection,
    ShareSection,
    SiloConfig,
    SiloDataSection,
    TlsSection,
    TrainingSection,
)
from fedpft.errors import (
    ConfigError,
    FedPFTError,
    InvalidUpdate,
    PrivacyViolation,
    QuorumLost,
    RefusedByServer,
    RoundOver,
)
from fedpft.federation import Phase
from fedpft.privacy import fixedpoint
from fedpft.privacy.fixedpoint import Contribution, Layout
from fedpft.provision import provision
from fedpft.server.ledger import Ledger
from fedpft.server.outcome import Sum
from fedpft.server.service import FederationServer
from fedpft.server.servicer import FederationServicer
from fedpft.silo.connection import ServerConnection
from fedpft.silo.summing import Summing, check_agreed
from fedpft.silo.work import Work
from fedpft.wire.hello import Terms
from fedpft.wire.tensors import read_tensors, write_tensors

SILOS = ("east", "north", "south")
SECURE = SecureTerms(most_samples=1000, max_entry=1.0, threshold_fraction=0.5, min_silos=2, weights="samples")
SETTINGS = RoundSettings(
    seed=5, adapter=AdapterSection(), training=TrainingSection(), inactive_below=0.01, secure_aggregation=SECURE
)
TERMS = Terms("sequence-classification", ("1", "2"), 64, 4.0, secure_aggregation=True)
ADAPTER = {"head": torch.linspace(-1, 1, 6), "lora_A": torch.ones(2, 3)}
NEURONS = {1: 3}
LONG_SECONDS = 60.0


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kits")
    provision(directory, [*SILOS, "west"])
    return directory


def tls(kit):
    return TlsSection(ca=kit / "ca.pem", certificate=kit / "certificate.pem", key=kit / "key.pem")


def trained(silo, round):
    """What a silo makes of an adapter, its samples, and its counts: the same each time."""
    draw = torch.Generator().manual_seed(SILOS.index(silo) * 10 + round)
    adapter = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=draw) for name, tensor in ADAPTER.items()}
    return adapter, 10 + SILOS.index(silo), {"1": torch.tensor([1, 0, 4]), "1.tokens": torch.tensor(5)}


def added(silos, round, *, counts=False):
    """The sum of the integers, without masks."""
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in ADAPTER.items()}, NEURONS if counts else {})
    total = torch.zeros(layout.words, dtype=torch.int32)
    for silo in silos:
        adapter, samples, inactivity = trained(silo, round)
        what = Contribution(ADAPTER, adapter, samples, samples, {"train_loss": 0.5}, inactivity if counts else None)
        total += fixedpoint.encode(what, layout, SECURE, fixedpoint.rounding_key(5, silo, round))[0]
    return total


class Silo:
    """One process of a silo, as fedpft.silo.run is, but that it does not train.

    at: called with what the server asks for, before it is done; raises to end the process there, or returns how often
        it is done, as if the first replies were lost.
    """

    def __init__(self, root, kits, address, name, at=lambda asked, silo: None, **changes):
        self.name, self._at = name, at
        values = {
            "server": address,
            "tls": tls(kits / "silos" / name),
            "data": SiloDataSection(path=root / "data.csv"),
            "work": root / f"work-{name}",
            "connect_timeout_seconds": 8.0,
        }
        config = SiloConfig(**(values | changes))
        config.work.mkdir(exist_ok=True)
        self.connection, self.work = ServerConnection(config), Work(config.work)
        self.config = config
        enrolment = self.connection.enrol(0)
        terms = enrolment.settings.secure_aggregation
        check_agreed(config, said=True, terms=terms, said_private=terms.silo_privacy)
        self.work.join(enrolment, name)
        self.summing = Summing(name, config, self.work, self.connection, NEURONS)

    def take_part(self):
        """Until the end; returns how it ended."""
        while True:
            task = self.connection.next_assignment()
            kind = task.WhichOneof("task")
            times = self._at(task.stage.WhichOneof("asked") if kind == "stage" else kind, self) or 1
            for _ in range(times):
                try:
                    match kind:
                        case "train":
                            self.train(task.train)
                        case "stage":
                            self.summing.do(task.stage)
                        case _:
                            return kind
                except RoundOver:
                    pass

    def train(self, train):
        self.connection.fetch(train.adapter, *self.work.received(train.adapter))
        update = self.work.update(ShareSection())
        if update is None or not update.answers(train):
            adapter, samples, inactivity = trained(self.name, train.round)
            groups = {"adapter": adapter} | ({"inactivity": inactivity} if train.count_inactivity else {})
            update = self.work.keep_update(
                train, groups, {}, samples=samples, metrics={"train_loss": 0.5}, weight=float(samples)
            )
        self.summing.begin(train, update, self.connection.settings)

    def close(self):
        self.connection._channel.close()
        self.connection._audit.close()


class Killed(Exception):
    """A process ends without another word."""


class Clock:
    """A server's deadlines without a clock: one passes when nobody is waited for but silos that have fallen silent.

    So a deadline says which silos have had nothing to say for as long as anybody cares to wait, on a busy machine too.
    """

    def __init__(self, live, silent):
        self._live, self._silent = live, silent
        self._waiting_since = None  # the turn, while the server waits
        self._is_over = threading.Event()
        live._await_news = self._await_news

    def _await_news(self, timeout_seconds):
        live = self._live
        self._waiting_since = live._turns
        while live._turns == self._waiting_since and not live._outcome and not live._broken:
            live._changed.wait(0.02)
            federation = live._federation
            left = federation.waiting if federation.phase is Phase.SUMMING else federation.pending
            if self._is_over.is_set() or (left and left <= self._silent()):
                break
        turned = live._turns != self._waiting_since
        self._waiting_since = None
        self._is_over.clear()
        live._check_whole()
        return turned or live._outcome is not None

    def passes(self, meanwhile):
        """A deadline passes, and before it, but not before the server waits for it, what `meanwhile` does."""
        for _ in range(3000):
            with self._live._changed:
                if not self._is_over.is_set() and self._waiting_since == self._live._turns:
                    meanwhile()
                    self._is_over.set()
                    return
            time.sleep(0.02)
        raise AssertionError("the server waits for nothing")


class World:
    """A server and its silos in one directory; each can be killed and started again."""

    def __init__(self, root, kits, pool, **federation):
        self.root, self.kits, self._pool = root, kits, pool
        section = {"silos": SILOS, "round_deadline_seconds": LONG_SECONDS, "secure_aggregation": True}
        self.federation = FederationSection(**(section | federation))
        self.stack = contextlib.ExitStack()
        (root / "bundle").mkdir()
        description = {"format": 1, "neurons": [3, 3], "compressed": [1]}
        (root / "bundle" / "proxy.json").write_text(json.dumps(description))
        self.server = None
        self.clock = None
        self.port = 0
        self.running: dict[str, Future] = {}
        self._faults = {}

    def start_server(self):
        kit = tls(self.kits / "server").model_dump()
        config = ServerConfig(
            out=self.root / "out",
            listen=f"127.0.0.1:{self.port}",
            tls=ServerTlsSection(**kit),
            model=ModelSection(path=self.root, labels=self.root),
            federation=self.federation,
            aggregation={"weights": "samples" if self.federation.silo_privacy is None else "equal"},
            alignment={"counts": "public"},
            secure_aggregation=SecureAggregationSection(most_samples=1000, stage_deadline_seconds=LONG_SECONDS),
            public_data=self.root,
        )
        self.ledger = Ledger(config.out, {})
        self.terms = config.secure_terms
        settings = SETTINGS.model_copy(update={"secure_aggregation": self.terms})
        said = dataclasses.replace(TERMS, silo_privacy=self.terms.silo_privacy)
        self.server = FederationServer(config, self.root / "bundle", settings, self.ledger, said)
        self.clock = Clock(self.server._live, self.silent)
        self.address = self.server.start()
        self.port = int(self.address.rpartition(":")[2])
        return self.server

    def kill_server(self):
        self.server._server.stop(0).wait()
        self.server._audit.close()
        self.ledger.close()

    def silent(self):
        """The silos from which nothing is to be expected, as they are now."""
        return {name for name, fault in self._faults.items() if isinstance(fault, Once) and fault.is_silent}

    def start(self, name, at=lambda asked, silo: None, **changes):
        def life():
            silo = Silo(self.root, self.kits, self.address, name, at, **changes)
            try:
                return silo.take_part()
            except Killed:
                return "killed"
            except FedPFTError:
                silo.connection.leave()
                raise
            finally:
                silo.close()

        self._faults[name] = at
        self.running[name] = self._pool.submit(life)
        return self.running[name]

    def start_silos(self, **at):
        for name in SILOS:
            self.start(name, at.get(name, lambda asked, silo: None))

    def run_round(self, round, *, count_inactivity=False):
        path = self.ledger.adapter_path(round - 1)
        if not self.ledger.entered(path):
            write_tensors(path, {"adapter": ADAPTER})
            self.ledger.enter_file(path)
        return self.server.run_round(round, count_inactivity=count_inactivity)

    def words(self, round):
        return read_tensors(self.ledger.sum_path(round), "sum")["words"]

    def close(self):
        for name in SILOS:
            if name not in self.running or self.running[name].done():
                self.server._live.tell(name)  # it takes leave of nobody
        self.server.abort("the test is over")
        self.kill_server()


@pytest.fixture
def world(tmp_path, kits):
    with ThreadPoolExecutor(16) as pool, contextlib.ExitStack() as stack:

        def make(**federation):
            made = World(tmp_path, kits, pool, **federation)
            made.start_server()
            stack.callback(made.close)
            return made

        yield make


def test_the_server_gets_the_sum_of_the_integers_and_nothing_else(world):
    here = world()
    here.start_silos()
    here.server.wait_for_silos()
    found = here.run_round(1, count_inactivity=True)
    assert isinstance(found, Sum)
    assert torch.equal(here.words(1), added(SILOS, 1, counts=True))
    assert (found.silos, found.summed()) == (3, {"samples": 33})
    assert found.train_loss() == 0.5
    assert found.inactivity()[0]["1"].tolist() == [3, 0, 12]
    assert found.inactivity()[0]["1.tokens"].tolist() == [15, 15, 15]
    assert found.told() == {}
    mean = found.mean(None, 1)
    for name, tensor in ADAPTER.items():
        wanted = sum((10 + n) * trained(silo, 1)[0][name].double() for n, silo in enumerate(SILOS)) / 33
        assert float((mean[name].double() - wanted).abs().max()) < 3 * 2.0**-SECURE.fraction_bits / 33 + 1e-7
        assert mean[name].dtype == tensor.dtype
    here.server.close_round()
    assert not here.ledger.sum_path(1).exists()
    here.run_round(2)
    assert torch.equal(here.words(2), added(SILOS, 2))
    here.server.close_round()
    here.server.finish()
    assert [here.running[name].result() for name in SILOS] == ["finished"] * 3
    stages = [(entry["round"], entry["stage"]) for entry in here.ledger.recorded("stage")]
    assert stages == [(round, stage) for round in (1, 2) for stage in ("shares", "vectors", "signatures", "reveals")]


# --- faults -----------------------------------------------------------------------------------------------------------

STAGES = ("train", "roster", "sealed", "survivors", "signatures")  # what a silo is asked for, in order


class Once:
    """What a silo does the first time that it is asked for something; silent: while it does that, it says nothing."""

    def __init__(self, asked, action, *, silent=False):
        self.asked, self.reached, self.is_silent = asked, threading.Event(), False
        self._action, self._falls_silent = action, silent

    def __call__(self, asked, silo):
        if asked != self.asked or self.reached.is_set():
            return None
        self.is_silent = self._falls_silent
        self.reached.set()
        found = self._action()
        self.is_silent = False
        return found


def die():
    raise Killed


@pytest.mark.parametrize("name", SILOS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_silo_that_is_killed_and_comes_back_is_in_the_sum(world, stage, name):
    here, fault = world(), Once(stage, die)
    here.start_silos(**{name: fault})
    here.server.wait_for_silos()
    outcome = here._pool.submit(here.run_round, 1)
    assert here.running[name].result(LONG_SECONDS) == "killed"
    here.start(name)
    found = outcome.result(LONG_SECONDS)
    assert found.silos == 3
    assert torch.equal(here.words(1), added(SILOS, 1)), "the same as if nothing had happened"
    attempts = {entry["attempt"] for entry in here.ledger.recorded("stage")}
    assert attempts == ({0, 1} if stage in ("roster", "sealed") else {0}), "no mask is used in two attempts"


@pytest.mark.parametrize("stage", STAGES)
def test_the_round_goes_on_without_a_silo_that_falls_silent(world, stage):
    """At its own deadline; its vector counts if it was there."""
    here, silent = world(min_silos=2), threading.Event()
    fault = Once(stage, lambda: silent.wait(LONG_SECONDS) and None, silent=True)
    here.start_silos(north=fault)
    here.server.wait_for_silos()
    try:
        here.run_round(1)
    finally:
        silent.set()
    counted = SILOS if stage in ("survivors", "signatures") else ("east", "south")
    assert torch.equal(here.words(1), added(counted, 1))
    here.server.close_round()
    here.run_round(2)
    assert torch.equal(here.words(2), added(here.ledger.recorded("sum")[-1]["silos"], 2))


@pytest.mark.parametrize("name", SILOS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_whose_reply_was_lost_is_given_again_and_counts_once(world, stage, name):
    here = world()
    here.start_silos(**{name: lambda asked, silo: 3 if asked == stage else None})
    here.server.wait_for_silos()
    here.run_round(1)
    assert torch.equal(here.words(1), added(SILOS, 1))
    assert {entry["attempt"] for entry in here.ledger.recorded("stage")} == {0}


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_is_killed_goes_on_to_the_same_sum(world, stage):
    here, fault = world(), Once(stage, lambda: here_is_killed.wait(LONG_SECONDS) and None)
    here_is_killed = threading.Event()
    here.start_silos(north=fault)
    here.server.wait_for_silos()
    first = here._pool.submit(here.run_round, 1)
    assert fault.reached.wait(LONG_SECONDS)
    here.server._live.break_off(Killed())
    with pytest.raises(Killed):
        first.result(LONG_SECONDS)
    here.kill_server()
    here_is_killed.set()
    here.start_server()
    here.server.wait_for_silos()
    here.run_round(1)
    assert torch.equal(here.words(1), added(SILOS, 1)), "the same as if nothing had happened"
    last = here.ledger.recorded("sum")[-1]
    assert last["attempt"] == 1


def test_a_server_that_is_killed_once_the_sum_is_kept_asks_nobody_again(world):
    here = world()
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1)
    here.kill_server()
    here.start_server()
    here.server.wait_for_silos()
    assert here.run_round(1).summed() == {"samples": 33}
    assert len(here.ledger.recorded("stage")) == 4


def test_a_server_that_is_killed_while_a_sum_is_opened_goes_on_with_those_whose_sum_that_was(world):
    """North dropped out before; east may have given its shares of the sum without it already."""
    here, silent, killed = world(min_silos=2), threading.Event(), threading.Event()
    reveals = Once("signatures", lambda: killed.wait(LONG_SECONDS) and None)
    here.start_silos(north=Once("sealed", lambda: silent.wait(LONG_SECONDS) and None, silent=True), south=reveals)
    here.server.wait_for_silos()
    first = here._pool.submit(here.run_round, 1)
    assert reveals.reached.wait(LONG_SECONDS)
    silent.set()
    here.server._live.break_off(Killed())
    with pytest.raises(Killed):
        first.result(LONG_SECONDS)
    here.kill_server()
    killed.set()
    here.start_server()
    here.server.wait_for_silos()
    here.run_round(1)
    assert here.ledger.recorded("sum")[-1] == {"round": 1, "attempt": 1, "silos": ["east", "south"]}
    assert torch.equal(here.words(1), added(("east", "south"), 1))


def test_below_the_threshold_nothing_is_opened_and_the_quorum_is_lost(world):
    here, silent = world(min_silos=2), threading.Event()

    def fall_silent():
        return Once("signatures", lambda: silent.wait(LONG_SECONDS) and None, silent=True)

    here.start_silos(north=fall_silent(), south=fall_silent())
    here.server.wait_for_silos()
    try:
        with pytest.raises(QuorumLost, match="no reveals before the deadline"):
            here.run_round(1)
    finally:
        silent.set()
    assert not here.ledger.recorded("sum")
    assert not here.ledger.sum_path(1).exists()


def test_a_silo_that_leaves_is_not_waited_for(world):
    here = world(min_silos=2)

    def leave():
        raise PrivacyViolation("for the test", "none")

    here.start_silos(north=Once("sealed", leave))
    here.server.wait_for_silos()
    here.run_round(1)
    assert torch.equal(here.words(1), added(("east", "south"), 1))


def test_a_silo_opens_one_sum_of_a_round_and_no_other(world):
    """East reveals for all three, and then the two others are killed; north stays away."""
    here = world(min_silos=2)
    here.start_silos(
        north=Once("signatures", die, silent=True),
        south=Once("signatures", die),
    )
    here.server.wait_for_silos()
    outcome = here._pool.submit(here.run_round, 1)
    for name in ("north", "south"):
        assert here.running[name].result(LONG_SECONDS) == "killed"
    here.start("south")
    with pytest.raises(QuorumLost):
        outcome.result(LONG_SECONDS)
    opened = here.root / "work-east" / "opened.json"
    assert set(json.loads(opened.read_text())["survivors"]) == set(SILOS)
    assert not here.ledger.recorded("sum"), "east gives nothing for a sum of east and south alone"
    events = [entry for entry in audit.read(here.root / "work-east" / "audit.jsonl") if entry.event == "withdrawn"]
    assert "over other silos" in events[0].fields["reason"]


# --- what the server has ----------------------------------------------------------------------------------------------


def secrets_of(silo, round):
    """Bytes that nobody but the silo should ever have: of its adapter, its change, its words, and some counts."""
    adapter, _, inactivity = trained(silo, round)
    for name, tensor in adapter.items():
        yield tensor.numpy().tobytes()
        yield (tensor - ADAPTER[name]).numpy().tobytes()
    yield inactivity["1"].numpy().tobytes()
    words = added([silo], round, counts=True)
    yield words.numpy().tobytes()
    yield words[:12].numpy().tobytes()
    yield words[12:].numpy().tobytes()


def files_under(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_nothing_of_a_single_silo_is_in_the_servers_files_or_in_what_reaches_it(world, monkeypatch):
    received, files = [], {}
    for method in ("Hello", "Enrol", "NextTask", "OfferUpdate", "AnswerStage", "Leave"):
        answer = getattr(FederationServicer, method)

        def recorded(self, request, context, answer=answer):
            received.append(request.SerializeToString())
            return answer(self, request, context)

        monkeypatch.setattr(FederationServicer, method, recorded)

    here = world()
    opened = here.server._summing.opened

    def look(action):
        files.update(files_under(here.root / "out"))  # with the vectors
        return opened(action)

    monkeypatch.setattr(here.server._summing, "opened", look)
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1, count_inactivity=True)
    vectors = [path for path in files if "updates" in path.parts]
    assert len(vectors) == 3
    assert not [path for path in vectors if path.exists()], "they go with the attempt"
    files |= {path.with_suffix(".after"): content for path, content in files_under(here.root / "out").items()}
    everything = b"\0".join([*received, *files.values()])
    for silo in SILOS:
        own = b"\0".join(files_under(here.root / f"work-{silo}").values())
        adapter = trained(silo, 1)[0]["head"].numpy().tobytes()
        assert adapter in own, "the search finds what is there"
        for secret in secrets_of(silo, 1):
            assert secret not in everything
    assert added(SILOS, 1, counts=True).numpy().tobytes() in everything, "and it finds the sum"


def test_samples_and_metrics_of_a_silo_are_refused_if_one_tells_them(world):
    here = world()
    config = SiloConfig(
        server=here.address,
        tls=tls(here.kits / "silos" / "north"),
        data=SiloDataSection(path=here.root / "data.csv"),
        work=here.root / "work-talkative",
    )
    config.work.mkdir()
    connection = ServerConnection(config)
    try:
        with pytest.raises(RefusedByServer, match="north tells its samples, which only a sum should"):
            connection.enrol(17)
    finally:
        connection._channel.close()
    for entry in audit.read(here.root / "out" / "audit.jsonl"):
        assert "samples" not in entry.fields


def test_both_audit_logs_have_the_stages(world):
    here = world()
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1)
    entries = list(audit.read(here.root / "out" / "audit.jsonl"))
    stages = [entry.fields["stage"] for entry in entries if entry.event == "stage"]
    assert stages == ["shares", "vectors", "signatures", "reveals", "opened"]
    got = sorted((entry.fields["peer"], entry.fields["file"]) for entry in entries if entry.event == "received")
    kinds = ("keys", "reveal", "shares", "signature", "vector")
    assert got == [(silo, kind) for silo in SILOS for kind in kinds]
    for silo in SILOS:
        sent = [e.fields["file"] for e in audit.read(here.root / f"work-{silo}" / "audit.jsonl") if e.event == "sent"]
        assert sent == ["keys", "shares", "vector.safetensors", "signature", "reveal"]


# --- a server that lies -----------------------------------------------------------------------------------------------


def lying(world, monkeypatch, asked, lie, **federation):
    """A round in which the server asks north for something else; returns how north ended."""
    here = world(min_silos=2, **federation)
    honest = here.server._summing.asked

    def asks(silo, round, attempt, stage):
        message = honest(silo, round, attempt, stage)
        if silo == "north" and message.WhichOneof("asked") == asked:
            lie(message)
        return message

    monkeypatch.setattr(here.server._summing, "asked", asks)
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1)
    with pytest.raises(PrivacyViolation) as caught:
        here.running["north"].result(LONG_SECONDS)
    return here, caught.value.message


def test_a_swapped_key_is_refused_and_the_round_goes_on_without(world, monkeypatch):
    def swap(message):
        message.roster.keys[0].mask_key = message.roster.keys[1].mask_key

    here, said = lying(world, monkeypatch, "roster", swap)
    assert "the server shows what east did not sign for this attempt" in said
    assert torch.equal(here.words(1), added(("east", "south"), 1)), "the others' sum, without north's vector"


def test_shares_of_other_silos_are_refused(world, monkeypatch):
    def swap(message):
        message.sealed.by_silo["east"] = message.sealed.by_silo["south"]

    _, said = lying(world, monkeypatch, "sealed", swap)
    assert "the server sent shares of east that are not those" in said


def test_other_survivors_are_refused_where_the_signatures_are_shown(world, monkeypatch):
    def swap(message):
        del message.signatures.survivors.silos[:]
        message.signatures.survivors.silos.extend(["east", "north"])

    here, said = lying(world, monkeypatch, "signatures", swap)
    assert "asks for the shares of another sum than this silo has signed" in said
    assert torch.equal(here.words(1), added(SILOS, 1)), "two of three open it"


def test_survivors_below_the_threshold_are_refused(world, monkeypatch):
    def swap(message):
        del message.survivors.silos[:]
        message.survivors.silos.extend(["north"])

    _, said = lying(world, monkeypatch, "survivors", swap)
    assert "says that 1 silos survive, 2 are needed" in said


def test_a_round_that_was_is_refused(world):
    here = world()
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1)
    here.server.close_round()
    here.run_round(2)
    work = Work(here.root / "work-north")
    assert work.opened(here.ledger.run_id).round == 2
    silo = Summing.__new__(Summing)
    silo._work, silo._server = work, type("Server", (), {"run_id": here.ledger.run_id})
    with pytest.raises(PrivacyViolation, match="asks for round 1 again, but has had the sum of round 2"):
        silo.check_round(1)


@pytest.mark.parametrize(
    ("said", "terms", "require", "message"),
    [
        (True, None, (), "says another thing of secure aggregation than before"),
        (False, SECURE, (), "says another thing of secure aggregation than before"),
        (False, None, ("secure_aggregation",), "has no secure aggregation, which `require` in silo.yaml demands"),
        (True, None, ("secure_aggregation",), "has no secure aggregation, which `require` in silo.yaml demands"),
    ],
)
def test_a_server_that_does_not_keep_what_it_said_is_left(tmp_path, kits, said, terms, require, message):
    config = SiloConfig(
        server="127.0.0.1:1",
        tls=tls(kits / "silos" / "north"),
        data=SiloDataSection(path=tmp_path),
        work=tmp_path,
        require=require,
    )
    with pytest.raises(PrivacyViolation, match=message):
        check_agreed(config, said=said, terms=terms)


def test_a_silo_without_a_certificate_takes_part_in_no_sum(tmp_path):
    config = SiloConfig(
        server="127.0.0.1:1",
        insecure_loopback=True,
        insecure_name="north",
        data=SiloDataSection(path=tmp_path),
        work=tmp_path,
    )
    with pytest.raises(ConfigError, match="secure aggregation needs `tls`"):
        check_agreed(config, said=True, terms=SECURE)


def test_a_vector_that_is_on_its_way_is_waited_for_longer_than_a_stage(world):
    """As over a slow link: a byte arrives now and then."""
    here = world(min_silos=2)

    def slowly():
        for _ in range(4):
            here.clock.passes(meanwhile=lambda: here.server._files.inbox._count(1))

    here.start_silos(north=Once("sealed", slowly))
    here.server.wait_for_silos()
    here.run_round(1)
    assert torch.equal(here.words(1), added(SILOS, 1)), "north is in it"


# --- a silo that lies -------------------------------------------------------------------------------------------------


def other(signature):
    """One that differs in a bit, whatever it was: the last byte is a random one."""
    return signature[:-1] + bytes([signature[-1] ^ 1])


def spoil(kind, request):
    """Makes an answer one that nobody could use."""
    match kind:
        case "keys":
            request.keys.keys.signature = other(request.keys.keys.signature)
        case "foreign keys":
            request.keys.keys.certificate = b"no certificate"
        case "shares":
            del request.shares.by_silo["east"]
        case "short shares":
            request.shares.by_silo["east"] = b"short"
        case "signature":
            request.signature = other(request.signature)
        case "reveal":
            request.reveal.by_silo["west"] = bytes(33)


@pytest.mark.parametrize("kind", ["keys", "foreign keys", "shares", "short shares", "signature", "reveal"])
def test_a_silo_whose_answer_cannot_be_used_is_out_of_the_round_and_the_others_go_on(world, kind):
    here = world(min_silos=2)
    asked = {"keys": "train", "foreign keys": "train", "signature": "survivors", "reveal": "signatures"}

    def lie(at, silo):
        if at == asked.get(kind, "roster"):
            honest = silo.connection.answer

            def answer(request):
                spoil(kind, request)
                honest(request)

            silo.connection.answer = answer

    here.start_silos(north=lie)
    here.server.wait_for_silos()
    here.run_round(1)
    with pytest.raises(InvalidUpdate, match="north: "):
        here.running["north"].result(LONG_SECONDS)
    counted = SILOS if kind in ("signature", "reveal") else ("east", "south")
    assert torch.equal(here.words(1), added(counted, 1))


def test_a_vector_of_another_length_is_out_of_the_round(world, monkeypatch):
    here = world(min_silos=2)
    keep = Work.keep_vector

    def kept(self, words):
        return keep(self, words[:-1] if self.path.name == "work-north" else words)

    monkeypatch.setattr(Work, "keep_vector", kept)
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1)
    with pytest.raises(InvalidUpdate, match="north: 'masked/words' is"):
        here.running["north"].result(LONG_SECONDS)
    assert torch.equal(here.words(1), added(("east", "south"), 1))


def test_a_sum_that_a_silo_has_spoilt_is_noticed_and_tried_again(world, monkeypatch):
    """A vector of the right form under other masks than those that were agreed on."""
    here, spoilt, keep = world(), threading.Event(), Work.keep_vector

    def kept(self, words):
        if self.path.name == "work-north" and not spoilt.is_set():
            spoilt.set()
            words = words + torch.arange(len(words), dtype=torch.int32) * 12_345_678
        return keep(self, words)

    monkeypatch.setattr(Work, "keep_vector", kept)
    here.start_silos()
    here.server.wait_for_silos()
    here.run_round(1)
    assert torch.equal(here.words(1), added(SILOS, 1))
    assert here.ledger.recorded("sum")[-1]["attempt"] == 1
    failed = [entry for entry in audit.read(here.root / "out" / "audit.jsonl") if entry.fields.get("stage") == "failed"]
    assert "none that silos could have put in" in failed[0].fields["reason"]


def test_weights_of_zero_leave_the_adapter_as_it_was(world, monkeypatch):
    original = Work.keep_update
    monkeypatch.setattr(
        Work, "keep_update", lambda self, *arguments, **named: original(self, *arguments, **named | {"weight": 0.0})
    )
    here = world()
    here.start_silos()
    here.server.wait_for_silos()
    mean = here.run_round(1).mean(None, 1)
    assert all(torch.equal(mean[name], tensor) for name, tensor in ADAPTER.items())
