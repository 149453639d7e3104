"""A whole swarm in one process: real stages, pipelines, codecs and rounds, joined by memory instead of sockets.

Every replica of every stage is a thread with the worker's own :class:`Pipeline` and :class:`Synchronizer`; only one
thread computes at a time, so that one swarm uses one core and several may run side by side. There is no coordinator
and nothing fails: it is for what settings do to the loss and to the bytes, not for speed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from potluck.protocol.config import RunConfig
from potluck.protocol.frames import Frame, Purpose, encode_header, purpose
from potluck.protocol.plan import Plan, Replica, SavePoint, Shape, StagePlan
from potluck.protocol.schedule import fragments, is_applied, is_round
from potluck.worker.boundary import Boundary, Seat
from potluck.worker.data import Dataset
from potluck.worker.mailbox import Address, Mailbox
from potluck.worker.model import StageModule
from potluck.worker.pipeline import Pipeline
from potluck.worker.stage import Stage
from potluck.worker.sync import Outcome, Synchronizer, apply
from potluck.worker.tracing import Posted

RUN = b"parity00"
CLOSING = "closing"  # weights in the round that ends a run, in which nothing is left out


class Broken(Exception):
    """Another replica has failed: nothing more will come."""


@dataclass
class Memory:
    """All mailboxes; counts what would have crossed the internet."""

    boxes: dict[str, Mailbox]
    baton: threading.Lock = field(default_factory=threading.Lock)
    last_step: int = -1
    nbytes: dict[str, int] = field(default_factory=dict)  # by purpose; a sparse run's last round by itself

    def count(self, frame: Frame) -> None:
        what = str(purpose(frame.header.kind))
        if what == Purpose.WEIGHTS and frame.header.step == self.last_step:
            what = CLOSING
        self.nbytes[what] = self.nbytes.get(what, 0) + len(frame.payload) + len(encode_header(frame.header))


class MemoryWire:
    """One replica's end. Gives the baton away while it waits."""

    def __init__(self, peer: str, memory: Memory) -> None:
        self.peer, self.memory = peer, memory

    def post(self, peer: str, frame: Frame) -> None:
        self.memory.count(frame)
        self.memory.boxes[peer].put(Address.of(frame.header, self.peer), frame)

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        self.memory.baton.release()
        try:
            return self.memory.boxes[self.peer].take(wanted, attempt)
        finally:
            self.memory.baton.acquire()

    def holds(self, address: Address) -> bool:
        return self.memory.boxes[self.peer].holds(address)

    def told(self, step: int) -> dict[Posted, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Result:
    heldout: float  # nats per token of the reference weights, uncompressed
    train: list[float]  # of every step
    nbytes: dict[str, int]  # sent by all machines together, by purpose and CLOSING
    tokens: int  # trained by all machines together
    weights: dict[str, Tensor]


class Swarm:
    """``replicas`` of every stage of a run, from given weights (by checkpoint name) or the run's own beginning."""

    def __init__(
        self, config: RunConfig, data: Dataset, replicas: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self.config, self.data, self.start = config, data, weights
        layers = Shape.of(config.model, data.manifest.vocab_size).split(config.pipeline.stages)
        self.plan = Plan(
            generation=1,
            first_step=0,
            first_sample=0,
            origin="init",
            origin_generation=0,
            stages=tuple(
                StagePlan(
                    first_layer=first,
                    last_layer=last,
                    replicas=tuple(Replica(peer=f"{s}/{r}") for r in range(replicas)),
                )
                for s, (first, last) in enumerate(layers)
            ),
            microbatches=config.pipeline.microbatches,
            microbatch_size=config.pipeline.microbatch_size,
        )
        last = config.steps if config.sync.resolved().completes else -1
        self.memory = Memory({peer: Mailbox() for peer in self.plan.places}, last_step=last)
        self.stages: dict[str, Stage] = {}
        self._losses = [0.0] * config.steps
        self._targets = [0] * config.steps
        self._error: BaseException | None = None

    def run(self) -> Result:
        """Trains all steps. Raises what a replica raised."""
        threads = [threading.Thread(target=self._guarded, args=(p,), name=p, daemon=True) for p in self.plan.places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        weights = {}
        for stage in (self.stages[s.replicas[0].peer] for s in self.plan.stages):
            weights |= {name: t.clone() for name, t in stage.named(stage.g).items()}
        return Result(
            heldout=heldout_loss(self.config, self.data, weights),
            train=[loss / max(1, n) for loss, n in zip(self._losses, self._targets, strict=True)],
            nbytes=self.memory.nbytes,
            tokens=self.config.steps * self.plan.samples_per_step * self.config.model.seq_len,
            weights=weights,
        )

    def _guarded(self, peer: str) -> None:
        with self.memory.baton:
            try:
                self._train(peer)
            except BaseException as error:
                self._error = self._error or error
                for box in self.memory.boxes.values():
                    box.close()

    def _train(self, peer: str) -> None:
        number, replica = self.plan.places[peer]
        part, config = self.plan.stages[number], self.config
        seat = Seat(plan=self.plan, stage=number, replica=replica, run=RUN)
        stage = Stage(config, self.data.manifest.vocab_size, part.first_layer, part.last_layer)
        if self.start is not None:
            for name, tensor in stage.named(stage.x).items():
                tensor.copy_(self.start[name])
            stage.g.copy_(stage.x)
        self.stages[peer] = stage
        point = SavePoint(kind="round", generation=0, step=0, first_layer=part.first_layer, last_layer=part.last_layer)
        wire, rule = MemoryWire(peer, self.memory), config.sync.resolved()
        boundary = Boundary(config, seat, self.data.manifest)
        pipeline = Pipeline(boundary, stage, self.data if seat.is_first else None, wire)
        synchronizer = Synchronizer(config, seat, stage, stage.state(point), wire)
        pending: Outcome | None = None
        samples = captured = 0
        for step in range(config.steps):
            result = pipeline.step(step)
            samples, done = samples + result.samples, step + 1
            if seat.is_last:
                self._losses[step] += result.loss_sum
                self._targets[step] += result.loss_targets
            last = done == config.steps
            if pending is not None and (last or is_applied(rule, config.seed, captured, done)):
                apply(stage, pending, late=True)
                pending = None
            if last or is_round(rule, config.seed, step):
                turn = fragments(rule, config.seed, step, last)
                pending = synchronizer.exchange(synchronizer.capture(stage, done, samples, turn, full=last))
                samples, captured = 0, done
                if last or not rule.delay:
                    apply(stage, pending, late=False)
                    pending = None


@torch.no_grad()
def heldout_loss(config: RunConfig, data: Dataset, weights: Mapping[str, Tensor]) -> float:
    """Mean cross-entropy in nats per token over ``eval.samples`` held-out samples, without any codec."""
    model = StageModule(config.model, data.manifest.vocab_size, 0, config.model.layers, 0)
    model.load_state_dict(dict(weights))
    total = count = 0.0
    most = min(config.eval.samples, data.manifest.n_heldout)
    for start in range(0, most, 32):
        ids, targets, _ = data.heldout_batch(range(start, min(most, start + 32)))
        total += float(model.loss_sum(model(ids), targets))
        count += targets.numel()
    return total / count
