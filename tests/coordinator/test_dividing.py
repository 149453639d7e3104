"""The layers are divided anew: when, from what, what is agreed first, and what it can go back to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_run import LAYERS, RULES, Run, journaled

from potluck.coordinator import events as ev
from potluck.coordinator.assignment import StageNeed
from potluck.coordinator.dividing import LOOK_SECONDS
from potluck.coordinator.planning import best_division
from potluck.coordinator.resume import keep, resumed
from potluck.coordinator.standstill import shifted
from potluck.coordinator.state import Division, Gone, Member, Remember, RunState, Tick
from potluck.coordinator.store import Store
from potluck.coordinator.views import view_of
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan


def division(*layers: tuple[int, int]) -> Division:
    needs = (StageNeed(work=1.0 * (b - a), memory_gb=1.0 * (b - a)) for a, b in layers)
    return Division(layers=layers, needs=tuple(needs))


TWO, FOUR = division(*LAYERS), division((0, 1), (1, 2), (2, 3), (3, 4))
RANGE = replace(
    RULES,
    divisions=(division((0, 4)), TWO, division((0, 1), (1, 2), (2, 4)), FOUR),
    divide_seconds=20.0,
    lease_seconds=1e4,
    silence_seconds=1e6,
    patience_seconds=30.0,
    prepare_seconds=1e4,
)


def begun(*peers: str, memory_gb: float = 2.0) -> Run:
    """A run of two stages, each of two layers, with a round committed at step 4."""
    run = Run(replace(RANGE, wait_for=len(peers)))
    run.join(*peers, memory_gb=memory_gb)
    run.ready()
    run.now += 2.0
    run.train(4)
    run.round(4)
    assert run.plan.layers == LAYERS and run.state.committed.step == 4
    return run


def divided(run: Run, *peers: str, memory_gb: float = 1.0) -> list[Any]:
    """Small workers join, for whom the stages are too large; the generation closes, and the next has four stages."""
    run.join(*peers, memory_gb=memory_gb)
    commands = look(run, 30.0)
    assert run.state.closing == "round" and run.state.end is not None
    commands += run.train(run.state.end)
    return [*commands, *run.round(run.state.end)]


def look(run: Run, seconds: float) -> list[Any]:
    return [c for _ in range(int(seconds / LOOK_SECONDS)) for c in run.do(Tick(), later=LOOK_SECONDS)]


def ready(run: Run, **odd: bytes) -> list[Any]:
    commands = []
    for peer, (stage, _) in sorted(run.plan.places.items()):
        digest = odd.get(peer, f"new {stage}".encode())
        commands += run.say(peer, ready=pb.Ready(generation=run.plan.generation, digest=digest))
    return commands


def members(*memory_gb: float) -> list[Member]:
    return [Member(peer=f"p{i}", name=f"p{i}", memory_gb=gb) for i, gb in enumerate(memory_gb)]


@pytest.mark.parametrize(
    ("memory_gb", "stages"),
    [((4.0,), 1), ((2.0, 2.0), 2), ((4.0, 4.0), 1), ((2.0, 1.0, 1.0), 3), ((1.0,) * 4, 4), ((2.0, 2.0, 1.0, 1.0), 4)],
)
def test_as_few_stages_as_fit_unless_more_are_clearly_faster(memory_gb: tuple[float, ...], stages: int) -> None:
    found = best_division(RANGE, members(*memory_gb))
    assert found is not None and len(found.layers) == stages
    assert best_division(RANGE, members(1.0, 1.0)) is None


def test_a_run_begins_with_the_division_that_suits_its_workers() -> None:
    run = Run(replace(RANGE, wait_for=4))
    run.join(*"abcd", memory_gb=1.0)
    assert run.plan.layers == FOUR.layers and not run.plan.parts


def test_another_division_must_stay_better_for_a_while() -> None:
    run = begun("a", "b")
    run.join("c", "d", memory_gb=1.0)
    look(run, 15.0)
    assert run.state.redivide is not None and not run.state.redivide.begun and not run.state.closing
    run.do(Gone(peer="c"))
    run.do(Gone(peer="d"))
    look(run, 30.0)
    assert run.state.redivide is None and not run.state.closing


def test_a_plan_made_meanwhile_does_not_begin_the_wait_anew() -> None:
    run = begun("a", "b")
    run.join("c", "d", memory_gb=1.0)
    look(run, 15.0)
    since = run.state.redivide.since  # type: ignore[union-attr]
    run.say("a", fault=pb.Fault(generation=1, text="it broke"))
    assert run.plan.generation == 2 and run.state.redivide is not None and run.state.redivide.since == since
    run.ready()
    look(run, 10.0)
    assert run.state.redivide.begun


def test_the_next_plan_says_what_its_stages_are_made_of() -> None:
    run = begun("a", "b")
    old = run.seats
    commands = divided(run, "c", "d")
    plan, committed = run.plan, run.state.committed
    [event] = journaled(commands, ev.Redivided)
    assert (event.before, event.after) == (LAYERS, FOUR.layers) and "1-1" in event.text
    assert plan.layers == FOUR.layers and plan.peers == set("abcd") and plan.first_step == committed.step
    assert tuple((p.first_layer, p.last_layer) for p in plan.parts) == LAYERS
    assert [[d.peer for d in p.donors] for p in plan.parts] == old
    assert [p.digest for p in plan.parts] == list(committed.digests)
    assert {run.seats[0][0], run.seats[1][0]} & set(old[0]), "who holds the layers stays at some of them"
    assert Plan.from_proto(plan.to_proto()) == plan


def test_the_round_is_known_in_its_new_stages_once_all_agree() -> None:
    run = begun("a", "b")
    divided(run, "c", "d")
    before = run.state.committed
    ready(run)
    committed = run.state.committed
    assert run.state.phase == "training" and run.state.undivided == before
    assert committed.digests == (b"new 0", b"new 1", b"new 2", b"new 3")
    assert (committed.step, committed.sample, committed.generation) == (before.step, before.sample, before.generation)
    for peer, (stage, _) in run.plan.places.items():
        assert committed.savepoint(stage, FOUR.layers[stage]) in run.state.members[peer].savepoints
    at = before.step + 4
    run.train(at)
    run.round(at)
    assert run.state.committed.step == at and run.state.undivided is None
    assert run.state.marks[0] == before, "older rounds are as they are on the disk"


def test_replicas_of_a_new_stage_that_differ_do_not_begin() -> None:
    run = begun("a", "b")
    divided(run, "c", "d", "e", "f", "g", "h")
    before = run.state.committed
    stage = next(peers for peers in run.seats if len(peers) > 1)
    commands = ready(run, **{stage[0]: b"other"})
    assert journaled(commands, ev.RoundRefused) and journaled(commands, ev.DivisionFailed)
    assert not journaled(commands, ev.RolledBack) and run.state.committed == before
    assert run.plan.layers == LAYERS and not run.plan.parts
    look(run, 15.0)
    assert run.state.redivide is None, "not again at once"


def test_who_cannot_fetch_leaves_the_old_stages_as_they_were() -> None:
    run = begun("a", "b")
    old = run.seats
    divided(run, "c", "d")
    before, generation = run.state.committed, run.plan.generation
    commands = run.do(Gone(peer="c"))
    assert journaled(commands, ev.DivisionFailed) and not journaled(commands, ev.RolledBack)
    assert run.plan.generation == generation + 1 and run.state.committed == before
    assert run.seats == old and run.donors == old


@pytest.mark.parametrize("who", ["all", "old"])
def test_until_another_round_it_can_go_back_to_the_old_stages(who: str) -> None:
    """Whoever had an old stage has it still; the new ones are gone on from as long as all are held."""
    run = begun("a", "b")
    divided(run, "c", "d")
    ready(run)
    lost = {p for p, (stage, _) in run.plan.places.items() if stage == 3}
    lost = lost if who == "all" and not lost & {"a", "b"} else {p for p in "cd"}
    before = run.state.undivided
    for peer in lost:
        run.do(Gone(peer=peer))
    run.do(Tick(), later=40.0)
    run.do(Tick(), later=40.0)
    assert run.plan.first_step == before.step, run.state.note  # type: ignore[union-attr]
    ready_again = [run.say(p, ready=pb.Ready(generation=run.plan.generation, digest=b"x")) for p in run.plan.peers]
    assert ready_again and run.state.phase == "training"
    assert run.state.committed == before and run.state.undivided is None


def test_a_division_that_nobody_can_hold_any_more_is_left_after_patience() -> None:
    run = Run(replace(RANGE, wait_for=4))
    run.join("a", memory_gb=2.0)
    run.join("b", memory_gb=2.0)
    run.join("c", "d", memory_gb=1.0)
    run.ready()
    run.now += 2.0
    run.train(4)
    run.round(4)
    assert run.plan.layers == FOUR.layers
    leaving = [p for p in "cd" if p in run.plan.peers]
    for peer in leaving:
        run.say(peer, leaving=pb.Leaving())
    assert run.state.end is not None
    run.train(run.state.end)
    commands = run.round(run.state.end)
    [event] = journaled(commands, ev.Redivided)
    assert event.after == LAYERS and "nobody is left" in event.text, "at once: who leaves gives what it has"
    assert not any(run.released(p) for p in leaving), "they give it first"
    assert run.plan.peers == {"a", "b"} and set(leaving) <= {d.peer for p in run.plan.parts for d in p.donors}


def test_a_fixed_number_of_stages_is_never_changed() -> None:
    run = begun("a", "b")
    run.rules = replace(run.rules, divisions=(TWO,))
    run.join("c", "d", memory_gb=2.0)
    look(run, 100.0)
    assert run.state.redivide is None


def test_keepers_are_told_of_no_round_that_their_stages_do_not_lead_on_from() -> None:
    run = begun("a", "b")
    run.rules = replace(run.rules, keepers=1)
    divided(run, "c", "d")
    assert all(not keep.rounds for p in "abcd" for keep in view_of(run.rules, run.state, p).keep)
    ready(run)
    told = [keep for p in "abcd" for keep in view_of(run.rules, run.state, p).keep]
    assert told and all([r.digest for r in keep.rounds] == [f"new {keep.stage}".encode()] for keep in told)


def test_a_restart_goes_on_with_the_division_in_force(tmp_path: Path) -> None:
    run = begun("a", "b")
    divided(run, "c", "d")
    before = run.state
    ready(run)
    store = Store(tmp_path / "run.sqlite")
    kept = [*keep(RunState(), before), *keep(before, run.state)]
    store.write([Remember(generation=run.state.generation, stop=None), *kept], 1.0)
    disk = RunState(since=5.0, generation=run.state.generation, committed=before.committed, marks=before.marks)
    again = resumed(run.rules, disk, store)
    assert again.committed == run.state.committed and again.undivided == before.committed
    assert again.plan == run.plan and again.phase == "training"
    store.close()


def test_a_standstill_takes_no_time() -> None:
    run = begun("a", "b")
    run.join("c", "d", memory_gb=1.0)
    look(run, 15.0)
    run.state = shifted(run.state, 1000.0)
    run.now += 1000.0
    look(run, 5.0)
    assert not run.state.closing
    look(run, 10.0)
    assert run.state.closing == "round"
