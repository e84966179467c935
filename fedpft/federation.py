"""The round state machine: events in, actions out. No I/O, no clock, no tensors.

    enrolling --Begin--> idle --StartRound--> training --Aggregate--> idle ... --> finished | aborted
                  LoseQuorum leads from enrolling and training back to idle; the caller decides what then.
                  A restarted server begins at enrolling, or, with `resume`, in the middle of training.

A silo is *present* from its enrolment until it fails or misses a deadline; it is present again as soon as it is heard
of again. Each round picks among the silos that are present. Of each silo a round counts at most one update, the first.
Where fewer are left than the quorum, silos that are present and were not picked take the place of those that failed, in
the order of their draws; the quorum is lost when there are none.

With secure aggregation what counts is a silo's part in a sum. After training it shows its keys (`UpdateArrived`), and
then the silos go through the stages of an attempt together (docs/protocol.md):

    training --StartStage--> summing --Open--> summing --Aggregate--> idle
                summing --StartAttempt--> training, with new keys

An attempt goes on without silos that drop out, as long as the threshold and the quorum allow. One that comes back
without its secrets before its vector was there has the attempt begun anew, so that the round counts it.
"""

import enum
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fedpft.errors import InvalidUpdate, QuorumLost, RefusedByServer, RoundOver, StaleProxy
from fedpft.seeding import derive_seed

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enrolled:
    """A silo announced itself, or asked for its next assignment."""

    silo: str


@dataclass(frozen=True)
class EnrolmentDeadlinePassed:
    """The time in which silos could enrol before the first round is over."""


@dataclass(frozen=True)
class RoundRequested:
    """The algorithm wants a round."""

    round: int


@dataclass(frozen=True)
class UpdateArrived:
    """A silo's update is there, whole, and its content was found valid."""

    silo: str
    round: int
    proxy_version: int
    attempt: int = 0


@dataclass(frozen=True)
class SiloFailed:
    """A silo left, or sent something unusable in a round. The reason names the fault, for the server's operator."""

    silo: str
    reason: str
    round: int | None = None


class Stage(enum.IntEnum):
    """What silos do in an attempt at a sum after they have shown their keys."""

    SHARES = 1
    VECTORS = 2
    SIGNATURES = 3
    REVEALS = 4


@dataclass(frozen=True)
class StageAnswered:
    """What a silo has to say in a stage is there, and was found valid."""

    silo: str
    round: int
    attempt: int
    stage: Stage


@dataclass(frozen=True)
class SecretsLost:
    """A silo cannot go on with an attempt: it was started again, or may not open such a sum."""

    silo: str
    round: int
    attempt: int


@dataclass(frozen=True)
class SumKept:
    """A round's sum was opened, and is on disk."""

    round: int


@dataclass(frozen=True)
class AttemptFailed:
    """The sum could not be opened."""

    round: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class DeadlinePassed:
    """The time for a round's updates, or for a stage, is over."""

    round: int


@dataclass(frozen=True)
class PatchPublished:
    """The proxy has a new version."""


@dataclass(frozen=True)
class FinishRequested:
    """The algorithm is through with all rounds."""


@dataclass(frozen=True)
class AbortRequested:
    """The algorithm cannot go on. All silos read the reason."""

    reason: str


Event = (
    Enrolled
    | EnrolmentDeadlinePassed
    | RoundRequested
    | UpdateArrived
    | StageAnswered
    | SecretsLost
    | SumKept
    | AttemptFailed
    | SiloFailed
    | DeadlinePassed
    | PatchPublished
    | FinishRequested
    | AbortRequested
)

# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Enough silos are enrolled."""

    silos: tuple[str, ...]


@dataclass(frozen=True)
class StartRound:
    """These silos train. attempt: how often a restarted server took the round up again."""

    round: int
    attempt: int
    silos: tuple[str, ...]


