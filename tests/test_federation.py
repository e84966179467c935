"""The round state machine: named situations first, then invariants under any order of events."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedpft.errors import InvalidUpdate, QuorumLost, RefusedByServer, RoundOver, StaleProxy
from fedpft.federation import (
    Aborted,
    AbortRequested,
    Accept,
    Aggregate,
    Answer,
    AttemptFailed,
    Begin,
    DeadlinePassed,
    Duplicate,
    Enrolled,
    EnrolmentDeadlinePassed,
    Federation,
    Finished,
    FinishRequested,
    LoseQuorum,
    Open,
    PatchPublished,
    Phase,
    Refuse,
    RoundRequested,
    SecretsLost,
    SiloFailed,
    Stage,
    StageAnswered,
    StartAttempt,
    StartRound,
    StartStage,
    Substitute,
    SumKept,
    Train,
    UpdateArrived,
    Wait,
)

SILOS = ("east", "north", "south")


def begun(silos=SILOS, min_silos=None, sample_fraction=1.0, seed=0, fewest=1):
    federation = Federation(silos, min_silos=min_silos, sample_fraction=sample_fraction, seed=seed, fewest=fewest)
    for silo in silos:
        federation.handle(Enrolled(silo))
    return federation


def training(**settings):
    federation = begun(**settings)
    federation.handle(RoundRequested(1))
    return federation


def refusal(actions):
    (action,) = actions
    assert isinstance(action, Refuse)
    return action.error


# --- enrolment --------------------------------------------------------------------------------------------------------


def test_the_federation_begins_when_the_last_silo_is_there():
    federation = Federation(SILOS, min_silos=1, sample_fraction=1.0, seed=0)
    assert federation.handle(Enrolled("north")) == []
    assert federation.handle(Enrolled("north")) == []
    assert federation.handle(Enrolled("east")) == []
    assert federation.handle(Enrolled("south")) == [Begin(SILOS)]
    assert federation.handle(EnrolmentDeadlinePassed()) == []


def test_an_unknown_silo_is_refused():
    federation = Federation(SILOS, min_silos=None, sample_fraction=1.0, seed=0)
    error = refusal(federation.handle(Enrolled("west")))
    assert type(error) is RefusedByServer
    assert "west" in error.message
    assert refusal(training().handle(UpdateArrived("west", 1, 0))).message == error.message


def test_enough_silos_at_the_deadline_are_enough():
    federation = Federation(SILOS, min_silos=2, sample_fraction=1.0, seed=0)
    federation.handle(Enrolled("north"))
    federation.handle(Enrolled("south"))
    assert federation.handle(EnrolmentDeadlinePassed()) == [Begin(("north", "south"))]
    assert federation.handle(RoundRequested(1)) == [StartRound(1, 0, ("north", "south"))]


@pytest.mark.parametrize("min_silos", [2, None])
def test_too_few_silos_at_the_deadline_lose_the_quorum_by_name(min_silos):
    federation = Federation(SILOS, min_silos=min_silos, sample_fraction=1.0, seed=0)
    federation.handle(Enrolled("north"))
    (action,) = federation.handle(EnrolmentDeadlinePassed())
    assert isinstance(action, LoseQuorum)
    assert "east, south" in action.error.message


# --- a round ----------------------------------------------------------------------------------------------------------


def test_a_round_ends_with_the_last_update():
    federation = training()
    assert [federation.assignment(silo) for silo in SILOS] == [Train(1, 0)] * 3
    assert federation.handle(UpdateArrived("south", 1, 0)) == [Accept("south")]
    assert federation.assignment("south") == Wait()
    assert federation.handle(UpdateArrived("north", 1, 0)) == [Accept("north")]
    assert federation.handle(UpdateArrived("east", 1, 0)) == [Accept("east"), Aggregate(1, SILOS)]
    assert federation.handle(RoundRequested(2)) == [StartRound(2, 0, SILOS)]


def test_the_same_update_twice_counts_once():
    federation = training(silos=("north", "south"))
    federation.handle(UpdateArrived("north", 1, 0))
    assert federation.handle(UpdateArrived("north", 1, 0)) == [Duplicate("north")]
    actions = federation.handle(UpdateArrived("south", 1, 0))
    assert actions == [Accept("south"), Aggregate(1, ("north", "south"))]
    assert federation.handle(UpdateArrived("south", 1, 0)) == [Duplicate("south")], "even after the round"
    federation.handle(RoundRequested(2))
    assert federation.handle(UpdateArrived("south", 1, 0)) == [Duplicate("south")], "even in the next one"


def test_a_late_update_is_refused():
    federation = training(min_silos=2)
    federation.handle(UpdateArrived("north", 1, 0))
    federation.handle(UpdateArrived("south", 1, 0))
    assert federation.handle(DeadlinePassed(1)) == [Aggregate(1, ("north", "south"))]
    assert type(refusal(federation.handle(UpdateArrived("east", 1, 0)))) is RoundOver
    federation.handle(RoundRequested(2))
    assert type(refusal(federation.handle(UpdateArrived("east", 1, 0)))) is RoundOver


def test_an_update_of_a_round_to_come_is_invalid():
    assert type(refusal(training().handle(UpdateArrived("north", 2, 0)))) is InvalidUpdate


def test_a_stale_proxy_is_refused_and_its_silo_not_waited_for():
    federation = begun(min_silos=2)
    federation.handle(PatchPublished())
    federation.handle(RoundRequested(1))
    assert federation.handle(UpdateArrived("east", 1, 1)) == [Accept("east")]
    assert federation.handle(UpdateArrived("south", 1, 1)) == [Accept("south")]
    refused, ended = federation.handle(UpdateArrived("north", 1, 0))
    assert type(refused.error) is StaleProxy
    assert ended == Aggregate(1, ("east", "south"))


def test_a_failed_silo_is_out_of_the_round_and_back_in_the_next():
    federation = training(min_silos=1)
    assert federation.handle(SiloFailed("north", "NaN", 1)) == []
    assert type(refusal(federation.handle(UpdateArrived("north", 1, 0)))) is RoundOver
    assert federation.handle(Enrolled("north")) == []
    assert federation.assignment("north") == Wait()
    federation.handle(UpdateArrived("east", 1, 0))
    assert federation.handle(UpdateArrived("south", 1, 0))[-1] == Aggregate(1, ("east", "south"))
    assert federation.handle(RoundRequested(2)) == [StartRound(2, 0, SILOS)]


def test_a_silo_that_is_not_heard_of_is_not_picked_again():
    federation = training(min_silos=1)
    federation.handle(UpdateArrived("north", 1, 0))
    federation.handle(DeadlinePassed(1))
    assert federation.handle(RoundRequested(2)) == [StartRound(2, 0, ("north",))]


def test_a_failure_of_an_earlier_round_is_no_failure_of_this_one():
    federation = training(min_silos=2)
    for silo in SILOS:
        federation.handle(UpdateArrived(silo, 1, 0))
    federation.handle(RoundRequested(2))
    assert federation.handle(SiloFailed("north", "NaN", 1)) == []
    assert federation.assignment("north") == Train(2, 0)


def test_a_lost_quorum_names_each_silo_and_its_reason():
    federation = training(min_silos=2)
    federation.handle(UpdateArrived("south", 1, 0))
    assert federation.handle(SiloFailed("north", "'head' holds NaN")) == []
    (action,) = federation.handle(DeadlinePassed(1))
    assert isinstance(action, LoseQuorum)
    assert isinstance(action.error, QuorumLost)
    assert "north: 'head' holds NaN" in action.error.message
    assert "east: no update before the deadline" in action.error.message
    assert federation.phase is Phase.IDLE


def test_a_quorum_out_of_reach_is_lost_before_the_deadline():
    federation = training(min_silos=3)
    (action,) = federation.handle(SiloFailed("north", "it left"))
    assert isinstance(action, LoseQuorum)


@pytest.mark.parametrize("event", [SiloFailed("{}", "NaN", 1), SiloFailed("{}", "it left"), DeadlinePassed(1)])
def test_a_silo_that_was_not_picked_takes_the_place_of_one_that_failed(event):
    federation = begun(silos=MANY, sample_fraction=0.25)
    drawn = federation._drawn(1)
    (started,) = federation.handle(RoundRequested(1))
    for silo in drawn[1:5]:
        federation.handle(UpdateArrived(silo, 1, 0))
    if isinstance(event, SiloFailed):
        event = SiloFailed(drawn[0], event.reason, event.round)
    silos = tuple(sorted(drawn[1:6]))
    assert federation.handle(event) == [Substitute(1, 0, silos, (drawn[5],))], "the next in the order of the draws"
    assert federation.assignment(drawn[5]) == Train(1, 0)
    assert type(refusal(federation.handle(UpdateArrived(drawn[0], 1, 0)))) is RoundOver
    assert federation.handle(UpdateArrived(drawn[5], 1, 0)) == [Accept(drawn[5]), Aggregate(1, silos)]
    assert drawn[0] in started.silos


def test_nobody_takes_the_place_of_a_silo_that_the_quorum_can_do_without():
    federation = begun(silos=MANY, sample_fraction=0.25, min_silos=4)
    first, *others = federation.pick(1)
    federation.handle(RoundRequested(1))
    assert federation.handle(SiloFailed(first, "it left")) == []
    assert federation.pending == set(others)
    (substitute,) = federation.handle(SiloFailed(others[0], "it left"))
    assert len(substitute.silos) == 4
    assert len(substitute.new) == 1


def test_a_silo_that_failed_takes_nobodys_place():
    federation = begun(sample_fraction=0.3)
    first, second, third = federation._drawn(1)
    federation.handle(RoundRequested(1))
    assert federation.handle(SiloFailed(first, "it left")) == [Substitute(1, 0, (second,), (second,))]
    federation.handle(Enrolled(first))
    federation.handle(SiloFailed(third, "it left"))
    (lost,) = federation.handle(DeadlinePassed(1))
    assert isinstance(lost, LoseQuorum), "one has failed in this round, one is not there"
    assert first in lost.error.message
    assert second in lost.error.message


def test_a_lost_quorum_says_with_how_many_the_round_can_go_on():
    federation = training()
    federation.handle(UpdateArrived("south", 1, 0))
    (lost,) = federation.handle(SiloFailed("north", "it left"))
    assert "set federation.min_silos to 2 to go on without them" in lost.error.remedy
    alone = training(silos=("north",))
    (lost,) = alone.handle(SiloFailed("north", "it left"))
    assert "min_silos" not in lost.error.remedy, "nobody is left"


# --- a mean that needs some updates -----------------------------------------------------------------------------------


def test_a_round_picks_as_many_as_the_mean_needs():
    federation = Federation(MANY, min_silos=None, sample_fraction=0.1, seed=0, fewest=5)
    for silo in MANY:
        federation.handle(Enrolled(silo))
    (started,) = federation.handle(RoundRequested(1))
    assert len(started.silos) == 5


def test_a_round_with_fewer_silos_than_the_mean_needs_is_lost_before_anybody_trains():
    federation = begun(fewest=3)
    federation.handle(SiloFailed("north", "it left"))
    (lost,) = federation.handle(RoundRequested(1))
    assert isinstance(lost, LoseQuorum)
    assert "round 1 needs 3 updates" in lost.error.message
    assert "north: not there" in lost.error.message
    assert "aggregation.mean takes no fewer than 3 updates" in lost.error.remedy
    assert "min_silos" not in lost.error.remedy, "lowering it would not help"


def test_a_restarted_round_counts_no_fewer_updates_than_the_mean_needs():
    """South's name was taken out of the list in between."""
    federation = Federation(SILOS[:2], min_silos=None, sample_fraction=1.0, seed=0, fewest=3)
    last = StartRound(1, 1, SILOS)
    federation.resume(last, present=SILOS, counted={1: SILOS[:2]}, proxy_version=0, aggregated=False)
    assert isinstance(federation.handle(RoundRequested(1))[-1], LoseQuorum)


