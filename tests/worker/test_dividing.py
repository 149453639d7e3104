"""The layers are divided anew while a run goes on: every weight and moment stays what it was."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch
from plain_loop import adamw, stock_model, train_step

from potluck.coordinator import dividing, events
from potluck.coordinator.state import Redivide, Said, Tick
from potluck.protocol import control_pb2 as pb
from potluck.protocol.frames import Kind
from potluck.protocol.plan import SavePoint, Shape
from potluck.worker.data import Dataset
from potluck.worker.origin import divided
from potluck.worker.stage import Stage, State, digest


def running(local_run, make_config, monkeypatch, steps: int, wanted, **changes):
    """A run whose coordinator finds ``wanted(members)`` stages best, from two workers on."""
    config = make_config(
        steps=steps,
        pipeline={"stages": {"min": 2, "max": 4}},
        coordinator={"wait_for": 2, "patience_seconds": 0.0, "prepare_seconds": 1e6},
        **changes,
    )
    ours = local_run(config)
    ours.rules = replace(ours.rules, divide_seconds=0.0)

    def better(rules, state):
        count = wanted(len(state.members))
        same = count == len(state.plan.stages)
        return None if same else Redivide(stages=count, since=0.0, why="a test wants it")

    monkeypatch.setattr(dividing, "better_division", better)
    monkeypatch.setattr(dividing, "LOOK_SECONDS", 0.0)
    ours.join("a", "b")
    ours.wait(lambda: ours.machine.rounds >= 1)
    return ours


def leave(ours, peer: str) -> None:
    ours.put(Said(peer=peer, report=pb.Up(seq=1, leaving=pb.Leaving())))


def look(ours, condition) -> None:
    """Ticks until it holds: a division is looked for at ticks, and only while a generation trains."""
    for _ in range(1200):
        ours.put(Tick())
        if condition():
            return
        time.sleep(0.05)
    ours.wait(lambda: False)


def is_at(ours, stages: int) -> bool:
    plan = ours.machine.plan
    return plan is not None and len(plan.stages) == stages and ours.machine.committed.generation == plan.generation


@pytest.mark.parametrize("keepers", [0, 2])
def test_two_stages_then_three_and_back_equal_the_plain_loop(
    local_run, make_config, monkeypatch, corpus_folder, keepers
):
    steps = 40
    checkpoint = {"keepers": keepers}
    ours = running(local_run, make_config, monkeypatch, steps, lambda n: min(n, 3), checkpoint=checkpoint)
    ours.join("c")
    ours.workers["c"].states.joiner.follow = lambda prospect: None  # a newcomer's moments may be some rounds old
    look(ours, lambda: is_at(ours, 3))
    leave(ours, "c")
    ours.wait(lambda: is_at(ours, 2))
    ours.finish()
    first, second = ours.seen(events.Redivided)
    assert (len(first.before), len(first.after), len(second.after)) == (2, 3, 2)
    assert not ours.seen(events.RolledBack) and not ours.seen(events.RoundRefused)

    folder, manifest = corpus_folder
    config = ours.config
    data, model = Dataset(folder), stock_model(config, manifest)
    optimizer = adamw(model, config)
    per_step = config.pipeline.microbatches * config.pipeline.microbatch_size
    losses = []
    for step in range(steps):
        loss_sum, targets = train_step(model, optimizer, data, config, step, step * per_step)
        losses.append(loss_sum / targets)
    assert ours.losses() == losses
    weights = ours.weights()
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_replicas_of_new_stages_agree_and_rounds_stay_compressed(local_run, make_config, monkeypatch):
    sync = {"preset": "potluck", "every": 4, "delay": 1}
    ours = running(local_run, make_config, monkeypatch, 60, lambda n: 2 if n < 6 else 3, sync=sync)
    ours.join("c", "d", "e", "f")
    look(ours, lambda: is_at(ours, 3))
    ours.finish()
    assert not ours.seen(events.RoundRefused) and not ours.seen(events.RolledBack)
    assert [len(stage) for stage in ours.machine.plan.replicas] == [2, 2, 2]
    assert len({(w.engine.stage.first, digest(w.engine.stage.g)) for w in ours.workers.values()}) == 3


def test_who_dies_while_it_fetches_costs_nothing(local_run, make_config, monkeypatch):
    """Everybody goes back to the stages as they were, without a committed round lost."""
    ours = running(local_run, make_config, monkeypatch, 40, lambda n: min(n, 3))
    committed = []

    def posted(sender: str, frame) -> None:
        plan = ours.machine.plan
        if frame.header.kind == Kind.STATE and plan is not None and plan.parts and "c" in ours.workers:
            committed.append(ours.machine.committed)
            ours.kill("c")

    ours.on_post = posted
    ours.join("c")
    ours.workers["c"].states.joiner.follow = lambda prospect: None
    look(ours, lambda: bool(committed))
    ours.wait(lambda: is_at(ours, 2) and ours.machine.committed.step > committed[0].step)
    ours.finish()
    assert len(ours.seen(events.DivisionFailed)) == 1
    assert not ours.seen(events.RolledBack) and not ours.seen(events.RoundRefused)
    assert ours.machine.committed.step == 40


def test_replicas_that_make_different_stages_do_not_begin(local_run, make_config, monkeypatch):
    """The new stages' digests are agreed before anything is trained on them."""
    failed = []
    ours = running(local_run, make_config, monkeypatch, 40, lambda n: 2 if n < 6 or failed else 3)
    ours.on_event = lambda event: failed.append(event) if isinstance(event, events.DivisionFailed) else None
    ours.join("c", "d", "e", "f")
    worker = ours.workers["f"]
    report = worker.report

    def lies(**body) -> None:
        if "ready" in body and ours.machine.plan is not None and ours.machine.plan.parts:
            body["ready"].digest = b"wrong"
        report(**body)

    worker.report = lies
    look(ours, lambda: bool(failed))
    assert ours.seen(events.RoundRefused)
    ours.finish()
    assert ours.machine.committed.step == 40 and not ours.seen(events.RolledBack)


