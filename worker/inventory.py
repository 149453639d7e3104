"""A state in pieces of 1 MiB, each with its SHA-256: what a donor lists first, and a newcomer asks for one by one.

Three parts. ``G``: the reference, 2^18 weights a piece. ``MOMENTUM``: the outer optimizer's, the same way; as all
replicas have the same bits of both, their pieces may come from anybody. ``MOMENTS``: AdamW's m and v are each
replica's own, so a piece has both, of 2^17 weights: first the m, then the v.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from ..protocol.errors import WireError
from ..protocol.frames import Count, Frame, Header, Kind, Small, TensorSpec, make_frame
from ..protocol.plan import SavePoint
from .moments import Moment, part_of
from .stage import State

PIECE_NBYTES = 1 << 20
RAW = "raw"  # codec of what goes as it is
HASH_NBYTES = 32
_SMALL_NBYTES = 4096  # what an inventory has besides its hashes, and a list of rounds has for each


class Part(IntEnum):
    """What of a state is asked for."""

    INVENTORY = 0
    G = 1
    MOMENTUM = 2
    MOMENTS = 3
    ENTRY = 4  # not of the state: the committed round that came after it, as a redo log has it


PARTS = (Part.G, Part.MOMENTUM, Part.MOMENTS)
_WEIGHTS = {Part.G: PIECE_NBYTES // 4, Part.MOMENTUM: PIECE_NBYTES // 4, Part.MOMENTS: PIECE_NBYTES // 8}


class StateName(NamedTuple):
    """A committed round of layers [first, last)."""

    generation: int
    step: int
    first_layer: int
    last_layer: int

    @classmethod
    def of(cls, point: SavePoint) -> StateName:
        return cls(point.generation, point.step, point.first_layer, point.last_layer)

    @property
    def layers(self) -> tuple[int, int]:
        return self.first_layer, self.last_layer


class PieceName(NamedTuple):
    part: Part
    number: int


class Inventory(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """The hashes of a state's pieces, one after the other; empty for a part that it does not have."""

    size: Count
    updates: Small
    g: bytes
    momentum: bytes
    moments: bytes

    def hashes(self, part: Part) -> bytes:
        return {Part.G: self.g, Part.MOMENTUM: self.momentum, Part.MOMENTS: self.moments}[part]

    def hash(self, piece: PieceName) -> bytes:
        start = piece.number * HASH_NBYTES
        return self.hashes(piece.part)[start : start + HASH_NBYTES]


def count(size: int, part: Part) -> int:
    """How many pieces a part of a stage of ``size`` weights has."""
    return -(-size // _WEIGHTS[part])


def span(size: int, piece: PieceName) -> tuple[int, int]:
    """The weights [start, end) that a piece is of."""
    start = piece.number * _WEIGHTS[piece.part]
    return start, min(size, start + _WEIGHTS[piece.part])


def nbytes(size: int, piece: PieceName) -> int:
    start, end = span(size, piece)
    return (end - start) * (8 if piece.part == Part.MOMENTS else 4)


def most_nbytes(size: int) -> int:
    """The longest frame payload of a state of a stage of ``size`` weights."""
    hashes = sum(count(size, part) for part in PARTS) * HASH_NBYTES
    return max(PIECE_NBYTES, hashes + _SMALL_NBYTES)


def vectors(state: State, part: Part) -> list[Moment]:
    """What a part is made of; empty if the state does not have it."""
    named: dict[Part, list[Moment | None]] = {
        Part.G: [state.g],
        Part.MOMENTUM: [state.momentum],
        Part.MOMENTS: [state.m, state.v],
    }
    return [vector for vector in named[part] if vector is not None]


def cut(state: State, piece: PieceName) -> bytes:
    """The bytes of a piece of a state that has it."""
    start, end = span(state.g.numel(), piece)
    return b"".join(_bytes(part_of(vector, start, end)) for vector in vectors(state, piece.part))


def _bytes(vector: Tensor) -> bytes:
    data: bytes = vector.contiguous().numpy().tobytes()
    return data


def inventory(state: State) -> Inventory:
    """Reads the whole state once; hashing leaves the other threads alone."""
    size = state.g.numel()

    def hashes(part: Part) -> bytes:
        if not vectors(state, part):
            return b""
        return b"".join(hashlib.sha256(cut(state, PieceName(part, i))).digest() for i in range(count(size, part)))

    return Inventory(
        size=size,
        updates=state.updates,
        g=hashes(Part.G),
        momentum=hashes(Part.MOMENTUM),
        moments=hashes(Part.MOMENTS),
    )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Inventory)


def encode(what: Inventory) -> bytes:
    return _encoder.encode(what)


def decode(data: bytes, size: int) -> Inventory:
    """``WireError`` unless it lists the pieces of a stage of ``size`` weights."""
    try:
        what = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a state's inventory is not valid: {error}") from None
    if what.size != size:
        raise WireError(f"a state of {what.size} weights for a stage of {size}")
    for part in PARTS:
        have, wanted = len(what.hashes(part)), count(size, part) * HASH_NBYTES
        if have != wanted and (have or part == Part.G):
            raise WireError(f"a state's inventory with {have} bytes of hashes for {wanted}")
    return what


def assemble(size: int, part: Part, data: np.ndarray) -> tuple[Tensor, ...]:
    """The vectors of a part (one, or m and v) from all of its pieces, one after the other, as bytes."""
    words = torch.from_numpy(data).view(torch.float32)
    if part != Part.MOMENTS:
        return (words,)
    m, v = torch.empty(size), torch.empty(size)
    for index in range(count(size, part)):
        start, end = span(size, PieceName(part, index))
        both = words[2 * start : 2 * end]
        m[start:end], v[start:end] = both[: end - start], both[end - start :]
    return m, v


def frame(
    kind: Kind, run: bytes, name: StateName, piece: PieceName, payload: bytes = b"", total_nbytes: int = 0
) -> Frame:
    """A request for a piece, or the piece; an answer without payload: it is not here.

    Nothing of it belongs to a plan: ``generation`` and ``step`` are of the round that the state is of, ``stage`` and
    ``attempt`` its first and last layer.
    ``total_nbytes``: of all pieces of an entry.
    """
    spec = TensorSpec(codec=RAW, shape=(len(payload),), nbytes=len(payload))
    return make_frame(
        payload=payload,
        kind=kind,
        run=run,
        generation=name.generation,
        step=name.step,
        stage=name.first_layer,
        microbatch=int(piece.part),
        part=piece.number,
        attempt=name.last_layer,
        tensors=() if kind == Kind.STATE_REQUEST else (spec,),
        targets=total_nbytes,
        dense_nbytes=0,
    )


def read(header: Header) -> tuple[StateName, PieceName]:
    """What a frame is about; ``WireError`` for a part that no state has."""
    if header.microbatch not in tuple(Part):
        raise WireError(f"part {header.microbatch} of a state")
    name = StateName(header.generation, header.step, header.stage, header.attempt)
    return name, PieceName(Part(header.microbatch), header.part)
