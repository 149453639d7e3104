"""How the means of a round move the reference: one rule, for those who make a round and those who do it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..compression.codec import CodecError
from ..compression.mask import Mask
from ..compression.sync import Sparse, SyncCodec
from ..protocol.config import Sync
from ..protocol.errors import WireError
from ..protocol.schedule import draw, turn
from .shards import WEIGHTS, Piece, codec_of
from .squeeze import SUFFIX, release

ALONE = "alone"  # codec of a lone replica's piece: its mean in fp32
FLIPPED = "flipped"  # the same where the new weights themselves count: which bits of the old ones change
LONE = (ALONE, FLIPPED)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The rounds of one stage: what a run's configuration and the number of the stage decide."""

    sync: Sync
    seed: int
    stage: int

    def mask(self, piece: Piece, owner: int, step: int, *, full: bool) -> Mask:
        """Which of an owner's weights the round after ``step`` steps opens; it moves on from round to round."""
        start, end = piece.shards[owner]
        seed = draw(self.seed, "mask", self.stage, piece.number, owner) % 2**63
        at = turn(self.sync, self.seed, step - 1, piece.fragment)
        return Mask(end - start, 1.0 if full else self.sync.density, seed, at)

    def mean(self, piece: Piece, decided: Sequence[Sparse], step: int, *, full: bool) -> Tensor:
        """A piece's mean from what each owner decided of its shard; zero where the mask is closed."""
        mean = torch.zeros(piece.end - piece.start)
        for owner, sent in enumerate(decided):
            mask, (start, end) = self.mask(piece, owner, step, full=full), piece.shards[owner]
            mask.put(mean[start - piece.start : end - piece.start], sent.dense(mask.count))
        return mean

    def advance(self, g: Tensor, momentum: Tensor | None, mean: Tensor) -> None:
        """The outer optimizer's step: along the mean, or Nesterov's as in DiLoCo. Writes to all of its arguments.

        Each product is rounded by itself: torch's ``alpha`` is a fused multiply-add on some CPUs and two roundings on
        others, and all replicas must come to the same bits.
        """
        if momentum is not None:
            momentum.mul_(self.sync.outer_momentum).add_(mean)
            mean.add_(momentum * self.sync.outer_momentum)
        g.add_(mean.mul_(self.sync.outer_lr))

    def decoded(self, codec: str, payload: bytes, count: int, *, full: bool) -> Sparse:
        """A payload as it came, for ``count`` weights; ``WireError`` if no replica makes such a one."""
        sync = codec_of(self.sync, full=full)
        return decoded(sync, codec, payload, count)

    def redo(
        self,
        piece: Piece,
        payloads: Sequence[tuple[str, bytes]],
        g: Tensor,
        momentum: Tensor | None,
        step: int,
        *,
        full: bool,
    ) -> None:
        """What a round did to one piece of ``g`` and ``momentum`` (both whole), from its payloads, owner by owner."""
        here = slice(piece.start, piece.end)
        kept = None if momentum is None else momentum[here]
        codec, payload = payloads[0]
        if codec.removesuffix(SUFFIX) in LONE:
            if len(payloads) != 1:
                raise WireError("a lone replica's piece among others")
            words = unpacked(codec, payload, piece.end - piece.start)
            if codec.removesuffix(SUFFIX) == FLIPPED:
                g[here] = torch.from_numpy((words ^ g[here].numpy().view(np.uint32)).view(np.float32))
            else:
                self.advance(g[here], kept, torch.from_numpy(words.view(np.float32)))
            return
        decided = []
        for owner, (codec, payload) in enumerate(payloads):
            if codec.removesuffix(SUFFIX) != WEIGHTS:
                raise WireError(f"a round's piece in the codec {codec!r}")
            count = self.mask(piece, owner, step, full=full).count
            decided.append(self.decoded(codec, payload, count, full=full))
        self.advance(g[here], kept, self.mean(piece, decided, step, full=full))


def decoded(sync: SyncCodec, codec: str, payload: bytes, count: int) -> Sparse:
    """What a payload with the codec's name ``codec`` says of ``count`` weights; ``WireError`` if it cannot be read."""
    try:
        return sync.decode(release(codec, payload, sync.bound(count)), count)
    except CodecError as error:
        raise WireError(f"a round's piece cannot be decoded: {error}") from None


def packed(values: Tensor, against: Tensor | None = None) -> bytes:
    """fp32 values, or the bits in which they differ from ``against``, byte by byte: all first ones, all second ones...

    What changes little from round to round leaves its high bytes zero, so that zstd finds them.
    """
    words = values.contiguous().numpy().view(np.uint32)
    if against is not None:
        words = words ^ against.contiguous().numpy().view(np.uint32)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4).T).tobytes()


def unpacked(codec: str, payload: bytes, count: int) -> np.ndarray:
    """The uint32 words of ``packed``; ``WireError`` unless there are ``count``."""
    data = release(codec, payload, 4 * count)
    if len(data) != 4 * count:
        raise WireError(f"a lone replica's piece of {len(data)} bytes for {count} weights")
    planes = np.frombuffer(data, np.uint8).reshape(4, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(np.uint32)