def test_no_fewer_silos_are_offered_than_the_mean_needs():
    federation = training(silos=MANY[:6], min_silos=5, fewest=3)
    lost = [federation.handle(SiloFailed(silo, "it left")) for silo in MANY[:3]][1][-1]
    assert "set federation.min_silos to 4" in lost.error.remedy


def resumed(lost, min_silos):
    federation = Federation(SILOS, min_silos=min_silos, sample_fraction=1.0, seed=0)
    federation.resume(
        StartRound(1, 1, SILOS),
        present=SILOS,
        counted={1: ["south"]},
        proxy_version=0,
        aggregated=False,
        lost=lost,
    )
    return federation


def test_with_a_lower_quorum_a_resumed_round_goes_on_without_the_silos_that_it_had_lost():
    federation = resumed(["north"], min_silos=2)
    assert federation.handle(RoundRequested(1)) == [StartRound(1, 1, ("east",))]
    assert federation.handle(UpdateArrived("east", 1, 0)) == [Accept("east"), Aggregate(1, ("east", "south"))]
    assert resumed(["north", "east"], min_silos=1).handle(RoundRequested(1))[1] == Aggregate(1, ("south",))


def test_a_silo_that_was_lost_and_mended_is_waited_for_again():
    federation = resumed(["north"], min_silos=2)
    federation.handle(Enrolled("north"))
    assert federation.assignment("north") == Train(1, 1)
    federation.handle(RoundRequested(1))
    assert federation.handle(UpdateArrived("east", 1, 0)) == [Accept("east")]
    assert federation.handle(UpdateArrived("north", 1, 0))[-1] == Aggregate(1, SILOS)


