"""The state machine, told what happens one thing at a time. No sleeping: the clock is an argument."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potluck.coordinator import events as ev
from potluck.coordinator.assignment import StageNeed
from potluck.coordinator.run import step, view_of
from potluck.coordinator.state import (
    Commit,
    Dismiss,
    Gone,
    Input,
    Joined,
    Journal,
    Lease,
    Mark,
    Member,
    Remember,
    ReturnLeases,
    Rules,
    RunState,
    Said,
    StopAsked,
    Tick,
    Uncommit,
    Uploaded,
)
from potluck.coordinator.store import Store
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import EvalConfig, Sync
from potluck.protocol.plan import Plan, SavePoint

LAYERS = ((0, 2), (2, 4))
RULES = Rules(
    name="test",
    seed=1,
    steps=20,
    layers=LAYERS,
    needs=(StageNeed(work=1.0, memory_gb=1.0), StageNeed(work=1.0, memory_gb=2.0)),
    microbatches=2,
    microbatch_size=3,
    sync=Sync(every=4),
    eval=EvalConfig(every=10),
    publish_rounds=100,
    wait_for=2,
    lease_seconds=60.0,
    patience_seconds=30.0,
)
SAMPLES = 6  # of a step, with one replica of the first stage


class Run:
    """A run and what it ordered so far; peers are named by their letter."""

    def __init__(self, rules: Rules = RULES, state: RunState | None = None) -> None:
        self.rules, self.state, self.now = rules, state or RunState(since=100.0), 100.0
        self.commands: list[Any] = []

    def do(self, what: Input, later: float = 0.0) -> list[Any]:
        self.now += later
        self.state, commands = step(self.rules, self.state, what, self.now)
        self.commands += commands
        return commands

    def join(self, *peers: str, points: tuple[SavePoint, ...] = (), memory_gb: float = 9.0, **more: Any) -> list[Any]:
        commands = []
        for peer in peers:
            member = Member(
                peer=peer,
                name=peer.upper(),
                memory_gb=memory_gb,
                session=more.get("session", peer.encode()),
                savepoints=frozenset(points),
            )
            commands += self.do(Joined(member=member))
        return commands

    def say(self, peer: str, **body: Any) -> list[Any]:
        return self.do(Said(peer=peer, report=pb.Up(seq=1, **body)))

    def ready(self) -> list[Any]:
        commands = []
        for peer in sorted(self.plan.peers):
            stage = self.plan.places[peer][0]
            digest = self.state.committed.digests[stage] if self.state.committed.digests else b""
            commands += self.say(peer, ready=pb.Ready(generation=self.plan.generation, digest=digest))
        return commands

    def train(self, to: int) -> list[Any]:
        """Every peer reports its steps below ``to``."""
        commands = []
        for at in range(self.plan.first_step, to):
            for peer in sorted(self.plan.peers):
                done = pb.StepDone(generation=self.plan.generation, step=at, loss_sum=2.0, targets=1)
                commands += self.say(peer, step_done=done)
        return commands

    def round(self, at: int, **odd: dict[str, Any]) -> list[Any]:
        """Every peer reports the round after ``at`` steps; ``odd`` changes what some say (None: nothing)."""
        commands, plan, committed = [], self.plan, self.state.committed
        since = plan.first_sample_of(at) - committed.sample
        for peer, (stage, _) in sorted(plan.places.items()):
            report: dict[str, Any] = {
                "generation": plan.generation,
                "step": at,
                "samples": since // len(plan.stages[stage].replicas),
                "digest": f"{stage}@{at}".encode(),
                "base_digest": committed.digests[stage] if committed.digests else b"start",
            }
            if odd.get(peer, {}) is not None:
                commands += self.say(peer, round_done=pb.RoundDone(**{**report, **odd.get(peer, {})}))
        return commands

    @property
    def plan(self) -> Plan:
        assert self.state.plan is not None
        return self.state.plan

    @property
    def seats(self) -> list[list[str]]:
        return [[r.peer for r in s.replicas] for s in self.plan.stages]

    @property
    def donors(self) -> list[list[str]]:
        return [[d.peer for d in s.donors] for s in self.plan.stages]

    def released(self, peer: str) -> bool:
        return view_of(self.rules, self.state, peer).released


def training(*peers: str, rules: Rules = RULES) -> Run:
    """A run of these peers (two at least), past its first lease."""
    run = Run(replace(rules, wait_for=len(peers)))
    run.join(*peers)
    run.ready()
    assert run.state.phase == "training"
    run.now += 2.0  # nobody is joining any more
    return run


def committed(*peers: str, rules: Rules = RULES) -> Run:
    """The same, with a round committed at step 4."""
    run = training(*peers, rules=rules)
    run.train(4)
    run.round(4)
    assert run.state.committed.step == 4
    return run


def leases(commands: list[Any]) -> list[Lease]:
    return [c for c in commands if isinstance(c, Lease)]


def journaled(commands: list[Any], kind: type[ev.Event]) -> list[Any]:
    return [c.event for c in commands if isinstance(c, Journal) and isinstance(c.event, kind)]


def point(mark: Mark, stage: int) -> SavePoint:
    return mark.savepoint(stage, LAYERS[stage])


def stop_point(mark: Mark, stage: int) -> SavePoint:
    first, last = LAYERS[stage]
    return SavePoint(kind="step", generation=mark.generation, step=mark.step, first_layer=first, last_layer=last)


def saved(run: Run, *peers: str) -> list[Any]:
    assert run.state.end is not None
    commands = []
    for peer in peers:
        first, last = LAYERS[run.plan.places[peer][0]]
        message = pb.SavePoint(
            kind="step", generation=run.plan.generation, step=run.state.end, first_layer=first, last_layer=last
        )
        commands += run.say(peer, saved=pb.Saved(generation=run.plan.generation, savepoint=message))
    return commands


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


# Leaving.


def test_a_leaving_peer_closes_the_round_and_is_released_after_it_has_given() -> None:
    run = committed("a", "b", "c", rules=replace(RULES, needs=(StageNeed(work=1.0, memory_gb=1.0),) * 2))
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


def test_a_lost_peer_ends_the_generation_at_once() -> None:
    run = committed("a", "b", "c", "d")
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
    run.now += 15.0
    for peer in "abc":
        run.say(peer, heartbeat=pb.Heartbeat(state="training"))
    commands = run.do(Tick(), later=6.0)
    assert [c.code for c in commands if isinstance(c, Dismiss)] == ["silent"]
    assert "d" not in run.plan.peers and run.plan.generation == 2


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
    assert [c.step for c in run.commands if isinstance(c, Uncommit)] == [4]
    assert run.plan.first_step == 4 and run.state.committed == old and run.state.marks == ()


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
        "a", "b", "c", rules=replace(RULES, needs=(StageNeed(work=1, memory_gb=1), StageNeed(work=9, memory_gb=1)))
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
