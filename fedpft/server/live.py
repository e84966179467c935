"""The round state machine among threads: one lock, one condition, and the log."""

import collections
import logging
import threading
from collections.abc import Callable, Collection

from fedpft.errors import NotEnrolled, QuorumLost
from fedpft.federation import (
    Accept,
    Action,
    Aggregate,
    Begin,
    DeadlinePassed,
    Duplicate,
    Enrolled,
    EnrolmentDeadlinePassed,
    Event,
    Federation,
    LoseQuorum,
    Phase,
    Refuse,
    RoundRequested,
    SiloFailed,
    StartRound,
    Task,
    UpdateArrived,
    Verdict,
    Wait,
)

log = logging.getLogger(__name__)


class LiveFederation:
    """Thread-safe. The algorithm's thread blocks in `await_...`; the threads of the RPCs bring the events."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # A silo's thread is woken only when there is something for that silo: n silos would else wake n threads each.
        self._tasks: dict[str, threading.Condition] = collections.defaultdict(lambda: threading.Condition(lock))
        self._outcome: Aggregate | LoseQuorum | None = None
        self._enrolled: set[str] = set()
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
            for action in actions:
                _log(action)
                if isinstance(action, Aggregate | LoseQuorum):
                    self._outcome = action
            # Everybody waits for another phase, but for the farewell: that waits for silos to go.
            if self._federation.phase is not before or before is Phase.OVER:
                self._changed.notify_all()
                for silo, waiting in self._tasks.items():
                    if self._federation.task(silo) != Wait():
                        waiting.notify_all()
            return actions

    def enrol(self, silo: str, samples: int) -> None:
        """Raises RefusedByServer if the federation has no such silo."""
        with self._changed:
            named, present = self._federation.silos, self._federation.present
            if silo in named:
                self._enrolled.add(silo)
                log.info("%s enrolled, %d samples; %d of %d silos", silo, samples, len(present | {silo}), len(named))
            for action in self.handle(Enrolled(silo)):
                if isinstance(action, Refuse):
                    raise action.error

    def check_enrolled(self, silo: str) -> None:
        """Raises NotEnrolled if the silo has not enrolled since this server started."""
        with self._changed:
            if silo not in self._enrolled:
                raise NotEnrolled(f"{silo!r} has not enrolled since the server started", "enrol again")

    def await_enrolment(self, timeout_seconds: float) -> None:
        """Blocks until the federation can begin; raises QuorumLost."""
        with self._changed:
            if self._changed.wait_for(lambda: self._federation.phase is not Phase.ENROLLING, timeout_seconds):
                return
            for action in self.handle(EnrolmentDeadlinePassed()):
                if isinstance(action, LoseQuorum):
                    raise action.error

    def await_round(
        self, round: int, timeout_seconds: float, started: Callable[[StartRound, Collection[str]], None]
    ) -> tuple[str, ...]:
        """Runs a round, or goes on with a resumed one; returns the silos whose updates count, or raises QuorumLost.

        Args:
            started: called before any silo hears of the round, with the silos that were there; not for a resumed one.
        """
        with self._changed:
            self._outcome, resumed = None, self._federation.phase is Phase.TRAINING
            for action in self.handle(RoundRequested(round)):
                if isinstance(action, StartRound) and not resumed:
                    started(action, self._federation.present)
            if not self._changed.wait_for(lambda: self._outcome is not None, timeout_seconds):
                self.handle(DeadlinePassed(round))
            return _silos(self._outcome)

    def await_task(self, silo: str, timeout_seconds: float, listening: Callable[[], bool]) -> Task:
        """Blocks until the silo has something to do, or no longer listens, or the time is over."""
        with self._changed:
            self.handle(Enrolled(silo))
            self._tasks[silo].wait_for(
                lambda: self._federation.task(silo) != Wait() or not listening(), timeout_seconds
            )
            return self._federation.task(silo)

    def wake(self, silo: str) -> None:
        """Lets the threads that wait for this silo's task look again."""
        with self._changed:
            self._tasks[silo].notify_all()

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


def _silos(outcome: Aggregate | LoseQuorum | None) -> tuple[str, ...]:
    match outcome:
        case Aggregate(_, silos):
            return silos
        case LoseQuorum(error):
            raise error
        case None:
            raise QuorumLost("the federation ended in the middle of a round", "start the server again")


def _log(action: Action) -> None:
    match action:
        case Begin(silos):
            log.info("the federation begins with %s", ", ".join(silos))
        case StartRound(round, attempt, silos):
            again = f", attempt {attempt}" if attempt else ""
            log.info("round %d%s: waiting for %s", round, again, ", ".join(silos) or "nobody")
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
