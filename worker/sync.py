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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compression.codec import CodecError
from ..compression.feedback import ErrorFeedback
from ..compression.mask import Mask
from ..compression.mean import MAX_WEIGHT, weighted_mean
from ..compression.sync import Encoded, Sparse, SyncCodec
from ..protocol import control_pb2 as pb
from ..protocol.config import RunConfig
from ..protocol.errors import DivergedError, WireError
from ..protocol.failpoints import failpoint
from ..protocol.frames import Frame, Kind, TensorSpec, make_frame
from ..protocol.keepers import keepers_of
from ..protocol.plan import SavePoint
from ..protocol.schedule import draw
from .boundary import Seat
from .mailbox import Address
from .pipeline import Wire
from .redo import Entry, Payload
from .reference import ALONE, FLIPPED, Rule, packed
from .rounding import round_into
from .shards import WEIGHTS, Piece, codec_of, layout
from .squeeze import squeeze
from .stage import Owned, Stage, State, digest


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The state of a replica at the moment a round begins; the round makes the new one of it and leaves nothing."""

    state: State  # x, g, m, v as they were
    samples: int
    fragments: tuple[int, ...]
    full: bool
    late: bool  # training goes on before it is applied
    place: int  # of the first weight in the model


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished exchange. ``state`` is where the stage stands if the round is applied at once."""

    state: State
    shifts: Sequence[tuple[int, Tensor]] | None  # to add to weights that trained on, from a place on; None: none did
    base_digest: bytes
    samples: int
    nbytes: int
    seconds: float
    entry: Entry | None = None  # to do it again from; None where nobody keeps any

    def report(self, attempt: int) -> pb.RoundDone:
        """For the coordinator, who decides whether it counts."""
        point = self.state.point
        return pb.RoundDone(
            generation=point.generation,
            step=point.step,
            samples=self.samples,
            digest=point.digest,
            base_digest=self.base_digest,
            nbytes=self.nbytes,
            seconds=self.seconds,
            attempt=attempt,
        )