@dataclass(frozen=True)
class Substitute:
    """Others train in place of silos that failed.

    silos: all those that the round now waits for, or counts already.
    new: those among them that were not in the round before.
    """

    round: int
    attempt: int
    silos: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True)
class StartStage:
    """An attempt is in this stage now.

    silos: whose answers to the stage before it go on with: keys, shares, vectors, signatures.
    """

    round: int
    attempt: int
    stage: Stage
    silos: tuple[str, ...]


@dataclass(frozen=True)
class StartAttempt:
    """A new attempt at the round's sum begins: what there is of the one before must not be used any more."""

    round: int
    attempt: int
    silos: tuple[str, ...]


@dataclass(frozen=True)
class Open:
    """The sum over these silos can be opened; the answer is SumKept or AttemptFailed."""

    round: int
    attempt: int
    silos: tuple[str, ...]


@dataclass(frozen=True)
class Accept:
    """The update counts."""

    silo: str


@dataclass(frozen=True)
class Duplicate:
    """The round already counts an update of this silo; this one changes nothing."""

    silo: str


@dataclass(frozen=True)
class Refuse:
    """The silo is told no."""

    silo: str
    error: RefusedByServer | InvalidUpdate


@dataclass(frozen=True)
class Aggregate:
    """The round is over; it counts the updates of these silos, in the order of their names."""

    round: int
    silos: tuple[str, ...]


@dataclass(frozen=True)
class LoseQuorum:
    """Too few silos are left. `error` names each that is missing, and why."""

    error: QuorumLost


Verdict = Accept | Duplicate | Refuse
Action = Begin | StartRound | Substitute | StartStage | StartAttempt | Open | Verdict | Aggregate | LoseQuorum

# --- what a silo should do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Train:
    """Train in this round, and send an update."""

    round: int
    attempt: int


@dataclass(frozen=True)
class Answer:
    """Do what this stage asks for."""

    round: int
    attempt: int
    stage: Stage


@dataclass(frozen=True)
class Wait:
    """Nothing to do for now."""


@dataclass(frozen=True)
class Finished:
    """The federation reached its end."""


@dataclass(frozen=True)
class Aborted:
    """The federation broke off."""

    reason: str


Assignment = Train | Answer | Wait | Finished | Aborted


class Phase(enum.Enum):
    """Where a federation stands."""

    ENROLLING = enum.auto()
    IDLE = enum.auto()
    TRAINING = enum.auto()
    SUMMING = enum.auto()
    OVER = enum.auto()


MOST_RETURNS = 3  # of a silo in one round without its secrets
MOST_FAILURES = 3  # to open a round's sum


