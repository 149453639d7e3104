"""What a run survives, with the same weights in the end: a corrupted replica, a stop, a loss, a newcomer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from potluck.coordinator import events, state
from potluck.protocol.errors import DivergedError
from potluck.protocol.frames import Frame, Kind
from potluck.protocol.plan import SavePoint
from potluck.worker.checkpoint import check
from potluck.worker.moments import Coded
from potluck.worker.stage import State, digest


def unbroken(local_run, config, peers):
    ours = local_run(config, home="unbroken")
    ours.join(*peers)
    return ours.finish()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_corrupted_replica_is_found_and_takes_the_state_over_anew(local_run, make_config):
    """Its round is refused, nothing of it is committed, and it starts again from its neighbour's state."""
    config = make_config(steps=8, coordinator={"wait_for": 4})
    ours = local_run(config)

    hits: list[int] = []

    def corrupt(capture, stage, done, *rest, **how):
        if done == 4 and not hits:
            hits.append(done)
            stage.g[5] += 1.0
        return capture(stage, done, *rest, **how)

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.TrainingStarted) and event.step == 0:
            rounds = ours.workers["b"].engine._synchronizer
            rounds.capture = partial(corrupt, rounds.capture)

    ours.on_event = on_event
    ours.join("a", "b", "c", "d")
    ours.finish()
    refused = ours.seen(events.RoundRefused)
    assert [(e.peers, e.why) for e in refused] == [(("b",), "a replica came with other reference weights")]
    assert [e.step for e in ours.seen(events.RolledBack)] == [3]
    assert [e.step for e in ours.seen(events.RoundCommitted)] == list(range(1, 9))
    assert len({(w.engine.stage.first, digest(w.engine.stage.g)) for w in ours.workers.values()}) == 2


