"""A peer moves to a stage that has become thin: it fetches that stage while it trains its own, and nobody waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck.coordinator import events
from potluck.coordinator.state import Tick
from potluck.protocol.frames import Kind
from potluck.worker import inventory as inv
from potluck.worker.inventory import Part
from potluck.worker.stage import digest

CREW = tuple("abcdef")


def thin(local_run, make_config, steps: int = 120):
    """Six peers at two stages; two of one stage are lost after the first rounds."""
    config = make_config(
        steps=steps,
        sync={"preset": "potluck", "every": 4, "delay": 1},
        pipeline={"microbatches": 1},
        coordinator={"wait_for": 6, "prepare_seconds": 1e6},
    )
    ours = local_run(config)
    ours.rules = replace(ours.rules, move_seconds=0.0)
    ours.join(*CREW)
    ours.wait(lambda: ours.machine.rounds >= 1)
    for replica in ours.machine.plan.replicas[1][1:]:
        ours.kill(replica.peer)
    return ours


@pytest.mark.parametrize("dies", [False, True])
def test_the_state_comes_while_everybody_trains(local_run, make_config, dies):
    ours, sent, planned = thin(local_run, make_config), [], []

    def posted(sender: str, frame) -> None:
        if frame.header.kind == Kind.STATE and frame.payload:
            sent.append((bool(planned), part := inv.read(frame.header)[1].part))
            if dies and part == Part.G and ours.machine.move is not None and ours.machine.move.peer in ours.workers:
                ours.kill(ours.machine.move.peer)

    ours.on_post = posted
    ours.on_event = lambda event: planned.append(event) if isinstance(event, events.PlanIssued) else None
    ours.put(Tick())
    [moving] = ours.seen(events.Moving)
    if not dies:
        ours.wait(lambda: ours.machine.generation > 1)
        [moved] = ours.seen(events.Moved)
        assert moved.peer == moving.peer and [len(stage) for stage in ours.machine.plan.replicas] == [2, 2]
    ours.finish()
    assert ours.machine.committed.step == 120
    assert not ours.seen(events.RolledBack) and not ours.seen(events.RoundRefused)
    assert (False, Part.G) in sent
    if dies:
        assert not ours.seen(events.Moved) and len(ours.machine.plan.peers) == 3
    else:
        assert (True, Part.MOMENTS) not in sent, "the run waited for a transfer"
    seated = [ours.workers[p].engine.stage for p in ours.machine.plan.peers]
    assert len({(stage.first, digest(stage.g)) for stage in seated}) == 2
