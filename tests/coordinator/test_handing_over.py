"""Stages that go from hand to hand: keepers who can take one over, newcomers who get theirs before they are seated."""

from __future__ import annotations

from dataclasses import replace

from scripted_run import RULES, Run, committed, point, training

from potluck.coordinator.state import Gone, Tick
from potluck.coordinator.views import TOLD_MARKS, view_of
from potluck.protocol import control_pb2 as pb
from potluck.protocol.keepers import all_keepers

KEPT = replace(RULES, keepers=1, patience_seconds=1e6)
PREPARED = replace(RULES, prepare_seconds=100.0, lease_seconds=1e4)


def held(run: Run, peer: str, *stages: int) -> None:
    points = [point(run.state.committed, s).to_proto() for s in stages]
    run.say(peer, held=pb.Held(savepoints=points))


def prepared(run: Run, peer: str, stage: int) -> None:
    run.say(peer, prepared=pb.Prepared(savepoint=point(run.state.committed, stage).to_proto()))


def test_keepers_are_told_of_the_newest_rounds() -> None:
    run = training("a", "b", "c", "d", rules=KEPT)
    for at in range(4, 21, 4):
        run.train(at)
        run.round(at)
        marks = [run.state.committed, *run.state.marks][:TOLD_MARKS]
        for stage, keepers in enumerate(all_keepers(run.plan, 1)):
            (peer,) = keepers
            (keep,) = [k for k in view_of(run.rules, run.state, peer).keep if k.stage == stage]
            points = [point(mark, stage).to_proto() for mark in marks]
            assert list(keep.rounds[: len(points)]) == points
            assert [p.step for p in keep.rounds[len(points) :]] == ([0] if len(points) < TOLD_MARKS else [])


def test_a_stage_that_only_its_keeper_holds_is_taken_over_by_it() -> None:
    run = committed("a", "b", "c", "d", rules=KEPT)
    lost = run.seats[1]
    (keeper,) = all_keepers(run.plan, 1)[1]
    for peer in lost:
        run.do(Gone(peer=peer, session=peer.encode()))
    assert run.state.phase == "waiting" and "stage 1" in run.state.note
    held(run, keeper, 1)
    assert run.state.phase == "preparing"
    assert (run.plan.first_step, run.plan.origin) == (4, "round")
    assert run.seats[1] == run.donors[1] == [keeper]


def test_who_trains_a_stage_gives_it_before_its_keepers_and_stays_at_it() -> None:
    run = committed("a", "b", "c", "d", rules=replace(KEPT, reroutes=False))
    seats = run.seats
    for peer in "abcd":
        held(run, peer, 1 - run.plan.places[peer][0])
    gone = seats[0][0]
    run.do(Gone(peer=gone, session=gone.encode()))
    assert run.state.phase == "preparing"
    assert run.donors == run.seats == [seats[0][1:], seats[1]]


def test_a_strange_report_of_what_is_kept_is_left_out() -> None:
    run = committed("a", "b", rules=KEPT)
    run.say("a", held=pb.Held(savepoints=[pb.SavePoint(kind="nonsense")]))
    assert not run.state.members["a"].held
    run.say("a", held=pb.Held(savepoints=[pb.SavePoint(kind="step", step=4)]))
    assert not run.state.members["a"].held


def test_a_newcomer_is_told_its_stage_and_the_generation_goes_on_until_it_has_it() -> None:
    run = committed("a", "b", rules=PREPARED)
    run.join("c")
    run.do(Tick(), later=5.0)
    view = view_of(run.rules, run.state, "c")
    stage = view.prospect.stage
    assert view.prospect.point == point(run.state.committed, stage).to_proto()
    replicas = run.seats[stage]
    for peer in "ab":
        assert [g.peer for g in view_of(run.rules, run.state, peer).guests] == (["c"] if peer in replicas else [])
        assert not view_of(run.rules, run.state, peer).HasField("prospect")
    assert not run.state.closing
    prepared(run, "c", stage)
    assert run.state.closing == "round"
    assert run.state.end is not None
    run.train(run.state.end)
    run.round(run.state.end)
    assert run.plan.generation == 2 and "c" in run.seats[stage]
    assert run.state.members["c"].prepared is None


def test_a_newcomer_without_a_word_is_not_waited_for_for_ever() -> None:
    run = committed("a", "b", rules=PREPARED)
    run.join("c")
    for _ in range(9):
        run.do(Tick(), later=10.0)
        for peer in "abc":
            run.say(peer, heartbeat=pb.Heartbeat())
        assert not run.state.closing
    run.do(Tick(), later=11.0)
    assert run.state.closing == "round"


def test_before_the_first_round_there_is_nothing_to_fetch() -> None:
    run = training("a", "b", rules=PREPARED)
    run.join("c")
    run.do(Tick(), later=2.0)
    assert not view_of(run.rules, run.state, "c").HasField("prospect")
    assert run.state.generation == 2 or run.state.closing == "round"
