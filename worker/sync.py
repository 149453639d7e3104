"""A round: the replicas of a stage exchange compressed differences from their shared reference.

Each replica sends compress(x_i - g) in shards to the shards' owners (reduce-scatter); an owner takes the mean,
weighted by samples, adds what it still owes (error feedback), compresses again and sends the same bytes to all
(all-gather). Everybody, the owner too, decodes those bytes, and the owner's sum is one of integers, so the new g is
bit-identical everywhere, whoever owns what and whatever arrives first.

What was not sent stays in x_i (implicit feedback: CocktailSGD, ICML 2023), or in a decayed buffer beside it while x_i
returns to g (explicit: SparseLoCo, arXiv 2508.15706). With everything sent and a coin the rule is GPT-JT's, with
``outer_lr`` and ``outer_momentum`` DiLoCo's (arXiv 2311.08105), with ``fragments`` its streaming form (2501.18512).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compression.codec import CodecError
from ..compression.feedback import ErrorFeedback
from ..compression.mask import Mask
from ..compression.mean import MAX_WEIGHT, weighted_mean
from ..compression.sync import Encoded, Sparse, SyncCodec
from ..protocol.config import RunConfig, Sync
from ..protocol.errors import StateError, WireError
from ..protocol.frames import Frame, Kind, TensorSpec, make_frame
from ..protocol.plan import SavePoint
from ..protocol.schedule import draw, turn
from .boundary import Seat
from .mailbox import Address
from .pipeline import Wire
from .squeeze import release, squeeze
from .stage import Owned, Stage, State, digest

WEIGHTS = "sync"  # codec name of a round's payload on the wire
LAST_BITS = 8


def codec_of(sync: Sync, *, full: bool = False) -> SyncCodec:
    """What the values of a round go through; ``full``: of a run's last round, in which everything is sent."""
    if full and sync.sparse:
        return SyncCodec(bits=max(sync.bits, LAST_BITS))
    return SyncCodec(topk=sync.topk, chunk=sync.chunk, bits=sync.bits)


def most_nbytes(sync: Sync, n: int) -> int:
    """The longest payload that a round's piece for ``n`` weights can have."""
    return max(codec_of(sync).bound(Mask(n, sync.density, 0).count), codec_of(sync, full=True).bound(n))


