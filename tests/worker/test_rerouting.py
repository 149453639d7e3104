"""A replica dies in mid-step or mid-round and the others of its stage do its work: nothing lost, nothing twice."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from potluck.coordinator import events
from potluck.protocol.frames import Frame, Kind
from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.worker.engine import Engine
from potluck.worker.mailbox import Fenced
from potluck.worker.pipeline import Lane, Pipeline
from potluck.worker.plan import Local, View
from potluck.worker.sync import Synchronizer

CREW = tuple("abcdef")


class Account:
    """Which microbatches are in the committed weights of each stage, by what the replicas themselves did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.local: dict[str, list[Lane]] = {}  # trained since the last capture
        self.captured: dict[tuple[str, int, int], list[Lane]] = {}  # peer, step, attempt
        backward, capture = Pipeline._backward, Synchronizer.capture

        def counted(pipeline: Pipeline, lane: Lane, frame: Frame | None) -> None:
            backward(pipeline, lane, frame)
            self.local.setdefault(pipeline.seat.peer, []).append(lane)

        def captured(synchronizer: Synchronizer, stage: Any, done: int, *more: Any, **options: Any) -> Any:
            peer = synchronizer.seat.peer
            self.captured[peer, done, synchronizer.seat.plan.attempt] = list(self.local.get(peer, []))
            return capture(synchronizer, stage, done, *more, **options)

        monkeypatch.setattr(Pipeline, "_backward", counted)
        monkeypatch.setattr(Synchronizer, "capture", captured)

    def check(self, plan: Any, step: int) -> None:
        """Of every stage: the living replicas' microbatches up to the last round are all there are, each once."""
        for stage, replicas in enumerate(plan.replicas):
            seen = Counter(lane for r in replicas for lane in self.captured[r.peer, step, plan.attempt])
            wanted = {Lane(at, m) for at in range(step) for m in range(plan.microbatches_per_step)}
            missing = wanted - seen.keys()  # in earlier rounds of who is lost since
            assert all(lane.step < max(lost.since for lost in plan.lost) for lane in missing), (stage, missing)
            assert max(seen.values()) == 1 and seen.keys() <= wanted, stage


class Deaths:
    """Replicas that die as they are about to send their n-th frame of a kind in training: (stage, kind, n)."""

    def __init__(self, ours: Any, *planned: tuple[int, Kind, int]) -> None:
        self.ours, self.planned, self.victims = ours, planned, dict[str, tuple[Kind, int]]()
        self.sent = Counter[tuple[str, Kind]]()
        ours.on_event, ours.on_post = self.choose, self.look

    def choose(self, event: events.Event) -> None:
        if isinstance(event, events.TrainingStarted) and not self.victims:
            replicas = [list(stage) for stage in self.ours.machine.plan.replicas]
            self.victims = {replicas[stage].pop().peer: (kind, n) for stage, kind, n in self.planned}

    def look(self, sender: str, frame: Frame) -> None:
        kind = frame.header.kind
        self.sent[sender, kind] += 1
        if self.victims.get(sender) == (kind, self.sent[sender, kind]) and sender in self.ours.workers:
            self.ours.kill(sender)


STEPS = 9
SENDERS = {Kind.ACTIVATION: (0, 1), Kind.GRADIENT: (1, 2), Kind.SHARD: (0, 1, 2), Kind.MEAN: (0, 1, 2)}
ONE = [
    ((stage, kind, n),)
    for kind, stages in SENDERS.items()
    for stage in stages
    for n in (1, 3 + 3 * (kind < Kind.SHARD))
]
TWO = [
    ((0, Kind.ACTIVATION, 4), (1, Kind.GRADIENT, 4)),
    ((1, Kind.ACTIVATION, 5), (2, Kind.GRADIENT, 5)),
    ((2, Kind.GRADIENT, 1), (2, Kind.MEAN, 2)),
    ((0, Kind.SHARD, 1), (0, Kind.ACTIVATION, 12)),
    ((1, Kind.MEAN, 2), (0, Kind.MEAN, 2)),
]


@pytest.mark.parametrize(("every", "delay"), [(1, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("deaths", [*ONE, *TWO], ids=lambda d: "+".join(f"{k.name.lower()}{n}@{s}" for s, k, n in d))
def test_replicas_die_as_they_send(local_run, make_config, monkeypatch, deaths, every, delay):
    crew = CREW if len({stage for stage, *_ in deaths}) == len(deaths) else CREW + tuple("ghi")
    config = make_config(
        steps=STEPS,
        model={"layers": 3},
        pipeline={"stages": 3, "microbatches": 3},
        sync={"preset": "dense", "every": every, "delay": delay},
        coordinator={"wait_for": len(crew)},
    )
    account, ours = Account(monkeypatch), local_run(config)
    plan = Deaths(ours, *deaths)
    ours.join(*crew)
    ours.finish()
    assert ours.machine.committed.step == STEPS
    assert not ours.seen(events.RolledBack)
    dead = [peer for peer, (kind, n) in plan.victims.items() if plan.sent[peer, kind] >= n]
    assert len(dead) == len(ours.seen(events.Rerouted)) > 0
    account.check(ours.machine.plan, STEPS)


def test_who_is_lost_applies_nothing_that_the_others_commit_without_it() -> None:
    """Their newest round is a later one, and the one on its way here is void."""
    replicas = (Replica(peer="a"), Replica(peer="b"))
    plan = Plan(
        generation=1,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        stages=(StagePlan(first_layer=0, last_layer=1, replicas=replicas),),
        microbatches=1,
        microbatch_size=1,
    )
    view = View(phase="training", plan=plan.without("b", since=0, void=4), committed=9)
    for peer, applies in (("a", True), ("b", False)):
        engine: Any = SimpleNamespace(
            views=SimpleNamespace(newest=(view, 1), closed=False),
            config=SimpleNamespace(peer=peer),
            local=Local(peer=peer, generation=1, attempt=1),
        )
        if applies:
            assert Engine._is_committed(engine, 4)
        else:
            with pytest.raises(Fenced):
                Engine._is_committed(engine, 4)