def test_a_silo_that_stayed_away_is_named_when_the_quorum_is_lost_again():
    federation = resumed(["north"], min_silos=2)
    federation.handle(RoundRequested(1))
    (lost,) = federation.handle(SiloFailed("east", "it left"))
    assert "north: not heard of since the restart" in lost.error.message
    assert federation.failed.keys() == {"north", "east"}


def test_without_a_lower_quorum_a_resumed_round_waits_for_the_silos_that_it_had_lost():
    assert resumed(["north"], min_silos=None).handle(RoundRequested(1)) == [StartRound(1, 1, ("east", "north"))]


def test_a_round_without_enough_silos_does_not_start():
    federation = begun(min_silos=2)
    federation.handle(SiloFailed("north", "it left"))
    federation.handle(SiloFailed("south", "it left"))
    (action,) = federation.handle(RoundRequested(1))
    assert isinstance(action, LoseQuorum)
    assert "north" in action.error.message


def test_a_deadline_of_another_round_means_nothing():
    federation = training(min_silos=1)
    assert federation.handle(DeadlinePassed(2)) == []
    assert federation.phase is Phase.TRAINING


def test_an_update_of_a_silo_that_was_not_picked_is_refused():
    federation = training(sample_fraction=0.34)
    (left_out, *_) = federation.silos - federation.pending
    assert federation.assignment(left_out) == Wait()
    assert "not picked" in refusal(federation.handle(UpdateArrived(left_out, 1, 0))).message