def parts(n: int, count: int) -> list[tuple[int, int]]:
    """[start, end) of ``count`` parts of a vector of length n; sizes differ by at most one."""
    return [(n * j // count, n * (j + 1) // count) for j in range(count)]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The state of a replica at the moment a round begins."""

    state: State  # x, g, m, v as they were
    samples: int
    fragments: tuple[int, ...]
    full: bool


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
        self.sync = config.sync.resolved()
        replicas = len(seat.plan.stages[seat.stage].replicas)
        # Of every fragment: where it lies in the stage's vector, and where its owners' shards lie in the fragment.
        self.fragments = parts(stage.size, self.sync.fragments)
        self.shards = [parts(end - start, replicas) for start, end in self.fragments]
        self.owned = Owned(fragments=self.sync.fragments, replicas=replicas, replica=seat.replica)
        self.feedback = [ErrorFeedback(end - start) for start, end in (s[seat.replica] for s in self.shards)]
        if state.feedback is not None and state.owned == self.owned:
            for feedback, kept in zip(self.feedback, state.feedback.split([f.n for f in self.feedback]), strict=True):
                feedback.load(kept)

    def owing(self, state: State) -> State:
        """``state`` with what this replica still owes as the owner of its shards."""
        kept = [f.state() for f in self.feedback]
        whole = None
        if any(k is not None for k in kept):
            whole = torch.cat([torch.zeros(f.n) if k is None else k for f, k in zip(self.feedback, kept, strict=True)])
        return replace(state, feedback=whole, owned=self.owned)

    def capture(
        self, stage: Stage, steps_done: int, samples: int, fragments: Iterable[int], *, full: bool = False
    ) -> Capture:
        """Copies what the round needs, so that training may go on.

        ``full``: the round that ends a run, in which neither mask nor top-k leaves anything out. What a sparse round
        leaves in the replicas' own weights would be lost to the model that is published.
        """
        plan = self.seat.plan
        point = SavePoint(
            kind="round",
            generation=plan.generation,
            step=steps_done,
            first_layer=stage.first,
            last_layer=stage.last,
        )
        return Capture(state=stage.state(point), samples=samples, fragments=tuple(fragments), full=full)

    def exchange(self, capture: Capture) -> Outcome:
        """The whole round; blocks on the other replicas. Raises ``Fenced`` when the generation ends meanwhile."""
        started, before, nbytes = time.perf_counter(), capture.state, 0
        assert before.x is not None
        x, g = before.x.clone(), before.g.clone()
        momentum, unsent = before.momentum, before.unsent
        if self.sync.outer_momentum:
            momentum = torch.zeros_like(g) if momentum is None else momentum.clone()
        if self.sync.feedback == "explicit":
            unsent = torch.zeros_like(g) if unsent is None else unsent.clone()
        for f in capture.fragments:
            here = slice(*self.fragments[f])
            residual = x[here] - g[here]
            if unsent is not None:
                residual.add_(unsent[here], alpha=self.sync.decay)
            alone = len(self.shards[f]) == 1
            if alone:
                mean, residual = residual, torch.zeros_like(residual)
            else:
                mean, sent_nbytes = self._average(f, before.point.step, residual, capture)
                nbytes += sent_nbytes
            if alone and self.sync.outer_lr == 1.0 and momentum is None and unsent is None:
                g[here] = x[here]  # not g + (x - g), which rounds
            else:
                g[here].add_(self._outer(mean, None if momentum is None else momentum[here]))
            x[here] = g[here]
            if unsent is not None:
                unsent[here] = residual
            else:
                x[here].add_(residual, alpha=self.sync.decay)
        if not all(math.isfinite(end) for end in torch.aminmax(g)):
            if len(self.seat.plan.stages[self.seat.stage].replicas) == 1:
                raise diverged("the weights have infinite or NaN elements")
            raise WireError("a round that makes weights infinite")
        point = replace(before.point, digest=digest(g))
        after = self.owing(replace(before, point=point, g=g, x=x, momentum=momentum, unsent=unsent))
        return Outcome(
            state=after,
            shift=x - before.x,
            base_digest=digest(before.g),
            samples=capture.samples,
            nbytes=nbytes,
            seconds=time.perf_counter() - started,
        )

    def _average(self, f: int, step: int, residual: Tensor, capture: Capture) -> tuple[Tensor, int]:
        """Reduce-scatter and all-gather of a fragment.

        Takes what was sent out of ``residual``; returns the mean, zero where nobody sent anything, and bytes sent.
        """
        seat, bounds, nbytes = self.seat, self.shards[f], 0
        peers = [r.peer for r in seat.plan.stages[seat.stage].replicas]
        codec = codec_of(self.sync, full=capture.full)
        masks = [self._mask(f, j, step, end - start, capture.full) for j, (start, end) in enumerate(bounds)]
        mine, pieces = masks[seat.replica], list[tuple[Sparse, int]]()
        for j, (start, end) in enumerate(bounds):
            values = masks[j].gather(residual[start:end]).clone()
            encoded = self._encoded(codec, values)
            masks[j].put(residual[start:end], encoded.sent.add_to(values, scale=-1.0))
            if j == seat.replica:
                pieces.append((encoded.sent, capture.samples))
            else:
                nbytes += self._post(peers[j], Kind.SHARD, step, f, end - start, encoded.payload, capture.samples)
        for i in range(len(peers)):
            if i != seat.replica:
                frame = self._take(Kind.SHARD, step, f, i)
                if (weight := frame.header.targets) >= MAX_WEIGHT:
                    raise WireError(f"a round's piece that says it is of {weight} samples")
                pieces.append((self._decoded(codec, frame, mine.count), weight))
        owed = self.feedback[f].compensated(mine, weighted_mean(pieces, mine.count))
        decided = self._encoded(codec, owed)
        self.feedback[f].keep(mine, owed, decided.sent)
        length = bounds[seat.replica][1] - bounds[seat.replica][0]
        for i, peer in enumerate(peers):
            if i != seat.replica:
                nbytes += self._post(peer, Kind.MEAN, step, f, length, decided.payload, 0)
        whole = torch.zeros_like(residual)
        for j, (start, end) in enumerate(bounds):
            if j == seat.replica:
                sent = decided.sent
            else:
                sent = self._decoded(codec, self._take(Kind.MEAN, step, f, j), masks[j].count)
            masks[j].put(whole[start:end], sent.dense(masks[j].count))
        return whole, nbytes

    def _mask(self, f: int, owner: int, step: int, n: int, full: bool) -> Mask:
        """Which of an owner's ``n`` weights a round opens; it moves on from round to round."""
        seed = draw(self.config.seed, "mask", self.seat.stage, f, owner) % 2**63
        at = turn(self.sync, self.config.seed, step - 1, f)
        return Mask(n, 1.0 if full else self.sync.density, seed, at)

    def _outer(self, mean: Tensor, momentum: Tensor | None) -> Tensor:
        """The outer optimizer's step: along the mean, or Nesterov's as in DiLoCo. Writes to both of its arguments.

        Each product is rounded by itself: torch's ``alpha`` is a fused multiply-add on some CPUs and two roundings on
        others, and all replicas must come to the same bits.
        """
        if momentum is not None:
            momentum.mul_(self.sync.outer_momentum).add_(mean)
            mean.add_(momentum * self.sync.outer_momentum)
        return mean.mul_(self.sync.outer_lr)

    def _encoded(self, codec: SyncCodec, values: Tensor) -> Encoded:
        try:
            return codec.encode(values)
        except CodecError as error:
            raise diverged(str(error)) from None

    def _decoded(self, codec: SyncCodec, frame: Frame, count: int) -> Sparse:
        (spec,) = frame.header.tensors
        try:
            return codec.decode(release(spec.codec, frame.payload, codec.bound(count)), count)
        except CodecError as error:
            raise WireError(f"a round's piece cannot be decoded: {error}") from None

    def _post(self, peer: str, kind: Kind, step: int, f: int, length: int, payload: bytes, weight: int) -> int:
        seat, codec = self.seat, WEIGHTS
        if self.config.zstd:
            codec, payload = squeeze(codec, payload)
        frame = make_frame(
            kind=kind,
            run=seat.run,
            generation=seat.plan.generation,
            step=step,
            stage=seat.stage,
            microbatch=seat.replica,
            part=f,
            attempt=0,
            tensors=(TensorSpec(codec=codec, shape=(length,), nbytes=len(payload)),),
            targets=weight,
            dense_nbytes=0,
            payload=payload,
        )
        self.wire.post(peer, frame)
        return len(payload)

    def _take(self, kind: Kind, step: int, f: int, replica: int) -> Frame:
        sender = self.seat.plan.stages[self.seat.stage].replicas[replica].peer
        return self.wire.take(Address(self.seat.plan.generation, kind, step, f, replica, sender))


def diverged(why: str) -> StateError:
    return StateError(
        f"training has diverged ({why})", hint="Start again from a published model with a lower optimizer.lr."
    )


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
    stage.unsent = None if state.unsent is None else state.unsent.to(stage.device)
