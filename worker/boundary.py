"""What crosses a boundary between two stages: tensors and targets as frames, and frames as tensors and targets.

An activation's frame carries the hidden states, the targets, where the documents lie if the run has prefixes
(:mod:`.side_inputs`), and, where values are kept for reuse (:mod:`..compression.aq`), a mark for each sample: which it
is, and what a delta is against. A receiver that lacks the
value of some mark answers with a ``MISS`` and gets the same microbatch once more, as attempt 1, without deltas.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..compression.aq import (
    MARK_NBYTES,
    Buffer,
    Codecs,
    Mode,
    Receiver,
    Sender,
    Slots,
    pack_marks,
    parse_marks,
    unbiased,
)
from ..compression.codec import Codec, CodecError
from ..compression.registry import build
from ..protocol.config import RunConfig
from ..protocol.errors import DivergedError, WireError
from ..protocol.frames import Frame, Header, Kind, TensorSpec, make_frame
from ..protocol.manifest import Manifest
from ..protocol.plan import Plan
from ..protocol.schedule import draw
from .layout import Batch
from .mixture import Mixture
from .side_inputs import (
    IDS,
    LAYOUT,
    decode_ids,
    decode_layout,
    encode_ids,
    encode_layout,
    ids_codec,
    layout_nbytes,
)
from .squeeze import SUFFIX, is_squeezed, release, squeeze

log = logging.getLogger(__name__)
TRAIN, EVAL = 0, 1  # Header.part of an activation
MARKS = "aq"


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

    @property
    def peer(self) -> str:
        return self.plan.replicas[self.stage][self.replica].peer

    def rerouted(self, plan: Plan) -> Seat:
        """The same seat in a plan that has lost somebody else."""
        return replace(self, plan=plan, replica=plan.places[self.peer][1])


class Route(NamedTuple):
    """A way that microbatches go: two peers and the layer between them."""

    sender: str
    receiver: str
    layer: int


def routes_of(plan: Plan) -> set[Route]:
    return {
        Route(plan.peer_of(stage, m), plan.peer_of(stage + 1, m), plan.stages[stage + 1].first_layer)
        for stage in range(len(plan.stages) - 1)
        for m in range(plan.microbatches_per_step)
    }


class Memory:
    """The values that a worker keeps for reuse, for every route it is an end of. Outlives generations."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.shape = (config.model.seq_len, config.model.d_model)
        self.codecs = codecs_of(config)
        self.codecs.nbytes(self.shape)
        slot_nbytes = 2 * self.shape[0] * self.shape[1]
        self.slots = Slots(folder, min(round(config.activations.cache_gb * 1e9), half_of_free(folder)), slot_nbytes)
        self.buffers: dict[Route, Buffer] = {}

    def follow(self, seat: Seat) -> None:
        """Takes over a plan: routes that are gone are forgotten, the others share the disk.

        Both ends of a route give it what the one with more routes can, so that they run full at the same sample.
        """
        routes = routes_of(seat.plan)
        ends = Counter(peer for route in routes for peer in (route.sender, route.receiver))
        mine = {route for route in routes if seat.peer in (route.sender, route.receiver)}
        for route in self.buffers.keys() - mine:
            self.buffers.pop(route).resize(0)
        for route in sorted(mine):
            limit = self.slots.count // max(ends[route.sender], ends[route.receiver])
            if not limit:
                log.warning(
                    "activations.cache_gb holds no sample of %d bytes: nothing is reused", self.slots.slot_nbytes
                )
            if route in self.buffers:
                self.buffers[route].resize(limit)
            else:
                self.buffers[route] = Buffer(self.slots, self.shape, limit)

    def close(self) -> None:
        self.slots.close()


