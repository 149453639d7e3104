"""The operator's orders, one thing at a time: what they do, what is refused, and that a restart forgets none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_run import ROLLING, RULES, Run, committed, journaled, leases, point, training

from potluck.coordinator import events as ev
from potluck.coordinator.operating import objection
from potluck.coordinator.resume import keep, resumed
from potluck.coordinator.state import Commit, Dismiss, Gone, Order, RunState, Tick, Unpublished, Uploaded
from potluck.coordinator.store import Store
from potluck.coordinator.views import note_of, view_of
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import Sync

HOUR = 3600.0


def order(run: Run, action: Any, **more: Any) -> list[Any]:
    return run.do(Order(action=action, **more))


def still(*peers: str, rules: Any = RULES) -> Run:
    """A run that is paused at step 6 and stands still."""
    run = committed(*peers, rules=rules)
    order(run, "pause", why="power cut tonight")
    run.train(run.state.until)
    assert run.state.end is not None
    run.round(run.state.end)
    run.ready()
    return run


def against(run: Run, action: Any, **more: Any) -> str:
    found = objection(run.rules, run.state, Order(action=action, **more))
    return found.text if found else ""


# Pause and resume.


def test_a_pause_lets_the_leased_steps_be_done_and_closes_a_round() -> None:
    run = committed("a", "b")
    commands = order(run, "pause", why="power cut tonight")
    assert [e.text for e in journaled(commands, ev.Paused)] == [
        "Paused by the operator after step 6: power cut tonight"
    ]
    assert (run.state.closing, run.state.end) == ("round", 6) and not leases(commands)
    run.train(6)
    seats = run.seats
    assert [c.mark.step for c in run.round(6) if isinstance(c, Commit)] == [6]
    assert run.state.phase == "preparing" and run.seats == seats
    assert not leases(run.ready()) and run.state.phase == "training" and run.state.until == 6
    assert view_of(run.rules, run.state, "a").note == "paused by the operator: power cut tonight"
    assert view_of(run.rules, run.state, "a").until == 6


def test_a_paused_run_stands_still_for_hours_and_goes_on_where_it_was() -> None:
    run = still("a", "b", "c")
    before = len(run.commands)
    for _ in range(100):
        run.now += 100.0
        for peer in "abc":
            run.say(peer, heartbeat=pb.Heartbeat(state="training", idle=True))
        assert run.do(Tick()) == []
    assert not leases(run.commands[before:]) and run.state.phase == "training"
    commands = order(run, "resume")
    assert "Resumed by the operator after 167 min" in [e.text for e in journaled(commands, ev.Resumed)]
    assert {lease.step for lease in leases(commands)} == {6, 7}
    assert view_of(run.rules, run.state, "a").note == ""
    assert run.do(Tick(), later=5.0) == []  # nobody hangs, no lease is late


def test_a_pause_before_the_first_step_and_with_nobody_here() -> None:
    run = Run()
    order(run, "pause")
    assert note_of(run.state) == "paused by the operator; 2 more workers must join"
    run.join("a", "b")
    run.ready()
    assert run.state.phase == "training" and not leases(run.commands)
    assert leases(order(run, "resume"))


def test_who_is_lost_while_it_is_paused_is_not_waited_for_against_the_clock() -> None:
    """A stage's last holder is gone: within its patience the run would go back to its beginning, paused it waits."""
    run = still("a", "b")
    run.do(Gone(peer="a"))
    assert run.state.phase == "waiting" and run.state.plan is None
    run.join("c")
    run.now += HOUR
    for peer in "bc":
        run.say(peer, heartbeat=pb.Heartbeat())
    run.do(Tick())
    assert run.state.phase == "waiting" and "its workers must come back" in run.state.note
    note = view_of(run.rules, run.state, "b").note
    assert note.startswith("paused by the operator: power cut tonight; nobody here holds stage")


