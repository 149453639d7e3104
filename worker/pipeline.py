"""A step of one replica: the forwards and backwards of its microbatches, as they arrive, over a wire.

Forwards go first until as many microbatches are under way (between their two) as the way there and back takes, then a
backward before the next forward, as in 1F1B (PipeDream-Flush). How many that are depends on the lines, and shows: a
stage that has a forward to do never waits for a gradient, and what was under way then may be under way from then on.
``benchmarks/links/schedule.py`` compares the rule with the best possible. Backwards run in the order of the
microbatches whatever arrives first: gradients are summed in one order, so a step's result does not depend on timing.
Nobody waits for ever: the first microbatch that is not done everywhere is the first of everybody who has yet to do it.

When a replica is lost and the generation goes on, its neighbours send what they had sent to it to its substitutes, who
do its microbatches since the last committed round again, at this one stage (SWARM, arXiv 2301.11913, re-sends the same
way; there nothing keeps count). They go into the update of the step at hand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..protocol import control_pb2 as pb
from ..protocol.errors import WireError
from ..protocol.failpoints import failpoint
from ..protocol.footprint import flight_nbytes
from ..protocol.frames import Frame, Kind
from ..protocol.plan import Plan
from .boundary import EVAL, TRAIN, Boundary
from .data import Dataset
from .layout import Batch
from .mailbox import Address, Rerouted
from .stage import Stage
from .tracing import Operation, Posted, Tracer

KEPT_NBYTES = 4 << 30  # of what was sent since the last committed round; beyond it a loss costs the round


class Wire(Protocol):
    """The way to other peers, as the computing thread sees it."""

    def post(self, peer: str, frame: Frame) -> None:
        """Sends a frame; returns before it has left. Order to one peer is kept."""

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        """Waits for a frame at one of ``wanted``, the first before the last. Raises ``Fenced`` when the generation is
        over, ``Rerouted`` when it goes on with a later ``attempt``."""

    def holds(self, address: Address) -> bool:
        """Whether a frame is there already."""

    def told(self, step: int) -> Mapping[Posted, float]:
        """When receivers said that they have what was posted of a step, by ``time.perf_counter``."""


@dataclass(kw_only=True)
class StepResult:
    """What a replica did in a step or an evaluation; loss is known to the last stage only."""

    samples: int = 0  # a lost replica's that are in this update, too
    targets: int = 0
    loss_sum: float = 0.0
    loss_targets: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0
    trace: pb.Trace | None = None


class Lane(NamedTuple):
    """A microbatch of a step."""

    step: int
    m: int


@dataclass
class Flight:
    """A microbatch between its forward and its backward."""

    batch: Batch
    output: Tensor  # with its graph
    miss: Address | None = None  # where the next stage says that it lacks what a delta was against
    resent: bool = False


class Kept:
    """What was sent in training since the last committed round, to be sent again if its receiver is lost."""

    def __init__(self, since: int) -> None:
        self.since = since  # the first step of which everything is here
        self.nbytes = 0
        self._frames: dict[tuple[Lane, Kind], Frame] = {}

    def add(self, frame: Frame) -> None:
        lane = Lane(frame.header.step, frame.header.microbatch)
        self._frames[lane, frame.header.kind] = frame
        self.nbytes += len(frame.payload)
        if self.nbytes > KEPT_NBYTES:
            self.forget(lane.step + 1)

    def forget(self, before: int) -> None:
        """Lets go of all steps below ``before``."""
        self.since = max(self.since, before)
        for key in [k for k in self._frames if k[0].step < before]:
            self.nbytes -= len(self._frames.pop(key).payload)

    def moved(self, before: Plan, after: Plan, stage: int) -> list[tuple[str, Frame]]:
        """What ``stage`` sent to somebody who is lost since ``before``, and to whom it must go."""
        out = []
        for (lane, kind), frame in self._frames.items():
            to = stage + 1 if kind == Kind.ACTIVATION else stage - 1
            peer, since = after.peer_of(to, lane.m), after.since(to, lane.m)
            if peer != before.peer_of(to, lane.m):
                if since < self.since:
                    raise WireError("a replica is lost, and what was sent to it is not kept any more")
                if lane.step >= since:
                    out.append((peer, frame))
        return out


class Pipeline:
    """Runs steps and evaluations of one replica in one generation."""

    def __init__(self, boundary: Boundary, stage: Stage, data: Dataset | None, wire: Wire) -> None:
        self.config, self.seat, self.boundary = boundary.config, boundary.seat, boundary
        self.stage, self.data, self.wire = stage, data, wire
        self.kept = Kept(self.seat.plan.first_step)
        self._flights: dict[Lane, Flight] = {}
        self._to_forward: list[Lane] = []  # in order
        self._to_backward: list[Lane] = []  # in order
        self._inherited: set[Lane] = set()  # of a lost replica, in steps that are done or at work
        self._asked: set[Lane] = set()  # to be had again, without deltas
        self._begun = self.seat.plan.first_step  # steps that are done or at work
        self._result = StepResult()
        self._waited = self._updating = 0.0
        self._tracer = Tracer(time.perf_counter)
        self._window = self.seat.stages - self.seat.stage  # microbatches under way, for a line without latency
        self._most = self._window + self._spare()

    def _spare(self) -> int:
        """Microbatches under way that there is memory for."""
        nbytes = flight_nbytes(self.config, self.stage.first, self.stage.last, str(self.stage.device).partition(":")[0])
        return int(self.config.pipeline.in_flight_gb * 1e9 / nbytes)

    def attempt_in(self, generation: int) -> int:
        """The newest attempt of a generation that we have heard of."""
        return self.seat.plan.attempt if self.seat.plan.generation == generation else 0

    @property
    def owes(self) -> bool:
        """Whether microbatches of a lost replica are left to us."""
        return bool(self._to_backward)

    def step(self, step: int) -> StepResult:
        """Forward and backward of every microbatch this replica serves, then the local optimizer's update."""
        self._begun = step + 1
        self._tracer.begin(step)
        self._add([Lane(step, m) for m in self.seat.served])
        result = self._update()
        result.trace = self._tracer.done(self._updating, self.wire.told(step))
        return result

    def catch_up(self) -> StepResult:
        """What a lost replica left to us, in an update of its own: no step is at hand that it could go into."""
        return self._update()

    def _add(self, lanes: list[Lane]) -> None:
        self._to_forward = sorted([*self._to_forward, *lanes], key=self._turn)
        self._to_backward = sorted([*self._to_backward, *lanes], key=self._turn)

    def _turn(self, lane: Lane) -> tuple[int, int, int]:
        """When a microbatch's turn is: the first ones of all first-stage replicas come before any of their second ones,
        so that whoever serves several of those keeps none waiting."""
        return lane.step, self.seat.plan.turn(lane.m), lane.m

    def _update(self) -> StepResult:
        started, self._waited = time.perf_counter(), 0.0
        result = self._result = StepResult()
        while self._to_backward:
            self._advance()
        self._inherited.clear()
        self._updating = time.perf_counter()
        failpoint("worker.update", torch.OutOfMemoryError)
        self.stage.update(result.targets)
        failpoint("worker.updated")
        result.wait_seconds, result.seconds = self._waited, time.perf_counter() - started
        return result

    def _advance(self) -> None:
        """One microbatch goes one way, see the module."""
        first = self._to_backward[0]
        gradient = self._from(Kind.GRADIENT, first) if first in self._flights else None
        inherited = [lane for lane in self._to_forward if lane in self._inherited]
        own = next((lane for lane in self._to_forward if lane not in self._inherited), None)
        if self.seat.is_last:
            inherited, own = [first], None
        flights = sum(lane not in self._inherited for lane in self._flights)
        may_grow = flights < self._most
        ahead = [own] if own and flights < self._window else []
        behind = [*inherited, *([own] if own and not ahead and may_grow else [])]
        if self.seat.is_first and (ahead or (behind and not (gradient and self.wire.holds(gradient)))):
            place, frame, lane = None, None, (ahead or behind)[0]
        else:
            inputs = {} if self.seat.is_first else {self._from(Kind.ACTIVATION, x): x for x in (*ahead, *behind)}
            wanted = [*list(inputs)[: len(ahead)], *([gradient] if gradient else []), *list(inputs)[len(ahead) :]]
            if (found := self._arrived(wanted)) is None:
                return  # the routes have changed
            place, frame = found
            if place == gradient:
                self._backward(first, frame)
                return
            lane = inputs[place]
        if lane == own:
            self._window = max(self._window, flights + 1)
        self._forward(lane, frame)

    def _from(self, kind: Kind, lane: Lane) -> Address:
        """Where a microbatch's activation or gradient comes in."""
        stage = self.seat.stage + (1 if kind == Kind.GRADIENT else -1)
        plan = self.seat.plan
        return Address(plan.generation, kind, lane.step, TRAIN, lane.m, plan.peer_of(stage, lane.m))

    def _forward(self, lane: Lane, frame: Frame | None = None) -> None:
        traced = self._tracer.start(*lane, frame, is_backward=False)
        failpoint("worker.forward", torch.OutOfMemoryError)
        if frame is None:
            assert self.data is not None, "the first stage needs the corpus"
            batch = self.data.batch(self.seat.plan.samples(*lane), self.config.seed)
        else:
            found = self.boundary.received(frame, attempt=int(lane in self._asked))
            if found is None:
                self._asked.add(lane)
                self.wire.post(self.seat.plan.peer_of(self.seat.stage - 1, lane.m), self.boundary.miss(*lane))
                return
            self._asked.discard(lane)
            batch = found
            traced.has_input()
        batch = batch.to(self.stage.device)
        self._to_forward.remove(lane)
        if not self.seat.is_first:
            batch.x.requires_grad_()
        output = self._output(batch)
        if self.seat.is_last:
            output = self.stage.module.loss_sum(output, batch.targets)
        self._count(lane, int((batch.targets >= 0).sum()), float(output.detach()) if self.seat.is_last else 0.0)
        self._flights[lane] = Flight(batch, output)
        if self.seat.is_last:
            self._tracer.end(traced)
            self._backward(lane, None)
        else:
            self._send_forward(lane, output.detach(), traced)
            self._tracer.end(traced)
            failpoint("worker.activation.sent")

    def _output(self, batch: Batch) -> Tensor:
        return self.stage.module(batch.x, batch.layout)

    def _count(self, lane: Lane, targets: int, loss: float) -> None:
        result = self._result
        result.samples += self.seat.plan.microbatch_size
        result.targets += targets
        if lane.step == self._begun - 1:  # the loss of older steps was told, or is lost with who knew it
            result.loss_sum += loss
            result.loss_targets += targets

    def _backward(self, lane: Lane, frame: Frame | None) -> None:
        traced = self._tracer.start(*lane, frame, is_backward=True)
        failpoint("worker.backward", torch.OutOfMemoryError)
        flight = self._flights[lane]
        if frame is None:
            flight.output.backward()
        else:
            gradient = self.boundary.received_gradient(frame).to(self.stage.device)
            traced.has_input()
            flight.output.backward(gradient)
        del self._flights[lane]
        self._to_backward.remove(lane)
        if not self.seat.is_first:
            assert flight.batch.x.grad is not None
            made = flight.batch.x.grad.to("cpu")  # waits for a GPU, so that encoding is what comes after
            traced.has_output()
            self._send(self.seat.stage - 1, self.boundary.gradient(*lane, made))
            failpoint("worker.gradient.sent")
        self._tracer.end(traced)

    def _send_forward(self, lane: Lane, hidden: Tensor, traced: Operation) -> None:
        batch = self._flights[lane].batch._replace(x=hidden.to("cpu"))  # waits for a GPU, so that encoding comes after
        traced.has_output()
        frame, has_delta = self.boundary.activation(lane.step, TRAIN, lane.m, batch)
        if has_delta:
            place = self._from(Kind.GRADIENT, lane)
            self._flights[lane].miss = place._replace(kind=Kind.MISS)
        known = lane in self._inherited and self.wire.holds(self._from(Kind.GRADIENT, lane))
        self._send(self.seat.stage + 1, frame, known=known)

    def _send(self, stage: int, frame: Frame, *, known: bool = False) -> None:
        """To a neighbour, unless it has done the microbatch already (``known``), and kept in case that it is lost."""
        plan = self.seat.plan
        if self.boundary.memory is None and len(plan.replicas[stage]) > 1:
            self.kept.add(frame)
        if not known:
            self.wire.post(plan.peer_of(stage, frame.header.microbatch), frame)

    def _send_again(self, miss: Frame) -> None:
        """Answers a ``MISS``."""
        lane = Lane(miss.header.step, miss.header.microbatch)
        flight = self._flights[lane]
        assert flight.miss is not None
        if flight.resent:
            raise WireError(
                f"{flight.miss.sender[:8]} asks for microbatch {lane.m} of step {lane.step} again and again"
            )
        flight.resent = True
        self.boundary.missed(miss.header)
        batch = flight.batch._replace(x=flight.output.detach())
        frame, _ = self.boundary.activation(lane.step, TRAIN, lane.m, batch, attempt=1)
        self.wire.post(flight.miss.sender, frame)

    def _arrived(self, wanted: Sequence[Address]) -> tuple[Address, Frame] | None:
        """Waits for a frame, and meanwhile answers whoever lacks what a delta was against; None if the routes changed.

        Nobody waits for ever: who misses something waits for a stage before its own, which computes or waits in turn,
        and whoever waits answers.
        """
        while True:
            misses = [flight.miss for flight in self._flights.values() if flight.miss is not None]
            started = time.perf_counter()
            try:
                place, frame = self.wire.take([*misses, *wanted], self.seat.plan.attempt)
            except Rerouted as change:
                self.reroute(change.plan)
                return None
            finally:
                self._waited += time.perf_counter() - started
            if frame.header.kind != Kind.MISS:
                return place, frame
            self._send_again(frame)

    def reroute(self, plan: Plan) -> None:
        """Goes on with a plan that has lost somebody: sends what he needs to who does his work now, and takes over
        what is left to us. Does nothing if the plan is known."""
        before = self.seat
        if plan.attempt <= before.plan.attempt:
            return
        seat = self.seat = self.boundary.seat = before.rerouted(plan)
        for peer, frame in self.kept.moved(before.plan, plan, seat.stage):
            self.wire.post(peer, frame)
        new = sorted(set(seat.served) - set(before.served))
        lanes = [Lane(step, m) for m in new for step in range(plan.since(seat.stage, m), self._begun)]
        self._inherited.update(lanes)
        self._add(lanes)
        failpoint("worker.rerouted")

    # The held-out loss.

    @torch.no_grad()
    def evaluate(self, position: int) -> StepResult | None:
        """Held-out loss of the reference weights ``g``, forward only, through the same codecs; None if it was cut off
        because somebody is lost."""
        failpoint("worker.evaluate", torch.OutOfMemoryError)
        started, self._waited = time.perf_counter(), 0.0
        result, stage, size = StepResult(), self.stage, self.config.pipeline.microbatch_size
        with stage.at_reference():
            for m in range(-(-self.config.eval.samples // size)):
                if self.seat.plan.replica_of(self.seat.stage, self._lane(m)) == self.seat.replica:
                    if (batch := self._heldout(position, m)) is None:
                        return None
                    hidden = self._output(batch)
                    if self.seat.is_last:
                        result.loss_sum += float(stage.module.loss_sum(hidden, batch.targets))
                        result.loss_targets += int((batch.targets >= 0).sum())
                    else:
                        frame, _ = self.boundary.activation(position, EVAL, m, batch._replace(x=hidden))
                        self.wire.post(self.seat.plan.peer_of(self.seat.stage + 1, self._lane(m)), frame)
        result.wait_seconds, result.seconds = self._waited, time.perf_counter() - started
        return result

    def _lane(self, microbatch: int) -> int:
        """Evaluation has its own number of microbatches: they take the routes of training in turn."""
        return microbatch % self.seat.plan.microbatches_per_step

    def _heldout(self, position: int, m: int) -> Batch | None:
        """This stage's input for a microbatch of held-out samples."""
        if self.seat.is_first:
            assert self.data is not None, "the first stage needs the corpus"
            size = self.config.pipeline.microbatch_size
            indices = range(m * size, min((m + 1) * size, self.config.eval.samples))
            batch = self.data.heldout_batch([i % self.data.manifest.n_heldout for i in indices])
        else:
            plan = self.seat.plan
            behind = plan.peer_of(self.seat.stage - 1, self._lane(m))
            arrived = self._arrived([Address(plan.generation, Kind.ACTIVATION, position, EVAL, m, behind)])
            if arrived is None:
                return None
            found = self.boundary.received(arrived[1])
            assert found is not None, "nothing can be missing without deltas"
            batch = found
        return batch.to(self.stage.device)
