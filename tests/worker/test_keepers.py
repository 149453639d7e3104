"""Stages outlive their replicas: keepers do the committed rounds again, and a stage goes on elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from potluck.coordinator import events, state
from potluck.protocol.frames import Kind
from potluck.worker import keeper as keepers
from potluck.worker.moments import dense
from potluck.worker.stage import Stage, digest

KEEP = {"keepers": 2}
SYNCS = [
    {"preset": "dense"},
    {"preset": "potluck", "every": 4, "delay": 1},
    {"preset": "diloco", "every": 3, "delay": 1},
    {"preset": "sparseloco", "every": 3, "delay": 0, "chunk": 256},
]


def kill(ours, *peers: str) -> None:
    """They vanish without a word, all at once."""
    for peer in peers:
        ours.cut_off(peer)
    for peer in peers:
        ours.put(state.Gone(peer=peer))


def replicas(ours, stage: int) -> list[str]:
    return [r.peer for r in ours.machine.plan.stages[stage].replicas]


def has_caught_up(ours, stages: Sequence[int]) -> bool:
    """Whether somebody has told the coordinator that it keeps the newest round of each of these stages."""
    mark = ours.machine.committed
    wanted = [mark.savepoint(s, ours.rules.divisions[0].layers[s]) for s in stages]
    return all(any(w in m.held for m in ours.machine.members.values()) for w in wanted)


class Killer:
    """Kills every replica of a stage once so many rounds are committed and kept."""

    def __init__(self, ours, stage: int, rounds: int) -> None:
        self.ours, self.stage, self.rounds = ours, stage, rounds
        self.killed: list[str] = []
        self.at = None
        self.put, ours.put = ours.put, self.after

    def after(self, what: state.Input) -> None:
        self.put(what)
        ours = self.ours
        with ours._lock:
            plan = ours.machine.plan
            due = ours.machine.rounds >= self.rounds and ours.machine.phase == "training" and not self.killed
            if due and plan is not None and has_caught_up(ours, [self.stage]):
                self.killed = replicas(ours, self.stage)
                self.at = ours.machine.committed
                self.digest = self.at.digests[self.stage]
                kill(ours, *self.killed)


@pytest.mark.parametrize("sync", SYNCS, ids=str)
@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_without_replicas_goes_on_elsewhere_and_no_round_is_lost(local_run, make_config, sync, stage):
    """Both replicas of a stage are killed; one of the others' takes it over from its redo log."""
    config = make_config(steps=24, sync=sync, checkpoint=KEEP, coordinator={"wait_for": 4, "patience_seconds": 1e6})
    ours = local_run(config)
    killer = Killer(ours, stage, 3)
    starts: list[tuple[int, bytes]] = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.TrainingStarted) and killer.killed:
            taker = ours.workers[replicas(ours, stage)[0]].engine.stage
            starts.append((event.step, digest(taker.g)))
            assert (taker.updates, taker.steps) == (0, event.step)  # said honestly: the moments begin anew
            assert not dense(taker.moments.copies()[0]).any()

    ours.on_event = on_event
    ours.join("a", "b", "c", "d")
    ours.finish()
    assert len(killer.killed) == 2
    assert starts[0] == (killer.at.step, killer.digest)
    assert [e.step for e in ours.seen(events.RolledBack)] == [killer.at.step]
    assert ours.machine.committed.step == config.steps
    steps = [e.step for e in ours.seen(events.RoundCommitted)]
    assert steps == sorted(set(steps)), "a committed round was done again"


def test_a_newcomer_takes_a_stage_over_from_a_keeper(local_run, make_config):
    """It never saw a round of it."""
    config = make_config(steps=24, sync=SYNCS[1], checkpoint=KEEP, coordinator={"wait_for": 2, "patience_seconds": 1e6})
    ours = local_run(config)
    killer = Killer(ours, 1, 3)
    ours.join("a", "b")
    ours.wait(lambda: bool(killer.killed))
    (left,) = ours.workers
    ours.join("new")
    ours.finish()
    assert ours.machine.committed.step == config.steps
    assert replicas(ours, 0) == [left]
    assert replicas(ours, 1) == ["new"]
    assert all(e.step == killer.at.step for e in ours.seen(events.RolledBack))


def test_without_keepers_the_same_loss_is_waited_out(local_run, make_config):
    config = make_config(
        steps=12,
        sync={"preset": "dense", "every": 2},
        checkpoint={"keepers": 0},
        coordinator={"wait_for": 4, "patience_seconds": 1e6},
    )
    ours = local_run(config)
    ours.join("a", "b", "c", "d")
    ours.wait(lambda: ours.machine.rounds >= 2)
    with ours._lock:
        kill(ours, *replicas(ours, 1))
    ours.wait(lambda: ours.machine.phase == "waiting" and "must come back" in ours.machine.note)


def test_a_keeper_that_missed_a_round_fetches_the_next(local_run, make_config, monkeypatch):
    """What an owner sent it is lost on the way: it keeps nothing wrong, and is whole again later."""
    monkeypatch.setattr(keepers, "LATE_SECONDS", 0.0)
    config = make_config(steps=30, sync=SYNCS[1], checkpoint=KEEP, coordinator={"wait_for": 4})
    ours = local_run(config)
    ours.join("a", "b", "c", "d")
    lost = []
    for worker in ours.workers.values():
        keeper = worker.states.keeper
        put = keeper.put

        def losing(peer, frame, put=put):
            if frame.header.step == 4 and frame.header.microbatch == 0 and len(lost) < 50:
                lost.append(frame)
            else:
                put(peer, frame)

        keeper.put = losing
    fetched = []
    for worker in ours.workers.values():
        fetch = worker.states.keeper.fetch
        worker.states.keeper.fetch = lambda *a, fetch=fetch: (fetched.append(a[0].point.step), fetch(*a))[1]
    ours.finish()
    assert lost
    assert fetched
    rebuilt = 0
    for worker in ours.workers.values():
        again = keepers.Keeper(config, keeper.shape, worker.states.points.folder, print)
        for stage in again._stages.values():
            for point in stage.kept.points:
                assert stage.kept.rebuild(point) is not None
                rebuilt += 1
        again.close()
    assert rebuilt > 4


@pytest.mark.parametrize("sync", SYNCS[:2], ids=str)
def test_keepers_cost_what_they_are_said_to(local_run, make_config, sync):
    """What goes to keepers: the means, once for each."""
    config = make_config(steps=12, sync=sync, checkpoint=KEEP, coordinator={"wait_for": 4})
    ours = local_run(config)
    nbytes = dict.fromkeys(Kind, 0)
    ours.on_post = lambda sender, frame: nbytes.update(
        {frame.header.kind: nbytes[frame.header.kind] + len(frame.payload)}
    )
    ours.join("a", "b", "c", "d")
    ours.finish()
    assert nbytes[Kind.REDO] == 2 * nbytes[Kind.MEAN]  # two keepers each, and one other replica
    assert torch.get_num_threads() == 1


def test_moments_that_begin_anew_are_warmed_up(make_config):
    """Adam's first update moves every weight by the whole rate, whatever the gradient is."""
    stage = Stage(make_config(optimizer={"lr": 1e-2, "warmup_steps": 10}), 300, 0, 2)
    stage.steps = 100
    moved = []
    for _ in range(3):
        before = stage.x.clone()
        stage.grad.fill_(1.0)
        stage.update(1)
        moved.append(float((stage.x - before).abs().median()))
    assert moved == pytest.approx([1e-3, 2e-3, 3e-3], rel=0.05)
