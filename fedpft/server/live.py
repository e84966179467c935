"""The round state machine among threads: one lock, one condition, and the log."""

import collections
import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from fedpft.errors import NotEnrolled, QuorumLost, RefusedByServer
from fedpft.federation import (
    Accept,
    Action,
    Aggregate,
    Assignment,
    AttemptFailed,
    Begin,
    DeadlinePassed,
    Duplicate,
    Enrolled,
    EnrolmentDeadlinePassed,
    Event,
    Federation,
    LoseQuorum,
    Open,
    Phase,
    Refuse,
    RoundRequested,
    SecretsLost,
    SiloFailed,
    StageAnswered,
    StartAttempt,
    StartRound,
    StartStage,
    Substitute,
    SumKept,
    UpdateArrived,
    Verdict,
    Wait,
)

log = logging.getLogger(__name__)

Picked = StartRound | Substitute | StartAttempt
Outcome = Aggregate | LoseQuorum | Open


@dataclass(frozen=True)
class Place:
    """Where a silo runs, in numbers that its process made up: `work` is the same as long as its work directory is."""

    work: bytes
    process: bytes


class LiveFederation:
    """Thread-safe. The algorithm's thread blocks in `await_...`; the threads of the RPCs bring the events."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # A silo's thread is woken only when there is something for that silo: n silos would else wake n threads each.
        self._waiting: dict[str, threading.Condition] = collections.defaultdict(lambda: threading.Condition(lock))
        self._outcome: Outcome | None = None
        self._picked: Callable[[Picked, Collection[str]], None] = lambda action, present: None
        self._staged: Callable[[StartStage], None] = lambda action: None
        self._turns = 0  # of the round: others are waited for, or for something else
        self._broken: Exception | None = None
        self._places: dict[str, Place] = {}
        self._told: set[str] = set()

    @property
    def proxy_version(self) -> int:
        """As :class:`Federation` counts it."""
        return self._federation.proxy_version

    def handle(self, event: Event) -> list[Action]:
        """Applies an event and wakes those for whom it changes something."""
        with self._changed:
            before = self._federation.phase
            actions = self._federation.handle(event)
            turns = self._turns
            for action in actions:
                if not isinstance(event, StageAnswered) or not isinstance(action, Accept):
                    log_action(action)
                if isinstance(action, Outcome):
                    self._outcome = action
                if isinstance(action, Substitute | StartAttempt | StartStage | Open):
                    self._turns += 1
                if isinstance(action, Substitute | StartAttempt) or (
                    isinstance(action, StartRound) and not action.attempt
                ):
                    self._picked(action, self._federation.present)
                if isinstance(action, StartStage):
                    self._staged(action)
            # Everybody waits for another phase, but for the farewell, which waits for silos to go, and for those who
            # are to take another's place, or have come to another stage.
            news = self._federation.phase is not before or self._turns != turns
            if news or before is Phase.OVER:
                self._changed.notify_all()
                for silo, waiting in self._waiting.items():
                    if self._federation.assignment(silo) != Wait():
                        waiting.notify_all()
            return actions

    def enrol(self, silo: str, samples: int, place: Place) -> None:
        """Takes a silo in; another process in the same work directory takes its former one's place.

        Raises:
            RefusedByServer: the federation has no such silo, or it takes part from another work directory.
        """
        with self._changed:
            named, present = self._federation.silos, self._federation.present
            known = self._places.get(silo, place)
            if silo in present and known.work != place.work:
                raise RefusedByServer(
                    f"{silo} takes part already, from another work directory",
                    "stop one of the two, or start this one with the other's `work`; if that is lost for good, this "
                    "one is let in when the other has missed a deadline, or the server was started again",
                )
            if silo in named:
                self._places[silo] = place
                having = f", {samples} samples" if samples else ""
                log.info("%s enrolled%s; %d of %d silos", silo, having, len(present | {silo}), len(named))
            for action in self.handle(Enrolled(silo)):
                if isinstance(action, Refuse):
                    raise action.error

    def check_enrolled(self, silo: str, place: Place) -> None:
        """Whether the caller is the process that speaks for the silo.

        Raises:
            NotEnrolled: the silo has not enrolled since this server started.
            RefusedByServer: another process of the same name has enrolled meanwhile.
        """
        with self._changed:
            if silo not in self._places:
                raise NotEnrolled(f"{silo!r} has not enrolled since the server started", "enrol again")
            if place != self._places[silo]:
                a_copy = "a copy of this" if place.work == self._places[silo].work else "another"
                raise RefusedByServer(
                    f"another process takes part as {silo} now, with {a_copy} work directory",
                    "stop one of the two: each kit is for one process, in one work directory",
                )

    def await_enrolment(self, timeout_seconds: float) -> None:
        """Blocks until the federation can begin; raises QuorumLost."""
        with self._changed:
            begun = self._changed.wait_for(
                lambda: self._broken is not None or self._federation.phase is not Phase.ENROLLING, timeout_seconds
            )
            self._check_whole()
            if begun:
                return
            for action in self.handle(EnrolmentDeadlinePassed()):
                if isinstance(action, LoseQuorum):
                    raise action.error

    def await_round(
        self,
        round: int,
        timeout_seconds: float,
        picked: Callable[[Picked, Collection[str]], None],
        summing: "Summing | None" = None,
    ) -> tuple[str, ...]:
        """Runs a round, or goes on with a resumed one; returns the silos whose updates count, or raises QuorumLost.

        Args:
            timeout_seconds: from the beginning, or from when silos took the place of others.
            picked: called, with the silos that are there, before any silo hears that it was picked; not for those of a
                resumed round.
            summing: what is done in the stages of a sum.

        Raises:
            Exception: that :meth:`break_off` was called with.
        """
        with self._changed:
            self._outcome, self._picked = None, picked
            if summing is not None:
                self._staged = summing.staged
            self.handle(RoundRequested(round))
        while True:
            with self._changed:
                outcome = self._await_outcome(round, timeout_seconds, summing)
                self._outcome = None
            if not isinstance(outcome, Open) or summing is None:
                return _silos(outcome)
            self.handle(summing.opened(outcome))

    def break_off(self, error: Exception) -> None:
        """Ends what the algorithm's thread waits for, now or next, with an error of this process's own."""
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    @property
    def failed(self) -> list[str]:
        """The silos that the present round has lost, by name."""
        with self._changed:
            return sorted(self._federation.failed)

    def await_assignment(self, silo: str, timeout_seconds: float, listening: Callable[[], bool]) -> Assignment:
        """Blocks until the silo has something to do, or no longer listens, or the time is over."""
        with self._changed:
            self.handle(Enrolled(silo))
            self._waiting[silo].wait_for(
                lambda: self._federation.assignment(silo) != Wait() or not listening(), timeout_seconds
            )
            return self._federation.assignment(silo)

    def wake(self, silo: str) -> None:
        """Lets the threads that wait for this silo's assignment look again."""
        with self._changed:
            self._waiting[silo].notify_all()

    def judge(self, update: UpdateArrived) -> Verdict:
        """What `take` would answer now; changes nothing."""
        with self._changed:
            return self._federation.judge(update)

    def take(self, update: UpdateArrived, keep: Callable[[], None]) -> Verdict:
        """Lets an update count if it may; `keep` puts its file in place, before anybody hears of it."""
        with self._changed:
            if isinstance(self._federation.judge(update), Accept):
                keep()
            verdict = self.handle(update)[0]
            assert isinstance(verdict, Accept | Duplicate | Refuse)
            return verdict

    def judge_answer(self, answer: StageAnswered) -> Verdict:
        """What `answer` would answer now; changes nothing."""
        with self._changed:
            return self._federation.judge_answer(answer)

    def answer(self, answer: StageAnswered, keep: Callable[[], None]) -> Verdict:
        """Takes what a silo has to say in a stage; `keep` puts it in place first, if it is taken."""
        with self._changed:
            if isinstance(self._federation.judge_answer(answer), Accept):
                keep()
            verdict = self.handle(answer)[0]
            assert isinstance(verdict, Accept | Duplicate | Refuse)
            return verdict

    def withdraw(self, silo: str, round: int, attempt: int) -> None:
        """A silo cannot go on with an attempt at a sum."""
        log.info("%s withdraws from attempt %d of round %d", silo, attempt, round)
        self.handle(SecretsLost(silo, round, attempt))

    def fail(self, silo: str, reason: str, round: int | None = None) -> None:
        """A silo is out of the round (None: whichever is on)."""
        log.warning("%s failed: %s", silo, reason)
        self.handle(SiloFailed(silo, reason, round))

    def tell(self, silo: str) -> None:
        """The silo has been told that the federation is over."""
        with self._changed:
            self._told.add(silo)
            self._changed.notify_all()

    def await_farewell(self, timeout_seconds: float, expected: Collection[str] = ()) -> None:
        """Blocks until every silo that is there, or expected to come back, knows that the federation is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._federation.present.union(expected) <= self._told, timeout_seconds)

    def _await_outcome(self, round: int, timeout_seconds: float, summing: "Summing | None") -> Outcome | None:
        while self._outcome is None:
            is_summing, arrived = self._federation.phase is Phase.SUMMING, summing.arrived_bytes if summing else 0
            if self._await_news(summing.stage_seconds if summing and is_summing else timeout_seconds):
                continue
            if summing is not None and is_summing and summing.arrived_bytes != arrived:
                continue  # a vector is on its way, over a slow link
            before = self._turns
            self.handle(DeadlinePassed(round))
            if self._turns == before:
                break
        return self._outcome

    def _await_news(self, timeout_seconds: float) -> bool:
        """Blocks until the round is over or has taken a turn; False if the time is over before."""
        before = self._turns
        self._changed.wait_for(lambda: self._outcome or self._broken or self._turns != before, timeout_seconds)
        self._check_whole()
        return self._outcome is not None or self._turns != before

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise self._broken


def _silos(outcome: Outcome | None) -> tuple[str, ...]:
    match outcome:
        case Aggregate(_, silos):
            return silos
        case LoseQuorum(error):
            raise error
        case _:
            raise QuorumLost("the federation ended in the middle of a round", "start the server again")


class Summing(Protocol):
    """What there is to do in the stages of a sum.

    stage_seconds: the longest wait in one of them, while nothing arrives.
    """

    stage_seconds: float

    @property
    def arrived_bytes(self) -> int:
        """Of vectors, so far."""

    def staged(self, action: StartStage) -> None:
        """A stage begins; no silo has heard of it."""

    def opened(self, action: Open) -> SumKept | AttemptFailed:
        """Opens the sum, and keeps it on disk. Called without the lock."""


def log_action(action: Action) -> None:
    """Says what the state machine has decided."""
    match action:
        case Begin(silos):
            log.info("the federation begins with %s", ", ".join(silos))
        case StartRound(round, attempt, silos):
            again = f", attempt {attempt}" if attempt else ""
            log.info("round %d%s: waiting for %s", round, again, ", ".join(silos) or "nobody")
        case Substitute(round, _, silos, new):
            log.warning("round %d: too few are left; %s will train too", round, ", ".join(new))
        case StartAttempt(round, attempt, silos):
            log.warning("round %d: attempt %d at its sum begins, with %s", round, attempt, ", ".join(silos))
        case StartStage(round, attempt, stage, silos):
            log.info("round %d, attempt %d: %s of %s", round, attempt, stage.name.lower(), ", ".join(silos))
        case Open(round, attempt, silos):
            log.info("round %d, attempt %d: the sum of %s is opened", round, attempt, ", ".join(silos))
        case Accept(silo):
            log.info("%s: update accepted", silo)
        case Duplicate(silo):
            log.info("%s: the same round's update again, ignored", silo)
        case Refuse(silo, error):
            log.warning("%s: refused: %s", silo, error.message)
        case Aggregate(round, silos):
            log.info("round %d: %d updates", round, len(silos))
        case LoseQuorum(error):
            log.error("%s", error.message)