class Federation:
    """The state. Every change goes through :meth:`handle`; the attributes are for reading.

    expected: silos for which enrolment waits.
    present: silos that can be picked.
    pending, accepted: of the round in progress, the silos waited for and those whose update counts.
    failed: silo -> reason, of the round in progress.
    absent: silos that a resumed round can do without, unless they are heard of again.
    stage: of the attempt; None while there is none, and while the sum is opened.
    waiting, done: silos whose answers to the stage are waited for, and there.
    survivors: silos of the sum, once their vectors are there.
    proxy_version: 0 for the proxy as first sent, one more for each patch.
    """

    def __init__(
        self,
        silos: Collection[str],
        *,
        min_silos: int | None,
        sample_fraction: float,
        seed: int,
        fewest: int = 1,
        threshold: Callable[[int], int] | None = None,
    ) -> None:
        """Args:
        silos: names of all silos that may take part.
        min_silos: fewest updates that make a round; None: all that were picked.
        sample_fraction: share of the present silos that a round picks, at least min_silos and at least `fewest`.
        fewest: updates without which there is no mean, at most min_silos and the number of silos.
        threshold: of so many silos how many it takes to open a sum; None: without secure aggregation.
        """
        self.silos = frozenset(silos)
        self.expected = self.silos
        self.min_silos = min_silos
        self.sample_fraction = sample_fraction
        self.seed = seed
        self.fewest = fewest
        self.phase = Phase.ENROLLING
        self.round = 0
        self.attempt = 0
        self.proxy_version = 0
        self.present: set[str] = set()
        self.pending: set[str] = set()
        self.accepted: set[str] = set()
        self.failed: dict[str, str] = {}
        self.absent: set[str] = set()
        self.stage: Stage | None = None
        self.waiting: set[str] = set()
        self.done: set[str] = set()
        self.survivors: frozenset[str] = frozenset()
        self._threshold = threshold
        self._returns: Counter[str] = Counter()
        self._failures = 0
        self.counted: dict[int, frozenset[str]] = {}
        self._quorum = 0
        self._resumed = False
        self._end: Finished | Aborted = Finished()

    def resume(
        self,
        last: StartRound,
        *,
        present: Collection[str],
        counted: Mapping[int, Collection[str]],
        proxy_version: int,
        aggregated: bool,
        lost: Collection[str] = (),
    ) -> None:
        """Takes up a run where a former process left it, before any event. Silos that are no longer named are gone.

        Args:
            last: the round that was begun last, with the attempt that begins now.
            present: the silos it was picked from. Enrolment waits for these, as the next round would have had them.
            counted: round -> silos whose update counts, for all rounds so far.
            proxy_version: patches that were published.
            aggregated: whether the last round is over. If not, it goes on now, without enrolment: updates are taken
                at once, and its end is announced as soon as it is requested.
            lost: the silos for want of which the last round lost its quorum. If the others make a quorum by now, they
                are waited for only once they are heard of.
        """
        self.proxy_version = proxy_version
        self.counted = {round: frozenset(silos) for round, silos in counted.items()}
        self.round, self.attempt = last.round, last.attempt
        if aggregated:
            self.expected = self.silos & set(present) or self.silos
            return
        picked = self.silos & set(last.silos)
        self.present = set(self.silos & set(present))
        self.accepted = set(self.counted.pop(self.round, ()))
        self.pending = set(picked - self.accepted)
        self._quorum = self.min_silos or max(len(picked), self.fewest)
        if len(self.accepted | self.pending.difference(lost)) >= self._quorum:
            self.absent = self.pending.intersection(lost)
            self.pending -= self.absent
            self.present -= self.absent
        self.phase, self._resumed = Phase.TRAINING, True

    def handle(self, event: Event) -> list[Action]:
        """Applies an event; returns what is to be done about it, in order."""
        match event:
            case Enrolled(silo):
                return self._enrol(silo)
            case EnrolmentDeadlinePassed():
                return self._close_enrolment()
            case RoundRequested(round):
                return self._start(round)
            case UpdateArrived(silo):
                return self._take(event)
            case SiloFailed(silo, reason, round):
                return [] if round is not None and round != self.round else self._fail({silo: reason})
            case StageAnswered(silo):
                return self._answer(event)
            case SecretsLost(silo, round, attempt):
                return self._lose_secrets(silo) if self._is_summing(round, attempt) else []
            case SumKept(round):
                return self._count(self.survivors)
            case AttemptFailed(round, attempt, reason):
                return self._begin_anew(reason) if self._is_summing(round, attempt) else []
            case DeadlinePassed(round):
                if round != self.round:
                    return []
                if self.phase is Phase.SUMMING and self.stage is not None:
                    return self._fail(dict.fromkeys(self.waiting, f"no {self.stage.name.lower()} before the deadline"))
                if self.phase is not Phase.TRAINING:
                    return []
                return self._fail(dict.fromkeys(self.pending, "no update before the deadline"))
            case PatchPublished():
                if self.phase in (Phase.TRAINING, Phase.SUMMING):
                    raise ValueError("the proxy cannot change during a round")
                self.proxy_version += 1
                return []
            case FinishRequested():
                self.phase, self._end = Phase.OVER, Finished()
                return []
            case AbortRequested(reason):
                self.phase, self._end = Phase.OVER, Aborted(reason)
                return []

    def assignment(self, silo: str) -> Assignment:
        """What a silo should do now."""
        if self.phase is Phase.OVER:
            return self._end
        if self.phase is Phase.SUMMING and self.stage is not None and silo in self.waiting:
            return Answer(self.round, self.attempt, self.stage)
        return Train(self.round, self.attempt) if self.phase is Phase.TRAINING and silo in self.pending else Wait()

    def judge(self, update: UpdateArrived) -> Verdict:
        """What :meth:`handle` would answer to an update. Changes nothing: it can be asked before the bytes arrive."""
        silo, round = update.silo, update.round
        if silo not in self.silos:
            return Refuse(silo, _unknown(silo))
        if silo in self.counted.get(round, ()) or (round == self.round and silo in self.accepted):
            return Duplicate(silo)
        if round > self.round:
            return Refuse(
                silo,
                InvalidUpdate(
                    f"an update of round {round}, but the federation is in round {self.round}",
                    "restart the silo",
                ),
            )
        if self.phase not in (Phase.TRAINING, Phase.SUMMING) or round < self.round:
            return Refuse(silo, RoundOver(f"round {round} is over", "the silo goes on with the next round"))
        if silo in self.failed:
            return Refuse(
                silo,
                RoundOver(
                    f"round {round} goes on without {silo}: {self.failed[silo]}", "the silo goes on with the next round"
                ),
            )
        if update.attempt > self.attempt:
            return Refuse(
                silo,
                InvalidUpdate(
                    f"an update of attempt {update.attempt}, but round {round} is at attempt {self.attempt}",
                    "restart the silo",
                ),
            )
        if self._threshold is not None and (self.phase is Phase.SUMMING or update.attempt < self.attempt):
            return Refuse(silo, _attempt_over(round, update.attempt))
        if silo not in self.pending:
            return Refuse(silo, RefusedByServer(f"{silo} was not picked for round {round}", "restart the silo"))
        if update.proxy_version != self.proxy_version:
            return Refuse(
                silo,
                StaleProxy(
                    f"trained on version {update.proxy_version} of the proxy, but round {round} is on version "
                    f"{self.proxy_version}",
                    "restart the silo: it fetches the present version",
                ),
            )
        return Accept(silo)

    def judge_answer(self, answer: StageAnswered) -> Verdict:
        """What :meth:`handle` would answer to what a silo says in a stage. Changes nothing."""
        silo = answer.silo
        if silo not in self.silos:
            return Refuse(silo, _unknown(silo))
        if self._is_summing(answer.round, answer.attempt) and answer.stage is self.stage:
            if silo in self.done:
                return Duplicate(silo)
            if silo in self.waiting:
                return Accept(silo)
        return Refuse(silo, _attempt_over(answer.round, answer.attempt))

    def pick(self, round: int) -> tuple[str, ...]:
        """The silos of a round: the same for the same seed, round and present silos, in whatever order they came.

        Each silo draws a number from seed, round and its own name, and the lowest win: that one silo is away changes
        the choice by no more than that silo.
        """
        count = max(math.ceil(self.sample_fraction * len(self.present)), self.min_silos or self.fewest)
        return tuple(sorted(self._drawn(round)[:count]))

    def _drawn(self, round: int) -> list[str]:
        return sorted(self.present, key=lambda silo: (derive_seed(self.seed, "silos of a round", round, silo), silo))

    def _enrol(self, silo: str) -> list[Action]:
        if silo not in self.silos:
            return [Refuse(silo, _unknown(silo))]
        self.present.add(silo)
        if self.phase is Phase.TRAINING and silo in self.absent:
            self.absent.discard(silo)
            self.pending.add(silo)
        return self._begin() if self.phase is Phase.ENROLLING and self.present >= self.expected else []

    def _close_enrolment(self) -> list[Action]:
        if self.phase is not Phase.ENROLLING:
            return []
        needed = self.min_silos or len(self.silos)
        if len(self.present) >= needed:
            return self._begin()
        missing = ", ".join(sorted(self.silos - self.present))
        return [
            LoseQuorum(
                QuorumLost(
                    f"{len(self.present)} of the {needed} silos needed have enrolled; missing: {missing}",
                    self._remedy("start the missing silos", len(self.present)),
                )
            )
        ]

    def _begin(self) -> list[Action]:
        self.phase = Phase.IDLE
        return [Begin(tuple(sorted(self.present)))]

    def _start(self, round: int) -> list[Action]:
        if self._resumed and round == self.round:
            self._resumed = False
            return [StartRound(round, self.attempt, tuple(sorted(self.pending))), *self._settle()]
        if self.phase is not Phase.IDLE or round <= max(self.counted, default=0):
            raise ValueError(f"round {round} cannot start: {self.phase.name.lower()}, last round {self.round}")
        self.round, self.attempt, self.accepted, self.failed, self.absent = round, 0, set(), {}, set()
        self._returns, self._failures = Counter(), 0
        self.pending = set(self.pick(round))
        self._quorum = self.min_silos or max(len(self.pending), self.fewest)
        if len(self.pending) < self._quorum:
            self.failed = dict.fromkeys(self.silos - self.present, "not there")
            return [self._lose_quorum()]
        self.phase = Phase.TRAINING
        return [StartRound(round, 0, tuple(sorted(self.pending)))]

    def _take(self, update: UpdateArrived) -> list[Action]:
        verdict = self.judge(update)
        if isinstance(verdict, Accept):
            self.pending.discard(update.silo)
            self.accepted.add(update.silo)
            return [verdict, *self._settle()]
        if isinstance(verdict, Refuse) and isinstance(verdict.error, StaleProxy):
            return [verdict, *self._fail({update.silo: verdict.error.message})]
        return [verdict]

    def _fail(self, reasons: dict[str, str]) -> list[Action]:
        self.present -= reasons.keys()
        if self.phase is Phase.SUMMING:
            self.failed |= {silo: reasons[silo] for silo in sorted(reasons.keys() & self.accepted)}
            self.waiting -= reasons.keys()
            return self._advance()
        theirs = self.pending if self._threshold is None else self.pending | self.accepted  # keys alone are no update
        hit = reasons.keys() & theirs if self.phase is Phase.TRAINING else set()
        if not hit:
            return []
        self.pending -= hit
        self.accepted -= hit
        self.failed |= {silo: reasons[silo] for silo in sorted(hit)}
        return self._settle()

    def _settle(self) -> list[Action]:
        """Ends the round if it is decided and the algorithm has asked for it."""
        if self._resumed:
            return []
        if missing := max(self._quorum - len(self.accepted) - len(self.pending), 0):
            out = self.accepted | self.pending | self.failed.keys()
            new = [silo for silo in self._drawn(self.round) if silo not in out][:missing]
            if len(new) < missing:
                return [self._lose_quorum()]
            self.pending.update(new)
            silos = tuple(sorted(self.accepted | self.pending))
            return [Substitute(self.round, self.attempt, silos, tuple(sorted(new)))]
        if self.pending:
            return []
        return self._count(self.accepted) if self._threshold is None else self._begin_stage(Stage.SHARES, self.accepted)

    def _count(self, silos: Collection[str]) -> list[Action]:
        self.phase, self.stage = Phase.IDLE, None
        self.counted[self.round] = frozenset(silos)
        return [Aggregate(self.round, tuple(sorted(silos)))]

    # --- the stages of a sum ---

    def _is_summing(self, round: int, attempt: int) -> bool:
        return self.phase is Phase.SUMMING and (round, attempt) == (self.round, self.attempt)

    def _answer(self, answer: StageAnswered) -> list[Action]:
        verdict = self.judge_answer(answer)
        if not isinstance(verdict, Accept):
            return [verdict]
        self.waiting.discard(answer.silo)
        self.done.add(answer.silo)
        return [verdict, *self._advance()]

    def _begin_stage(self, stage: Stage, silos: Collection[str]) -> list[Action]:
        self.phase, self.stage = Phase.SUMMING, stage
        self.waiting, self.done = set(silos) - self.failed.keys(), set()
        start = StartStage(self.round, self.attempt, stage, tuple(sorted(silos)))
        return [start, *self._advance()]

    def _advance(self) -> list[Action]:
        """Goes on once all that can answer have; begins anew as soon as too few are left to open the sum."""
        if self.stage is None or self._threshold is None:
            return []
        needed, left = self._threshold(len(self.accepted)), self.waiting | self.done
        if self.stage in (Stage.SHARES, Stage.VECTORS):
            needed = max(needed, self._quorum)
        if len(left) < needed:
            return self._begin_anew(f"{len(left)} silos are left of {needed} for {self.stage.name.lower()}")
        if self.waiting:
            return []
        if self.stage is Stage.REVEALS:
            self.stage = None
            return [Open(self.round, self.attempt, tuple(sorted(self.survivors)))]
        if self.stage is Stage.VECTORS:
            self.survivors = frozenset(self.done)
        return self._begin_stage(Stage(self.stage + 1), frozenset(self.done))

    def _lose_secrets(self, silo: str) -> list[Action]:
        if self.stage is None or silo not in self.waiting:
            return []
        if self.stage in (Stage.SHARES, Stage.VECTORS):
            self._returns[silo] += 1
            if self._returns[silo] > MOST_RETURNS:
                return self._fail({silo: "it was started again and again"})
            return self._begin_anew(f"{silo} is back without its secrets")
        self.waiting.discard(silo)
        return self._advance()

    def _begin_anew(self, reason: str) -> list[Action]:
        self._failures += self.stage not in (Stage.SHARES, Stage.VECTORS)
        self.attempt += 1
        self.pending = self.accepted - self.failed.keys()
        self.accepted, self.waiting, self.done, self.survivors = set(), set(), set(), frozenset()
        self.phase, self.stage = Phase.TRAINING, None
        if self._failures > MOST_FAILURES:
            self.failed |= dict.fromkeys(self.pending, reason)
            return [self._lose_quorum()]
        return [StartAttempt(self.round, self.attempt, tuple(sorted(self.pending))), *self._settle()]

    def _lose_quorum(self) -> LoseQuorum:
        self.phase = Phase.IDLE
        left = len(self.accepted) + len(self.pending)
        self.failed |= dict.fromkeys(self.absent, "not heard of since the restart")
        self.pending, self.absent = set(), set()
        missing = "; ".join(f"{silo}: {reason}" for silo, reason in sorted(self.failed.items()))
        return LoseQuorum(
            QuorumLost(
                f"round {self.round} needs {self._quorum} updates and cannot get them ({missing})",
                self._remedy("mend these silos", left),
            )
        )

    def _remedy(self, mend: str, left: int) -> str:
        """What to do about a lost quorum. left: how many silos could do without the others."""
        others = f", or set federation.min_silos to {left} to go on without them" if left >= self.fewest else ""
        if not others and self.fewest > 1:
            others = f" (aggregation.mean takes no fewer than {self.fewest} updates)"
        return f"{mend}{others}, and start the server again: it goes on from where it was"


def _attempt_over(round: int, attempt: int) -> RoundOver:
    return RoundOver(f"attempt {attempt} at the sum of round {round} is over", "the silo goes on with the next one")


def _unknown(silo: str) -> RefusedByServer:
    return RefusedByServer(
        f"no silo named {silo!r} takes part in this federation",
        "ask the server's operator to add the name to federation.silos",
    )