def test_every_silo_hears_the_end():
    finished, aborted = training(), training()
    finished.handle(FinishRequested())
    aborted.handle(AbortRequested("the disk is full"))
    for silo in SILOS:
        assert finished.assignment(silo) == Finished()
        assert aborted.assignment(silo) == Aborted("the disk is full")


def test_a_patch_during_a_round_is_a_programming_error():
    with pytest.raises(ValueError, match="during a round"):
        training().handle(PatchPublished())


def test_a_round_that_was_is_a_programming_error():
    federation = training(silos=("north",))
    federation.handle(UpdateArrived("north", 1, 0))
    with pytest.raises(ValueError, match="cannot start"):
        federation.handle(RoundRequested(1))


# --- picking ----------------------------------------------------------------------------------------------------------

MANY = tuple(f"silo{number}" for number in range(20))


def test_a_resumed_round_goes_on_without_enrolment_and_ends_as_it_would_have():
    federation = Federation(SILOS, min_silos=None, sample_fraction=1.0, seed=0)
    federation.resume(
        StartRound(2, 1, SILOS), present=SILOS, counted={1: SILOS, 2: ["south"]}, proxy_version=1, aggregated=False
    )
    assert federation.assignment("north") == Train(2, 1)
    assert federation.assignment("south") == Wait()
    assert federation.handle(RoundRequested(2)) == [StartRound(2, 1, ("east", "north"))]
    assert federation.handle(UpdateArrived("north", 2, 1)) == [Accept("north")]
    assert federation.handle(UpdateArrived("south", 2, 1)) == [Duplicate("south")]
    assert federation.handle(UpdateArrived("east", 2, 1, attempt=1)) == [Accept("east"), Aggregate(2, SILOS)]
    assert federation.handle(RoundRequested(3)) == [StartRound(3, 0, SILOS)]


def test_a_silo_that_is_no_longer_named_is_not_waited_for_after_a_restart():
    federation = Federation(("north", "south"), min_silos=None, sample_fraction=1.0, seed=0)
    federation.resume(
        StartRound(1, 1, SILOS), present=SILOS, counted={1: ["north", "south"]}, proxy_version=0, aggregated=False
    )
    assert federation.handle(RoundRequested(1)) == [StartRound(1, 1, ()), Aggregate(1, ("north", "south"))]


def test_after_a_restart_between_rounds_those_that_were_there_are_waited_for():
    federation = Federation(SILOS, min_silos=1, sample_fraction=1.0, seed=0)
    federation.resume(
        StartRound(1, 1, ("east",)), present=("east", "north"), counted={1: ["east"]}, proxy_version=0, aggregated=True
    )
    assert federation.handle(Enrolled("east")) == []
    assert federation.handle(Enrolled("north")) == [Begin(("east", "north"))]


def test_an_attempt_to_come_is_invalid():
    assert isinstance(refusal(training().handle(UpdateArrived("north", 1, 0, attempt=1))), InvalidUpdate)


def test_the_choice_is_the_same_for_every_order_of_enrolment():
    one, other = begun(silos=MANY, sample_fraction=0.25), begun(silos=MANY[::-1], sample_fraction=0.25)
    assert [one.pick(round) for round in range(1, 9)] == [other.pick(round) for round in range(1, 9)]


def test_the_choice_varies_with_round_and_seed():
    federation, other = begun(silos=MANY, sample_fraction=0.25), begun(silos=MANY, sample_fraction=0.25, seed=1)
    assert len({federation.pick(round) for round in range(1, 9)}) == 8
    assert federation.pick(1) != other.pick(1)
    assert {len(federation.pick(round)) for round in range(1, 9)} == {5}


def test_every_silo_has_its_turn():
    federation = begun(silos=MANY, sample_fraction=0.25)
    turns = [silo for round in range(1, 401) for silo in federation.pick(round)]
    assert all(60 <= turns.count(silo) <= 140 for silo in MANY)  # 100 expected, standard deviation 8.7


def test_a_fraction_below_the_minimum_picks_the_minimum():
    assert len(begun(silos=MANY, min_silos=3, sample_fraction=0.05).pick(1)) == 3
    assert len(begun(silos=MANY, sample_fraction=0.001).pick(1)) == 1


# --- any order of events ----------------------------------------------------------------------------------------------

names = st.sampled_from([*SILOS, "stranger"])


def in_phase(phase):
    return precondition(lambda machine: machine.federation.phase is phase)