@pytest.mark.parametrize("cut", [[0, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_a_divided_state_has_every_layer_as_it_was(make_config, cut):
    config = make_config()
    shape = Shape.of(config.model, 300)

    def state(first: int, last: int, *, moments: bool = True) -> State:
        stage = Stage(config, 300, first, last)
        assert stage.size == shape.size(first, last)
        a, b = shape.start(first), shape.start(last)
        whole = torch.arange(a, b, dtype=torch.float32)
        return State(
            point=SavePoint(kind="round", generation=1, step=2, first_layer=first, last_layer=last),
            g=stage.g.clone(),
            m=whole if moments else None,
            v=whole + 0.5 if moments else None,
            updates=2 if moments else 0,
            x=stage.g + 1 if first == 0 else None,
        )

    old = [state(0, 2), state(2, 4)]
    whole = Stage(config, 300, 0, 4).g
    for first, last in itertools.pairwise(cut):
        parts = [s for s in old if s.point.first_layer < last and first < s.point.last_layer]
        found = divided(parts, (first, last), shape)
        a, b = shape.start(first), shape.start(last)
        assert torch.equal(found.g, whole[a:b]) and found.point.digest == digest(found.g)
        assert found.m is not None and found.v is not None and found.updates == 2
        assert torch.equal(found.m, torch.arange(a, b, dtype=torch.float32)) and torch.equal(found.v, found.m + 0.5)
        if first == 0:
            assert found.x is not None
            ours = min(b, shape.start(2)) - a
            assert torch.equal(found.x[:ours], found.g[:ours] + 1) and torch.equal(found.x[ours:], found.g[ours:])
    mixed = divided([state(0, 2), state(2, 4, moments=False)], (0, 4), shape)
    assert mixed.m is not None and mixed.updates == 2 and not mixed.m[shape.start(2) :].any()
    bare = divided([state(0, 2, moments=False), state(2, 4, moments=False)], (1, 3), shape)
    assert bare.m is None and bare.v is None and bare.updates == 0