def half_of_free(folder: Path) -> int:
    """Half of what the disk of ``folder`` has left: what a run asks for does not fill it, whatever it asks for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free // 2
    except OSError:
        return 0


class Boundary:
    """Makes and reads the frames of one replica in one generation."""

    def __init__(self, config: RunConfig, seat: Seat, manifest: Manifest, memory: Memory | None = None) -> None:
        self.config, self.seat, self.manifest, self.memory = config, seat, manifest, memory
        self._mixture = Mixture(manifest, config.seed)
        self.forward_codec = build(config.activations.forward)
        self.backward_codec = build(config.activations.backward)
        if memory is not None:
            memory.follow(seat)

    def activation(self, step: int, part: int, m: int, batch: Batch, attempt: int = 0) -> tuple[Frame, bool]:
        """A batch with hidden states [B, T, D] for the next stage; whether a delta is among them.

        ``DivergedError`` if a value is not finite.
        """
        hidden, targets, layout = batch
        shape, marks = tuple(hidden.shape), None
        dense = 2 * hidden.numel()
        if self.memory is None or part != TRAIN:
            payload = encoded(self.forward_codec, hidden, self._seed(Kind.ACTIVATION, step, part, m))
        else:
            samples = self.samples(step, m)
            seeds = [self._seed(Kind.ACTIVATION, step, part, m, i) for i in range(len(samples))]
            sender = Sender(self.memory.codecs, self._buffer(self.seat.stage + 1, m))
            with no_divergence():
                payload, marks = sender.encode(hidden.float().cpu(), samples, step + 1, seeds, plain=attempt > 0)
        codec, payload = self._squeezed(self.forward_codec, payload)
        name, ids = encode_ids(targets, self.manifest.vocab_size)
        pieces = [payload, ids]
        specs = [
            TensorSpec(codec=codec, shape=shape, nbytes=len(payload)),
            TensorSpec(codec=name, shape=tuple(targets.shape), nbytes=len(ids)),
        ]
        if layout is not None:
            pieces.append(encode_layout(layout))
            specs.append(TensorSpec(codec=LAYOUT, shape=tuple(targets.shape), nbytes=len(pieces[-1])))
        if marks is not None:
            pieces.append(pack_marks(marks))
            specs.append(TensorSpec(codec=MARKS, shape=(len(marks), MARK_NBYTES), nbytes=len(pieces[-1])))
        frame = self._frame(
            b"".join(pieces),
            kind=Kind.ACTIVATION,
            step=step,
            part=part,
            microbatch=m,
            attempt=attempt,
            tensors=tuple(specs),
            targets=targets.numel(),
            dense_nbytes=0 if attempt else dense + len(ids),
        )
        return frame, any(mark.mode == Mode.DELTA for mark in marks or ())

    def gradient(self, step: int, m: int, gradient: Tensor) -> Frame:
        """The loss's gradient [B, T, D] by what the stage before sent. ``DivergedError`` if it is not finite."""
        payload = encoded(self.backward_codec, gradient, self._seed(Kind.GRADIENT, step, TRAIN, m))
        codec, payload = self._squeezed(self.backward_codec, payload)
        spec = TensorSpec(codec=codec, shape=tuple(gradient.shape), nbytes=len(payload))
        return self._frame(
            payload, kind=Kind.GRADIENT, step=step, microbatch=m, tensors=(spec,), dense_nbytes=2 * gradient.numel()
        )

    def miss(self, step: int, m: int) -> Frame:
        """Asks the stage before for a microbatch without deltas; ``targets`` says since when anything is kept here."""
        return self._frame(
            b"", kind=Kind.MISS, step=step, microbatch=m, targets=self._buffer(self.seat.stage, m).since(step + 1)
        )

    def missed(self, header: Header) -> None:
        """Takes over what a ``MISS`` says of the receiver; the plain microbatch is up to the caller."""
        assert self.memory is not None
        log.debug("microbatch %d of step %d goes once more, without deltas", header.microbatch, header.step)
        sender = Sender(self.memory.codecs, self._buffer(self.seat.stage + 1, header.microbatch))
        sender.missed(header.targets, header.step + 1)

    def received(self, frame: Frame, attempt: int = 0) -> Batch | None:
        """The batch of an activation, hidden states [B, T, D] in fp32; None if a value is missing.

        ``WireError`` for a payload that no sender makes, other samples than the plan's, targets that are no tokens,
        another attempt than asked for, or a delta in the second.
        """
        header, payload = frame.header, memoryview(frame.payload)
        hidden_spec, ids_spec = header.tensors[:2]
        hidden_end, ids_end = hidden_spec.nbytes, hidden_spec.nbytes + ids_spec.nbytes
        layout_end = ids_end + (header.tensors[2].nbytes if self.manifest.masked else 0)
        if hidden_spec.shape[0] != (size := self.size(header.part, header.microbatch)):
            raise WireError(f"microbatch {header.microbatch} of {hidden_spec.shape[0]} samples, not {size}")
        targets = decode_ids(payload[hidden_end:ids_end], ids_spec, self.manifest.vocab_size)
        layout = decode_layout(payload[ids_end:layout_end], ids_spec.shape) if self.manifest.masked else None
        marked = self.memory is not None and header.part == TRAIN
        body = release(
            hidden_spec.codec, payload[:hidden_end], hidden_nbytes(self.forward_codec, hidden_spec.shape, marked)
        )
        if self.memory is None or not marked:
            return Batch(decoded(self.forward_codec, body, hidden_spec.shape), targets, layout)
        with from_a_peer():
            marks = parse_marks(payload[layout_end:])
        if [mark.sample for mark in marks] != self.samples(header.step, header.microbatch):
            raise WireError(f"microbatch {header.microbatch} of step {header.step} with other samples than the plan's")
        if header.attempt != attempt or (attempt and any(mark.mode == Mode.DELTA for mark in marks)):
            raise WireError(f"microbatch {header.microbatch} of step {header.step} cannot be had without deltas")
        receiver = Receiver(self.memory.codecs, self._buffer(self.seat.stage, header.microbatch))
        with from_a_peer():
            hidden = receiver.decode(body, marks, header.step + 1)
        return None if hidden is None else Batch(hidden, targets, layout)

    def received_gradient(self, frame: Frame) -> Tensor:
        """A gradient [B, T, D] in fp32; ``WireError`` if no encoder makes such bytes, or it is of fewer samples."""
        (spec,), codec = frame.header.tensors, self.backward_codec
        if spec.shape[0] != self.seat.plan.microbatch_size:
            raise WireError(f"a gradient of {spec.shape[0]} samples, not {self.seat.plan.microbatch_size}")
        return decoded(codec, release(spec.codec, frame.payload, codec.nbytes(spec.shape)), spec.shape)

    def size(self, part: int, m: int) -> int:
        """How many samples a microbatch has: fewer only in the last one of an evaluation."""
        if part == TRAIN:
            return self.seat.plan.microbatch_size
        most = self.config.pipeline.microbatch_size
        return min(most, self.config.eval.samples - m * most)

    def samples(self, step: int, m: int) -> list[int]:
        """Which samples of the corpus a microbatch is made of: the same numbers in every epoch."""
        return [self._mixture.place(index).number for index in self.seat.plan.samples(step, m)]

    def _buffer(self, stage: int, m: int) -> Buffer:
        """Of the route by which microbatch ``m`` gets to ``stage``."""
        assert self.memory is not None
        plan = self.seat.plan
        route = Route(plan.peer_of(stage - 1, m), plan.peer_of(stage, m), plan.stages[stage].first_layer)
        return self.memory.buffers[route]

    def _seed(self, kind: Kind, *what: int) -> int:
        """For rounding by chance: of its own for every tensor, the same whenever a step is done again."""
        return draw(self.config.seed, "boundary", self.seat.stage, int(kind), *what) % 2**63

    def _squeezed(self, codec: Codec, payload: bytes) -> tuple[str, bytes]:
        return squeeze(codec.spec, payload) if self.config.zstd else (codec.spec, payload)

    def _frame(self, payload: bytes, *, kind: Kind, **fields: object) -> Frame:
        rest: dict[str, object] = {"part": TRAIN, "attempt": 0, "tensors": (), "targets": 0, "dense_nbytes": 0}
        return make_frame(
            payload,
            kind=kind,
            run=self.seat.run,
            generation=self.seat.plan.generation,
            stage=self.seat.stage + (1 if kind == Kind.ACTIVATION else -1),
            **rest | fields,
        )