class AnyOrder(RuleBasedStateMachine):
    """Keeps its own plain record of what was answered, and compares."""

    @initialize(
        min_silos=st.none() | st.integers(1, 3),
        fraction=st.sampled_from([0.3, 0.6, 1.0]),
        seed=st.integers(0, 9),
        enrolled=st.sampled_from([SILOS, SILOS, SILOS[:2], ()]),
    )
    def start(self, min_silos, fraction, seed, enrolled):
        self.federation = Federation(SILOS, min_silos=min_silos, sample_fraction=fraction, seed=seed)
        self.round, self.picked, self.counted, self.open = 0, (), [], False
        self.versions, self.attempt, self.begun, self.quorum, self.lost = 0, 0, None, 0, frozenset()
        self.history = {}
        for silo in enrolled:
            self.handle(Enrolled(silo))

    def handle(self, event):
        actions = self.federation.handle(event)
        for action in actions:
            match action:
                case StartRound(round, attempt, silos):
                    assert not self.open
                    assert round == self.round
                    assert attempt == self.attempt
                    if not attempt:
                        assert silos
                        self.begun = (action, frozenset(self.federation.present))
                        self.picked, self.counted, self.lost = silos, [], frozenset()
                        self.quorum = self.federation.min_silos or len(silos)
                    self.open = True
                case Substitute(round, attempt, silos, new):
                    assert self.open
                    assert (round, attempt) == (self.round, self.attempt)
                    assert new
                    assert not set(new) & set(self.picked), "a silo is picked once in a round"
                    assert set(new) <= self.federation.present
                    assert set(self.counted) <= set(silos) <= {*self.picked, *new}
                    assert len(silos) == self.quorum, "as many as are needed"
                    self.picked += new
                    self.begun = (StartRound(round, attempt, silos), frozenset(self.federation.present))
                case Accept(silo):
                    assert self.open
                    assert silo in self.picked
                    assert silo not in self.counted, "a silo counts once"
                    self.counted.append(silo)
                case Aggregate(round, silos):
                    assert self.open
                    assert round == self.round
                    assert silos == tuple(sorted(self.counted)), "exactly the accepted updates count"
                    assert len(silos) >= self.quorum
                    self.open, self.history[round] = False, silos
                case LoseQuorum():
                    if self.open:
                        spare = self.federation.present - set(self.picked)
                        hopes = set(self.picked) - self.federation.failed.keys()
                        assert not self.federation.absent
                        assert len(hopes | spare) < self.quorum, "a quorum that can be met is not given up"
                        self.lost = frozenset(self.federation.failed)
                    self.open = False
        return actions

    @rule(silo=names)
    def enrol(self, silo):
        self.handle(Enrolled(silo))

    @in_phase(Phase.ENROLLING)
    @rule()
    def close_enrolment(self):
        self.handle(EnrolmentDeadlinePassed())

    @in_phase(Phase.IDLE)
    @rule()
    def request_round(self):
        self.round, self.attempt = self.round + 1, 0
        self.handle(RoundRequested(self.round))

    @in_phase(Phase.TRAINING)
    @rule(data=st.data())
    def send_good_update(self, data):
        silo = data.draw(st.sampled_from(sorted(self.federation.pending)))
        assert self.handle(UpdateArrived(silo, self.round, self.versions))[0] == Accept(silo)

    @rule(silo=names, behind=st.integers(-1, 2), version_behind=st.integers(-1, 1))
    def send_update(self, silo, behind, version_behind):
        update = UpdateArrived(silo, self.round - behind, self.versions - version_behind)
        counted, foreseen = len(self.counted), self.federation.judge(update)
        verdict = self.handle(update)[0]
        assert type(verdict) is type(foreseen), "judge says what handle does"
        if isinstance(verdict, Accept):
            assert behind == version_behind == 0
            assert len(self.counted) == counted + 1
        else:
            assert len(self.counted) == counted

    @rule(silo=names, round_known=st.booleans())
    def fail(self, silo, round_known):
        self.handle(SiloFailed(silo, "it left", self.round if round_known else None))

    @in_phase(Phase.TRAINING)
    @rule(behind=st.integers(0, 1))
    def pass_deadline(self, behind):
        waited_for = frozenset(self.federation.pending)
        self.handle(DeadlinePassed(self.round - behind))
        if behind == 0:
            assert not waited_for & self.federation.pending, "no silo outlives the deadline; others take its place"

    @in_phase(Phase.IDLE)
    @rule()
    def publish_patch(self):
        self.handle(PatchPublished())
        self.versions += 1

    @precondition(lambda machine: machine.begun is not None)
    @rule(data=st.data())
    def restart(self, data):
        """A new process, which knows what is on disk: rounds as they were begun, updates that count, patches."""
        old = self.federation
        min_silos = data.draw(st.sampled_from([old.min_silos, 1])) if self.lost else old.min_silos
        self.federation = Federation(SILOS, min_silos=min_silos, sample_fraction=old.sample_fraction, seed=old.seed)
        begun, present = self.begun
        aggregated = begun.round in self.history
        self.round, self.attempt, self.open = begun.round, self.attempt + 1, False
        self.federation.resume(
            StartRound(begun.round, self.attempt, begun.silos),
            present=present,
            counted=self.history | ({} if aggregated else {begun.round: self.counted}),
            proxy_version=self.versions,
            aggregated=aggregated,
            lost=self.lost,
        )
        for silo in self.counted:
            assert self.federation.judge(UpdateArrived(silo, self.round, self.versions)) == Duplicate(silo)
        if aggregated:
            assert self.federation.phase is Phase.ENROLLING
            for silo in sorted(present):
                self.handle(Enrolled(silo))
            assert self.federation.phase is Phase.IDLE, "those that were there are all that is waited for"
            return
        self.picked, self.quorum = begun.silos, min_silos or len(begun.silos)
        absent = self.federation.absent
        assert absent <= self.lost
        assert not absent or len(set(begun.silos) - absent) >= self.quorum, "only whom the quorum can do without"
        for silo in sorted(self.federation.pending):
            if data.draw(st.booleans()):  # comes in before the algorithm asks for the round
                assert self.federation.handle(UpdateArrived(silo, self.round, self.versions)) == [Accept(silo)]
                self.counted.append(silo)
        assert self.handle(RoundRequested(self.round))[0] == StartRound(
            self.round, self.attempt, tuple(sorted(set(begun.silos) - set(self.counted) - absent))
        )

    @invariant()
    def holds(self):
        federation = self.federation
        assert (federation.phase is Phase.TRAINING) == self.open
        assert federation.present <= federation.silos
        assert federation.proxy_version == self.versions
        if self.open:
            groups = [federation.pending, federation.accepted, federation.failed.keys(), federation.absent]
            assert sorted(silo for group in groups for silo in group) == sorted(self.picked), "each silo is in one"
            assert federation.pending, "an open round waits for somebody"
            assert federation.pending <= federation.present
            assert all(federation.assignment(silo) == Train(self.round, self.attempt) for silo in federation.pending)
        assert all(federation.assignment(silo) == Wait() for silo in federation.silos - federation.pending)


