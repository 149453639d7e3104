"""A replica is lost and the generation goes on: who takes its work, what is void, who is to blame, when to hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kept_run import KeptRun
from scripted_run import RULES, Run, committed, journaled, leases, training

from potluck.coordinator import events as ev
from potluck.coordinator.pace import LEARNED, LEAST_SECONDS, Pace
from potluck.coordinator.state import Gone, Joined, Member, Relet, ReturnLeases, Said, StopAsked, Tick
from potluck.coordinator.verify import verify
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan, Replica, StagePlan

CREW = tuple("abcdef")


def lose(run: Run, peer: str) -> list[Any]:
    return run.do(Gone(peer=peer))


def second(run: Run, stage: int) -> str:
    return run.plan.replicas[stage][1].peer


# The plan.


def wide_plan(*replicas: int) -> Plan:
    names = iter("abcdefghijklmnop")
    stages = tuple(
        StagePlan(first_layer=i, last_layer=i + 1, replicas=tuple(Replica(peer=next(names)) for _ in range(n)))
        for i, n in enumerate(replicas)
    )
    return Plan(
        generation=1,
        first_step=3,
        first_sample=18,
        origin="round",
        origin_generation=0,
        stages=stages,
        microbatches=2,
        microbatch_size=3,
    )


def test_every_microbatch_has_one_server_and_others_keep_theirs() -> None:
    plan = wide_plan(3, 4)
    after = plan.without("b", since=5, void=7)
    assert [plan.peer_of(0, m) for m in range(6)] == list("aabbcc")
    assert [after.peer_of(0, m) for m in range(6)] == list("aaaccc")
    assert [after.since(0, m) for m in range(6)] == [3, 3, 5, 5, 3, 3]
    assert after.served(0, 0) == [0, 1, 2] and after.places["c"] == (0, 1) and "b" not in after.peers
    assert [after.peer_of(1, m) for m in range(6)] == [plan.peer_of(1, m) for m in range(6)]
    assert after.samples_per_step == plan.samples_per_step and after.samples(5, 2) == plan.samples(5, 2)
    later = after.without("c", since=6, void=8)
    assert {later.peer_of(0, m) for m in range(6)} == {"a"}
    assert [later.since(0, m) for m in range(6)] == [3, 3, 5, 6, 6, 6]
    assert Plan.from_proto(later.to_proto()) == later


# Going on.


def test_the_generation_goes_on_without_a_replica() -> None:
    run = committed(*CREW)
    victim = second(run, 0)
    before, until = run.plan, run.state.until
    commands = lose(run, victim)
    assert not journaled(commands, ev.RolledBack) and not [c for c in commands if isinstance(c, ReturnLeases)]
    [event] = journaled(commands, ev.Rerouted)
    assert (event.since, event.void, event.stage) == (4, until, 0)
    assert run.plan.generation == before.generation and run.plan.attempt == 1 and run.plan.void == until
    [relet] = [c for c in commands if isinstance(c, Relet)]
    assert set(relet.holders.values()) <= run.plan.peers
    run.train(8)
    granted = [x for x in leases(run.commands) if x.step == 7]
    assert sum(x.count for x in granted) == before.samples_per_step and victim not in {x.peer for x in granted}


def test_a_round_counts_when_those_left_have_all_samples() -> None:
    run = committed(*CREW)
    lose(run, second(run, 1))
    run.train(8)
    run.round(8, **{p: {"attempt": 0} for p in run.plan.peers})
    assert run.state.committed.step == 4, "a round of before the loss"
    run.round(8)
    assert run.state.committed.step == 8
    assert journaled(run.commands, ev.RoundCommitted)[-1].replicas == len(run.plan.peers) == 5


def test_too_few_samples_of_a_substitute_are_noticed() -> None:
    run = committed(*CREW)
    lose(run, second(run, 1))
    run.train(8)
    run.round(8, **{run.plan.replicas[1][0].peer: {"samples": 1}})
    assert run.state.committed.step == 4 and journaled(run.commands, ev.RoundRefused)


def test_who_says_that_it_is_gone_is_not_waited_for() -> None:
    run = committed(*CREW, rules=replace(RULES, away_seconds=3.0))
    victim = second(run, 0)
    commands = run.say(victim, leaving=pb.Leaving(at_once=True))
    assert victim not in run.state.members and [lost.peer for lost in run.plan.lost] == [victim]
    assert journaled(commands, ev.PeerGone)[0].graceful and journaled(commands, ev.Rerouted)
    assert run.do(Gone(peer=victim, session=victim.encode())) == []
    assert not run.state.unaware  # nobody waits for it at the run's end
    run.join(victim, session=b"again")
    assert not run.state.barred  # it was not given up: it may come back at any time


def test_the_last_replica_of_a_stage_costs_the_generation() -> None:
    run = committed("a", "b", "c", "d")
    lose(run, second(run, 0))
    commands = lose(run, run.plan.replicas[0][0].peer)
    assert journaled(commands, ev.RolledBack)[0].step == 4


def test_what_the_lost_one_says_afterwards_changes_nothing() -> None:
    run = committed("a", "b", "c", "d")
    victim = second(run, 0)
    lose(run, victim)
    run.do(Joined(member=Member(peer=victim, name="back", memory_gb=9.0, session=b"new")))
    before = run.state
    for body in (
        {"step_done": pb.StepDone(generation=1, step=4)},
        {"round_done": pb.RoundDone(generation=1, step=6, samples=9, attempt=1)},
        {"fault": pb.Fault(generation=1, text="mine is better")},
    ):
        assert run.do(Said(peer=victim, report=pb.Up(seq=1, **body))) == []
    assert replace(run.state, members=before.members) == before


def test_a_lost_peer_is_taken_in_again_in_the_next_generation() -> None:
    run = committed("a", "b", "c", "d")
    victim = second(run, 0)
    lose(run, victim)
    run.do(Joined(member=Member(peer=victim, name="back", memory_gb=9.0, session=b"new")))
    run.do(Tick(), later=2.0)
    assert run.state.closing == "round"
    assert run.state.end is not None
    run.train(run.state.end)
    run.round(run.state.end)
    assert run.plan.generation == 2 and victim in run.plan.peers and not run.plan.lost


def test_the_ledger_of_a_run_with_losses_verifies(tmp_path: Path) -> None:
    run = KeptRun(tmp_path, 6)
    run.join(*CREW)
    run.ready()
    run.to(4)
    lose(run, second(run, 0))
    lose(run, second(run, 1))
    run.train(8)
    run.round(8)
    report = verify(run.store.path)
    assert run.state.committed.step == 8 and not report.problems, report.lines()


def test_an_evaluation_that_lost_somebody_is_left_out() -> None:
    run = training(*CREW, rules=replace(RULES, eval=replace_eval(4)))
    run.train(3)
    lose(run, second(run, 1))
    void = run.plan.void
    last = [r.peer for r in run.plan.replicas[-1]]
    for peer in last:
        run.say(peer, eval_done=pb.EvalDone(generation=1, step=void, loss_sum=1.0, targets=1))
    assert not journaled(run.commands, ev.HeldOut) and run.state.evaluated == void


def replace_eval(every: int) -> Any:
    import msgspec

    return msgspec.structs.replace(RULES.eval, every=every)


# Who is to blame.


def beat(run: Run, *idle: str) -> None:
    for peer in sorted(run.plan.peers):
        run.say(peer, heartbeat=pb.Heartbeat(state="training", idle=peer in idle))


def paced(*crew: str) -> Run:
    """A run whose steps took a second each."""
    run = training(*crew)
    for at in range(LEARNED + 4):
        run.now += 1.0
        for peer in sorted(run.plan.peers):
            run.say(peer, step_done=pb.StepDone(generation=1, step=at, loss_sum=1.0, targets=1))
        if (at + 1) % 4 == 0:
            run.round(at + 1)
    return run


def test_who_hangs_is_given_up_and_not_taken_in_again_at_once() -> None:
    run = paced(*CREW)
    hung = second(run, 0)
    run.now += LEAST_SECONDS + 1.0
    beat(run, *(run.plan.peers - {hung}))
    commands = run.do(Tick())
    assert [e.peer for e in journaled(commands, ev.Rerouted)] == [hung]
    run.do(Tick(), later=5.0)
    assert not run.state.closing, "it has joined already, and would be taken in at once"
    for _ in range(5):
        beat(run, *run.plan.peers)
        run.do(Tick(), later=6.0)
        run.say(hung, heartbeat=pb.Heartbeat(state="waiting"))
    assert run.state.closing == "round"


def test_who_has_just_got_what_it_waited_for_does_not_hang() -> None:
    """All wait for a round over slow lines; the first to go on are the first who do not wait."""
    run = paced(*CREW)
    beat(run, *run.plan.peers)
    run.now += LEAST_SECONDS + 1.0
    one = second(run, 0)
    beat(run, *(run.plan.peers - {one}))
    assert not journaled(run.do(Tick()), ev.Rerouted)
    run.now += LEAST_SECONDS + 1.0
    beat(run, *(run.plan.peers - {one}))
    assert [e.peer for e in journaled(run.do(Tick()), ev.Rerouted)] == [one]


def test_where_everybody_computes_nobody_is_to_blame() -> None:
    run = paced(*CREW)
    run.now += LEAST_SECONDS + 1.0
    beat(run)
    assert not journaled(run.do(Tick()), ev.Rerouted) and not run.plan.lost


def test_peers_that_do_not_reach_each_other_are_parted() -> None:
    run = committed(*CREW)
    accuser, other = run.plan.replicas[0][0].peer, second(run, 1)
    commands = run.say(accuser, fault=pb.Fault(generation=1, text="cannot send", peer=other))
    assert [e.peer for e in journaled(commands, ev.Rerouted)] == [other]
    assert not journaled(run.say(accuser, fault=pb.Fault(generation=1, text="cannot", peer=other)), ev.RolledBack)
    assert run.plan.generation == 1


def test_pace() -> None:
    pace = Pace().reached(0, 100.0, learn=False)
    assert pace.grace_seconds(60.0) == 60.0
    for at in range(1, 30):
        pace = pace.reached(at, 100.0 + 8.0 * at, learn=True)
    assert pace.mean_seconds == pytest.approx(8.0) and 24.0 <= pace.grace_seconds(600.0) < 30.0
    assert pace.grace_seconds(20.0) == 20.0
    assert pace.reached(29, 500.0, learn=True) is pace


# Never alone in silence.


def test_below_quorum_nothing_is_leased_until_nobody_has_come_for_a_while() -> None:
    run = committed("a", "b", "c", "d", rules=replace(RULES, quorum=2))
    lose(run, second(run, 0))
    until = run.state.until
    assert journaled(run.commands, ev.Held)
    run.train(until)
    assert run.state.until == until and "stage 0 has 1 of the 2 replicas" in run.state.note
    for _ in range(5):
        beat(run, *run.plan.peers)
        run.do(Tick(), later=8.0)
    assert journaled(run.commands, ev.Degraded) and run.state.until > until
    run.train(8)
    run.round(8)
    assert journaled(run.commands, ev.RoundCommitted)[-1].degraded
    assert not journaled(run.commands, ev.RoundCommitted)[0].degraded


def test_a_stop_while_nothing_is_leased_is_a_stop_at_the_last_round(tmp_path: Path) -> None:
    """The ledger has nothing to tell where a savepoint between two rounds would be."""
    run = KeptRun(tmp_path, 2, quorum=2)
    run.join("a", "b")
    run.ready()
    assert run.state.held is not None and run.state.until == 0
    run.do(StopAsked())
    assert run.state.phase == "stopped" and run.state.stop is None


def test_a_held_round_goes_on_when_somebody_comes() -> None:
    run = committed("a", "b", "c", "d", rules=replace(RULES, quorum=2))
    lose(run, second(run, 0))
    until = run.state.until
    run.join("z")
    run.train(until)
    run.do(Tick(), later=2.0)
    assert run.state.closing == "round" and run.state.end == until
    run.round(until)
    run.ready()
    assert run.plan.generation == 2 and run.state.until > until
    assert all(len(replicas) == 2 for replicas in run.plan.replicas)


def test_after_a_restart_the_first_step_says_nothing_of_the_pace() -> None:
    pace = Pace().reached(400, 1e9, learn=True)
    assert (pace.step, pace.count) == (400, 0)
    assert pace.reached(401, 1e9 + 0.5, learn=True).mean_seconds == 0.5
