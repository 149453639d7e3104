"""What a round is made of: fragments that take turns, pieces that fit a frame, owners' shards, and their codec."""

from __future__ import annotations

from dataclasses import dataclass

from ..compression.mask import count
from ..compression.sync import SyncCodec
from ..protocol.config import Sync

MOST_WEIGHTS = 1 << 26  # in a shard: a quarter of a frame's limit where they go in 32 bits
LAST_BITS = 8
WEIGHTS = "sync"  # codec name of a round's payload on the wire


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is exchanged as one: weights [start, end) of the stage, and [start, end) of each owner's shard of them."""

    number: int
    fragment: int
    start: int
    end: int
    shards: tuple[tuple[int, int], ...]


def cut(n: int, parts: int, start: int = 0) -> list[tuple[int, int]]:
    """[start, end) of each of ``parts`` parts of n elements from ``start`` on; sizes differ by at most one."""
    return [(start + n * j // parts, start + n * (j + 1) // parts) for j in range(parts)]


def layout(n: int, fragments: int, replicas: int) -> list[list[Piece]]:
    """The pieces of each fragment of a stage of n weights, numbered throughout."""
    out: list[list[Piece]] = []
    number = 0
    for fragment, (first, last) in enumerate(cut(n, fragments)):
        out.append([])
        for start, end in cut(last - first, max(1, -(-(last - first) // (MOST_WEIGHTS * replicas))), first):
            shards = tuple(cut(end - start, replicas, start))
            out[-1].append(Piece(number=number, fragment=fragment, start=start, end=end, shards=shards))
            number += 1
    return out


def codec_of(sync: Sync, *, full: bool = False) -> SyncCodec:
    """What the values of a round go through; ``full``: of one that sends everything, as ``Sync.completes`` asks for."""
    if full:
        return SyncCodec(bits=max(sync.bits, LAST_BITS))
    return SyncCodec(topk=sync.topk, chunk=sync.chunk, bits=sync.bits)


def most_nbytes(sync: Sync, n: int) -> int:
    """The longest payload that a round's piece for ``n`` weights, ``MOST_WEIGHTS`` at most, can have."""
    usual = codec_of(sync).bound(count(n, sync.density))
    return max(usual, codec_of(sync, full=True).bound(n)) if sync.completes else usual