@contextmanager
def no_divergence() -> Iterator[None]:
    """``DivergedError`` for a tensor that no codec takes because it is not finite."""
    try:
        yield
    except CodecError as error:
        raise DivergedError(str(error)) from None


@contextmanager
def from_a_peer() -> Iterator[None]:
    """``WireError`` for bytes that no encoder makes."""
    try:
        yield
    except CodecError as error:
        raise WireError(f"a boundary tensor cannot be decoded: {error}") from None


def encoded(codec: Codec, tensor: Tensor, seed: int) -> bytes:
    """A boundary tensor as bytes."""
    with no_divergence():
        return codec.encode(tensor.cpu(), seed)


def decoded(codec: Codec, payload: bytes | memoryview, shape: Sequence[int]) -> Tensor:
    """Bytes from a peer as a boundary tensor."""
    with from_a_peer():
        return codec.decode(payload, shape)


def codecs_of(config: RunConfig) -> Codecs:
    """The forward quantizer and its unbiased form."""
    plain = build(config.activations.forward)
    return Codecs(plain, unbiased(plain))


def hidden_nbytes(codec: Codec, shape: Sequence[int], marked: bool) -> int:
    """Bytes of hidden states [B, T, D] before zstd: one encoding of all, or, where they are marked, of each sample."""
    return shape[0] * codec.nbytes(shape[1:]) if marked else codec.nbytes(shape)


