"""Rendered sequences as tokens and then as shards. The file of rows grows by whole rows: a build that was stopped goes
on behind the last one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError
from ...protocol.failpoints import failpoint
from ...protocol.manifest import Shard
from .render import Piece, Renderer, Split
from .shards import ShardWriter
from .words import Words

BATCH = 64
_CHARS_A_TOKEN = 4  # that are gathered for each token that a row still lacks
_MOST_EMPTY = 1000  # sequences in a row that have no answer in them


class Rows:
    """The rows of one split of one source in ``folder``, as far as they are made."""

    def __init__(self, path: Path, renderer: Renderer, split: Split, words: Words, seq_len: int) -> None:
        self._path, self._renderer, self._split, self._words = path, renderer, split, words
        self._width = seq_len + 1
        self._dtype = np.dtype(
            [
                ("number", "<u8"),  # of the sequence
                ("used", "<u4"),  # examples that begin in it
                ("tokens", np.dtype(words.dtype).newbyteorder("<"), (self._width,)),
                ("flags", "u1", (math.ceil(self._width / 8),)),
            ]
        )

    def make(self, wanted: int, most_used: float, what: str, say: Callable[[int], None]) -> int:
        """Appends rows until there are ``wanted``, or until ``most_used`` examples began in them; returns how many
        there are. ``ConfigError`` if sequences have no answers in them."""
        self._path.touch()
        n = self._path.stat().st_size // self._dtype.itemsize
        os.truncate(self._path, n * self._dtype.itemsize)
        rows = self._rows(n)
        used, number = (int(rows["used"].sum()), int(rows["number"][-1]) + 1) if n else (0, 0)
        del rows
        empty = 0
        with self._path.open("ab") as file:
            while n < wanted and used < most_used:
                for row in self._filled(range(number, number + BATCH)):
                    if n >= wanted or used >= most_used:
                        break
                    if self._renderer.answers and not row["flags"].any():
                        empty += 1
                        continue
                    failpoint("coordinator.corpus.write")
                    file.write(row.tobytes())
                    n, used, empty = n + 1, used + int(row["used"]), 0
                if empty >= _MOST_EMPTY:
                    raise ConfigError(
                        f"sources.{what}: no answer in {empty} sequences of {self._width - 1} tokens",
                        hint="Use a longer seq_len, or leave the source out.",
                    )
                file.flush()
                number += BATCH
                say(n)
        return n

    def cut(self, shards: Path, rows_each: int) -> tuple[Shard, ...]:
        found = self._rows(self._path.stat().st_size // self._dtype.itemsize)
        with ShardWriter(shards, self._width, self._words.dtype, rows_each) as writer:
            for at in range(0, len(found), 1024):
                some = found[at : at + 1024]
                writer.add(some["tokens"], some["flags"] if self._renderer.answers else None)
        return tuple(writer.shards)

    def _rows(self, n: int) -> NDArray[np.void]:
        return np.memmap(self._path, dtype=self._dtype, mode="r", shape=(n,)) if n else np.zeros(0, self._dtype)

    def _filled(self, numbers: range) -> NDArray[np.void]:
        """Sequences, tokenized until they are full; on all cores."""
        sources = [self._renderer.sequence(self._split, number) for number in numbers]
        ids: list[list[int]] = [[] for _ in numbers]
        flags: list[list[bool]] = [[] for _ in numbers]
        used = [0] * len(numbers)
        while open_ := [place for place, row in enumerate(ids) if len(row) < self._width]:
            gathered = [
                (place, piece) for place in open_ for piece in _some(sources[place], self._width - len(ids[place]))
            ]
            for (place, piece), tokens in zip(gathered, self._words.encode([p.text for _, p in gathered]), strict=True):
                used[place] += piece.starts and len(ids[place]) < self._width
                ids[place] += tokens
                flags[place] += [piece.answer] * len(tokens)
        rows = np.zeros(len(numbers), self._dtype)
        rows["number"], rows["used"] = numbers, used
        rows["tokens"] = [row[: self._width] for row in ids]
        rows["flags"] = np.packbits([row[: self._width] for row in flags], axis=1)
        return rows


def _some(pieces: Iterator[Piece], tokens: int) -> Iterator[Piece]:
    """Pieces of about so many tokens."""
    chars = 0
    while chars < tokens * _CHARS_A_TOKEN:
        piece = next(pieces)
        chars += len(piece.text)
        yield piece