@pytest.mark.parametrize(
    "sync",
    [
        {"preset": "dense"},
        {"preset": "dense", "every": 3},
        {"preset": "cocktail", "density": 0.25, "topk": 1.0, "every": 3, "delay": 0},
        {"preset": "diloco", "every": 3, "delay": 0},
        {"preset": "diloco", "every": 4, "fragments": 2, "delay": 0},
        {"preset": "sparseloco", "every": 3, "delay": 0, "chunk": 256},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_to_the_same_weights(local_run, make_config, sync):
    """Stopped between two rounds, all workers and the coordinator's state gone but for what is on disk."""
    config = make_config(steps=8, sync=sync, coordinator={"wait_for": 4})
    peers = ("a", "b", "c", "d")
    whole = unbroken(local_run, config, peers)

    first = local_run(config, home="stopped")
    first.on_event = lambda event: (
        first.put(state.StopAsked()) if isinstance(event, events.RoundCommitted) and event.round == 1 else None
    )
    first.join(*peers)
    first.finish()
    assert first.machine.phase == "stopped"
    stop = first.machine.stop
    assert stop is not None
    assert 0 < stop.step < config.steps

    second = local_run(config, home="stopped")
    second.machine = state.RunState(
        generation=first.machine.generation,
        committed=first.machine.committed,
        stop=stop,
        rounds=first.machine.rounds,
        published=0,
    )
    second.join(*peers)
    second.finish()
    assert first.losses() + second.losses() == whole.losses()
    assert_same(second.weights(), whole.weights())


def test_a_lost_replica_costs_no_committed_work(local_run, make_config):
    """One of two replicas vanishes: the rest goes on without it; every sample index is used once."""
    config = make_config(steps=8, coordinator={"wait_for": 4})
    ours = local_run(config)

    def lose(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted) and event.round == 3:
            ours.on_event = lambda event: None
            ours.kill("d")

    ours.on_event = lose
    ours.join("a", "b", "c", "d")
    ours.finish()
    assert not ours.seen(events.RolledBack)
    assert len(ours.seen(events.Rerouted)) == len(ours.seen(events.PlanIssued)) == 1
    plan = ours.machine.plan
    assert plan is not None
    assert sorted(len(replicas) for replicas in plan.replicas) == [1, 2]
    assert ours.machine.committed.step == config.steps


def test_a_newcomer_takes_the_state_from_a_donor_and_is_used(local_run, make_config):
    config = make_config(
        steps=12, sync={"preset": "cocktail", "density": 0.25, "topk": 1.0, "every": 3}, coordinator={"wait_for": 2}
    )
    ours = local_run(config)
    ours.on_event = lambda event: (
        setattr(ours, "late", True) if isinstance(event, events.RoundCommitted) and event.round == 1 else None
    )
    ours.late = False
    ours.join("a", "b")
    ours.wait(lambda: ours.late)
    ours.join("c", "d")
    ours.finish()
    plan = ours.machine.plan
    assert plan is not None
    assert plan.peers == {"a", "b", "c", "d"}
    assert not ours.seen(events.RoundRefused)
    digests = {(w.engine.stage.first, digest(w.engine.stage.g)) for w in ours.workers.values()}
    assert len(digests) == 2


def test_a_damaged_tensor_from_a_peer_is_refused_and_its_step_done_again(local_run, make_config):
    """No encoder makes a scale that is not finite: the receiver reports it, nothing of it is committed."""
    config = make_config(steps=6, activations={"forward": "int8:tile=32", "backward": "int8:tile=32"})
    ours = local_run(config)
    damaged = []

    def damage(peer, frame, post):
        if frame.header.step == 3 and frame.header.kind != Kind.REDO and not damaged:
            damaged.append(frame.header.kind)
            frame = Frame(frame.header, b"\xff" * len(frame.payload))
        post(peer, frame)

    ours.join("a", "b")
    for worker in ours.workers.values():
        post = worker.links.post
        worker.links.post = lambda peer, frame, post=post: damage(peer, frame, post)
    ours.finish()
    assert damaged
    assert "cannot be decoded" in ours.seen(events.Faulted)[0].what
    assert ours.seen(events.RolledBack)
    assert ours.machine.committed.step == config.steps


def test_a_diverged_run_says_so(local_run, make_config):
    config = make_config(steps=500, activations={"forward": "int8:tile=32", "backward": "int8:tile=32"})
    ours = local_run(config)

    def spoil(sender: str, frame: Frame) -> None:
        """In the middle of a step, again and again."""
        if frame.header.kind == Kind.ACTIVATION and frame.header.step > 1:
            ours.workers[sender].engine.stage.x.fill_(float("nan"))

    ours.on_post = spoil
    ours.join("a", "b")
    with pytest.raises(DivergedError, match="diverged") as caught:
        ours.finish()
    assert "optimizer.lr" in caught.value.hint


def test_numbers_that_were_wrong_once_are_done_again(local_run, make_config):
    """What is not finite may come from a peer or a bad chip: everybody goes back to the last round, and it is gone."""
    config = make_config(steps=6, activations={"forward": "int8:tile=32", "backward": "int8:tile=32"})
    ours = local_run(config)

    def spoil(sender: str, frame: Frame) -> None:
        if frame.header.kind == Kind.ACTIVATION and frame.header.step == 3:  # in the middle of the step
            ours.on_post = lambda sender, frame: None
            ours.workers[sender].engine.stage.x[7] = float("inf")

    ours.on_post = spoil
    ours.join("a", "b")
    ours.finish()
    assert "diverged" in ours.seen(events.Faulted)[0].what
    assert ours.machine.committed.step == config.steps


@pytest.mark.parametrize(
    ("name", "why"), [("v", "negative"), ("g", "not the run's"), ("m", "finite"), ("unsent", "size")]
)
def test_a_state_is_checked_before_it_is_used(name, why):
    """The digest is of ``g`` only; negative means of squares would make every weight NaN in the next step."""
    vectors = {n: torch.ones(10) for n in ("g", "m", "v", "unsent")}
    point = SavePoint(kind="round", generation=1, step=2, first_layer=0, last_layer=1, digest=digest(vectors["g"]))
    good = State(point=point, updates=2, **vectors)
    check(good, 10)
    coded = Coded(torch.zeros(10, dtype=torch.uint8), torch.ones(1), signed=True)
    check(replace(good, m=coded), 10)
    for scale in (torch.ones(2), -torch.ones(1), torch.full((1,), torch.nan)):
        with pytest.raises(ValueError, match="moments"):
            check(replace(good, m=replace(coded, scales=scale)), 10)
    wrong = {"v": -torch.ones(10), "g": torch.zeros(10), "m": torch.full((10,), torch.inf), "unsent": torch.ones(11)}
    with pytest.raises(ValueError, match=why):
        check(replace(good, **{name: wrong[name]}), 10)
