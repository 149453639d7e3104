"""A step of one replica: the forwards and backwards of its microbatches in 1F1B order, over a wire.

1F1B (PipeDream-Flush): after a few forwards to fill the pipe, one forward alternates with one backward, so at most
``stages after me + run_ahead + 1`` inputs are kept. Backwards run in the order of the microbatches whatever arrives
first: gradients are summed in one order, so a step's result does not depend on timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..compression.codec import Codec, CodecError
from ..compression.registry import build
from ..protocol.config import RunConfig
from ..protocol.errors import StateError, WireError
from ..protocol.frames import Frame, Header, Kind, TensorSpec, make_frame
from ..protocol.plan import Plan
from .data import Dataset
from .mailbox import Address
from .model import IGNORED
from .stage import Stage

TRAIN, EVAL = 0, 1  # Header.part of an activation


class Wire(Protocol):
    """The way to other peers, as the computing thread sees it."""

    def post(self, peer: str, frame: Frame) -> None:
        """Sends a frame; returns before it has left. Order to one peer is kept."""

    def take(self, address: Address) -> Frame:
        """Waits for a frame. Raises ``Fenced`` when the generation is over."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One replica's place in a plan."""

    plan: Plan
    stage: int
    replica: int
    run: bytes  # 8 bytes naming the run on the wire

    @property
    def stages(self) -> int:
        return len(self.plan.stages)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def served(self) -> list[int]:
        return self.plan.served(self.stage, self.replica)


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

    def __init__(self, config: RunConfig, seat: Seat, stage: Stage, data: Dataset | None, wire: Wire) -> None:
        self.config, self.seat, self.stage, self.data, self.wire = config, seat, stage, data, wire
        self.forward_codec = build(config.activations.forward)
        self.backward_codec = build(config.activations.backward)
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
        self.stage.update(result.targets)
        result.wait_seconds, result.seconds = self._waited, time.perf_counter() - started
        return result

    @torch.no_grad()
    def evaluate(self, position: int) -> StepResult:
        """Held-out loss of the reference weights ``g``, forward only, through the same codecs."""
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

    def _backward(self, step: int, m: int) -> None:
        flight = self._flights.pop(m)
        if self.seat.is_last:
            assert flight.output is not None
            flight.output.backward()
        else:
            frame = self._take(Kind.GRADIENT, step, TRAIN, m, self.seat.plan.peer_of(self.seat.stage + 1, m))
            spec = frame.header.tensors[0]
            gradient = decoded(self.backward_codec, frame.payload, spec.shape).to(self.stage.device)
            output = self.stage.module(flight.source) if flight.output is None else flight.output
            output.backward(gradient)
        if not self.seat.is_first:
            assert flight.source.grad is not None
            back = self.seat.plan.peer_of(self.seat.stage - 1, m)
            self._post(back, Kind.GRADIENT, step, TRAIN, m, self.backward_codec, flight.source.grad)

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
        frame = self._take(Kind.ACTIVATION, step, part, m, behind)
        hidden_spec, ids_spec = frame.header.tensors
        payload = memoryview(frame.payload)
        hidden = decoded(self.forward_codec, payload[: hidden_spec.nbytes], hidden_spec.shape)
        targets = decode_ids(payload[hidden_spec.nbytes :], ids_spec)
        return hidden.to(self.stage.device), targets.to(self.stage.device)

    def _send_forward(self, step: int, m: int, hidden: Tensor, targets: Tensor, part: int) -> None:
        lane = m if part == TRAIN else self._lane(m)
        ahead = self.seat.plan.peer_of(self.seat.stage + 1, lane)
        self._post(ahead, Kind.ACTIVATION, step, part, m, self.forward_codec, hidden, targets)

    def _post(
        self,
        peer: str,
        kind: Kind,
        step: int,
        part: int,
        m: int,
        codec: Codec,
        tensor: Tensor,
        targets: Tensor | None = None,
    ) -> None:
        payload = encoded(codec, tensor)
        specs = [TensorSpec(codec=codec.spec, shape=tuple(tensor.shape), nbytes=len(payload))]
        dense = 2 * tensor.numel()
        if targets is not None:
            name, ids = encode_ids(targets, self.stage.vocab_size)
            specs.append(TensorSpec(codec=name, shape=tuple(targets.shape), nbytes=len(ids)))
            payload += ids
            dense += len(ids)
        frame = make_frame(
            payload,
            kind=kind,
            run=self.seat.run,
            generation=self.seat.plan.generation,
            step=step,
            stage=self.seat.stage + (1 if kind == Kind.ACTIVATION else -1),
            microbatch=m,
            attempt=0,
            part=part,
            tensors=tuple(specs),
            targets=0 if targets is None else targets.numel(),
            dense_nbytes=dense,
        )
        self.wire.post(peer, frame)

    def _take(self, kind: Kind, step: int, part: int, m: int, sender: str) -> Frame:
        started = time.perf_counter()
        frame = self.wire.take(Address(self.seat.plan.generation, kind, step, part, m, sender))
        self._waited += time.perf_counter() - started
        return frame