def boundary_check(config: RunConfig, manifest: Manifest) -> Callable[[Header], None]:
    """A check for incoming activations, gradients and misses: what this run's look like, to the byte."""
    model, pipeline, reuse = config.model, config.pipeline, config.activations.reuse
    codec_of_ids = ids_codec(manifest.vocab_size)
    codecs = {
        Kind.ACTIVATION: build(config.activations.forward),
        Kind.GRADIENT: build(config.activations.backward),
    }

    def check(header: Header) -> None:
        if header.kind == Kind.MISS:
            if not reuse or header.tensors or header.part != TRAIN:
                raise WireError("a miss where nothing can be missing")
            return
        codec, marked = codecs[header.kind], reuse and (header.kind, header.part) == (Kind.ACTIVATION, TRAIN)
        wanted = (2 + manifest.masked if header.kind == Kind.ACTIVATION else 1) + marked
        if len(header.tensors) != wanted:
            raise WireError(f"{header.kind.name.lower()} with {len(header.tensors)} tensors, not {wanted}")
        hidden = header.tensors[0]
        if (
            len(hidden.shape) != 3
            or not 1 <= hidden.shape[0] <= pipeline.microbatch_size
            or hidden.shape[1:] != (model.seq_len, model.d_model)
            or hidden.codec not in (codec.spec, codec.spec + SUFFIX)
            or hidden.nbytes > hidden_nbytes(codec, hidden.shape, marked)
            or (hidden.nbytes < hidden_nbytes(codec, hidden.shape, marked) and not is_squeezed(hidden.codec))
        ):
            raise WireError(f"a boundary tensor of {hidden.shape} as {hidden.codec} in {hidden.nbytes} bytes")
        if header.kind == Kind.ACTIVATION:
            ids = header.tensors[1]
            size = np.dtype(IDS[codec_of_ids]).itemsize * hidden.shape[0] * hidden.shape[1]
            if ids.codec != codec_of_ids or ids.shape != hidden.shape[:2] or ids.nbytes != size:
                raise WireError(f"targets of {ids.shape} as {ids.codec} in {ids.nbytes} bytes")
            if manifest.masked:
                where = header.tensors[2]
                most = layout_nbytes(ids.shape)
                if where.codec != LAYOUT or where.shape != ids.shape or where.nbytes > most:
                    raise WireError(f"a layout of {where.shape} as {where.codec} in {where.nbytes} bytes")
        if marked:
            marks, shape = header.tensors[-1], (hidden.shape[0], MARK_NBYTES)
            if marks.codec != MARKS or marks.shape != shape or marks.nbytes != shape[0] * MARK_NBYTES:
                raise WireError(f"marks of {marks.shape} as {marks.codec} in {marks.nbytes} bytes")

    return check
