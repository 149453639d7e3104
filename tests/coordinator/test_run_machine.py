"""The state machine, told what happens one thing at a time. No sleeping: the clock is an argument."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_run import RULES, SAMPLES, Run, committed, journaled, leases, training

from potluck.coordinator import events as ev
from potluck.coordinator.state import (
    Commit,
    Dismiss,
    Gone,
    ReturnLeases,
    Tick,
)
from potluck.coordinator.store import Store
from potluck.protocol import control_pb2 as pb

# Beginning.


def test_the_first_plan_waits_for_the_workers_it_was_told_to_wait_for() -> None:
    run = Run()
    run.join("a")
    assert run.state.phase == "waiting" and run.state.note == "1 more worker must join"
    run.join("b")
    assert run.state.phase == "preparing" and run.seats == [["a"], ["b"]]
    assert run.plan.origin == "init" and run.plan.generation == 1
    run.ready()
    assert run.state.phase == "training"


def test_without_a_number_to_wait_for_it_waits_until_nobody_joins_any_more() -> None:
    run = Run(replace(RULES, wait_for=0))
    run.join("a", "b", "c")
    assert run.state.phase == "waiting" and run.state.note == "workers are joining"
    run.do(Tick(), later=1.5)
    assert run.plan.peers == {"a", "b", "c"}


def test_leases_cover_every_sample_once_and_name_their_generation() -> None:
    run = training("a", "b", "c")
    assert len(run.seats[0]) == 2  # two replicas share a step
    for at in range(4, 21, 4):
        run.train(at)
        run.round(at)
    granted = sorted((x.first, x.count) for x in leases(run.commands))
    assert [first for first, _ in granted] == [sum(n for _, n in granted[:i]) for i in range(len(granted))]
    assert sum(n for _, n in granted) == 20 * 2 * SAMPLES == run.state.committed.sample
    assert {x.generation for x in leases(run.commands)} == {1}


def test_leases_stay_a_little_ahead_of_the_slowest() -> None:
    run = training("a", "b")
    assert run.state.until == 2
    run.say("a", step_done=pb.StepDone(generation=1, step=0))
    assert run.state.until == 2
    run.say("b", step_done=pb.StepDone(generation=1, step=0))
    assert run.state.until == 3


# Rounds.


def test_a_round_counts_when_the_last_replica_has_reported_it() -> None:
    run = training("a", "b")
    run.train(4)
    assert not [c for c in run.round(4, b=None) if isinstance(c, Commit)]  # type: ignore[arg-type]
    commits = [c for c in run.round(4) if isinstance(c, Commit)]
    assert [(c.mark.step, c.mark.sample, c.samples, c.round) for c in commits] == [(4, 24, 24, 1)]
    assert commits[0].mark.digests == (b"0@4", b"1@4")


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"digest": b"other"}, "digests differ"),
        ({"base_digest": b"other"}, "other reference weights"),
    ],
)
def test_an_odd_replica_refuses_the_round_and_takes_the_state_over_anew(odd: dict[str, Any], why: str) -> None:
    run = committed("a", "b", "c", "d", "e")
    crowd = max(run.seats, key=len)
    stage = run.seats.index(crowd)
    run.train(8)
    commands = run.round(8, **{crowd[0]: odd})
    assert [e.peers for e in journaled(commands, ev.RoundRefused)] == [(crowd[0].upper(),)]
    assert why in journaled(commands, ev.RoundRefused)[0].why
    assert not [c for c in commands if isinstance(c, Commit)] and [c for c in commands if isinstance(c, ReturnLeases)]
    assert run.state.phase == "preparing" and run.plan.generation == 2
    assert (run.plan.first_step, run.plan.origin) == (4, "round")
    assert run.donors[stage] == crowd[1:] and crowd[0] in run.plan.peers


def test_samples_that_do_not_add_up_refuse_the_round() -> None:
    run = committed("a", "b")
    run.train(8)
    commands = run.round(8, a={"samples": 23})
    assert "counts other samples" in journaled(commands, ev.RoundRefused)[0].why
    assert run.state.committed.step == 4 and run.plan.first_step == 4


def test_two_replicas_that_disagree_go_back_to_what_both_hold() -> None:
    run = committed("a", "b", "c", "d")
    run.train(8)
    commands = run.round(8, **{run.seats[0][0]: {"digest": b"other"}})
    assert journaled(commands, ev.RoundRefused)
    assert run.state.phase == "preparing" and all(run.donors)


def test_reports_of_an_older_generation_change_nothing() -> None:
    run = committed("a", "b")
    run.say("a", fault=pb.Fault(generation=1, text="line down"))
    assert run.plan.generation == 2
    before = run.state
    for body in (
        {"ready": pb.Ready(generation=1)},
        {"step_done": pb.StepDone(generation=1, step=4)},
        {"round_done": pb.RoundDone(generation=1, step=8)},
        {"eval_done": pb.EvalDone(generation=1, step=10)},
        {"fault": pb.Fault(generation=1, text="again")},
    ):
        assert run.say("a", **body) == []
    assert run.plan is before.plan and run.state.rounds_done == {} and run.state.members["a"].ready == 0


def test_a_repeated_report_of_a_committed_round_is_not_judged_again() -> None:
    run = training("a", "b")
    run.train(4)
    report = {"generation": 1, "step": 4, "samples": 24, "base_digest": b"start"}
    for _ in range(2):
        run.say("a", round_done=pb.RoundDone(**report, digest=b"0@4"))
        run.say("b", round_done=pb.RoundDone(**report, digest=b"1@4"))
    assert run.state.phase == "training" and run.plan.generation == 1 and run.state.committed.step == 4


def test_numbers_that_no_database_holds_do_no_harm(tmp_path: Path) -> None:
    run = training("a", "b")
    run.train(4)
    run.round(4, a={"nbytes": 2**64 - 1, "seconds": float("nan")}, b={"seconds": float("inf")})
    run.say("b", eval_done=pb.EvalDone(generation=1, step=2**63))
    assert run.state.committed.step == 4 and run.state.evaluated == -1
    store = Store(tmp_path / "run.sqlite")
    store.write([c for c in run.commands if not isinstance(c, Dismiss)], 1.0)
    assert store.marks()[0] == run.state.committed
    store.close()


# Joining.


def test_a_late_joiner_is_seated_after_a_closing_round() -> None:
    run = committed("a", "b")
    run.join("c")
    assert run.state.closing == ""  # others may be on their way
    run.do(Tick(), later=1.5)
    assert (run.state.closing, run.state.end) == ("round", 6)
    run.train(6)
    assert run.state.until == 6
    run.round(6)
    assert run.plan.generation == 2 and run.plan.peers == {"a", "b", "c"} and run.plan.first_step == 6
    assert run.donors == [["a"], ["b"]]


def test_a_second_worker_with_the_same_key_is_refused() -> None:
    run = committed("a", "b")
    before = run.state
    commands = run.join("a", session=b"another")
    assert [(c.code, c.session) for c in commands if isinstance(c, Dismiss)] == [("duplicate", b"another")]
    assert run.do(Gone(peer="a", session=b"another")) == [] and run.state.members == before.members


def test_a_worker_that_fits_no_stage_is_refused() -> None:
    run = Run()
    commands = run.join("a", memory_gb=0.5)
    assert [c.code for c in commands if isinstance(c, Dismiss)] == ["capacity"]
    assert not run.state.members


def test_too_little_memory_for_the_largest_stage_is_said() -> None:
    run = Run()
    run.join("a", "b", memory_gb=1.5)
    assert run.state.phase == "waiting" and "needs 2 GB" in run.state.note


def test_a_worker_that_dials_again_is_where_it_was() -> None:
    run = committed("a", "b")
    run.say("a", step_done=pb.StepDone(generation=1, step=4))
    held = tuple(run.state.members["a"].savepoints)
    run.say("a", leaving=pb.Leaving())
    run.join("a", points=held)
    member = run.state.members["a"]
    assert (member.step, member.ready, member.leaving) == (5, 1, True)
    assert run.state.phase == "training" and run.state.closing == "round"
