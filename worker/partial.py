"""A state on its way, on disk: the pieces that have come, and a journal of which are whole.

The journal names a piece and its SHA-256 once its bytes are written; nothing is flushed, because whoever goes on from
the folder hashes the pieces again and takes what is as the journal says. So a power cut costs pieces, never truth.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..protocol.errors import StateError
from . import inventory as inv
from .inventory import PARTS, Part, PieceName

_RECORD = struct.Struct("!BII32s")


class Whole(NamedTuple):
    """A piece that is here: the ``updates`` of the donor it came from, and its hash."""

    piece: PieceName
    updates: int
    hash: bytes


class Partial:
    """A folder with the pieces of one state of a stage of ``size`` weights. ``StateError`` if the disk refuses."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._data = os.open(folder / "data", os.O_RDWR | os.O_CREAT, 0o600)
            self._journal = (folder / "journal").open("a+b")
        except OSError as error:
            raise self._trouble(error) from None

    def resume(self) -> Iterator[Whole]:
        """What an earlier try left, hashed anew."""
        self._journal.seek(0)
        records = self._journal.read()
        whole = len(records) - len(records) % _RECORD.size
        self._journal.truncate(whole)
        for number, index, updates, digest in _RECORD.iter_unpack(records[:whole]):
            if number not in PARTS or index >= inv.count(self.size, Part(number)):
                continue
            piece = PieceName(Part(number), index)
            data = os.pread(self._data, inv.nbytes(self.size, piece), self._offset(piece))
            if hashlib.sha256(data).digest() == digest:
                yield Whole(piece, updates, digest)

    def put(self, whole: Whole, data: bytes) -> None:
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._data, data[done:], self._offset(whole.piece) + done)
            self._journal.write(_RECORD.pack(whole.piece.part, whole.piece.number, whole.updates, whole.hash))
            self._journal.flush()
        except OSError as error:
            raise self._trouble(error) from None

    def read(self, part: Part) -> np.ndarray:
        """All bytes of a part."""
        first, n = PieceName(part, 0), self.size * (8 if part == Part.MOMENTS else 4)
        try:
            out = np.fromfile(self.folder / "data", np.uint8, n, offset=self._offset(first))
        except OSError as error:
            raise self._trouble(error) from None
        assert out.size == n
        return out

    def close(self) -> None:
        os.close(self._data)
        self._journal.close()

    def drop(self) -> None:
        """It is not needed any more."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _offset(self, piece: PieceName) -> int:
        start, _ = inv.span(self.size, piece)
        return {Part.G: 0, Part.MOMENTUM: 4, Part.MOMENTS: 8}[piece.part] * self.size + start * (
            8 if piece.part == Part.MOMENTS else 4
        )

    def _trouble(self, error: OSError) -> StateError:
        return StateError(f"{self.folder}: {error}", hint="Free some space: --data-dir names the folder.")
