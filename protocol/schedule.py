"""When things happen, as pure functions of (seed, step): nobody needs to be asked, all peers agree."""

from __future__ import annotations

import functools
import hashlib

from .config import EvalConfig, Sync


def draw(seed: int, *what: object) -> int:
    """A 64-bit integer that depends on nothing but the seed and the name of the draw; the same on every machine."""
    text = ":".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_round(sync: Sync, seed: int, step: int) -> bool:
    """Whether the replicas of a stage exchange weights after ``step`` (0-based)."""
    if sync.every is not None:
        return (step + 1) % (sync.every // sync.fragments) == 0
    return draw(seed, "round", step) < (sync.coin or 0.0) * sync.fragments * 2**64


def is_applied(sync: Sync, seed: int, captured: int, done: int) -> bool:
    """Whether a round captured after ``captured`` steps is in the weights before step ``done`` begins."""
    return done >= captured + sync.delay or is_round(sync, seed, done - 1)


def fragments(sync: Sync, seed: int, step: int, last: bool) -> range:
    """Which parts of the weights a round after ``step`` exchanges.

    The one whose turn it is (Streaming DiLoCo, arXiv 2501.18512, so that no round is a peak); every one in a round
    that closes a generation or, ``last``, the run, because what comes after starts from the reference.
    """
    if last or not is_round(sync, seed, step):
        return range(sync.fragments)
    if sync.every is not None:
        turn = (step + 1) // (sync.every // sync.fragments) % sync.fragments
    else:
        turn = draw(seed, "fragment", step) % sync.fragments
    return range(turn, turn + 1)


def turn(sync: Sync, seed: int, step: int, fragment: int) -> int:
    """How often ``fragment`` had its turn in the rounds up to ``step``, those that close a generation left out.

    The round's mask moves on with it, so that every weight has its turn as well.
    """
    if sync.every is not None:
        rounds = (step + 1) // (sync.every // sync.fragments)
        return (rounds - fragment) // sync.fragments + 1
    blocks, rest = divmod(step + 1, _BLOCK)
    return (
        sum(_turns(sync, seed, block, _BLOCK)[fragment] for block in range(blocks))
        + (_turns(sync, seed, blocks, rest)[fragment])
    )


_BLOCK = 1024


@functools.lru_cache(maxsize=1 << 14)
def _turns(sync: Sync, seed: int, block: int, count: int) -> tuple[int, ...]:
    """The turns of each fragment in the first ``count`` steps of a block."""
    turns = [0] * sync.fragments
    for step in range(block * _BLOCK, block * _BLOCK + count):
        if is_round(sync, seed, step):
            turns[fragments(sync, seed, step, last=False)[0]] += 1
    return tuple(turns)


def is_eval(config: EvalConfig, steps: int, position: int) -> bool:
    """Whether the held-out loss is measured when ``position`` steps are done."""
    return position % config.every == 0 or position == steps
