"""Bytes that a hostile peer might send: valid ones changed a little, parts of two, wrong lengths, or chance alone."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

EDGES = (0, 1, 0x7F, 0x80, 0xC0, 0xDD, 0xDF, 0xFF)  # of lengths, and MessagePack's marks of arrays and maps
T = TypeVar("T")


class Mutator:
    """Deterministic: the same seed gives the same inputs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, valid: Sequence[bytes], *, most_nbytes: int = 1 << 20) -> bytes:
        """One input made from ``valid`` ones."""
        r = self.random
        if r.random() < 0.08:
            return r.randbytes(r.choice((0, 1, 2, 9, 40, 300)))
        data = bytearray(r.choice(valid))
        for _ in range(r.choice((1, 1, 1, 2, 4))):
            self._change(data, valid)
        return bytes(data[:most_nbytes])

    def _change(self, data: bytearray, valid: Sequence[bytes]) -> None:
        r = self.random
        at = r.randrange(len(data) + 1)
        if r.random() < 0.4:  # heads have the lengths
            at = min(at, r.randrange(24))
        match r.randrange(8):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << r.randrange(8)
            case 2 if at < len(data):
                data[at] = r.choice(EDGES)
            case 3:  # a length field
                width = r.choice((2, 4, 8))
                number = r.choice((0, 1, len(data), 1 << 15, (1 << 31) - 1, 1 << 40, (1 << 64) - 1))
                data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "big")
            case 4:
                del data[at:]
            case 5:
                del data[at : at + r.randrange(1, 9)]
            case 6:
                data[at:at] = r.randbytes(r.randrange(1, 9))
            case _:
                other = r.choice(valid)
                begin = r.randrange(len(other) + 1)
                data[at : at + r.randrange(64)] = other[begin : begin + r.randrange(256)]


@contextmanager
def traced() -> Iterator[None]:
    """Python's allocations are measured, so that ``outcome`` can look at them."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def outcome(
    parse: Callable[[], T], errors: tuple[type[Exception], ...], most_nbytes: int, seen: Counter[str]
) -> T | None:
    """What ``parse`` gives; None for one of ``errors``. Counts either in ``seen``. Anything else that it raises goes
    on, and it may not have allocated more than ``most_nbytes`` at any time. Call within ``traced``."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    found: T | None = None
    try:
        found = parse()
        seen["taken"] += 1
    except errors:
        seen["refused"] += 1
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before <= most_nbytes, f"{peak - before} bytes were allocated, {most_nbytes} are allowed"
    return found