AnyOrder.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)
TestAnyOrder = AnyOrder.TestCase


# --- sums -------------------------------------------------------------------------------------------------------------

FIVE = ("a", "b", "c", "d", "e")


def majority(silos):
    return silos // 2 + 1


def summing(silos=SILOS, min_silos=None, keys=True):
    """A round of which all have trained."""
    federation = Federation(silos, min_silos=min_silos, sample_fraction=1.0, seed=0, fewest=2, threshold=majority)
    for silo in silos:
        federation.handle(Enrolled(silo))
    federation.handle(RoundRequested(1))
    if keys:
        show_keys(federation, silos)
    return federation


def show_keys(federation, silos):
    return [federation.handle(UpdateArrived(silo, 1, 0, federation.attempt)) for silo in silos][-1]


def answer(federation, silos, stage=None):
    """Returns what the last answer led to."""
    stage = stage or federation.stage
    return [federation.handle(StageAnswered(silo, 1, federation.attempt, stage)) for silo in silos][-1]


def test_a_sum_passes_through_its_stages():
    federation = summing(keys=False)
    assert show_keys(federation, SILOS) == [Accept("south"), StartStage(1, 0, Stage.SHARES, SILOS)]
    for stage in Stage:
        assert federation.assignment("north") == Answer(1, 0, stage)
        actions = answer(federation, SILOS)
        following = Open(1, 0, SILOS) if stage is Stage.REVEALS else StartStage(1, 0, Stage(stage + 1), SILOS)
        assert actions == [Accept("south"), following]
    assert federation.assignment("north") == Wait()
    assert federation.handle(SumKept(1)) == [Aggregate(1, SILOS)]
    assert federation.handle(RoundRequested(2)) == [StartRound(2, 0, SILOS)]


def test_an_answer_twice_changes_nothing_and_one_out_of_turn_is_refused():
    federation = summing()
    answer(federation, ["north"])
    assert answer(federation, ["north"]) == [Duplicate("north")]
    assert type(refusal(answer(federation, ["north"], Stage.VECTORS))) is RoundOver
    assert type(refusal(federation.handle(StageAnswered("east", 1, 1, Stage.SHARES)))) is RoundOver
    assert type(refusal(federation.handle(StageAnswered("east", 2, 0, Stage.SHARES)))) is RoundOver
    assert type(refusal(federation.handle(StageAnswered("west", 1, 0, Stage.SHARES)))) is RefusedByServer


def test_keys_of_an_attempt_that_is_over_are_refused():
    federation = summing()
    federation.handle(SecretsLost("north", 1, 0))
    assert federation.attempt == 1
    assert type(refusal(federation.handle(UpdateArrived("east", 1, 0, attempt=0)))) is RoundOver
    assert federation.handle(UpdateArrived("east", 1, 0, attempt=1)) == [Accept("east")]


@pytest.mark.parametrize("stage", list(Stage))
def test_silos_that_drop_out_are_done_without_down_to_the_quorum(stage):
    federation = summing(FIVE, min_silos=3)
    for _ in range(stage - 1):
        answer(federation, FIVE)
    answer(federation, FIVE[:3])
    (following,) = federation.handle(DeadlinePassed(1))
    if stage is Stage.SHARES:
        assert following == StartStage(1, 0, Stage.VECTORS, FIVE[:3])
    elif stage is Stage.VECTORS:
        assert following == StartStage(1, 0, Stage.SIGNATURES, FIVE[:3])
    elif stage is Stage.SIGNATURES:
        assert following == StartStage(1, 0, Stage.REVEALS, FIVE[:3])
    else:
        assert following == Open(1, 0, FIVE)


