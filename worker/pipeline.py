"""A step of one replica: the forwards and backwards of its microbatches in 1F1B order, over a wire.

1F1B (PipeDream-Flush): after a few forwards to fill the pipe, one forward alternates with one backward, so at most
``stages after me + run_ahead + 1`` inputs are kept. Backwards run in the order of the microbatches whatever arrives
first: gradients are summed in one order, so a step's result does not depend on timing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..protocol.errors import WireError
from ..protocol.failpoints import failpoint
from ..protocol.frames import Frame, Kind
from .boundary import EVAL, TRAIN, Boundary
from .data import Dataset
from .mailbox import Address
from .stage import Stage


class Wire(Protocol):
    """The way to other peers, as the computing thread sees it."""

    def post(self, peer: str, frame: Frame) -> None:
        """Sends a frame; returns before it has left. Order to one peer is kept."""

    def take(self, address: Address, also: Sequence[Address] = ()) -> Frame:
        """Waits for a frame there, or at one of ``also``, first. Raises ``Fenced`` when the generation is over."""


@dataclass(kw_only=True)
class StepResult:
    """What a replica did in a step or an evaluation; loss is known to the last stage only."""

    samples: int = 0
    targets: int = 0
    loss_sum: float = 0.0
    wait_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Flight:
    """A microbatch between its forward and its backward."""

    source: Tensor
    targets: Tensor
    output: Tensor | None = None  # kept graph, when nothing is recomputed
    miss: Address | None = None  # where the next stage says that it lacks what a delta was against
    resent: bool = False


def one_f_one_b(count: int, stages_after: int, run_ahead: int) -> Iterator[tuple[str, int]]:
    """The order of ("F", i) and ("B", i) for ``count`` microbatches with ``stages_after`` stages behind."""
    warmup = min(count, stages_after + (run_ahead if stages_after else 0))
    yield from (("F", i) for i in range(warmup))
    for i in range(count):
        if warmup + i < count:
            yield "F", warmup + i
        yield "B", i


class Pipeline:
    """Runs steps and evaluations of one replica in one generation."""

    def __init__(self, boundary: Boundary, stage: Stage, data: Dataset | None, wire: Wire) -> None:
        self.config, self.seat, self.boundary = boundary.config, boundary.seat, boundary
        self.stage, self.data, self.wire = stage, data, wire
        self._flights: dict[int, Flight] = {}
        self._waited = 0.0

    def step(self, step: int) -> StepResult:
        """Forward and backward of every microbatch this replica serves, then the local optimizer's update."""
        started, self._waited = time.perf_counter(), 0.0
        result = StepResult()
        self._flights.clear()
        served = self.seat.served
        order = one_f_one_b(len(served), self.seat.stages - 1 - self.seat.stage, self.config.pipeline.run_ahead)
        for action, i in order:
            if action == "F":
                self._forward(step, served[i], result)
            else:
                self._backward(step, served[i])
        result.samples = len(served) * self.seat.plan.microbatch_size
        failpoint("worker.update", torch.OutOfMemoryError)
        self.stage.update(result.targets)
        failpoint("worker.updated")
        result.wait_seconds, result.seconds = self._waited, time.perf_counter() - started
        return result

    @torch.no_grad()
    def evaluate(self, position: int) -> StepResult:
        """Held-out loss of the reference weights ``g``, forward only, through the same codecs."""
        failpoint("worker.evaluate", torch.OutOfMemoryError)
        started, self._waited = time.perf_counter(), 0.0
        result, stage, size = StepResult(), self.stage, self.config.pipeline.microbatch_size
        training = stage.x.clone()
        stage.x.copy_(stage.g)
        try:
            for m in range(-(-self.config.eval.samples // size)):
                if self.seat.plan.replica_of(self.seat.stage, self._lane(m)) == self.seat.replica:
                    source, targets = self._input(position, m, EVAL)
                    hidden = stage.module(source)
                    if self.seat.is_last:
                        result.loss_sum += float(stage.module.loss_sum(hidden, targets))
                        result.targets += int((targets >= 0).sum())
                    else:
                        self._send_forward(position, m, hidden, targets, EVAL)
        finally:
            stage.x.copy_(training)
        result.wait_seconds, result.seconds = self._waited, time.perf_counter() - started
        return result

    def _lane(self, microbatch: int) -> int:
        """Evaluation has its own number of microbatches: they take the routes of training in turn."""
        return microbatch % self.seat.plan.microbatches_per_step

    def _forward(self, step: int, m: int, result: StepResult) -> None:
        failpoint("worker.forward", torch.OutOfMemoryError)
        source, targets = self._input(step, m, TRAIN)
        result.targets += int((targets >= 0).sum())
        keep = self.seat.is_last or not self.config.pipeline.recompute
        if not self.seat.is_first:
            source.requires_grad_()
        with torch.set_grad_enabled(keep):
            output = self.stage.module(source)
        flight = self._flights[m] = Flight(source, targets)
        if self.seat.is_last:
            flight.output = self.stage.module.loss_sum(output, targets)
            result.loss_sum += float(flight.output.detach())
        else:
            flight.output = output if keep else None
            self._send_forward(step, m, output.detach(), targets, TRAIN)
            failpoint("worker.activation.sent")

    def _backward(self, step: int, m: int) -> None:
        failpoint("worker.backward", torch.OutOfMemoryError)
        flight = self._flights[m]
        if self.seat.is_last:
            assert flight.output is not None
            flight.output.backward()
        else:
            frame = self._take(Kind.GRADIENT, step, TRAIN, m, self.seat.plan.peer_of(self.seat.stage + 1, m))
            gradient = self.boundary.received_gradient(frame).to(self.stage.device)
            output = self.stage.module(flight.source) if flight.output is None else flight.output
            output.backward(gradient)
        del self._flights[m]
        if not self.seat.is_first:
            assert flight.source.grad is not None
            back = self.seat.plan.peer_of(self.seat.stage - 1, m)
            self.wire.post(back, self.boundary.gradient(step, m, flight.source.grad))
            failpoint("worker.gradient.sent")

    def _input(self, step: int, m: int, part: int) -> tuple[Tensor, Tensor]:
        """This stage's input for a microbatch and its targets [B, T] (int64)."""
        if self.seat.is_first:
            assert self.data is not None, "the first stage needs the corpus"
            if part == TRAIN:
                ids, targets = self.data.batch(self.seat.plan.samples(step, m), self.config.seed)
            else:
                size = self.config.pipeline.microbatch_size
                indices = range(m * size, min((m + 1) * size, self.config.eval.samples))
                ids, targets = self.data.heldout_batch([i % self.data.manifest.n_heldout for i in indices])
            return ids.to(self.stage.device), targets.to(self.stage.device)
        lane = m if part == TRAIN else self._lane(m)
        behind = self.seat.plan.peer_of(self.seat.stage - 1, lane)
        found = self.boundary.received(self._take(Kind.ACTIVATION, step, part, m, behind))
        if found is None:
            self.wire.post(behind, self.boundary.miss(step, m))
            found = self.boundary.received(self._take(Kind.ACTIVATION, step, part, m, behind), attempt=1)
            assert found is not None, "nothing can be missing without deltas"
        hidden, targets = found
        return hidden.to(self.stage.device), targets.to(self.stage.device)

    def _send_forward(self, step: int, m: int, hidden: Tensor, targets: Tensor, part: int) -> None:
        lane = m if part == TRAIN else self._lane(m)
        ahead = self.seat.plan.peer_of(self.seat.stage + 1, lane)
        frame, has_delta = self.boundary.activation(step, part, m, hidden, targets)
        if has_delta:
            self._flights[m].miss = Address(self.seat.plan.generation, Kind.MISS, step, part, m, ahead)
        self.wire.post(ahead, frame)

    def _send_again(self, miss: Frame) -> None:
        """Answers a ``MISS``. The weights are still those of the step, so an output that was not kept is made anew."""
        step, m = miss.header.step, miss.header.microbatch
        flight = self._flights[m]
        assert flight.miss is not None
        if flight.resent:
            raise WireError(f"{flight.miss.sender[:8]} asks for microbatch {m} of step {step} again and again")
        flight.resent = True
        self.boundary.missed(miss.header)
        with torch.no_grad():
            output = self.stage.module(flight.source) if flight.output is None else flight.output
        frame, _ = self.boundary.activation(step, TRAIN, m, output.detach(), flight.targets, attempt=1)
        self.wire.post(flight.miss.sender, frame)

    def _take(self, kind: Kind, step: int, part: int, m: int, sender: str) -> Frame:
        """Waits for a frame, and meanwhile answers whoever lacks what a delta was against.

        Nobody waits for ever: who misses something waits for a stage before its own, which computes or waits in turn,
        and whoever waits answers.
        """
        address = Address(self.seat.plan.generation, kind, step, part, m, sender)
        while True:
            also = [flight.miss for flight in self._flights.values() if flight.miss is not None]
            started = time.perf_counter()
            frame = self.wire.take(address, also)
            self._waited += time.perf_counter() - started
            if frame.header.kind != Kind.MISS:
                return frame
            self._send_again(frame)
