"""Training text that repeats what a model is examined on: n-grams of tokens that both contain (Brown et al., 2020,
appendix C, which took n = 13).

The texts to protect are few and stay in memory, as sorted hashes of their n-grams and 20 bytes per token in all; the
training text streams past. A hash only proposes: every overlap is compared token by token, so nothing is found that is
not there. Both sides must be made by the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

N_GRAM = 13
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FINAL = np.uint64(0xBF58476D1CE4E5B9)


class Overlap(NamedTuple):
    """``length`` tokens from ``start`` of a row that protected texts contain too, n-gram by n-gram."""

    row: int
    start: int
    length: int


class Report(NamedTuple):
    """``texts_found``: places of the protected texts that were met, each with how many of its n-grams were, counted
    once each. ``n_short``: texts of less than n tokens, which have no n-gram and are not protected."""

    n: int
    n_rows: int
    n_tokens: int
    overlaps: list[Overlap]
    texts_found: dict[int, int]
    n_texts: int
    n_short: int

    @property
    def rows_found(self) -> int:
        return len({one.row for one in self.overlaps})

    @property
    def tokens_found(self) -> int:
        return sum(one.length for one in self.overlaps)

    def one_line(self) -> str:
        found = f"{self.rows_found} of {self.n_rows} rows and {self.tokens_found} of {self.n_tokens} tokens"
        short = f"; {self.n_short} are too short to be looked for" if self.n_short else ""
        return f"{found} repeat {len(self.texts_found)} of {self.n_texts} protected texts ({self.n}-grams){short}"


class Protected:
    """The n-grams of ``texts``, arrays of token ids >= 0. Raises ValueError for n < 1."""

    def __init__(self, texts: Sequence[NDArray[np.integer]], n: int = N_GRAM) -> None:
        if n < 1:
            raise ValueError(f"n-grams of {n} tokens")
        self.n = n
        self.n_texts = len(texts)
        self.n_short = sum(len(text) < n for text in texts)
        self._text_starts = np.cumsum([0, *(len(text) for text in texts)])
        self._tokens = np.concatenate([np.zeros(0, np.uint32), *(text.astype(np.uint32) for text in texts)])
        places = [np.arange(max(len(text) - n + 1, 0)) for text in texts]
        at = np.concatenate([np.zeros(0, np.int64), *(p + s for p, s in zip(places, self._text_starts, strict=False))])
        hashes = _hashes(self._tokens, n)[at] if len(at) else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._at, self._hashes = at[order], hashes[order]

    def matches(self, row: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where in ``row`` an n-gram begins that is protected: ascending."""
        if len(row) < self.n or not len(self._hashes):
            return np.zeros(0, np.int64)
        tokens = row.astype(np.uint32)
        hashes = _hashes(tokens, self.n)
        first = np.searchsorted(self._hashes, hashes)
        proposed = np.flatnonzero(self._hashes[np.minimum(first, len(self._hashes) - 1)] == hashes)
        grams = tokens[proposed[:, None] + np.arange(self.n)]
        equal = self._equal(first[proposed], grams)
        for place in np.flatnonzero(~equal):  # another n-gram with this hash comes first
            begin, end = self._range(hashes[proposed[place]])
            same = self._equal(np.arange(begin, end), np.broadcast_to(grams[place], (end - begin, self.n)))
            equal[place] = bool(same.any())
        return proposed[equal]

    def owners(self, gram: NDArray[np.integer]) -> set[int]:
        """Places of the texts that contain this n-gram."""
        tokens = gram.astype(np.uint32)
        begin, end = self._range(_hashes(tokens, self.n)[0])
        at = np.arange(begin, end)[self._equal(np.arange(begin, end), np.broadcast_to(tokens, (end - begin, self.n)))]
        return set((np.searchsorted(self._text_starts, self._at[at], side="right") - 1).tolist())

    def _range(self, hash_: np.uint64) -> tuple[int, int]:
        begin, end = (np.searchsorted(self._hashes, hash_, side=side) for side in ("left", "right"))
        return int(begin), int(end)

    def _equal(self, entries: NDArray[np.int64], grams: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Whether entry i is the n-gram ``grams[i]``."""
        equal: NDArray[np.bool_] = np.all(self._tokens[self._at[entries][:, None] + np.arange(self.n)] == grams, axis=1)
        return equal


def overlaps(
    rows: Iterable[NDArray[np.integer]], protected: Sequence[NDArray[np.integer]], n: int = N_GRAM
) -> list[Overlap]:
    """What of ``rows`` the ``protected`` texts contain; n-grams that touch or overlap are one overlap.

    Rows are looked at one by one: what reaches across the end of one is found where n tokens of it lie in one of them.
    """
    return scan(rows, protected, n).overlaps


def scan(rows: Iterable[NDArray[np.integer]], protected: Sequence[NDArray[np.integer]], n: int = N_GRAM) -> Report:
    """As ``overlaps``, with the sums of it for people."""
    grams = Protected(protected, n)
    found: list[Overlap] = []
    seen: set[bytes] = set()
    texts_found: dict[int, int] = {}
    n_rows = n_tokens = 0
    for number, row in enumerate(rows):
        n_rows, n_tokens = n_rows + 1, n_tokens + len(row)
        starts = grams.matches(row)
        found += [Overlap(number, start, length) for start, length in merged(starts, n)]
        for start in starts.tolist():
            gram = row[start : start + n].astype(np.uint32)
            if (name := gram.tobytes()) not in seen:
                seen.add(name)
                for owner in grams.owners(gram):
                    texts_found[owner] = texts_found.get(owner, 0) + 1
    return Report(n, n_rows, n_tokens, found, dict(sorted(texts_found.items())), grams.n_texts, grams.n_short)


def merged(starts: NDArray[np.int64], n: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches that n-grams at ``starts``, ascending, cover."""
    if not len(starts):
        return []
    breaks = np.flatnonzero(np.diff(starts) > n) + 1
    return [(int(run[0]), int(run[-1] - run[0]) + n) for run in np.split(starts, breaks)]


def _hashes(tokens: NDArray[np.uint32], n: int) -> NDArray[np.uint64]:
    """[T - n + 1] hashes of the n-grams of ``tokens`` [T >= n], a polynomial modulo 2**64, mixed."""
    wide = tokens.astype(np.uint64) + np.uint64(1)
    n_grams = len(tokens) - n + 1
    total = np.zeros(n_grams, np.uint64)
    for place in range(n):
        total *= _FACTOR
        total += wide[place : place + n_grams]
    total ^= total >> np.uint64(32)
    total *= _FINAL
    return total ^ (total >> np.uint64(29))
