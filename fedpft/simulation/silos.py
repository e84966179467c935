"""The silos as the rounds see them, simulated: state machine, files and checks are the server's own."""

import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from fedpft.config import RoundSettings, SimulationConfig
from fedpft.errors import InvalidUpdate
from fedpft.federation import (
    Accept,
    Aggregate,
    Enrolled,
    Event,
    FinishRequested,
    LoseQuorum,
    Open,
    PatchPublished,
    RoundRequested,
    SiloFailed,
    StartRound,
    Substitute,
    UpdateArrived,
)
from fedpft.privacy.noise import Secret
from fedpft.proxy.bundle import compressed_neurons
from fedpft.proxy.corrections import is_used
from fedpft.server.ledger import Ledger
from fedpft.server.live import log_action
from fedpft.server.outcome import Sum
from fedpft.server.roundfiles import RoundFiles, federation_of
from fedpft.server.summing import sum_of
from fedpft.server.updates import Update
from fedpft.silo.summing import words_of
from fedpft.silo.work import Update as Trained
from fedpft.silo.work import Work
from fedpft.simulation.crew import SHARE, Crew, Done, Job, falls_on, limits_of
from fedpft.simulation.data import SilosData
from fedpft.wire.transfer import Payload, payload
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

REPORT_SECONDS = 15.0  # between two lines on how far a round is


