"""The state machine, scenario by scenario: leaving, losing, stopping, finishing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from kept_run import with_a_lost_round
from scripted_run import (
    LAYERS,
    ROLLING,
    RULES,
    SAMPLES,
    Run,
    committed,
    journaled,
    leases,
    point,
    saved,
    stop_point,
    training,
)

from potluck.coordinator import events as ev
from potluck.coordinator.assignment import StageNeed
from potluck.coordinator.state import (
    Dismiss,
    Division,
    Gone,
    Mark,
    Remember,
    ReturnLeases,
    Rules,
    RunState,
    StopAsked,
    Tick,
    Uncommit,
    Uploaded,
)
from potluck.coordinator.store import Store
from potluck.coordinator.views import view_of
from potluck.protocol import control_pb2 as pb

# Leaving.


def needing(*needs: StageNeed) -> Rules:
    return replace(RULES, divisions=(Division(layers=LAYERS, needs=needs),))


def test_a_leaving_peer_closes_the_round_and_is_released_after_it_has_given() -> None:
    run = committed(
        "a",
        "b",
        "c",
        rules=needing(StageNeed(work=1.0, memory_gb=1.0), StageNeed(work=1.0, memory_gb=1.0)),
    )
    leaver = next(s[0] for s in run.seats if len(s) == 1)  # the only one of its stage
    run.say(leaver, leaving=pb.Leaving())
    assert run.state.closing == "round" and not run.released(leaver)
    end = run.state.end
    assert end is not None
    run.train(end)
    run.round(end)
    assert run.state.phase == "preparing" and leaver not in run.plan.peers
    assert [leaver] in run.donors and not run.released(leaver)
    run.ready()
    assert run.state.phase == "training" and run.released(leaver)
    commands = run.do(Gone(peer=leaver))
    assert [e.graceful for e in journaled(commands, ev.PeerGone)] == [True] and run.plan.generation == 2


def test_who_leaves_while_others_join_gives_first() -> None:
    run = committed("a", "b", "c")
    leaver = next(s[0] for s in run.seats if len(s) == 1)
    run.say(leaver, leaving=pb.Leaving())
    assert run.state.end is not None
    run.train(run.state.end)
    run.join("d")  # just now: the next plan would wait for more
    run.round(run.state.end)
    assert run.state.phase == "preparing" and [leaver] in run.donors and not run.released(leaver)


def test_a_peer_that_took_a_stage_over_holds_it() -> None:
    run = committed("a", "b", "c")
    leaver = next(s[0] for s in run.seats if len(s) == 1)
    run.say(leaver, leaving=pb.Leaving())
    assert run.state.end is not None
    run.train(run.state.end)
    run.round(run.state.end)
    run.ready()
    run.do(Gone(peer=leaver))
    run.say(run.seats[0][0], fault=pb.Fault(generation=2, text="line down"))  # before it made a round of its own
    assert run.state.phase == "preparing" and run.plan.generation == 3


def test_a_late_ready_tells_who_holds_a_lost_donors_stage() -> None:
    run = committed("a", "b", "c")
    leaver = next(s[0] for s in run.seats if len(s) == 1)
    run.say(leaver, leaving=pb.Leaving())
    assert run.state.end is not None
    run.train(run.state.end)
    run.round(run.state.end)
    stage = run.donors.index([leaver])
    heir = run.seats[stage][0]
    run.do(Gone(peer=leaver))
    assert run.state.phase == "waiting" and f"nobody here holds stage {stage}" in run.state.note
    run.say(heir, ready=pb.Ready(generation=2, digest=run.state.committed.digests[stage]))
    assert run.state.phase == "preparing" and run.donors[stage] == [heir]


def test_a_donor_that_does_not_hold_the_state_after_all_is_not_named_again() -> None:
    run = committed("a", "b", "c", "d", rules=ROLLING)
    run.do(Gone(peer="d"))
    stage = next(i for i, peers in enumerate(run.donors) if len(peers) == 2)
    liar, heir = run.donors[stage]
    run.say(liar, fault=pb.Fault(generation=run.plan.generation, text="damaged", peer=liar, missing=True))
    assert run.state.phase == "preparing" and run.donors[stage] == [heir]
    run.say(liar, fault=pb.Fault(generation=run.plan.generation, text="not there", peer=heir, missing=True))
    assert run.state.phase == "waiting" and f"nobody here holds stage {stage}" in run.state.note


def test_when_the_last_holder_of_a_stage_leaves_the_run_waits_and_says_for_what() -> None:
    run = committed("a", "b")
    run.say("b", leaving=pb.Leaving())
    run.train(6)
    run.round(6)
    assert run.state.phase == "waiting" and run.state.note == "1 more worker must join"
    assert run.released("b")
    run.do(Gone(peer="b"))
    run.join("c")
    run.do(Tick(), later=1.5)
    assert run.state.note == "nobody here holds stage 1 as of step 6: its workers must come back"
    run.do(Gone(peer="c"))
    run.join("b", points=(point(run.state.committed, 1),))
    run.do(Tick(), later=1.5)
    assert run.state.phase == "preparing" and run.plan.first_step == 6


# Losing.


def test_a_peer_whose_work_nobody_can_do_ends_the_generation_at_once() -> None:
    run = committed("a", "b", "c", "d", rules=ROLLING)
    run.train(6)
    lost = run.seats[0][0]
    commands = run.do(Gone(peer=lost))
    assert [c for c in commands if isinstance(c, ReturnLeases)]
    assert journaled(commands, ev.RolledBack)[0].step == 4
    assert run.plan.generation == 2 and run.plan.first_step == 4 and lost not in run.plan.peers
    run.ready()
    new = [x for x in leases(run.commands) if x.generation == 2]
    assert new[0].first == run.state.committed.sample


def test_silence_is_a_loss() -> None:
    run = committed("a", "b", "c", "d")
    run.now += 10.0
    for peer in "abc":
        run.say(peer, heartbeat=pb.Heartbeat(state="training"))
    commands = run.do(Tick(), later=6.0)
    assert [c.code for c in commands if isinstance(c, Dismiss)] == ["silent"]
    assert "d" not in run.plan.peers and journaled(commands, ev.Rerouted)


def test_an_expired_lease_ends_the_generation() -> None:
    run = committed("a", "b")
    for _ in range(13):
        run.now += 10.0
        for peer in "ab":
            run.say(peer, heartbeat=pb.Heartbeat(state="training"))
    run.do(Tick())
    assert run.plan.generation == 2 and "lease of step 4 expired" in journaled(run.commands, ev.RolledBack)[-1].why


def test_a_peer_lost_while_preparing_does_not_stop_the_others() -> None:
    run = Run(replace(RULES, wait_for=3))
    run.join("a", "b", "c")
    run.do(Gone(peer=run.seats[0][0]), later=2.0)
    assert run.state.phase == "preparing" and run.plan.generation == 2 and len(run.plan.peers) == 2


# Stopping, and starting again.


def stopped_run() -> Run:
    run = committed("a", "b")
    run.do(StopAsked())
    assert (run.state.closing, run.state.end) == ("save", 6)
    run.train(6)
    saved(run, "a", "b")
    assert run.state.phase == "stopped" and run.state.stop is not None
    return run


def reopened(run: Run, tmp_path: Path) -> Run:
    """A coordinator that is started on what the first one wrote down."""
    store = Store(tmp_path / "run.sqlite")
    store.write([c for c in run.commands if not isinstance(c, Dismiss)], run.now)
    marks = store.marks()
    state = RunState(
        since=run.now,
        generation=store.meta("generation", 0),
        committed=marks[0],
        marks=tuple(marks[1:]),
        stop=store.stop_mark(),
        rounds=len(marks),
    )
    store.close()
    again = Run(run.rules, state)
    again.now = run.now
    return again


def test_a_stop_is_saved_by_everybody_and_remembered() -> None:
    run = stopped_run()
    mark = run.state.stop
    assert mark is not None
    assert (mark.kind, mark.step, mark.sample, mark.holders) == ("step", 6, 6 * SAMPLES, (("a",), ("b",)))
    assert [c.stop for c in run.commands if isinstance(c, Remember)][-1] == mark
    assert run.released("a") and not [c for c in run.commands[-3:] if isinstance(c, ReturnLeases)]


def test_a_round_that_is_late_does_not_undo_what_is_saved() -> None:
    run = training("a", "b")
    run.train(2)
    run.do(StopAsked())
    run.train(4)
    report = {"generation": 1, "step": 4, "samples": 24, "base_digest": b"start"}
    run.say("a", round_done=pb.RoundDone(**report, digest=b"0@4"))
    saved(run, "a")
    run.say("b", round_done=pb.RoundDone(**report, digest=b"1@4"))
    saved(run, "b")
    assert run.state.phase == "stopped" and run.state.committed.step == 4


def test_the_very_peers_of_a_stop_go_on_from_it(tmp_path: Path) -> None:
    first = stopped_run()
    mark, run = first.state.stop, reopened(first, tmp_path)
    assert mark is not None and run.state.stop == mark
    run.join("a", points=(stop_point(mark, 0), point(run.state.committed, 0)))
    run.join("b", points=(stop_point(mark, 1), point(run.state.committed, 1)))
    run.do(Tick(), later=1.5)
    assert (run.plan.origin, run.plan.first_step, run.plan.first_sample) == ("step", 6, 36)
    assert run.seats == run.donors == [["a"], ["b"]] and run.plan.generation == 2
    assert not [c for c in run.commands if isinstance(c, ReturnLeases)]
    run.ready()
    assert leases(run.commands)[0].first == 36


def test_others_go_on_from_the_round_before_the_stop_after_patience(tmp_path: Path) -> None:
    first = stopped_run()
    run = reopened(first, tmp_path)
    run.join("a", points=(point(run.state.committed, 0),))
    run.join("c", points=(point(run.state.committed, 1),))
    run.do(Tick(), later=1.5)
    assert run.state.note == "the workers that saved the run's last steps must come back"
    run.now += 28.0
    for peer in "ac":
        run.say(peer, heartbeat=pb.Heartbeat())
    run.do(Tick(), later=1.0)
    assert (run.plan.origin, run.plan.first_step) == ("round", 4) and run.state.stop is None
    assert [c for c in run.commands if isinstance(c, ReturnLeases)]
    assert [c.stop for c in run.commands if isinstance(c, Remember)][-1] is None


def test_a_stop_is_gone_on_from_once(tmp_path: Path) -> None:
    first = stopped_run()
    mark, run = first.state.stop, reopened(first, tmp_path)
    assert mark is not None
    run.join("a", points=(stop_point(mark, 0),))
    run.join("b", points=(stop_point(mark, 1),))
    run.do(Tick(), later=1.5)
    run.ready()
    assert run.state.phase == "training" and run.state.stop is None
    remembered = [c for c in run.commands if isinstance(c, Remember)]
    assert remembered[-1].stop is None  # whatever kills the coordinator now, its leases are not given twice


def test_older_rounds_are_gone_back_to_when_nobody_holds_newer_ones(tmp_path: Path) -> None:
    first = committed("a", "b")
    old = first.state.committed
    first.train(8)
    first.round(8)
    run = reopened(first, tmp_path)
    run.join("a", points=(point(old, 0), point(run.state.committed, 0)))
    run.join("b", points=(point(old, 1),))
    run.do(Tick(), later=1.5)
    assert "holds stage 1 as of step 8" in run.state.note
    run.now += 29.0
    for peer in "ab":
        run.say(peer, heartbeat=pb.Heartbeat())
    run.do(Tick(), later=1.0)
    assert run.plan.first_step == 4 and run.state.committed.step == 8
    for peer, stage in (("a", 0), ("b", 1)):
        assert not [c for c in run.commands if isinstance(c, Uncommit)], "nobody has proved to hold step 4 yet"
        run.say(peer, ready=pb.Ready(generation=run.plan.generation, digest=old.digests[stage]))
    assert [c.step for c in run.commands if isinstance(c, Uncommit)] == [4]
    assert run.state.committed == old and run.state.marks == ()


def test_whoever_holds_the_newer_round_may_come_back_before_an_older_plan_begins(tmp_path: Path) -> None:
    first = committed("a", "b")
    old = first.state.committed
    first.train(8)
    first.round(8)
    run = reopened(first, tmp_path)
    newest = run.state.committed
    run.join("a", points=(point(old, 0), point(newest, 0)))
    run.join("b", points=(point(old, 1),))
    run.now += 40.0
    for peer in "ab":
        run.say(peer, heartbeat=pb.Heartbeat())
    run.do(Tick(), later=1.0)
    assert run.plan.first_step == 4
    run.say("b", fault=pb.Fault(generation=run.plan.generation, text="it is damaged", peer="b"))
    run.join("c", points=(point(newest, 1),))
    run.do(Tick(), later=2.0)
    assert run.plan.first_step == 8 and run.state.committed == newest
    assert not [c for c in run.commands if isinstance(c, Uncommit)]


# The end.


def at_the_end() -> Run:
    run = committed("a", "b", rules=replace(RULES, steps=6))
    assert (run.state.closing, run.state.end) == ("round", 6)
    run.train(6)
    run.round(6)
    assert run.state.phase == "finishing"
    return run


def test_the_run_ends_evaluated_and_published() -> None:
    run = at_the_end()
    assert view_of(run.rules, run.state, "a").publish == 6
    run.say("b", eval_done=pb.EvalDone(generation=1, step=6, loss_sum=3.0, targets=2))
    assert run.state.phase == "finishing"
    commands = run.do(Uploaded(step=6, path="checkpoints/step-6"))
    assert run.state.phase == "finished" and journaled(commands, ev.Finished) and run.released("a")
    assert [c.code for c in run.join("c") if isinstance(c, Dismiss)] == ["finished"]


def test_a_loss_at_the_end_is_made_good() -> None:
    run = at_the_end()
    held = tuple(run.state.members["b"].savepoints)
    run.do(Gone(peer="b"))
    assert run.state.phase == "waiting" and run.state.committed.step == 6
    run.join("b", points=held)
    run.do(Tick(), later=1.5)
    run.ready()
    assert run.state.phase == "finishing" and run.state.publish == 6


def test_a_finished_run_that_is_opened_again_needs_nobody() -> None:
    mark = Mark(kind="round", generation=3, step=20, sample=120)
    run = Run(state=RunState(generation=3, committed=mark, published=20, evaluated=20))
    run.do(Tick())
    assert run.state.phase == "finished"


def test_evaluations_may_come_in_any_order_of_their_peers() -> None:
    run = training(
        "a",
        "b",
        "c",
        rules=replace(
            RULES,
            divisions=(
                Division(layers=LAYERS, needs=(StageNeed(work=1, memory_gb=1), StageNeed(work=9, memory_gb=1))),
            ),
        ),
    )
    last = run.seats[1]
    assert len(last) == 2
    run.train(12)
    early, late = last
    for at in (10, 11):
        run.say(early, eval_done=pb.EvalDone(generation=1, step=at, loss_sum=1.0, targets=1))
    for at in (10, 11):
        run.say(late, eval_done=pb.EvalDone(generation=1, step=at, loss_sum=1.0, targets=1))
    assert run.state.evaluated == 11


def test_no_round_number_is_used_twice(tmp_path: Path) -> None:
    """Not even that of a lost round, by a coordinator started after the loss: its leases are kept under it."""
    run = with_a_lost_round(tmp_path, restarted=True)
    told = run.store.rows("SELECT data FROM events WHERE kind = 'RoundCommitted' ORDER BY id")
    assert [json.loads(data)["round"] for (data,) in told] == [1, 2, 3]


def test_a_round_without_a_digest_does_not_count() -> None:
    """All replicas of a stage may say nothing alike: nobody could ever be held to that."""
    run = training("a", "b")
    run.train(4)
    commands = run.round(4, a={"digest": b""})
    [refused] = journaled(commands, ev.RoundRefused)
    assert refused.peers == ("A",) and run.state.committed.step == 0