def encoded(codec: Codec, tensor: Tensor) -> bytes:
    """A boundary tensor as bytes. ``StateError`` if it is not finite: the run has diverged."""
    try:
        return codec.encode(tensor.cpu())
    except CodecError as error:
        raise StateError(
            f"training has diverged ({error})", hint="Start again from a published model with a lower optimizer.lr."
        ) from None


def decoded(codec: Codec, payload: bytes | memoryview, shape: Sequence[int]) -> Tensor:
    """Bytes from a peer as a boundary tensor. ``WireError`` if no encoder makes such bytes."""
    try:
        return codec.decode(payload, shape)
    except CodecError as error:
        raise WireError(f"a boundary tensor cannot be decoded: {error}") from None


IDS = {"ids16": "<u2", "ids32": "<u4"}  # token ids plus one, so that 0 says IGNORED


def encode_ids(ids_BT: Tensor, vocab_size: int) -> tuple[str, bytes]:
    """Targets [B, T] as (codec, bytes): two bytes each if the vocabulary allows."""
    codec = ids_codec(vocab_size)
    return codec, (ids_BT.cpu().numpy() + 1).clip(min=0).astype(IDS[codec]).tobytes()


def decode_ids(payload: memoryview, spec: TensorSpec) -> Tensor:
    """Bytes to targets [B, T], int64."""
    ids = torch.from_numpy(np.frombuffer(payload, dtype=IDS[spec.codec]).astype(np.int64)).view(*spec.shape)
    return torch.where(ids == 0, IGNORED, ids - 1)


def ids_codec(vocab_size: int) -> str:
    return "ids16" if vocab_size < 2**16 else "ids32"


def boundary_check(config: RunConfig, vocab_size: int) -> Callable[[Header], None]:
    """A check for incoming activations and gradients: what this run's boundary tensors look like, to the byte."""
    model, pipeline = config.model, config.pipeline
    codecs = {
        Kind.ACTIVATION: build(config.activations.forward),
        Kind.GRADIENT: build(config.activations.backward),
    }

    def check(header: Header) -> None:
        codec = codecs[header.kind]
        wanted = 2 if header.kind == Kind.ACTIVATION else 1
        if len(header.tensors) != wanted:
            raise WireError(f"{header.kind.name.lower()} with {len(header.tensors)} tensors, not {wanted}")
        hidden = header.tensors[0]
        if (
            len(hidden.shape) != 3
            or not 1 <= hidden.shape[0] <= pipeline.microbatch_size
            or hidden.shape[1:] != (model.seq_len, model.d_model)
            or hidden.codec != codec.spec
            or hidden.nbytes != codec.nbytes(hidden.shape)
        ):
            raise WireError(f"a boundary tensor of {hidden.shape} as {hidden.codec} in {hidden.nbytes} bytes")
        if wanted == 2:
            ids = header.tensors[1]
            size = (
                np.dtype(IDS[ids_codec(vocab_size)]).itemsize * ids.shape[0] * ids.shape[1]
                if len(ids.shape) == 2
                else 0
            )
            if ids.codec != ids_codec(vocab_size) or ids.shape != hidden.shape[:2] or ids.nbytes != size:
                raise WireError(f"targets of {ids.shape} as {ids.codec} in {ids.nbytes} bytes")

    return check