@pytest.mark.parametrize("stage", list(Stage))
def test_with_one_fewer_the_attempt_begins_anew_and_opens_nothing(stage):
    federation = summing(FIVE, min_silos=3)
    for _ in range(stage - 1):
        answer(federation, FIVE)
    answer(federation, FIVE[:2])
    anew, *lost = federation.handle(DeadlinePassed(1))
    assert anew == StartAttempt(1, 1, FIVE[:2])
    assert isinstance(lost[0], LoseQuorum)
    assert f"no {stage.name.lower()} before the deadline" in lost[0].error.message


def test_a_silo_that_is_back_without_its_secrets_is_counted_in_a_new_attempt():
    federation = summing(min_silos=2)
    answer(federation, SILOS)
    assert federation.handle(SecretsLost("north", 1, 0)) == [StartAttempt(1, 1, SILOS)]
    assert [federation.assignment(silo) for silo in SILOS] == [Train(1, 1)] * 3
    assert show_keys(federation, SILOS)[-1] == StartStage(1, 1, Stage.SHARES, SILOS)


def test_a_silo_that_is_back_after_its_vector_was_there_is_counted_in_this_one():
    federation = summing(min_silos=2)
    for _ in range(2):
        answer(federation, SILOS)
    assert federation.handle(SecretsLost("north", 1, 0)) == []
    assert answer(federation, ["east", "south"])[-1] == StartStage(1, 0, Stage.REVEALS, ("east", "south"))
    assert answer(federation, ["east", "south"])[-1] == Open(1, 0, SILOS)


def test_a_silo_that_comes_back_again_and_again_is_done_without():
    federation = summing(min_silos=2)
    for attempt in range(3):
        assert federation.handle(SecretsLost("north", 1, attempt)) == [StartAttempt(1, attempt + 1, SILOS)]
        show_keys(federation, SILOS)
    assert federation.handle(SecretsLost("north", 1, 3)) == []
    assert answer(federation, ["east", "south"])[-1] == StartStage(1, 3, Stage.VECTORS, ("east", "south"))


def test_a_silo_that_leaves_after_its_shares_are_there_is_not_waited_for():
    federation = summing(min_silos=2)
    answer(federation, ["north"])
    assert federation.handle(SiloFailed("north", "it left")) == []
    assert answer(federation, ["east", "south"])[-1] == StartStage(1, 0, Stage.VECTORS, SILOS)
    assert federation.waiting == {"east", "south"}
    assert federation.assignment("north") == Wait()


def test_a_silo_that_leaves_after_its_keys_are_there_is_no_part_of_the_attempt():
    federation = summing(min_silos=2, keys=False)
    show_keys(federation, ["north", "east"])
    federation.handle(SiloFailed("north", "it left"))
    assert show_keys(federation, ["south"])[-1] == StartStage(1, 0, Stage.SHARES, ("east", "south"))


def test_a_sum_that_cannot_be_opened_is_tried_again_and_then_given_up():
    federation = summing()
    for attempt in range(4):
        for _ in Stage:
            actions = answer(federation, SILOS)
        assert actions[-1] == Open(1, attempt, SILOS)
        (following,) = federation.handle(AttemptFailed(1, attempt, "the shares do not fit"))
        if attempt < 3:
            assert following == StartAttempt(1, attempt + 1, SILOS)
            show_keys(federation, SILOS)
    assert isinstance(following, LoseQuorum)
    assert "the shares do not fit" in following.error.message


def test_a_patch_during_a_sum_is_a_programming_error():
    with pytest.raises(ValueError, match="during a round"):
        summing().handle(PatchPublished())