class SimulatedSilos:
    """What rounds.py takes for the silos; each method is as of FederationServer.

    bytes_down, bytes_up: what would have gone over the wire.
    """

    def __init__(
        self,
        config: SimulationConfig,
        bundle: Path,
        settings: RoundSettings,
        ledger: Ledger,
        data: SilosData,
        crew: Crew,
    ) -> None:
        self._config, self._ledger, self._data, self._crew = config, ledger, data, crew
        self._federation = federation_of(config, simulated=True)
        self._files = RoundFiles(config, bundle, settings, ledger)
        self._files.resume(self._federation)
        self._keep_residuals()
        self._neurons = compressed_neurons(bundle)
        self._bundle = {path.name: path.stat().st_size for path in bundle.iterdir()}
        self._versions = self._versions_so_far()
        self.bytes_down = 0
        self._settings, self._rounds = settings, settings.training.rounds
        self._clock = _Clock()

    @property
    def bytes_up(self) -> int:
        """Updates."""
        return self._files.inbox.bytes_up

    def start(self) -> None:
        """Nothing has to listen."""

    def wait_for_silos(self) -> None:
        """Nobody has to be waited for."""
        if not self._ledger.recorded("round"):  # of the time before one closed no count is kept
            self.bytes_down += sum(map(self._bundle_bytes, self._federation.silos))
        for silo in sorted(self._federation.silos):
            self._files.inbox.enrolled(silo, self._data.sizes[silo])
            self._federation.handle(Enrolled(silo))

    def run_round(self, round: int, *, count_inactivity: bool) -> list[Update] | Sum:
        """Lets the round's silos train."""
        if (kept := self._files.sum(round)) is not None:
            return kept
        if round != self._files.open_round:
            self._files.open(round, count_inactivity=count_inactivity)
        for silo in self._federation.silos:  # whoever dropped out is back
            self._federation.handle(Enrolled(silo))
        outcome = self._handle(RoundRequested(round))
        while outcome is None:
            outcome = self._train(round)
        if isinstance(outcome, LoseQuorum):
            self._files.lose(round, self._federation.failed)
            raise outcome.error
        if self._config.secure_terms is not None:  # no stages: what is added is the same without masks
            paths = [update.path for update in self._files.updates(round)]
            self._files.keep_sum(Open(round, self._federation.attempt, outcome.silos), sum_of(paths))
        return self.updates(round)

    def updates(self, round: int) -> list[Update] | Sum:
        """Those that the round counts, or their sum."""
        return self._files.sum(round) or self._files.updates(round)

    def close_round(self) -> None:
        """Deletes the round's updates."""
        self._files.close_round()

    def publish_patch(self) -> int:
        """The proxy has its next version."""
        self._files.put_patch(self._federation.proxy_version + 1)
        self._federation.handle(PatchPublished())
        return self._federation.proxy_version

    def finish(self) -> None:
        """What the silos had on disk is of no more use."""
        self._federation.handle(FinishRequested())
        shutil.rmtree(self._data.directory, ignore_errors=True)

    def abort(self, reason: str) -> None:
        """There is nobody to be told."""

    def close(self) -> None:
        """Ends the processes."""
        self._crew.close()

    def curves(self) -> dict[str, Any]:
        """Who has what."""
        return {"split": self._data.split()}

    def _train(self, round: int) -> Aggregate | LoseQuorum | None:
        """One go at all that the round still waits for; some of it may fail, and others take its place."""
        pending = sorted(self._federation.pending)
        out = {silo for silo in pending if drops_out(self._config, round, silo)}
        for silo in sorted(out):
            if (outcome := self._handle(SiloFailed(silo, "it dropped out", round))) is not None:
                return outcome
        jobs = [self._job(round, silo) for silo in pending if silo not in out]
        counted = len(self._federation.accepted)
        for number, done in enumerate(self._crew.run(jobs), 1):
            if (outcome := self._take(round, done)) is not None:
                return outcome  # of a quorum that is lost nobody trains for nothing
            rest = len(jobs) - number + (self._rounds - round) * (counted + len(jobs))
            self._clock.tick(f"round {round} of {self._rounds}: {counted + number} silos have trained", rest)
        return None

    def _job(self, round: int, silo: str) -> Job:
        files, federation, inbox = self._files, self._federation, self._files.inbox
        assert files.adapter is not None  # a round begins with one
        version, known = federation.proxy_version, self._versions.get(silo, 0)
        self.bytes_down += files.adapter.total_bytes
        if version > known and files.patch is not None and files.snapshot is not None:
            self.bytes_down += (files.patch if version == known + 1 else files.snapshot).total_bytes
        self._versions[silo] = version
        train = pb.Train(
            round=round,
            attempt=federation.attempt,
            adapter=files.adapter.announcement(),
            proxy_version=version,
            count_inactivity=inbox.counts_inactivity,
        )
        return Job(silo, train, files.adapter.path, files.snapshot.path if files.snapshot else None)

    def _take(self, round: int, done: Done) -> Aggregate | LoseQuorum | None:
        """Lets what a silo trained count, after the same look at it as at any update."""
        trained, silo = done.trained, done.silo
        if trained is None:
            return self._handle(SiloFailed(silo, done.fault, round))
        work = self._data.work(silo)
        header = pb.UpdateHeader(round=round, attempt=self._federation.attempt, proxy_version=trained.proxy_version)
        try:
            if self._settings.secure_aggregation is None:
                file = payload(work.update_path)
                header.samples = trained.samples
                header.metrics.update(trained.metrics)
            else:
                file = self._vector(silo, trained, work)
            header.file.CopyFrom(file.announcement())
            update = self._files.inbox.take_in(silo, header, file.path)
        except InvalidUpdate as error:
            work.drop_update()
            return self._handle(SiloFailed(silo, error.message, round))
        arrived = UpdateArrived(silo, round, trained.proxy_version, self._federation.attempt)
        if isinstance(self._federation.judge(arrived), Accept):
            self._files.inbox.keep(update, header)
            self._files.inbox.sync()
            self._keep_residual(work, trained)
        return self._handle(arrived)

    def _vector(self, silo: str, trained: Trained, work: Work) -> Payload:
        assert self._files.adapter is not None
        neurons = self._neurons if self._files.inbox.counts_inactivity else {}
        start = self._files.adapter.path
        return work.keep_vector(words_of(silo, trained, work, start, neurons, self._settings, noise=Secret()))

    def _bundle_bytes(self, silo: str) -> int:
        """Of the proxy's files, those that the silo uses."""
        limits = limits_of(self._config, silo)
        return sum(size for name, size in self._bundle.items() if is_used(name, limits))

    def _handle(self, event: Event) -> Aggregate | LoseQuorum | None:
        outcome: Aggregate | LoseQuorum | None = None
        for action in self._federation.handle(event):
            log_action(action)
            if isinstance(action, Aggregate | LoseQuorum):
                outcome = action
            elif isinstance(action, Substitute) or (isinstance(action, StartRound) and not action.attempt):
                self._files.enter(action, self._federation.present)
        return outcome

    def _keep_residual(self, work: Work, trained: Trained) -> None:
        """The update counts: of all that the silo has on disk, what was rounded off it is for later."""
        work.count_update(trained)
        work.drop_update()
        work.drop_vector()
        with contextlib.suppress(OSError):  # something was rounded off
            work.path.rmdir()

    def _keep_residuals(self) -> None:
        """The same of updates that count, where a former process was killed in between."""
        for row in self._ledger.updates(self._federation.round):
            work = self._data.work(row.silo)
            if (trained := work.update(SHARE)) is not None and trained.round == row.round:
                self._keep_residual(work, trained)

    def _versions_so_far(self) -> dict[str, int]:
        """Which version of the proxy each silo has seen."""
        aligned = [entry["round"] for entry in self._ledger.recorded("alignment")]
        return {row.silo: sum(round < row.round for round in aligned) for row in self._ledger.updates()}


def drops_out(config: SimulationConfig, round: int, silo: str) -> bool:
    """Whether a silo fails in a round if it is picked."""
    return falls_on(config.simulation.drop_out_fraction, config.seed, "drops out", round, silo)


class _Clock:
    """Says how long it will still take."""

    def __init__(self) -> None:
        self._begun = self._said = time.monotonic()
        self._done = 0

    def tick(self, what: str, rest: int) -> None:
        """One more is done, and so many are left."""
        self._done += 1
        now = time.monotonic()
        if now - self._said >= REPORT_SECONDS:
            self._said = now
            minutes = (now - self._begun) / self._done * rest / 60
            log.info("%s; about %s left", what, f"{minutes:.0f} min" if minutes >= 2 else f"{60 * minutes:.0f} s")