def test_joins_and_leaves_work_while_it_is_paused() -> None:
    run = still("a", "b")
    run.join("c")
    run.do(Tick(), later=2.0)
    assert run.state.phase == "preparing" and "c" in run.plan.peers
    run.ready()
    run.say("c", leaving=pb.Leaving())
    assert "c" not in run.plan.peers
    run.ready()
    assert run.released("c") and run.state.phase == "training" and run.state.until == 6
    assert leases(order(run, "resume"))


def test_a_replica_that_is_lost_while_it_is_paused_costs_nothing() -> None:
    run = still("a", "b", "c")
    victim = max(run.seats, key=len)[0]
    commands = run.do(Gone(peer=victim))
    assert journaled(commands, ev.Rerouted) and run.state.phase == "training"
    assert not leases(commands) and leases(order(run, "resume"))


def test_a_hung_worker_does_not_keep_the_run_from_standing_still() -> None:
    run = committed("a", "b", "c")
    order(run, "pause")
    for peer in "abc":
        run.say(peer, heartbeat=pb.Heartbeat(state="training", idle=peer != "a"))
    run.now += 2 * HOUR
    for peer in "abc":
        run.say(peer, heartbeat=pb.Heartbeat(state="training", idle=peer != "a"))
    commands = run.do(Tick())
    assert journaled(commands, ev.Rerouted) or journaled(commands, ev.RolledBack)


def test_a_stop_works_while_it_is_paused() -> None:
    from potluck.coordinator.state import StopAsked

    run = still("a", "b")
    run.do(StopAsked())
    assert run.state.phase == "stopped"
    assert view_of(run.rules, run.state, "a").note == "the operator stopped the run"


def test_what_cannot_be_paused() -> None:
    run = still("a", "b")
    assert against(run, "pause") == "the run is paused already, by the operator: power cut tonight"
    order(run, "resume")
    assert against(run, "resume") == "the run is not paused"
    assert order(run, "resume") == []
    run.train(20)
    assert "last steps are given out" in against(run, "pause")


def test_time_to_hold_for_a_quorum_does_not_run_while_it_is_paused() -> None:
    rules = replace(RULES, quorum=2)
    run = committed("a", "b", "c", "d", rules=rules)
    run.do(Gone(peer=run.seats[0][0]))
    assert run.state.held == run.now
    run.now += 10.0
    order(run, "pause")
    run.now += HOUR
    for peer in run.state.members:
        run.say(peer, heartbeat=pb.Heartbeat(idle=True))
    run.do(Tick())
    assert not run.state.degraded
    order(run, "resume")
    assert run.state.held == run.now - 10.0 and not run.state.degraded


# Drain.


def test_a_drained_peer_finishes_hands_over_and_is_told_why() -> None:
    run = committed("a", "b", "c")
    commands = order(run, "drain", peer="c", why="wrong machine")
    assert [e.text for e in journaled(commands, ev.Drained)] == [
        "C is drained by the operator, it finishes its step and hands over: wrong machine"
    ]
    assert run.state.closing == "round" and not run.released("c")
    run.train(6)
    run.round(6)
    run.ready()
    assert "c" not in run.plan.peers and run.released("c") and run.state.phase == "training"
    assert view_of(run.rules, run.state, "c").note == "drained by the operator: wrong machine"
    assert view_of(run.rules, run.state, "a").note == ""
    run.do(Gone(peer="c"))
    run.join("c", session=b"again")
    assert "c" in run.state.members


def test_who_alone_can_hold_a_stage_is_drained_only_by_force() -> None:
    run = committed("a", "b")
    assert "the run would wait: 1 more worker must join" in against(run, "drain", peer="a")
    assert order(run, "drain", peer="a") == []
    order(run, "drain", peer="a", force=True)
    run.train(6)
    run.round(6)
    assert run.released("a") and run.state.phase == "waiting"


