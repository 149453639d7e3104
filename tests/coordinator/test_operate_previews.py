"""What an order would do, in words with numbers, held to what it then does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scripted_run import RULES, Run, committed, journaled, training

from potluck.coordinator import events as ev
from potluck.coordinator.operate import Scale, preview, spell_bytes, spell_seconds
from potluck.coordinator.pace import Pace
from potluck.coordinator.state import Order, Uploaded
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import ModelConfig, Sync
from potluck.protocol.plan import Shape

SHAPE = Shape.of(ModelConfig(d_model=64, layers=4, heads=4, rotary_dim=16, seq_len=32), 1000)
SCALE = Scale(shape=SHAPE)
STATE_NBYTES = [SHAPE.size(*layers) * 12 for layers in ((0, 2), (2, 4))]  # G, and AdamW's m and v, in fp32


def told(run: Run, action: Any, scale: Scale = SCALE, **more: Any) -> str:
    before = run.state
    found = preview(run.rules, run.state, scale, Order(action=action, **more))
    assert run.state is before
    return found.text if found.objection is None else f"[{found.objection.text}] {found.text}"


def test_a_pause_tells_how_many_steps_are_open_and_where_it_stands() -> None:
    run = committed("a", "b")
    run.state = replace(run.state, pace=Pace())
    assert told(run, "pause").startswith(
        "2 leased steps are still done, then a round closes over 12 samples: the run stands still at step 6. "
    )
    run.say("a", step_done=done(run, 4))
    run.say("b", step_done=done(run, 4))
    assert "2 leased steps are still done, then a round closes over 18 samples" in told(run, "pause")
    run.state = replace(run.state, pace=replace(run.state.pace, count=9, mean_seconds=30.0))
    assert "stands still at step 7, in about 60 seconds." in told(run, "pause")
    run.do(Order(action="pause"))
    run.train(7)
    run.round(7)
    run.ready()
    assert run.state.until == 7 and told(run, "resume") == "New steps are leased again, from step 7."


def test_a_pause_of_a_run_that_has_not_begun() -> None:
    run = Run()
    assert told(run, "pause").startswith("No step is leased. Plans are still made, nothing is trained.")


def test_a_drain_tells_who_takes_the_stage_over_and_for_how_many_bytes() -> None:
    """Three peers, two stages: without the one that is alone, one of the pair must fetch the other stage."""
    run = committed("a", "b", "c")
    [alone] = min(run.seats, key=len)
    stage = run.plan.places[alone][0]
    nbytes = STATE_NBYTES[stage]
    text = told(run, "drain", peer=alone)
    assert f"hands stage {stage} over; a round closes at step 6." in text
    seconds = spell_seconds(nbytes / 6.25e6)
    assert f"1 worker takes over a stage ({stage}): {spell_bytes(nbytes)} to fetch, about {seconds}." in text
    assert f"Stage {1 - stage} is left with one replica." in text
    run.do(Order(action="drain", peer=alone))
    run.train(6)
    run.round(6)
    assert [p for p in run.seats[stage] if p != alone] == run.seats[stage] != []


def test_measured_lines_make_the_time_longer() -> None:
    run = committed("a", "b", "c")
    [alone] = min(run.seats, key=len)
    others = [p for p in "abc" if p != alone]
    slow = Scale(shape=SHAPE, rates={(alone, p): 1000.0 for p in others})
    nbytes = STATE_NBYTES[run.plan.places[alone][0]]
    assert f"about {spell_seconds(nbytes / 1000)}" in told(run, "drain", slow, peer=alone)
    assert nbytes / 1000 > 100


def test_an_outer_momentum_is_fetched_too() -> None:
    rules = replace(RULES, sync=Sync(every=4, outer_momentum=0.9))
    assert Scale(shape=SHAPE).state_nbytes(rules, (0, 2)) == SHAPE.size(0, 2) * 16


def test_a_drain_of_a_replica_moves_nothing_and_names_the_quorum() -> None:
    run = committed("a", "b", "c", "d", rules=replace(RULES, quorum=2))
    text = told(run, "drain", peer=run.seats[1][0])
    assert "No stage has to be fetched." in text
    assert "Stage 1 is left with 1 of the 2 replicas that a round needs: nothing is leased for up to 30 seconds" in text


def test_a_drain_that_leaves_nobody_says_that_the_run_waits() -> None:
    run = committed("a", "b")
    text = told(run, "drain", peer="a")
    assert text.startswith("[the run would wait: 1 more worker must join: there are 2 stages]")
    assert text.endswith("Then the run waits: 1 more worker must join: there are 2 stages.")


def test_who_has_no_stage_is_let_go_at_once() -> None:
    run = committed("a", "b")
    run.join("c")
    assert told(run, "drain", peer="c") == "C has no stage: it is let go at once."
    assert told(run, "ban", peer="c").endswith("It has no stage.")


def test_a_ban_of_a_replica_tells_what_is_done_again() -> None:
    run = committed("a", "b", "c")
    victim = max(run.seats, key=len)[0]
    stage = run.plan.places[victim][0]
    samples = 2 * run.plan.samples_per_step
    text = told(run, "ban", peer=victim)
    assert f"The other replica of stage {stage} takes its part over, and of {samples} samples do it again." in text
    assert "Nothing has to be fetched." in text
    assert journaled(run.do(Order(action="ban", peer=victim)), ev.Rerouted)


def test_a_ban_of_the_only_holder_tells_that_the_run_falls_back() -> None:
    run = committed("a", "b")
    run.join("c")
    text = told(run, "ban", peer="a")
    assert text.startswith("[only A holds stage 0 as of step 4: the run would fall back or wait] Only A holds stage 0")
    assert "Everybody goes back to step 4: 12 samples are trained again." in text


def test_a_checkpoint_tells_its_step_and_its_bytes() -> None:
    run = committed("a", "b")
    run.do(Uploaded(step=0, path="x"))
    size = spell_bytes(SHAPE.size(0, 4) * 4)
    assert told(run, "checkpoint") == f"The model of the round at step 8 is published: {size} to upload."
    rare = training("a", "b", rules=replace(RULES, sync=Sync(every=100)))
    rare.do(Uploaded(step=0, path="x"))
    assert told(rare, "checkpoint") == f"A round is closed at step 2, and its model published: {size} to upload."
    rare.do(Order(action="checkpoint"))
    assert rare.state.end == 2


def test_units() -> None:
    assert [spell_bytes(n) for n in (999, 1500, 21_000_000, 123_400_000, 2.1e9, 4e12)] == [
        *("999 B", "1.5 kB", "21 MB", "123 MB", "2.1 GB", "4 TB"),
    ]
    assert [spell_seconds(s) for s in (0.1, 1, 59.6, 130, 7200)] == [
        *("1 second", "1 second", "60 seconds", "2 minutes", "2 hours"),
    ]


def done(run: Run, step: int) -> Any:
    return pb.StepDone(generation=run.plan.generation, step=step, loss_sum=2.0, targets=1)