class AnySum(RuleBasedStateMachine):
    """Silos hold the secrets of one attempt at most, and open one sum of a round only; servers and silos are killed."""

    @initialize(min_silos=st.sampled_from([None, 2, 3, 4]))
    def start(self, min_silos):
        self.min_silos, self.round, self.begun = min_silos, 0, None
        self.secrets, self.pinned, self.history = dict.fromkeys(FIVE, -1), {}, {}
        self.stages, self.reveals, self.opened = {}, set(), None
        self.new_process()
        for silo in FIVE:
            self.handle(Enrolled(silo))

    def new_process(self):
        self.federation = Federation(
            FIVE, min_silos=self.min_silos, sample_fraction=1.0, seed=0, fewest=2, threshold=majority
        )

    def handle(self, event):
        federation, actions = self.federation, self.federation.handle(event)
        for action in actions:
            match action:
                case StartRound(round, attempt, silos):
                    self.attempt, self.begun = attempt, (action, frozenset(federation.present))
                    if not attempt:
                        self.pinned, self.secrets = {}, dict.fromkeys(FIVE, -1)
                        self.quorum = self.min_silos or len(silos)
                    self.stages, self.reveals, self.opened = {}, set(), None
                case StartAttempt(round, attempt, silos):
                    assert attempt == self.attempt + 1, "no attempt is begun twice"
                    assert not set(silos) & federation.failed.keys()
                    self.attempt, self.stages, self.reveals, self.opened = attempt, {}, set(), None
                    self.begun = (StartRound(round, attempt, silos), frozenset(federation.present))
                case Substitute(round, attempt, silos, _):
                    self.begun = (StartRound(round, attempt, silos), frozenset(federation.present))
                case StartStage(_, attempt, stage, silos):
                    assert attempt == self.attempt
                    assert stage == len(self.stages) + 1, "one after the other"
                    assert stage is Stage.SHARES or set(silos) <= set(self.stages[Stage(stage - 1)])
                    self.stages[stage] = silos
                    assert len(silos) >= majority(len(self.stages[Stage.SHARES]))
                case Open(_, attempt, silos):
                    assert silos == self.stages[Stage.SIGNATURES], "what was signed is opened"
                    assert len(silos) >= self.quorum
                    assert len(self.reveals) >= majority(len(self.stages[Stage.SHARES]))
                    assert len({self.pinned[silo] for silo in self.reveals}) == 1
                    self.opened = silos
                case Aggregate(round, silos):
                    assert silos == self.opened
                    self.history[round] = silos
        return actions

    @in_phase(Phase.IDLE)
    @rule()
    def request_round(self):
        self.round += 1
        self.handle(RoundRequested(self.round))

    @in_phase(Phase.TRAINING)
    @rule(data=st.data())
    def shows_keys(self, data):
        silo = data.draw(st.sampled_from(sorted(self.federation.pending)))
        self.secrets[silo] = self.federation.attempt
        update = UpdateArrived(silo, self.round, 0, self.federation.attempt)
        assert self.handle(update)[0] == Accept(silo)

    @in_phase(Phase.TRAINING)
    @rule()
    def all_show_keys(self):
        for silo in sorted(self.federation.pending):
            self.secrets[silo] = self.federation.attempt
            self.handle(UpdateArrived(silo, self.round, 0, self.federation.attempt))

    @precondition(lambda machine: machine.federation.stage is not None)
    @rule(data=st.data(), times=st.integers(1, 2))
    def answers(self, data, times):
        self.answer(data.draw(st.sampled_from(sorted(self.federation.waiting))), times)

    @precondition(lambda machine: machine.federation.stage is not None)
    @rule()
    def all_answer(self):
        stage, attempt = self.federation.stage, self.attempt
        for silo in sorted(self.federation.waiting):
            if (self.federation.stage, self.attempt) == (stage, attempt):
                self.answer(silo, 1)

    def answer(self, silo, times):
        federation = self.federation
        attempt, stage = self.attempt, federation.stage
        survivors = self.stages.get(Stage.SIGNATURES)
        barred = stage is Stage.SIGNATURES and self.pinned.get(silo, survivors) != survivors
        if self.secrets[silo] != attempt or barred:
            self.handle(SecretsLost(silo, self.round, attempt))
            return
        if stage is Stage.REVEALS:
            assert self.pinned.setdefault(silo, survivors) == survivors, "a silo opens one sum of a round"
            self.reveals.add(silo)
        verdicts = [self.handle(StageAnswered(silo, self.round, attempt, stage))[0] for _ in range(times)]
        assert verdicts[0] == Accept(silo)

    @rule(silo=st.sampled_from(FIVE))
    def silo_is_killed(self, silo):
        self.secrets[silo] = -1
        self.handle(Enrolled(silo))

    @rule(silo=st.sampled_from(FIVE))
    def silo_leaves(self, silo):
        self.handle(SiloFailed(silo, "it left"))

    @rule(silo=st.sampled_from(FIVE), stage=st.sampled_from(list(Stage)), behind=st.integers(0, 2))
    def stray_answer(self, silo, stage, behind):
        federation = self.federation
        answered = StageAnswered(silo, self.round, federation.attempt - behind, stage)
        if behind or stage is not federation.stage or silo not in federation.waiting:
            assert not isinstance(self.handle(answered)[0], Accept)

    @rule()
    def deadline(self):
        self.handle(DeadlinePassed(self.round))

    @precondition(lambda machine: machine.opened is not None and machine.federation.phase is Phase.SUMMING)
    @rule(fits=st.booleans())
    def opens(self, fits):
        self.handle(SumKept(self.round) if fits else AttemptFailed(self.round, self.attempt, "no fit"))

    @precondition(lambda machine: machine.begun is not None)
    @rule()
    def server_is_killed(self):
        begun, present = self.begun
        self.new_process()
        self.round = begun.round
        aggregated = begun.round in self.history
        self.federation.resume(
            StartRound(begun.round, begun.attempt + 1, begun.silos),
            present=present,
            counted=self.history,
            proxy_version=0,
            aggregated=aggregated,
        )
        if aggregated:
            for silo in sorted(present):
                self.handle(Enrolled(silo))
            return
        self.handle(RoundRequested(begun.round))

    @invariant()
    def holds(self):
        federation = self.federation
        if federation.phase is Phase.SUMMING and federation.stage is not None:
            assert federation.waiting, "a stage waits for somebody"
            assert not federation.waiting & (federation.done | federation.failed.keys())
            assert federation.waiting <= federation.accepted
        for silo in FIVE:
            asked = federation.phase is Phase.SUMMING and federation.stage and silo in federation.waiting
            assert isinstance(federation.assignment(silo), Answer) == bool(asked)


AnySum.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=50)
TestAnySum = AnySum.TestCase