def test_who_is_not_here_or_leaves_already_is_not_drained() -> None:
    run = committed("a", "b", "c")
    assert against(run, "drain", peer="x", name="xaver") == "xaver is not here"
    run.say("c", leaving=pb.Leaving())
    assert against(run, "drain", peer="c") == "C is leaving already"


# Ban.


def test_a_banned_peer_is_dropped_at_once_and_its_key_stays_out() -> None:
    run = committed("a", "b", "c")
    victim = max(run.seats, key=len)[0]
    commands = order(run, "ban", peer=victim, why="sends noise")
    assert [e.text for e in journaled(commands, ev.Banned)] == [
        f"{victim.upper()} is banned by the operator: sends noise"
    ]
    refused = [c for c in commands if isinstance(c, Dismiss)]
    assert [(c.peer, c.code, c.text) for c in refused] == [
        (victim, "banned", "this worker is banned from the run: sends noise")
    ]
    assert journaled(commands, ev.Rerouted) and run.state.phase == "training"
    assert victim not in run.state.members and victim not in run.plan.peers and victim not in run.state.unaware
    again = run.join(victim, session=b"again")
    assert [c.code for c in again if isinstance(c, Dismiss)] == ["banned"] and victim not in run.state.members
    assert not journaled(again, ev.PeerJoined)
    assert [e.text for e in journaled(order(run, "unban", peer=victim), ev.Unbanned)] == [
        f"{victim.upper()} may join again, says the operator"
    ]
    run.join(victim, session=b"again")
    assert victim in run.state.members


def test_what_only_the_banned_one_holds_is_lost_only_by_force() -> None:
    run = committed("a", "b", rules=replace(RULES, patience_seconds=0.0))
    run.join("c")
    assert against(run, "ban", peer="a") == "only A holds stage 0 as of step 4: the run would fall back or wait"
    assert order(run, "ban", peer="a") == []
    commands = order(run, "ban", peer="a", force=True)
    assert journaled(commands, ev.RolledBack)
    run.do(Tick(), later=2.0)
    assert all("a" not in donors for donors in run.donors)


def test_a_keeper_of_its_stage_makes_a_ban_harmless_to_rounds() -> None:
    run = committed("a", "b", "c")
    alone = next(peers[0] for peers in run.seats if len(peers) == 1)
    stage = run.plan.places[alone][0]
    assert "only" in against(run, "ban", peer=alone)
    keeper = max(run.seats, key=len)[0]
    kept = [point(run.state.committed, stage).to_proto()]
    run.say(keeper, held=pb.Held(savepoints=kept))
    assert not against(run, "ban", peer=alone)


def test_a_donor_that_is_banned_while_others_fetch_gives_nothing() -> None:
    run = committed("a", "b", "c", "d", "e", rules=ROLLING)
    run.join("f")
    run.do(Tick(), later=2.0)
    run.train(6)
    run.round(6)
    assert run.state.phase == "preparing"
    stage = run.plan.places["f"][0]
    donor = run.donors[stage][0]
    order(run, "ban", peer=donor)
    assert all(donor not in donors for donors in run.donors) and donor not in run.plan.peers


def test_a_peer_that_is_away_from_the_run_is_banned_by_its_id() -> None:
    run = committed("a", "b")
    commands = order(run, "ban", peer="z", name="zoe")
    assert [type(c).__name__ for c in commands] == ["Journal"]
    assert against(run, "ban", peer="z") == "zoe is banned already"
    assert [c.code for c in run.join("z") if isinstance(c, Dismiss)] == ["banned"]


# A checkpoint now.


