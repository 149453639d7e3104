"""Ways that stay broken: no storm of plans, one who can be spared is left out; a run that lost all begins again."""

from __future__ import annotations

from dataclasses import replace

from scripted_run import ROLLING, Run, committed, journaled

from potluck.coordinator import events as ev
from potluck.coordinator.planning import MOST_PAUSE_SECONDS, pause_seconds
from potluck.coordinator.state import Gone, ReturnLeases, Tick, Uncommit
from potluck.protocol import control_pb2 as pb


def broken(run: Run, peer: str, other: str) -> list[ev.Event]:
    commands = run.say(peer, fault=pb.Fault(generation=run.plan.generation, text="cannot send", peer=other))
    return journaled(commands, ev.PlanIssued)


def wait(run: Run, seconds: float) -> list[object]:
    """Time passes, and everybody is heard."""
    commands: list[object] = []
    for _ in range(round(2 * seconds)):
        run.now += 0.5
        for peer in sorted(run.state.members):
            commands += run.say(peer, heartbeat=pb.Heartbeat(idle=True))
        commands += run.do(Tick())
    return commands


def two(rules: object = ROLLING) -> Run:
    """A run whose plan was issued, of two who need each other."""
    run = Run(rules)  # type: ignore[arg-type]
    run.join("a", "b")
    run.do(Tick(), later=2.0)
    assert run.state.phase == "preparing"
    return run


def test_plans_that_fail_over_the_same_way_come_ever_more_slowly() -> None:
    run, waits = two(), []
    for _ in range(8):
        started = run.now
        if not broken(run, "a", "b"):
            while run.state.phase == "waiting":
                wait(run, 0.5)
        waits.append(run.now - started)
        assert run.state.phase == "preparing"
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert pause_seconds(10**6) == MOST_PAUSE_SECONDS


def test_a_committed_round_ends_the_pauses() -> None:
    run = two()
    broken(run, "a", "b")
    assert run.state.broken == (("a", "b"),)
    run.ready()
    run.train(4)
    run.round(4)
    assert run.state.committed.step == 4 and run.state.broken == ()


def test_the_next_plan_leaves_out_one_of_two_who_do_not_reach_each_other() -> None:
    run = Run(ROLLING)
    run.join("a", "b", "c")
    run.do(Tick(), later=2.0)
    one, other = run.plan.replicas[0][0].peer, run.plan.replicas[1][0].peer
    assert broken(run, one, other)
    assert run.state.phase == "preparing" and not {one, other} <= run.plan.peers and len(run.plan.peers) == 2
    run.ready()
    assert run.state.phase == "training"


def test_a_broken_way_takes_nobodys_state() -> None:
    run = committed("a", "b")
    run.do(Gone(peer="b"))
    points = run.state.members["a"].savepoints
    run.join("b", points=tuple(p for p in points))
    run.say("a", fault=pb.Fault(generation=run.state.generation, text="cannot send", peer="b"))
    assert run.state.members["a"].savepoints == points


def test_a_run_whose_states_are_all_gone_begins_at_the_beginning() -> None:
    run = committed("a", "b")
    run.do(Gone(peer="a"))
    run.do(Gone(peer="b"))
    run.join("c", "d")
    run.do(Tick(), later=2.0)
    assert run.state.phase == "waiting" and "its workers must come back" in run.state.note
    wait(run, run.rules.patience_seconds)
    assert run.plan.origin == "init" and run.plan.first_step == 0 and run.state.committed.step == 4
    commands = run.ready()
    assert [e.step for e in journaled(commands, ev.RolledBack)] == [0]
    assert any(isinstance(c, Uncommit) and c.step == 0 for c in commands)
    assert any(isinstance(c, ReturnLeases) for c in run.commands)
    run.train(4)
    run.round(4)
    assert run.state.committed.step == 4 and run.state.committed.sample == 24


def test_who_was_away_at_the_end_is_known_until_it_was_told() -> None:
    run = committed("a", "b")
    run.do(Gone(peer="b"))
    assert "b" in run.state.unaware
    run.state = replace(run.state, phase="finished")
    run.join("b")
    assert not run.state.unaware and "b" not in run.state.members
