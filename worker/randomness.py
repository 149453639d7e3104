"""Chance as a function: the same draws from the same key, on every platform and with every numpy.

Only the raw 64-bit words of numpy's Philox4x64-10 (Salmon et al., 2011) are used. Numpy promises that they stay; what
its ``Generator`` makes of them it may change (NEP 19). Pinned by golden values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 256  # words fetched at once; the stream does not depend on it


class Random:
    """A stream of draws that ``key``, whole numbers in [0, 2**64), decides. Keys of other lengths are other keys."""

    def __init__(self, key: tuple[int, ...]) -> None:
        digest = hashlib.sha256(b"".join(part.to_bytes(8, "little") for part in key)).digest()
        self._philox = np.random.Philox(key=np.frombuffer(digest[:16], "<u8").astype(np.uint64))
        self._words = np.empty(0, np.uint64)
        self._used = 0

    def words(self, n: int) -> NDArray[np.uint64]:
        """[n] raw words."""
        if self._used + n > len(self._words):
            more = self._philox.random_raw(max(n, _BLOCK))
            self._words = np.concatenate([self._words[self._used :], more])
            self._used = 0
        self._used += n
        return self._words[self._used - n : self._used]

    def word(self) -> int:
        return int(self.words(1)[0])

    def below(self, n: int) -> int:
        """Uniform in [0, n), n in [1, 2**64], without bias: words of the incomplete last multiple of n are refused."""
        if not 1 <= n <= 1 << 64:
            raise ValueError(f"no number below {n}")
        complete = (1 << 64) - (1 << 64) % n
        while (word := self.word()) >= complete:
            pass
        return word % n

    def uniform(self) -> float:
        """Uniform in [0, 1): a multiple of 2**-53."""
        return (self.word() >> 11) * 2.0**-53

    def choose(self, weights: Sequence[float]) -> int:
        """A place in ``weights`` (>= 0, not all 0), as likely as its weight."""
        left = self.uniform() * sum(weights)
        for place, weight in enumerate(weights):
            if left < weight:
                return place
            left -= weight
        return max(place for place, weight in enumerate(weights) if weight > 0)  # rounding ate the last one

    def split(self, total: int, parts: int) -> NDArray[np.int64]:
        """[parts] whole numbers >= 1 that sum to ``total``: every such composition is equally likely.

        The ``parts - 1`` places of the smallest among ``total - 1`` words are the cuts.
        """
        if not 1 <= parts <= total:
            raise ValueError(f"{total} cannot be split into {parts} parts that are not empty")
        if parts == 1:
            return np.array([total], np.int64)
        words = self.words(total - 1)
        last = np.partition(words, parts - 2)[parts - 2]
        cuts = np.flatnonzero(words <= last)
        if len(cuts) >= parts:  # equal words: the first ones count
            same = np.flatnonzero(words == last)
            cuts = np.setdiff1d(cuts, same[parts - 1 - len(cuts) :])
        return np.diff(cuts + 1, prepend=0, append=total)
