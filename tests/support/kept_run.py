"""A run driven by hand whose ledger is on disk, with what the simulation seldom does: a committed round is lost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifests import MANIFEST
from scripted_run import RULES, Run, point, saved, stop_point

from potluck.coordinator.resume import keep
from potluck.coordinator.service import open_run
from potluck.coordinator.standstill import shifted
from potluck.coordinator.state import Dismiss, Gone, Input, Said, StopAsked, Tick
from potluck.coordinator.store import Store
from potluck.protocol.config import ModelConfig, PipelineConfig, RunConfig
from potluck.worker.reports import Reports

CONFIG = RunConfig(
    name="test",
    model=ModelConfig(d_model=8, layers=4, heads=1, rotary_dim=2, seq_len=8),
    pipeline=PipelineConfig(stages=2, microbatches=RULES.microbatches, microbatch_size=RULES.microbatch_size),
)


class KeptRun(Run):
    """Writes down what it orders, as the coordinator does; its peers keep their reports, as workers do."""

    def __init__(self, folder: Path, crew: int, **rules: Any) -> None:
        self.store = Store(folder / "run.sqlite")
        self.reports: defaultdict[str, Reports] = defaultdict(Reports)
        super().__init__(
            replace(RULES, wait_for=crew, settle_seconds=0.0, **{"silence_seconds": 1e6, **rules}),
            open_run(self.store, CONFIG, MANIFEST)[2],
        )

    def do(self, what: Input, later: float = 0.0) -> list[Any]:
        before, commands = self.state, super().do(what, later)
        durable = [c for c in commands if not isinstance(c, Dismiss)]
        self.store.write([*durable, *keep(before, self.state)], self.now)
        return commands

    def say(self, peer: str, **body: Any) -> list[Any]:
        self.reports[peer].add(**body)
        return self.send(peer)

    def send(self, peer: str) -> list[Any]:
        """Everything of it that is not acknowledged."""
        commands = []
        for up in self.reports[peer].after(0):
            commands += self.do(Said(peer=peer, report=up))
            self.reports[peer].acknowledged(up.seq)
        return commands

    def restart(self, *back: str) -> list[Any]:
        """The coordinator is killed and started again; of its peers these dial again."""
        held = {peer: tuple(self.state.members[peer].savepoints) for peer in back}
        state = open_run(self.store, CONFIG, MANIFEST)[2]
        self.state = shifted(state, self.now - state.since)
        commands = []
        for peer in back:
            commands += self.join(peer, points=held[peer])
            self.reports[peer].welcomed(0)
            commands += self.send(peer)
        return commands

    def to(self, at: int) -> None:
        """Trains to a round after ``at`` steps."""
        self.train(at)
        self.round(at)
        assert self.state.committed.step == at

    def to_end(self) -> None:
        """Closes the generation; the next one is ready."""
        end = self.state.end
        assert end is not None
        self.to(end)
        self.ready()


def with_a_lost_round(folder: Path, *, restarted: bool = False) -> KeptRun:
    """Rounds at 4 and 8; the second is lost with all who held it, and made again; two replicas in between."""
    run = KeptRun(folder, 3, reroutes=False)
    run.join("a", "b", "c")
    run.ready()
    run.to(4)
    old = run.state.committed
    run.to(8)
    for peer in sorted(run.plan.peers):
        run.do(Gone(peer=peer))
    if restarted:
        run.restart()
    run.join("d", "e", points=(point(old, 0), point(old, 1)))
    run.do(Tick(), later=60.0)
    if restarted:
        run.do(Gone(peer="d"))
        run.restart()
        run.join("d", "e", points=(point(old, 0), point(old, 1)))
        run.do(Tick(), later=60.0)
    run.ready()
    run.to(8)
    return run


def with_a_stop(folder: Path) -> KeptRun:
    """Stopped between two rounds, and gone on from there: leases of two generations in one round."""
    run = KeptRun(folder, 2)
    run.join("a", "b")
    run.ready()
    run.to(4)
    run.train(5)
    run.do(StopAsked())
    run.train(run.state.end or 0)
    saved(run, "a", "b")
    assert run.state.phase == "stopped"
    return run


def gone_on(run: KeptRun) -> KeptRun:
    """The stopped run, opened again by the peers that saved it."""
    run.restart()
    mark = run.state.stop
    assert mark is not None
    run.join(*mark.holders[0], points=(stop_point(mark, 0),))
    run.join(*mark.holders[1], points=(stop_point(mark, 1),))
    run.ready()
    return run
