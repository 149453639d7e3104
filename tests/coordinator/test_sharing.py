"""Microbatches by speed: the best shares, what is known of speeds, and when a generation ends for it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_run import RULES, Run, committed, journaled, leases

from potluck.coordinator import events as ev
from potluck.coordinator.sharing import LEARN_STEPS, WORTH, best_shares, last_done, shared
from potluck.coordinator.standstill import shifted
from potluck.coordinator.state import Rules, Tick
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import WireError
from potluck.protocol.plan import Plan, even_shares

EIGHT = replace(RULES, microbatches=8, steps=1000, move_seconds=60.0, lease_seconds=1e6, silence_seconds=1e6)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=3), st.integers(1, 9))
def test_no_other_shares_are_done_earlier(paces: list[float], count: int) -> None:
    found = best_shares(count, paces)
    every = [s for s in itertools.product(range(1, count + 1), repeat=len(paces)) if sum(s) == count]
    best = min((last_done(s, paces) for s in every), default=float("inf"))
    even = last_done(even_shares(count, len(paces)), paces)
    if found:
        assert sum(found) == count and min(found) >= 1
        assert last_done(found, paces) == best and even > WORTH * best
    else:
        assert count < len(paces) or even <= WORTH * best


@pytest.mark.parametrize("paces", [[1.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0], [-1.0, 1.0]])
def test_paces_that_cannot_be_leave_shares_even(paces: list[float]) -> None:
    assert best_shares(8, paces) == ()


def train(run: Run, seconds: dict[str, float], steps: int) -> None:
    """Steps in which each peer computes for so long a microbatch."""
    start = max(run.state.members[p].step for p in run.plan.peers)
    for at in range(start, start + steps):
        for peer, (stage, replica) in sorted(run.plan.places.items()):
            count = len(run.plan.served(stage, replica))
            done = pb.StepDone(
                generation=run.plan.generation,
                step=at,
                loss_sum=2.0,
                targets=1,
                samples=count * run.plan.microbatch_size,
                compute_seconds=seconds.get(peer, 1.0) * count,
                wait_seconds=100.0,
            )
            run.say(peer, step_done=done)
        if (at + 1) % 4 == 0:
            run.round(at + 1)


def waited(run: Run, seconds: float) -> list[object]:
    return [c for _ in range(int(seconds / 5)) for c in run.do(Tick(), later=5.0)]


def crew(rules: Rules = EIGHT) -> Run:
    """Two replicas of each stage."""
    run = committed("a", "b", "c", "d", rules=rules)
    assert [len(seats) for seats in run.seats] == [2, 2]
    return run


def shares(run: Run) -> list[tuple[int, ...]]:
    return [stage.shares for stage in run.plan.stages]


def test_a_slow_replica_gets_less_after_a_closing_round() -> None:
    run = crew()
    slow = run.seats[0][1]
    train(run, {slow: 3.0}, LEARN_STEPS + 4)
    assert shares(run) == [(), ()]
    waited(run, 55.0)
    assert not run.state.closing
    waited(run, 15.0)
    assert run.state.closing == "round" and run.state.end is not None
    end = run.state.end
    train(run, {slow: 3.0}, end - max(run.state.members[p].step for p in run.plan.peers))
    commands = run.round(end) if run.state.committed.step < end else run.commands
    [event] = journaled(commands, ev.PlanIssued)[-1:]
    assert shares(run) == [(12, 4), ()]
    names = [run.state.members[p].name for p in run.seats[0]]
    assert event.shares == ((12, 4), ()) and f"stage 0: {names[0]} (12 of 16), {names[1]} (4 of 16)" in event.text
    before = len(run.commands)
    run.ready()
    first = leases(run.commands[before:])[:2]
    assert [(lease.count, lease.peer) for lease in first] == list(zip((36, 12), run.seats[0], strict=True))
    train(run, {slow: 3.0}, 40)
    waited(run, 1000.0)
    assert not run.state.closing, "what is as good as can be is left alone"


def test_a_stage_that_is_not_the_slowest_ends_no_generation() -> None:
    run = crew()
    train(run, {run.seats[0][1]: 3.0, run.seats[1][0]: 9.0, run.seats[1][1]: 9.0}, LEARN_STEPS + 4)
    waited(run, 200.0)
    assert not run.state.closing


def test_a_moment_of_slowness_is_no_reason() -> None:
    run = crew()
    slow = run.seats[0][1]
    train(run, {slow: 3.0}, LEARN_STEPS + 2)
    waited(run, 40.0)
    assert run.state.uneven is not None
    assert shifted(run.state, 7.0).uneven == run.state.uneven + 7.0
    train(run, {}, 60)
    waited(run, 5.0)
    assert run.state.uneven is None and not run.state.closing


def test_before_anything_is_measured_the_owners_word_counts() -> None:
    run = crew()
    fast = run.seats[1][0]
    members = {p: replace(m, speed=3.0 if p == fast else 1.0) for p, m in run.state.members.items()}
    run.state = replace(run.state, members=members)
    assert [stage.shares for stage in shared(run.state, run.plan).stages] == [(), (12, 4)]
    train(run, {}, LEARN_STEPS + 2)
    assert [stage.shares for stage in shared(run.state, run.plan).stages] == [(), ()]


def test_what_a_lost_one_served_goes_to_others_by_their_shares() -> None:
    stages = [
        pb.Stage(
            first_layer=0,
            last_layer=1,
            replicas=[pb.Replica(peer=p) for p in ("a", "b", "c")],
            shares=[8, 8, 2],
        )
    ]
    message = pb.Plan(generation=1, origin="init", microbatches=6, microbatch_size=1, stages=stages)
    plan = Plan.from_proto(message)
    assert [len(plan.served(0, i)) for i in range(3)] == [8, 8, 2]
    assert plan.seats == [range(8), range(8, 16), range(16, 18)]
    assert [plan.turn(m) for m in (0, 7, 8, 17)] == [0, 7, 0, 1]
    without = plan.without("a", 0, 0)
    assert [len(without.served(0, i)) for i in range(2)] == [15, 3]
    assert Plan.from_proto(without.to_proto()) == without


@pytest.mark.parametrize("wrong", [[8, 8], [8, 8, 1], [9, 9, 0], [6, 6, 6, 0], [2**32 - 1, 18, 1]])
def test_shares_that_do_not_add_up_are_refused(wrong: list[int]) -> None:
    replicas = [pb.Replica(peer=p) for p in ("a", "b", "c")]
    stages = [pb.Stage(first_layer=0, last_layer=1, replicas=replicas, shares=wrong)]
    message = pb.Plan(generation=1, origin="init", microbatches=6, microbatch_size=1, stages=stages)
    with pytest.raises(WireError, match="shares"):
        Plan.from_proto(message)
