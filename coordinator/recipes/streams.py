"""A text as tokens and then as shards, in two passes, so that a build that was stopped goes on.

First every document is tokenized and appended to one file, its hash and size to another. Then the documents with the
smallest hashes are held out, and both parts are cut into rows. A build that goes on compares the hashes of the
documents that it skips, and begins the text anew where they differ.

What a guard takes out of a document is not written; its pieces have one entry, so they are held out together. A
document of which nothing is left has an entry of size 0.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...protocol.failpoints import failpoint
from ...protocol.manifest import Shard
from .guard import Guard, Seen
from .left_out import Findings
from .shards import ShardWriter, windows
from .words import Words

BATCH_DOCUMENTS = 256
KEY = np.dtype([("key", "V32"), ("size", "<u4")])
_SOME_ROWS = 4096  # written at a time


class Stream:
    """The tokens of one text in ``folder``, as far as they are made; without what ``guard`` takes out."""

    def __init__(self, folder: Path, name: str, words: Words, seed: int, guard: Guard | None = None) -> None:
        self._tokens, self._documents = folder / f"{name}.tokens", folder / f"{name}.documents"
        self._findings = Findings(folder / f"{name}.findings")
        self._words, self._seed, self._guard = words, seed, guard
        self._dtype = np.dtype(words.dtype).newbyteorder("<")

    def encode(self, documents: Callable[[], Iterator[str]], most: int, say: Callable[[int, int], None]) -> None:
        """Appends what is missing, until there are ``most`` tokens (0: all). ``say`` gets the tokens so far, and the
        characters that are new."""
        index = self._whole()
        texts = (text for text in documents() if text.strip())
        for known in index["key"]:
            text = next(texts, None)
            if text is None or self._key(text) != known.tobytes():
                index = index[:0]
                texts = (text for text in documents() if text.strip())
                break
        n_tokens, number = int(index["size"].sum()), len(index)
        self._findings.reopen(number)
        os.truncate(self._documents, len(index) * KEY.itemsize)
        os.truncate(self._tokens, n_tokens * self._dtype.itemsize)
        chars = 0
        with self._tokens.open("ab") as tokens, self._documents.open("ab") as entries:
            while (not most or n_tokens < most) and (batch := list(islice(texts, BATCH_DOCUMENTS))):
                for text, ids in zip(batch, self._words.encode(batch), strict=True):
                    if most and n_tokens >= most:  # not at the batch's end: where batches begin is chance
                        break
                    failpoint("coordinator.corpus.write")
                    pieces, finding = self._guard.document(number, ids) if self._guard else ([ids], None)
                    if finding:
                        self._findings.add(finding)
                    left = [token for piece in pieces for token in (*piece, self._words.special.eos)]
                    tokens.write(np.array(left, dtype=self._dtype).tobytes())
                    tokens.flush()  # before its entry, which says that it is there
                    entries.write(np.array((self._key(text), len(left)), dtype=KEY).tobytes())
                    n_tokens, number = n_tokens + len(left), number + 1
                    chars += len(text)
                entries.flush()
                say(n_tokens, chars)

    def seen(self) -> Seen:
        """What the guard found in all documents; tokens are with the ends of text."""
        index, findings = self._whole(), self._findings.all()
        tokens = int(index["size"].sum()) + sum(finding.dropped for finding in findings)
        return Seen(len(index), tokens, findings)

    def cut(
        self, shards: Path, seq_len: int, heldout_share: float, rows_each: int
    ) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
        """The part to train on and the one that is held out; either may be too small for a row, and so empty."""
        index = self._whole()
        sizes = index["size"].astype(np.int64)
        keys = [key.tobytes() for key in index["key"]]
        at_least = max(int(sizes.sum() * heldout_share), 2 * seq_len + 1)
        chosen = choose_heldout(keys, sizes.tolist(), at_least)
        held = np.array([key in chosen for key in keys], dtype=bool)
        found = []
        for wanted in (~held, held):
            with ShardWriter(shards, seq_len + 1, self._words.dtype, rows_each) as writer:
                for rows in self._rows(sizes, wanted, seq_len):
                    writer.add(rows)
            found.append(tuple(writer.shards))
        return found[0], found[1]

    def remove(self) -> None:
        self._tokens.unlink(missing_ok=True)
        self._documents.unlink(missing_ok=True)

    def _rows(self, sizes: NDArray[np.int64], wanted: NDArray[np.bool_], seq_len: int) -> Iterator[NDArray[np.int64]]:
        """All whole rows of the wanted documents, some at a time."""
        if not wanted.any():
            return
        tokens = np.memmap(self._tokens, dtype=self._dtype, mode="r")
        ends = np.cumsum(sizes)
        parts: list[NDArray[np.int64]] = []
        n_tokens = 0
        for place in np.flatnonzero(wanted):
            parts.append(tokens[ends[place] - sizes[place] : ends[place]])
            n_tokens += int(sizes[place])
            if n_tokens > _SOME_ROWS * seq_len:
                stream = np.concatenate(parts)
                rows = windows(stream, seq_len)
                yield rows
                parts = [stream[len(rows) * seq_len :]]
                n_tokens = len(parts[0])
        stream = np.concatenate(parts)
        if len(stream) > seq_len:
            yield windows(stream, seq_len)

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self._seed}:{text}".encode()).digest()

    def _whole(self) -> NDArray[np.void]:
        """The documents that are on the disk with all their tokens."""
        for path in (self._tokens, self._documents):
            path.touch()
        data = self._documents.read_bytes()
        index = np.frombuffer(data[: len(data) // KEY.itemsize * KEY.itemsize], dtype=KEY)
        there = self._tokens.stat().st_size // self._dtype.itemsize
        return index[: int(np.searchsorted(np.cumsum(index["size"], dtype=np.int64), there, side="right"))]


def choose_heldout(keys: list[bytes], sizes: list[int], at_least: int) -> set[bytes]:
    """The documents with the smallest hashes, until they have ``at_least`` tokens."""
    chosen: set[bytes] = set()
    n_tokens = 0
    for key, size in sorted(zip(keys, sizes, strict=True)):
        if n_tokens >= at_least and key not in chosen:
            break
        chosen.add(key)
        n_tokens += size
    return chosen
