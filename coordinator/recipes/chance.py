"""Chance that is a function of a name: the same on every machine and with every version of every library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """Draws from SHA-256 in counter mode, keyed by what is given: equal keys, equal draws."""

    def __init__(self, *key: object) -> None:
        self._key = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
        self._count = 0
        self._left: list[int] = []

    def share(self) -> float:
        """In [0, 1)."""
        if not self._left:
            block = hashlib.sha256(self._key + self._count.to_bytes(8, "little")).digest()
            self._left = [int.from_bytes(block[at : at + 8], "little") for at in range(0, 32, 8)]
            self._count += 1
        return (self._left.pop() >> 11) / (1 << 53)

    def below(self, n: int) -> int:
        """In [0, n), n at most 2**40."""
        return int(self.share() * n)

    def one(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def order(self, n: int) -> Iterator[int]:
        """range(n) in random order, made as far as it is asked for (Fisher and Yates's shuffle)."""
        moved: dict[int, int] = {}
        for place in range(n):
            other = place + self.below(n - place)
            yield moved.get(other, other)
            moved[other] = moved.get(place, place)
