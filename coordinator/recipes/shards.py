"""Rows into shards: files named by their SHA-256 (layout: protocol/manifest.py)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.manifest import Shard


class ShardWriter:
    """Cuts rows into shards of ``rows_each`` in ``folder``; a context, in which ``shards`` grows.

    ``width``: tokens of a row.
    """

    def __init__(self, folder: Path, width: int, dtype: str, rows_each: int) -> None:
        self.folder, self.width, self.rows_each = folder, width, rows_each
        self.shards: list[Shard] = []
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._flags: list[bytes] = []
        self._part = folder / ".part"
        self._file: IO[bytes] | None = None
        self._digest: Any = None
        self._rows = 0

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._end()
        elif self._file is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def add(self, rows: NDArray[Any], flags: NDArray[np.uint8] | None = None) -> None:
        """``rows``: integers [n, width]; ``flags``: packed bits [n, ceil(width / 8)], of all rows or of none."""
        while len(rows):
            room = self.rows_each - self._rows
            if self._file is None:
                self._file, self._digest = self._part.open("wb"), hashlib.sha256()
            self._write(rows[:room].astype(self._dtype).tobytes())
            if flags is not None:
                self._flags.append(flags[:room].tobytes())
                flags = flags[room:]
            self._rows += min(room, len(rows))
            rows = rows[room:]
            if self._rows == self.rows_each:
                self._end()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)

    def _end(self) -> None:
        if self._file is None:
            return
        for flags in self._flags:
            self._write(flags)
        self._file.close()
        name = self._digest.hexdigest()
        os.replace(self._part, self.folder / name)
        self.shards.append(Shard(name, self._rows))
        self._file, self._rows, self._flags = None, 0, []


def windows(stream: NDArray[Any], seq_len: int) -> NDArray[Any]:
    """All whole rows of a stream of n * seq_len + 1 tokens or more: [n, seq_len + 1], each with the first token of the
    next."""
    n = (len(stream) - 1) // seq_len
    return np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[: n * seq_len : seq_len]
