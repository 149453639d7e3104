"""A peer goes to a stage that has become thin: when, who, and what makes it stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_run import LAYERS, RULES, Run, committed, journaled, point

from potluck.coordinator import events as ev
from potluck.coordinator.assignment import StageNeed
from potluck.coordinator.standstill import shifted
from potluck.coordinator.state import Division, Gone, Rules, StopAsked, Tick
from potluck.coordinator.views import view_of
from potluck.protocol import control_pb2 as pb

NEED = StageNeed(work=1.0, memory_gb=2.0)
MOVING = replace(
    RULES,
    divisions=(Division(layers=LAYERS, needs=(NEED, NEED)),),
    prepare_seconds=100.0,
    move_seconds=50.0,
    lease_seconds=1e4,
    silence_seconds=1e6,
)
CREW = "abcdefgh"


def thin(rules: Rules = MOVING, lost: int = 2) -> Run:
    """Four replicas of each stage, and two of the second one are lost."""
    run = committed(*CREW, rules=rules)
    for peer in run.seats[1][-lost:]:
        run.do(Gone(peer=peer))
    assert run.plan.attempt == lost
    return run


def waited(run: Run, seconds: float) -> list[object]:
    return [c for _ in range(int(seconds / 5)) for c in run.do(Tick(), later=5.0)]


def prepared(run: Run, peer: str, stage: int) -> list[object]:
    return run.say(peer, prepared=pb.Prepared(savepoint=point(run.state.committed, stage).to_proto()))


def closed(run: Run) -> list[object]:
    """The generation ends in order."""
    assert run.state.closing == "round" and run.state.end is not None
    return [*run.train(run.state.end), *run.round(run.state.end)]


def test_nothing_is_done_for_a_while_then_somebody_gets_ready_beside_its_work() -> None:
    run = thin()
    assert not journaled(waited(run, 50.0), ev.Moving) and run.state.move is not None and not run.state.move.begun
    [event] = journaled(waited(run, 10.0), ev.Moving)
    assert (event.origin, event.stage) == (0, 1) and event.peer in run.seats[0]
    view = view_of(run.rules, run.state, event.peer)
    assert view.prospect.stage == 1 and view.prospect.point == point(run.state.committed, 1).to_proto()
    for peer in run.plan.peers - {event.peer}:
        guests = [g.peer for g in view_of(run.rules, run.state, peer).guests]
        assert guests == ([event.peer] if run.plan.places[peer][0] == 1 else [])
        assert not view_of(run.rules, run.state, peer).HasField("prospect")
    run.train(8)
    assert not run.state.closing and run.state.phase == "training"


def test_who_is_ready_is_seated_there_after_a_closing_round() -> None:
    run = thin()
    waited(run, 60.0)
    mover = run.state.move.peer  # type: ignore[union-attr]
    prepared(run, mover, 1)
    commands = closed(run)
    [event] = journaled(commands, ev.Moved)
    assert event.peer == mover and "from stage 0 to stage 1" in event.text
    assert [len(seats) for seats in run.seats] == [3, 3] and mover in run.seats[1]
    assert mover not in run.donors[1] and run.state.move is None and not journaled(commands, ev.RolledBack)


def test_who_comes_back_makes_the_move_unnecessary() -> None:
    run = thin()
    lost = sorted(set(CREW) - run.plan.peers)
    waited(run, 60.0)
    mover = run.state.move.peer  # type: ignore[union-attr]
    run.join(lost[0])
    run.do(Tick())
    assert run.state.move is None and not view_of(run.rules, run.state, mover).HasField("prospect")
    prepared(run, mover, 1)  # too late
    assert run.state.members[mover].prepared is None and not run.state.closing
    run.do(Tick(), later=2.0)
    assert view_of(run.rules, run.state, lost[0]).prospect.stage == 1
    prepared(run, lost[0], 1)
    closed(run)
    assert [len(seats) for seats in run.seats] == [4, 3] and mover in run.seats[0]


def test_one_of_four_lost_moves_nobody() -> None:
    run = thin(lost=1)
    waited(run, 200.0)
    assert run.state.move is None


def test_another_is_asked_if_one_does_not_get_ready() -> None:
    run = thin()
    waited(run, 60.0)
    first = run.state.move.peer  # type: ignore[union-attr]
    events = journaled(waited(run, 200.0), ev.Moving)
    assert [e.peer for e in events] != [first] and len(events) == 1 and first in run.state.slow
    assert not run.state.closing and run.state.phase == "training"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_mover_that_is_lost_costs_nothing(when: str) -> None:
    run = thin()
    waited(run, 60.0)
    mover = run.state.move.peer  # type: ignore[union-attr]
    if when == "after":
        prepared(run, mover, 1)
    commands = run.do(Gone(peer=mover))
    commands += run.do(Tick())
    assert journaled(commands, ev.Rerouted) and not journaled(commands, ev.RolledBack)
    assert run.state.phase == "training"
    if when == "after":
        closed(run)
        assert [len(seats) for seats in run.seats] == [3, 2]


def test_an_abort_meanwhile_leaves_the_mover_where_it_holds_the_state() -> None:
    run = thin(rules=replace(MOVING, patience_seconds=0.0))
    waited(run, 60.0)
    mover = run.state.move.peer  # type: ignore[union-attr]
    fault = pb.Fault(generation=run.plan.generation, text="it broke")
    run.say(mover, fault=fault)
    assert run.plan.generation == 2 and mover in run.seats[0] and run.state.move is None
    assert run.donors == run.seats


@pytest.mark.parametrize("why", ["quorum", "memory", "prepare", "stop"])
def test_when_nobody_moves(why: str) -> None:
    changes = {
        "quorum": {"quorum": 4},
        "memory": {"divisions": (Division(layers=LAYERS, needs=(NEED, replace(NEED, memory_gb=8.0))),)},
        "prepare": {"prepare_seconds": 0.0},
        "stop": {},
    }[why]
    run = thin(rules=replace(MOVING, **changes))  # type: ignore[arg-type]
    if why == "stop":
        run.do(StopAsked())
    waited(run, 200.0)
    assert run.state.move is None or not run.state.move.begun


def test_a_standstill_takes_no_time() -> None:
    run = thin()
    waited(run, 40.0)
    run.state = shifted(run.state, 1000.0)
    run.now += 1000.0
    assert not journaled(waited(run, 10.0), ev.Moving)
    assert journaled(waited(run, 10.0), ev.Moving)