def test_a_checkpoint_closes_a_round_where_none_is_near() -> None:
    run = training("a", "b", rules=replace(RULES, sync=Sync(every=100)))
    run.do(Uploaded(step=0, path="x"))
    commands = order(run, "checkpoint", why="for the paper")
    assert [e.text for e in journaled(commands, ev.CheckpointAsked)] == [
        "A checkpoint is asked for by the operator, of the next round: for the paper"
    ]
    assert (run.state.closing, run.state.end) == ("round", 2)
    run.train(2)
    run.round(2)
    run.ready()
    assert run.state.publish == 2 and view_of(run.rules, run.state, "a").publish == 2
    assert against(run, "checkpoint") == "a checkpoint is asked for already"
    run.do(Uploaded(step=2, path="x"))
    assert run.state.checkpoint is None and run.state.publish is None and run.state.closing == ""
    assert run.state.until == 4


def test_a_checkpoint_waits_for_the_round_that_comes_anyway() -> None:
    run = committed("a", "b")
    run.do(Uploaded(step=0, path="x"))
    order(run, "checkpoint")
    assert run.state.closing == "" and run.state.until == 6  # the next round is at step 8
    run.train(8)
    run.round(8)
    assert run.state.publish == 8


def test_a_checkpoint_of_a_paused_run_is_of_its_last_round() -> None:
    run = still("a", "b")
    run.do(Uploaded(step=0, path="x"))
    order(run, "checkpoint")
    assert run.state.publish == 6
    run.do(Uploaded(step=6, path="x"))
    assert against(run, "checkpoint") == "the model of step 6 is published already"


def test_a_checkpoint_that_cannot_be_written_is_made_of_the_next_round() -> None:
    run = committed("a", "b")
    run.do(Uploaded(step=0, path="x"))
    order(run, "checkpoint")
    run.train(8)
    run.round(8)
    run.do(Unpublished(step=8, why="the disk is full"))
    assert run.state.publish is None
    run.train(12)
    run.round(12)
    assert run.state.publish == 12


def test_a_checkpoint_survives_the_generation_that_was_to_make_it() -> None:
    run = committed("a", "b", rules=ROLLING)
    run.do(Uploaded(step=0, path="x"))
    order(run, "checkpoint")
    run.train(8)
    run.round(8)
    run.say("a", fault=pb.Fault(generation=1, text="line down"))
    run.ready()
    assert run.state.publish == 8
    run.train(12)
    run.say("a", leaving=pb.Leaving())
    run.join("c", points=(point(run.state.committed, 0), point(run.state.committed, 1)))


# After a restart.


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(tmp_path / "run.sqlite")
    yield made
    made.close()


def restarted(run: Run, store: Store) -> RunState:
    for found in keep(RunState(since=100.0), run.state):
        store.set_meta(**found.values)
    fresh = RunState(since=run.now, generation=run.state.generation, committed=run.state.committed)
    return resumed(run.rules, fresh, store)


def test_a_pause_bans_and_wishes_survive_a_restart(store: Store) -> None:
    run = still("a", "b", "c")
    order(run, "ban", peer="z", name="zoe", why="noise")
    order(run, "drain", peer="c", why="wrong machine")
    order(run, "checkpoint")
    state = restarted(run, store)
    assert (state.paused, state.bans, state.checkpoint) == (run.state.paused, run.state.bans, run.state.checkpoint)
    assert state.members["c"].leaving and state.members["c"].drained == "drained by the operator: wrong machine"
    again = Run(run.rules, state)
    again.now = run.now
    for peer in "abc":
        again.join(peer, points=tuple(run.state.members[peer].savepoints))
    again.do(Tick(), later=2.0)
    again.ready()
    assert not leases(again.commands) and leases(order(again, "resume"))


def test_a_file_without_orders_opens(store: Store) -> None:
    run = committed("a", "b")
    assert all("operated" not in found.values for found in keep(RunState(since=100.0), run.state))
    state = restarted(run, store)
    assert state.paused is None and not state.bans and state.checkpoint is None


def test_an_order_after_the_end_is_refused() -> None:
    run = Run(state=RunState(phase="finished"))
    for action in ("pause", "resume", "drain", "ban", "unban", "checkpoint"):
        assert against(run, action, peer="a") == "the run is finished" and order(run, action, peer="a") == []
