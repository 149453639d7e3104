"""A real hub on a disk that refuses on demand, and its workers: which writes fail is data, nothing sleeps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from failing_disk import FailingDisk
from manifests import MANIFEST

from potluck.coordinator.dashboard.board import Board
from potluck.coordinator.hub import Hub, Line
from potluck.coordinator.service import open_run, rules_of
from potluck.coordinator.state import Member, Uploaded
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import (
    CheckpointConfig,
    CoordinatorConfig,
    EvalConfig,
    ModelConfig,
    PipelineConfig,
    RunConfig,
    SyncConfig,
)
from potluck.protocol.plan import SavePoint
from potluck.protocol.schedule import is_round
from potluck.worker import plan as rules_of_worker
from potluck.worker.control import view_from
from potluck.worker.plan import Local, View, next_action
from potluck.worker.reports import Reports

CONFIG = RunConfig(
    steps=8,
    model=ModelConfig(d_model=8, layers=4, heads=1, rotary_dim=2, seq_len=8),
    pipeline=PipelineConfig(stages=2, microbatches=2, microbatch_size=1),
    sync=SyncConfig(preset="cocktail", every=3),  # type: ignore[arg-type]
    eval=EvalConfig(every=5),
    checkpoint=CheckpointConfig(publish_rounds=100),
    coordinator=CoordinatorConfig(wait_for=2, lease_seconds=60.0),
)


class Hand(Line):
    """A worker by its real rules, without any training. Checks what it is sent while the disk refuses."""

    def __init__(self, peer: str, hub: Hub, config: RunConfig, uploads: set[tuple[int, int]]) -> None:
        super().__init__(peer, f"session-{peer}".encode())
        self.hub, self.config, self.uploads = hub, config, uploads
        self.view, self.local, self.digest, self.since = View(), Local(peer=peer), b"start", 0
        self.acks: list[int] = []
        self.notes: list[str] = []
        self.reports, self.said = Reports(), 0

    def send(self, message: pb.Down) -> None:
        if message.HasField("view"):
            view = message.view
            if self.hub.standing:
                assert view.until == self.view.until and view.committed == self.view.committed, "a lease without a disk"
                assert not self.view.plan or view.plan.generation == self.view.plan.generation
            self.notes.append(view.note)
            self.view = view_from(view)
        elif message.HasField("ack"):
            assert not self.hub.standing, "acknowledged while the disk refuses"
            self.acks.append(message.ack.seq)
            self.reports.acknowledged(message.ack.seq)
        super().send(message)

    async def live(self) -> None:
        """From its first word to a coordinator to its release."""
        self.hub.connect(self)
        self.reports.welcomed(self.hub.acked.get(self.session, 0))
        points: frozenset[SavePoint] = frozenset()
        await self.hub.enter(
            self, Member(peer=self.peer, name=self.peer, memory_gb=9.0, session=self.session, savepoints=points)
        )
        sent = 0
        while True:
            for up in self.reports.after(sent):
                sent = up.seq
                await self.hub.report(self, up)
                await self.hub.report(self, pb.Up(heartbeat=pb.Heartbeat(state="training", traffic=[self.traffic()])))
            action = next_action(self.view, self.local, self.config)
            if action is None:
                if await self.outbox.get() is None:  # refused
                    return
            elif isinstance(action, rules_of_worker.Exit):
                break
            else:
                self.do(action)
        while self.reports:
            await self.outbox.get()
        self.hub.hang_up(self)

    def dial_again(self, hub: Hub) -> None:
        """The same process, and a coordinator that was started anew."""
        self.hub, self.outbox, self.last_view, self.entered, self.waiting_nbytes = hub, asyncio.Queue(), b"", False, 0

    def report(self, **body: object) -> None:
        self.said += 1
        self.reports.add(**body)

    def traffic(self) -> pb.Traffic:
        return pb.Traffic(peer="x", direction="out", purpose="activation", nbytes=self.said, dense_nbytes=1)

    def do(self, action: rules_of_worker.Action) -> None:
        plan = self.view.plan
        assert plan
        generation, stage = plan.generation, plan.places[self.peer][0]
        match action:
            case rules_of_worker.TakeSeat():
                self.local = Local(
                    peer=self.peer, generation=generation, seated=True, step=plan.first_step, round=plan.first_step
                )
                self.report(ready=pb.Ready(generation=generation, digest=self.digest))
            case rules_of_worker.Train(step=at):
                self.local, self.since = replace(self.local, step=at + 1), self.since + plan.samples_per_step
                done = pb.StepDone(generation=generation, step=at, samples=1, loss_sum=1.0, targets=1)
                self.report(step_done=done)
                if is_round(self.config.sync.resolved(), self.config.seed, at):
                    self.round(at + 1)
            case rules_of_worker.CloseRound(step=at):
                self.round(at)
            case rules_of_worker.Evaluate(position=at):
                self.local = replace(self.local, evaluated=at)
                self.report(eval_done=pb.EvalDone(generation=generation, step=at, loss_sum=1.0, targets=1))
            case rules_of_worker.Publish(step=at):
                self.local = replace(self.local, published=at)
                self.uploads.add((at, stage))
                if {(at, i) for i in range(len(plan.stages))} <= self.uploads:
                    folder = self.hub.store.path.parent / "checkpoints" / f"step-{at:08d}"
                    folder.mkdir(parents=True, exist_ok=True)
                    self.hub.put(Uploaded(step=at, path=folder.name))

    def round(self, at: int) -> None:
        assert self.view.plan
        stage, base = self.view.plan.places[self.peer][0], self.digest
        self.digest, samples, self.since = f"{stage}@{at}".encode(), self.since, 0
        self.local = replace(self.local, round=at)
        self.report(
            round_done=pb.RoundDone(
                generation=self.local.generation, step=at, samples=samples, digest=self.digest, base_digest=base
            )
        )


def a_hub(config: RunConfig, folder: Path) -> Hub:
    """A hub on a failing disk that does not fail yet."""
    store = FailingDisk(folder / "run.sqlite")
    run_id, _, state = open_run(store, config, MANIFEST)
    rules = replace(rules_of(config, MANIFEST), settle_seconds=0.0)
    return Hub(rules, state, store, Board(config, rules, run_id, 300, store))


def disk(hub: Hub) -> FailingDisk:
    assert isinstance(hub.store, FailingDisk)
    return hub.store


async def finished(hub: Hub, hands: list[Hand]) -> None:
    """All hands at work until the run is over."""
    async with asyncio.timeout(30.0), asyncio.TaskGroup() as group:
        for hand in hands:
            group.create_task(hand.live())
        assert await hub.until_phase("finished", "stopped") == "finished"
