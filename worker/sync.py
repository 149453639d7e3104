"""A round: the replicas of a stage exchange compressed differences from their shared reference.

Each replica sends compress(x_i - g) in shards to the shards' owners (reduce-scatter); an owner takes the mean,
weighted by samples, adds what it still owes (error feedback), compresses again and sends the same bytes to all
(all-gather). Everybody, the owner too, decodes those bytes, so the new g is bit-identical everywhere. What was not
sent stays in x_i. The rule is CocktailSGD's (ICML 2023); with density 1 and a coin it is GPT-JT's, with ``outer_lr``
and ``outer_momentum`` it is DiLoCo's (arXiv 2311.08105).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compression.codec import CodecError
from ..compression.feedback import ErrorFeedback
from ..compression.sync import Encoded, Sparse, SyncCodec
from ..protocol.config import RunConfig
from ..protocol.errors import StateError, WireError
from ..protocol.frames import Frame, Kind, TensorSpec, make_frame
from ..protocol.plan import SavePoint
from ..protocol.schedule import draw
from .mailbox import Address
from .pipeline import Seat, Wire
from .stage import Stage, State, digest

WEIGHTS = "sync"  # codec name of a round's payload on the wire


def codec_of(config: RunConfig) -> SyncCodec:
    sync = config.sync.resolved()
    return SyncCodec(density=sync.density, topk=sync.topk, bits=sync.bits)


def shards(n: int, owners: int) -> list[tuple[int, int]]:
    """[start, end) of each owner's part of a vector of length n; sizes differ by at most one."""
    return [(n * j // owners, n * (j + 1) // owners) for j in range(owners)]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The state of a replica at the moment a round begins."""

    state: State  # x, g, m, v as they were
    samples: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished exchange. ``state`` is where the stage stands if the round is applied at once."""

    state: State
    shift: Tensor  # to add to weights that trained on meanwhile
    base_digest: bytes
    samples: int
    nbytes: int
    seconds: float


class Synchronizer:
    """Rounds of one replica in one generation."""

    def __init__(self, config: RunConfig, seat: Seat, stage: Stage, state: State, wire: Wire) -> None:
        self.config, self.seat, self.wire = config, seat, wire
        self.sync, self.codec = config.sync.resolved(), codec_of(config)
        self.bounds = shards(stage.size, len(seat.plan.stages[seat.stage].replicas))
        mine = self.bounds[seat.replica]
        self.feedback = ErrorFeedback(mine[1] - mine[0])
        if state.feedback is not None and state.owned == mine:
            self.feedback.load(state.feedback)

    def owing(self, state: State) -> State:
        """``state`` with what this replica still owes as the owner of its shard."""
        return replace(state, feedback=self.feedback.state(), owned=self.bounds[self.seat.replica])

    def capture(self, stage: Stage, steps_done: int, samples: int) -> Capture:
        """Copies what the round needs, so that training may go on."""
        plan = self.seat.plan
        point = SavePoint(
            kind="round",
            generation=plan.generation,
            step=steps_done,
            first_layer=stage.first,
            last_layer=stage.last,
        )
        return Capture(state=stage.state(point), samples=samples)

    def exchange(self, capture: Capture) -> Outcome:
        """The whole round; blocks on the other replicas. Raises ``Fenced`` when the generation ends meanwhile."""
        started, state = time.perf_counter(), capture.state
        assert state.x is not None
        base = digest(state.g)
        residual = state.x - state.g
        if len(self.bounds) == 1:
            mean, nbytes, residual = residual, 0, torch.zeros_like(residual)
        else:
            mean, nbytes = self._average(state.point.step, residual, capture.samples)
        g, momentum = self._outer(state, mean)
        x = g + residual
        point = replace(state.point, digest=digest(g))
        after = self.owing(replace(state, point=point, g=g, x=x, momentum=momentum))
        return Outcome(
            state=after,
            shift=x - state.x,
            base_digest=base,
            samples=capture.samples,
            nbytes=nbytes,
            seconds=time.perf_counter() - started,
        )

    def _average(self, step: int, residual: Tensor, samples: int) -> tuple[Tensor, int]:
        """Reduce-scatter and all-gather. Takes what was sent out of ``residual``; returns the mean and bytes sent."""
        seat, nbytes = self.seat, 0
        peers = [r.peer for r in seat.plan.stages[seat.stage].replicas]
        seeds = [draw(self.config.seed, "mask", seat.stage, step, j) % 2**63 for j in range(len(peers))]
        own = b""
        for j, (start, end) in enumerate(self.bounds):
            part = residual[start:end]
            encoded = self._encoded(part, seeds[j])
            encoded.sent.add_to(part, scale=-1.0)
            if j == seat.replica:
                own = encoded.payload
            else:
                nbytes += self._post(peers[j], Kind.SHARD, step, end - start, encoded.payload, samples)
        mine = self.bounds[seat.replica]
        length, seed = mine[1] - mine[0], seeds[seat.replica]
        payloads = {seat.replica: (own, samples)}
        for i in range(len(peers)):
            if i != seat.replica:
                frame = self._take(Kind.SHARD, step, i)
                payloads[i] = (frame.payload, frame.header.targets)
        total = max(1, sum(weight for _, weight in payloads.values()))
        mean = torch.zeros(length)
        for i in range(len(peers)):  # in the replicas' order: floats do not commute
            payload, weight = payloads[i]
            self._decoded(payload, length, seed).add_to(mean, scale=weight / total)
        owed = self.feedback.compensated(mean)
        encoded = self._encoded(owed, seed)
        decided = encoded.payload
        self.feedback.keep(owed, encoded.sent)
        for i, peer in enumerate(peers):
            if i != seat.replica:
                nbytes += self._post(peer, Kind.MEAN, step, length, decided, 0)
        whole = torch.zeros_like(residual)
        for j, (start, end) in enumerate(self.bounds):
            payload = decided if j == seat.replica else self._take(Kind.MEAN, step, j).payload
            self._decoded(payload, end - start, seeds[j]).add_to(whole[start:end])
        return whole, nbytes

    def _encoded(self, part: Tensor, seed: int) -> Encoded:
        try:
            return self.codec.encode(part, seed)
        except CodecError as error:
            raise StateError(
                f"training has diverged ({error})", hint="Start again from a published model with a lower optimizer.lr."
            ) from None

    def _decoded(self, payload: bytes, length: int, seed: int) -> Sparse:
        try:
            return self.codec.decode(payload, length, seed)
        except CodecError as error:
            raise WireError(f"a round's piece cannot be decoded: {error}") from None

    def _outer(self, state: State, mean: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outer optimizer's step from ``g``: plain, or Nesterov's momentum as in DiLoCo."""
        if not self.sync.outer_momentum:
            exact = len(self.bounds) == 1 and self.sync.outer_lr == 1.0
            assert state.x is not None
            return (state.x.clone() if exact else state.g.add(mean, alpha=self.sync.outer_lr)), None
        momentum = torch.zeros_like(mean) if state.momentum is None else state.momentum
        momentum = momentum.mul(self.sync.outer_momentum).add_(mean)
        direction = mean.add(momentum, alpha=self.sync.outer_momentum)
        return state.g.add(direction, alpha=self.sync.outer_lr), momentum

    def _post(self, peer: str, kind: Kind, step: int, length: int, payload: bytes, weight: int) -> int:
        seat = self.seat
        frame = make_frame(
            kind=kind,
            run=seat.run,
            generation=seat.plan.generation,
            step=step,
            stage=seat.stage,
            microbatch=seat.replica,
            part=0,
            attempt=0,
            tensors=(TensorSpec(codec=WEIGHTS, shape=(length,), nbytes=len(payload)),),
            targets=weight,
            dense_nbytes=0,
            payload=payload,
        )
        self.wire.post(peer, frame)
        return len(payload)

    def _take(self, kind: Kind, step: int, replica: int) -> Frame:
        sender = self.seat.plan.stages[self.seat.stage].replicas[replica].peer
        return self.wire.take(Address(self.seat.plan.generation, kind, step, 0, replica, sender))


def apply(stage: Stage, outcome: Outcome, *, late: bool) -> None:
    """Puts a round into the weights: exactly if nothing trained since its capture, else as a shift (``late``)."""
    state = outcome.state
    assert state.x is not None
    stage.g.copy_(state.g)
    if late:
        stage.x.add_(outcome.shift.to(stage.device))
    else:
        stage.x.copy_(state.x)
    stage.momentum = None if state.momentum is None else state.momentum.to(stage.device)
