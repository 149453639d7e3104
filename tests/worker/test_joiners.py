"""A newcomer gets its stage while the others train, and takes its seat with what the last rounds changed."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from potluck.coordinator import events
from potluck.protocol.frames import Kind
from potluck.worker import inventory as inv
from potluck.worker.checkpoint import SavePoints
from potluck.worker.inventory import Part
from potluck.worker.stage import digest

SYNC = {"preset": "potluck", "every": 4, "delay": 1}


class Watch:
    """What newcomers were sent of states, before their plan and after it."""

    def __init__(self, ours) -> None:
        self.ours, self.planned = ours, False
        self.sent: list[tuple[bool, Part, int]] = []
        ours.on_post, ours.on_event = self.posted, self.happened

    def posted(self, sender: str, frame) -> None:
        if frame.header.kind == Kind.STATE and frame.payload:
            self.sent.append((self.planned, inv.read(frame.header)[1].part, len(frame.payload)))

    def happened(self, event: events.Event) -> None:
        if isinstance(event, events.PlanIssued) and sum(map(len, event.stages)) > 2:
            self.planned = True

    def nbytes(self, *parts: Part, planned: bool) -> int:
        return sum(n for p, part, n in self.sent if p == planned and part in parts)


def joined(local_run, make_config, sync=SYNC, steps: int = 60, hold: threading.Event | None = None, **coordinator):
    coordinator = {"wait_for": 2, "prepare_seconds": 1e6, **coordinator}
    ours = local_run(make_config(steps=steps, sync=sync, coordinator=coordinator))
    watch = Watch(ours)
    ours.join("a", "b")
    ours.wait(lambda: ours.machine.rounds >= 1)
    return ours, watch


def check(ours) -> None:
    assert ours.machine.plan.peers == {"a", "b", "c", "d"}
    assert not ours.seen(events.RoundRefused)
    assert not ours.seen(events.RolledBack)
    assert len({(w.engine.stage.first, digest(w.engine.stage.g)) for w in ours.workers.values()}) == 2


@pytest.mark.parametrize(
    "sync", [SYNC, {"preset": "diloco", "every": 3, "delay": 1}, {"preset": "dense"}], ids=lambda s: s["preset"]
)
def test_the_state_comes_while_the_others_train(local_run, make_config, sync):
    ours, watch = joined(local_run, make_config, sync)
    ours.join("c", "d")
    ours.finish()
    check(ours)
    assert watch.nbytes(Part.G, planned=False)
    assert watch.nbytes(Part.MOMENTS, planned=False)
    # Keepers, who need no moments, may fetch a base in the new generation: beside training, too.
    assert watch.nbytes(Part.MOMENTS, planned=True) == 0, "the run waited for a transfer"
    assert watch.nbytes(Part.ENTRY, planned=True), "the closing round was not done again"


def test_nobody_waits_for_a_newcomer_who_is_not_ready(local_run, make_config):
    """The generation goes on, round after round, until its state is there."""
    ours, _ = joined(local_run, make_config, steps=120)
    ready, put = threading.Event(), {}
    for worker in ours.workers.values():
        put[worker.peer] = worker.states.put

        def slow(peer, frame, put=put[worker.peer]):
            put(peer, frame) if ready.is_set() or peer not in ("c", "d") else None

        worker.states.put = slow
    ours.join("c", "d")
    before = ours.machine.rounds
    ours.wait(lambda: ours.machine.rounds >= before + 4)
    assert ours.machine.generation == 1
    assert not ours.machine.closing
    ready.set()
    for worker in ("c", "d"):  # what was swallowed is asked for once more
        ours.workers[worker].states.joiner.follow(None)
    ours.wait(lambda: ours.machine.generation > 1 or ours.machine.phase == "finished")


def test_rounds_that_nobody_has_any_more_mean_one_more_transfer(local_run, make_config):
    ours, watch = joined(local_run, make_config)
    for worker in ours.workers.values():
        worker.states._donor._entry = lambda name: None
    ours.join("c", "d")
    ours.finish()
    check(ours)
    assert watch.nbytes(Part.MOMENTS, planned=True)


def test_time_for_getting_ready_is_bounded(local_run, make_config):
    """With none at all, the run waits for the transfer, as it does for a first plan."""
    ours, _ = joined(local_run, make_config, prepare_seconds=0.0)
    ours.join("c", "d")
    ours.finish()
    check(ours)


def killed(local_run, make_config):
    """A run of four without an end, whose ``d`` has saved a round, is killed, and missed one."""
    coordinator = {"wait_for": 4, "prepare_seconds": 1e6}
    ours = local_run(make_config(steps=10_000, sync=SYNC, coordinator=coordinator, checkpoint={"save_rounds": 1}))
    ours.join("a", "b", "c", "d")
    ours.wait(lambda: ours.machine.rounds >= 2 and bool(ours.workers["d"].points._disk))
    ours.kill("d")
    rounds = ours.machine.rounds
    ours.wait(lambda: ours.machine.rounds > rounds)
    return ours


def seated_again(ours) -> None:
    ours.wait(lambda: ours.machine.generation == 2 and "d" in ours.machine.plan.peers)
    rounds = ours.machine.rounds
    ours.wait(lambda: ours.machine.rounds >= rounds + 2)
    assert not ours.seen(events.RoundRefused)
    assert not ours.seen(events.RolledBack)


def test_who_was_away_for_a_little_while_fetches_only_the_rounds_since(local_run, make_config):
    """A worker that is started again has a round of its stage on disk: nothing of the state is sent to it."""
    ours = killed(local_run, make_config)
    watch = Watch(ours)
    ours.join("d")
    seated_again(ours)
    assert watch.nbytes(Part.ENTRY, planned=False)
    assert not watch.nbytes(Part.G, Part.MOMENTS, planned=False)


def test_what_is_on_disk_is_not_believed(local_run, make_config, monkeypatch):
    """A round of another run's weights: the rounds since do not fit it, and the state is fetched."""
    newest = SavePoints.newest

    def other(self, layers, step):
        state = newest(self, layers, step)
        if state is None:
            return None
        g = state.g + 1
        return replace(state, g=g, point=replace(state.point, digest=digest(g)))

    ours = killed(local_run, make_config)
    watch = Watch(ours)
    monkeypatch.setattr(SavePoints, "newest", other)
    ours.join("d")
    seated_again(ours)
    assert watch.nbytes(Part.G, planned=False) + watch.nbytes(Part.G, planned=True)