class Synchronizer:
    """Rounds of one replica in one generation."""

    def __init__(self, config: RunConfig, seat: Seat, stage: Stage, state: State | None, wire: Wire) -> None:
        """``state``: what the seat was taken with; None when the generation goes on without one of the replicas."""
        self.config, self.seat, self.wire = config, seat, wire
        self.sync = config.sync.resolved()
        self.rule = Rule(sync=self.sync, seed=config.seed, stage=seat.stage)
        self.peers = [r.peer for r in seat.plan.replicas[seat.stage]]
        self.kept = config.checkpoint.keepers > 0
        self.keepers = keepers_of(seat.plan, seat.stage, config.checkpoint.keepers)
        self.pieces = layout(stage.size, self.sync.fragments, len(self.peers))
        self.owned = Owned(fragments=self.sync.fragments, replicas=len(self.peers), replica=seat.replica)
        # By the piece's number.
        self.feedback = [ErrorFeedback(end - start) for start, end in self.owned.shards(stage.size)]
        if state is not None and state.feedback and state.owned == self.owned:
            for feedback, kept in zip(self.feedback, state.feedback, strict=True):
                feedback.load(kept)
        # Steps done when samples were counted from zero; None where an older plan's are among them.
        self.counted_from = None if seat.plan.origin == "step" else seat.plan.first_step
        if seat.plan.lost:
            self.counted_from = seat.plan.lost[-1].since

    def owing(self, state: State) -> State:
        """``state`` with what this replica still owes as the owner of its shards."""
        return replace(state, feedback=tuple(f.state() for f in self.feedback), owned=self.owned)

    def capture(
        self,
        stage: Stage,
        steps_done: int,
        samples: int,
        fragments: Iterable[int],
        *,
        full: bool = False,
        late: bool = True,
    ) -> Capture:
        """Copies what the round needs, so that training may go on, if it does (``late``).

        ``full``: the round that ends a run, in which neither mask nor top-k leaves anything out (``Sync.completes``).
        """
        plan = self.seat.plan
        point = SavePoint(
            kind="round",
            generation=plan.generation,
            step=steps_done,
            first_layer=stage.first,
            last_layer=stage.last,
        )
        full = full and self.sync.completes
        return Capture(
            state=stage.state(point),
            samples=samples,
            fragments=tuple(fragments),
            full=full,
            late=late,
            place=stage.place_in_model,
        )

    def exchange(self, capture: Capture) -> Outcome:
        """The whole round; blocks on the other replicas. Raises ``Fenced`` when the generation ends meanwhile."""
        started, before, nbytes = time.perf_counter(), capture.state, 0
        assert before.x is not None
        base_digest, key = digest(before.g), draw(self.config.seed, "rounding", "round", before.point.step)
        x, g = before.x, before.g.clone()
        momentum, unsent = before.momentum, before.unsent
        if self.sync.outer_momentum and momentum is None:
            momentum = torch.zeros_like(g)
        if self.sync.feedback == "explicit" and unsent is None:
            unsent = torch.zeros_like(g)
        payloads: list[Payload] = []
        shifts: list[tuple[int, Tensor]] = []
        for piece, mean, residual, sent_nbytes in self._averages(capture, x, g, unsent, payloads):
            here = slice(piece.start, piece.end)
            nbytes += sent_nbytes
            exact = self.sync.outer_lr == 1.0 and momentum is None and unsent is None
            if len(self.peers) == 1 and self.kept:
                nbytes += self._tell(
                    piece, packed(x[here].float(), g[here]) if exact else packed(mean), exact, payloads, capture
                )
            if len(self.peers) == 1 and exact:
                g[here] = x[here]  # not g + (x - g), which rounds
            else:
                self.rule.advance(g[here], None if momentum is None else momentum[here], mean)
            moved = mean.copy_(g[here])  # its memory is free
            if unsent is not None:
                unsent[here] = residual
            else:
                moved.add_(residual, alpha=self.sync.decay)
            del residual  # makes room
            if capture.late:
                shifts.append((piece.start, moved - x[here]))
            round_into(x[here], moved, key, capture.place + piece.start)
            del mean, moved
        self.counted_from = before.point.step
        if not all(math.isfinite(end) for end in torch.aminmax(g)):
            if len(self.peers) == 1:
                raise DivergedError("the weights have infinite or NaN elements")
            raise WireError("a round that makes weights infinite")
        point = replace(before.point, digest=digest(g))
        after = self.owing(replace(before, point=point, g=g, x=x, momentum=momentum, unsent=unsent))
        entry = Entry(
            generation=point.generation,
            attempt=self.seat.plan.attempt,
            step=point.step,
            fragments=capture.fragments,
            replicas=len(self.peers),
            full=capture.full,
            base_digest=base_digest,
            digest=point.digest,
            payloads=tuple(payloads),
        )
        return Outcome(
            state=after,
            shifts=shifts if capture.late else None,
            base_digest=base_digest,
            entry=entry if self.kept else None,
            samples=capture.samples,
            nbytes=nbytes,
            seconds=time.perf_counter() - started,
        )

    def _averages(
        self, capture: Capture, x: Tensor, g: Tensor, unsent: Tensor | None, payloads: list[Payload]
    ) -> Iterator[tuple[Piece, Tensor, Tensor, int]]:
        """Reduce-scatter and all-gather, piece by piece, the next one on its way meanwhile.

        Gives the mean of what was sent (zero where nobody sent anything), what of ours was not, and bytes sent; puts
        what the owners decided into ``payloads``.
        """
        pieces = [piece for f in capture.fragments for piece in self.pieces[f]]
        going: list[tuple[Piece, Tensor, Sparse, int]] = []
        for piece in [*pieces, None]:
            if piece is not None:
                if len(self.peers) == 1:
                    residual = self._residual(piece, x, g, unsent)
                    yield piece, residual, torch.zeros_like(residual), 0
                    continue
                going.append(self._scatter(piece, self._residual(piece, x, g, unsent), capture))
                failpoint("worker.round.shard_sent")
            if going and (piece is None or len(going) > 1):
                yield self._gather(*going.pop(0), capture, payloads)  # and keeps nothing of it

    def _residual(self, piece: Piece, x: Tensor, g: Tensor, unsent: Tensor | None) -> Tensor:
        here = slice(piece.start, piece.end)
        residual = x[here] - g[here]  # fp32, as g is
        if unsent is not None:
            residual.add_(unsent[here], alpha=self.sync.decay)
        return residual

    def _scatter(self, piece: Piece, residual: Tensor, capture: Capture) -> tuple[Piece, Tensor, Sparse, int]:
        """Sends every owner its shard, and takes what was sent out of ``residual``; our own shard's, and bytes sent."""
        codec, nbytes, own = codec_of(self.sync, full=capture.full), 0, None
        for j, (start, end) in enumerate(piece.shards):
            mask, part = self._mask(piece, j, capture), residual[start - piece.start : end - piece.start]
            values = mask.gather(part).clone()
            encoded = self._encoded(codec, values)
            mask.put(part, encoded.sent.add_to(values, scale=-1.0))
            if j == self.seat.replica:
                own = encoded.sent
            else:
                payload = self._squeezed(WEIGHTS, encoded.payload)
                nbytes += self._post(self.peers[j], Kind.SHARD, piece, end - start, payload, capture)
        assert own is not None
        return piece, residual, own, nbytes

    def _gather(
        self, piece: Piece, residual: Tensor, own: Sparse, nbytes: int, capture: Capture, payloads: list[Payload]
    ) -> tuple[Piece, Tensor, Tensor, int]:
        """Decides our shard's mean, sends it to all, and takes everybody's: as ``_averages`` gives it."""
        codec, replica = codec_of(self.sync, full=capture.full), self.seat.replica
        step, mine = capture.state.point.step, self._mask(piece, replica, capture)
        received = [(own, capture.samples)]
        for i in range(len(self.peers)):
            if i != replica:
                frame = self._take(Kind.SHARD, step, piece, i)
                received.append((self._decoded(frame, mine.count, capture), self._weight(frame, i, step)))
        failpoint("worker.round.shards_taken")
        feedback = self.feedback[piece.number]
        owed = feedback.compensated(mine, weighted_mean(received, mine.count))
        encoded = self._encoded(codec, owed)
        feedback.keep(mine, owed, encoded.sent)
        payload = self._squeezed(WEIGHTS, encoded.payload)
        for kind, peers in ((Kind.MEAN, self.peers), (Kind.REDO, self.keepers)):
            for peer in peers:
                if peer != self.peers[replica]:
                    nbytes += self._post(peer, kind, piece, mine.n, payload, capture)
        failpoint("worker.round.mean_sent")
        decided = []
        for j in range(len(self.peers)):
            if j == replica:
                payloads.append(payload)
                decided.append(encoded.sent)
            else:
                frame = self._take(Kind.MEAN, step, piece, j)
                payloads.append((frame.header.tensors[0].codec, frame.payload))
                decided.append(self._decoded(frame, self._mask(piece, j, capture).count, capture))
        return piece, self.rule.mean(piece, decided, step, full=capture.full), residual, nbytes

    def _tell(self, piece: Piece, data: bytes, exact: bool, payloads: list[Payload], capture: Capture) -> int:
        """What a lone replica's keepers need of a piece: nobody else decides it, so it goes as it is; bytes sent."""
        payload = self._squeezed(FLIPPED if exact else ALONE, data)
        payloads.append(payload)
        length = piece.end - piece.start
        return sum(self._post(peer, Kind.REDO, piece, length, payload, capture) for peer in self.keepers)

    def _weight(self, frame: Frame, i: int, step: int) -> int:
        """The samples that replica ``i`` says it has trained on since the last round: the plan knows better."""
        weight, plan = frame.header.targets, self.seat.plan
        if weight >= MAX_WEIGHT:
            raise WireError(f"a round's piece that says it is of {weight} samples")
        if self.counted_from is not None:
            served = len(plan.served(self.seat.stage, i)) * plan.microbatch_size
            if weight != (step - self.counted_from) * served:
                raise WireError(f"a round's piece of {weight} samples where the plan has another number")
        return weight

    def _mask(self, piece: Piece, owner: int, capture: Capture) -> Mask:
        return self.rule.mask(piece, owner, capture.state.point.step, full=capture.full)

    def _encoded(self, codec: SyncCodec, values: Tensor) -> Encoded:
        try:
            return codec.encode(values)
        except CodecError as error:
            raise DivergedError(str(error)) from None

    def _decoded(self, frame: Frame, count: int, capture: Capture) -> Sparse:
        (spec,) = frame.header.tensors
        return self.rule.decoded(spec.codec, frame.payload, count, full=capture.full)

    def _post(self, to: str, kind: Kind, piece: Piece, length: int, payload: Payload, capture: Capture) -> int:
        seat = self.seat
        codec, data = payload
        frame = make_frame(
            kind=kind,
            run=seat.run,
            generation=seat.plan.generation,
            step=capture.state.point.step,
            stage=seat.stage,
            microbatch=seat.replica,
            part=piece.number,
            attempt=seat.plan.attempt,
            tensors=(TensorSpec(codec=codec, shape=(length,), nbytes=len(data)),),
            targets=capture.samples if kind == Kind.SHARD else 0,
            dense_nbytes=0,
            payload=data,
        )
        self.wire.post(to, frame)
        return len(data)

    def _squeezed(self, codec: str, data: bytes) -> Payload:
        return squeeze(codec, data) if self.config.zstd else (codec, data)

    def _take(self, kind: Kind, step: int, piece: Piece, replica: int) -> Frame:
        plan = self.seat.plan
        place = Address(plan.generation, kind, step, piece.number, replica, self.peers[replica], plan.attempt)
        return self.wire.take([place], plan.attempt)[1]


def apply(stage: Stage, outcome: Outcome, *, late: bool) -> None:
    """Puts a round into the weights: exactly if nothing trained since its capture, else as a shift (``late``)."""
    state = outcome.state
    assert state.x is not None
    stage.g = state.g
    if late:
        assert outcome.shifts is not None
        for start, by in outcome.shifts:
            stage.shift(start, by)
    else:
        stage.place(state.x)
    stage.momentum, stage.unsent = state.momentum, state.unsent
