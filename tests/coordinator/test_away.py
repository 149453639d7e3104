"""A line that breaks is not a death: its peer has a moment to dial again."""

from __future__ import annotations

from dataclasses import replace

from scripted_run import RULES, Run, committed, journaled

from potluck.coordinator import events as ev
from potluck.coordinator.standstill import shifted
from potluck.coordinator.state import Dismiss, Gone, StopAsked, Tick
from potluck.protocol import control_pb2 as pb

PATIENT = replace(RULES, away_seconds=3.0)


def test_a_peer_that_dials_again_in_time_has_lost_nothing() -> None:
    run = committed("a", "b", rules=PATIENT)
    run.say("a", step_done=pb.StepDone(generation=1, step=4))
    before = run.state
    assert run.do(Gone(peer="a", session=b"a")) == [] and run.state.members["a"].away is not None
    assert run.do(Tick(), later=2.5) == []
    run.join("a", points=tuple(before.members["a"].savepoints))
    assert replace(run.state.members["a"], last_seen=before.members["a"].last_seen) == before.members["a"]
    assert run.do(Tick(), later=2.5) == [] and run.plan.generation == 1


def test_a_peer_that_does_not_is_lost() -> None:
    run = committed("a", "b", "c", "d", rules=PATIENT)
    run.do(Gone(peer="d", session=b"d"))
    assert run.do(Gone(peer="d", session=b"d"), later=2.0) == []
    commands = run.do(Tick(), later=1.1)
    assert [(e.name, e.graceful) for e in journaled(commands, ev.PeerGone)] == [("D", False)]
    assert journaled(commands, ev.Rerouted)[0].name == "D"
    assert run.plan.generation == 1 and "d" not in run.plan.peers


def test_another_process_with_the_key_means_that_the_first_is_no_more() -> None:
    run = committed("a", "b", "c", "d", rules=PATIENT)
    run.do(Gone(peer="d", session=b"d"))
    commands = run.join("d", session=b"another")
    assert [c for c in commands if isinstance(c, Dismiss)] == []
    told = [e.kind for e in journaled(commands, ev.Event)]
    assert told.index("PeerGone") < told.index("Rerouted") < told.index("PeerJoined")
    assert run.state.members["d"].session == b"another" and run.state.members["d"].away is None
    assert run.plan.generation == 1 and "d" not in run.plan.peers


def test_whom_nobody_needs_goes_at_once() -> None:
    run = committed("a", "b", rules=PATIENT)
    run.join("c")  # not seated yet
    run.do(Gone(peer="c"))
    assert run.state.members.keys() == {"a", "b"} and run.plan.generation == 1
    run.do(StopAsked())
    run.say("a", fault=pb.Fault(generation=1, text="line down"))
    assert run.state.phase == "stopped"
    [gone] = journaled(run.do(Gone(peer="a")), ev.PeerGone)
    assert gone.graceful and run.state.members.keys() == {"b"}
    waiting = Run(PATIENT)
    waiting.join("a")
    waiting.do(Gone(peer="a"))
    assert waiting.state.phase == "waiting" and not waiting.state.members


def test_no_plan_is_made_while_a_peer_may_come_back() -> None:
    run = committed("a", "b", "c", "d", rules=PATIENT)
    run.do(Gone(peer="d"))
    run.say("a", fault=pb.Fault(generation=1, text="cannot send to d"))
    assert run.state.phase == "waiting" and run.state.note == "a worker's line broke: it has a moment to dial again"
    run.join("d", points=tuple(run.state.members["d"].savepoints))
    assert run.state.phase == "preparing" and run.plan.peers == {"a", "b", "c", "d"}


def test_nobody_is_away_for_time_that_stood_still() -> None:
    run = committed("a", "b", rules=PATIENT)
    run.do(Gone(peer="a"))
    run.state, run.now = shifted(run.state, 3600.0), run.now + 3600.0
    assert run.do(Tick(), later=2.9) == []
    assert journaled(run.do(Tick(), later=0.2), ev.PeerGone)


def test_what_did_not_reach_a_peer_while_it_was_away_is_not_waited_for() -> None:
    run = committed("a", "b", "c", "d", rules=PATIENT)
    run.do(Gone(peer="d", session=b"d"))
    run.say("a", fault=pb.Fault(generation=1, text="cannot send to d", peer="d"))
    assert run.state.members["d"].away is not None and not run.plan.lost
    assert journaled(run.join("d"), ev.Rerouted)[0].name == "D"
    assert run.plan.generation == 1 and "d" in run.state.barred
