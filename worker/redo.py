"""The redo log of a stage: its committed rounds, as their owners sent them, on top of a base.

Whoever has a base and every round since then comes to the very bits of the stage's replicas, without having been one.
An entry costs what one replica received in that round's all-gather; of a lone replica, which sends nothing, the bits
of the weights that the round changed (``reference.py``).

A log is one file: 8 bytes that name it, then entries, each behind its length (8 bytes) and CRC-32. An entry is
flushed to the disk (fsync) before anybody is told of it; a last one that was cut short is dropped when the log is
opened. ``Kept`` folds a log that is longer than its base into a new one: a temporary file, fsync, rename.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from ..protocol.errors import StateError, WireError
from ..protocol.frames import Count, Small
from ..protocol.plan import SavePoint
from .checkpoint import load_state, point_of, write_state
from .inventory import StateName
from .reference import Rule
from .shards import Piece, layout
from .stage import State, digest

MAGIC = b"PLREDO1\n"
_HEAD = struct.Struct("!QI")
Hash = Annotated[bytes, Meta(max_length=32)]
Payload = tuple[str, bytes]  # codec with zstd's mark, and the bytes as sent


class Entry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """One committed round of a stage. ``payloads``: of every piece of its fragments in turn, owner by owner."""

    generation: Small
    attempt: Small = 0
    step: Count
    fragments: tuple[Small, ...]
    replicas: Small  # that owned a shard each
    full: bool
    base_digest: Hash  # of the reference before it, and
    digest: Hash  # after it; empty where its keeper has not been told
    payloads: tuple[Payload, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(data) for _, data in self.payloads)

    def encode(self) -> bytes:
        return _encoder.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """``WireError`` for bytes that are no entry."""
        try:
            return _decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"an entry of a redo log is not valid: {error}") from None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def pieces_of(rule: Rule, size: int, fragments: Iterable[int], replicas: int) -> list[Piece]:
    """What a round of ``fragments`` exchanges, in order; ``WireError`` for a round that no run of this rule has."""
    wanted = list(fragments)
    if not 1 <= replicas <= size or any(not 0 <= f < rule.sync.fragments for f in wanted):
        raise WireError(f"a round of fragments {wanted} among {replicas} replicas")
    cut = layout(size, rule.sync.fragments, replicas)
    return [piece for f in wanted for piece in cut[f]]


def replay(rule: Rule, g: Tensor, momentum: Tensor | None, entry: Entry) -> tuple[Tensor, Tensor | None]:
    """The reference and the outer momentum after a round, to the bit, from those before it.

    ``WireError`` if the entry is no round of this rule, or what comes out is not what it says.
    """
    if len(entry.payloads) < entry.replicas:
        raise WireError("a round with fewer payloads than owners")
    pieces = pieces_of(rule, g.numel(), entry.fragments, entry.replicas)
    if len(entry.payloads) != sum(len(piece.shards) for piece in pieces):
        raise WireError(f"a round of {len(pieces)} pieces with {len(entry.payloads)} payloads")
    g = g.clone()
    if rule.sync.outer_momentum:
        momentum = torch.zeros_like(g) if momentum is None else momentum.clone()
    payloads = iter(entry.payloads)
    for piece in pieces:
        of_piece = [next(payloads) for _ in piece.shards]
        rule.redo(piece, of_piece, g, momentum, entry.step, full=entry.full)
    if entry.digest and digest(g) != entry.digest:
        raise WireError(f"the round of step {entry.step} done again gives other weights")
    return g, momentum


class Recent:
    """The last rounds of the stage we hold, encoded, in memory: for newcomers who fetched the state before those.

    The newest one, and others as far as all are ``most_nbytes`` at most. Thread-safe.
    """

    def __init__(self) -> None:
        self.most_nbytes = 0
        self._entries: deque[tuple[tuple[int, int], int, bytes, bytes]] = deque()  # layers, step, digest, encoded
        self._lock = threading.Lock()

    def add(self, layers: tuple[int, int], entry: Entry) -> None:
        """The newest round, committed or about to be; those that it does not lead on from did not count."""
        with self._lock:
            while self._entries and self._entries[-1][2] != entry.base_digest:
                self._entries.pop()
            self._entries.append((layers, entry.step, entry.digest, entry.encode()))
            while len(self._entries) > 1 and sum(len(data) for *_, data in self._entries) > self.most_nbytes:
                self._entries.popleft()

    def after(self, name: StateName) -> bytes | None:
        """The round that came after a state; whether it leads on from that very one shows its digest."""
        with self._lock:
            later = (d for layers, step, _, d in self._entries if layers == name.layers and step > name.step)
            return next(later, None)


class RedoLog:
    """Entries in a file, one after the other. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it, and drops what is not whole at its end."""
        self.path = path
        self._spans: list[tuple[int, int]] = []  # of the entries' bodies
        try:
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._open()
        except OSError as error:
            raise _trouble(path, error) from None

    def _open(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        end = len(MAGIC)
        if self._file.read(end) != MAGIC:
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(MAGIC)
            self._flush()
        while end + _HEAD.size <= size:
            self._file.seek(end)
            length, crc = _HEAD.unpack(self._file.read(_HEAD.size))
            start = end + _HEAD.size
            if length > size - start or zlib.crc32(self._file.read(length)) != crc:
                break
            self._spans.append((start, length))
            end = start + length
        self._file.truncate(end)
        self._end = end

    @property
    def nbytes(self) -> int:
        return self._end

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[Entry]:
        """Entry by entry from the disk, each in memory only while it is looked at."""
        for start, length in list(self._spans):
            self._file.seek(start)
            yield Entry.decode(self._file.read(length))

    def append(self, entry: Entry) -> None:
        """On the disk when this returns; ``StateError`` if the disk refuses, and the log is as it was."""
        body = entry.encode()
        try:
            self._file.seek(self._end)
            self._file.write(_HEAD.pack(len(body), zlib.crc32(body)) + body)
            self._flush()
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise _trouble(self.path, error) from None
        self._spans.append((self._end + _HEAD.size, len(body)))
        self._end += _HEAD.size + len(body)

    def clear(self) -> None:
        """Drops every entry: a base has them."""
        self._file.truncate(len(MAGIC))
        self._flush()
        self._spans, self._end = [], len(MAGIC)

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class Kept:
    """What a keeper has of one stage: a base and the rounds since, both on disk. Not thread-safe.

    The base is a state without moments: AdamW's m and v are each replica's own and in no round.
    """

    def __init__(self, folder: Path, rule: Rule, size: int) -> None:
        self.folder, self.rule, self.size = folder, rule, size
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _trouble(folder, error) from None
        self._base = folder / "base.safetensors"
        self.log = RedoLog(folder / "rounds.log")
        self.points: list[SavePoint] = []  # what can be rebuilt, oldest first
        with suppress(StateError):  # none yet, or damaged: a new one will come
            self.points = [point_of(self._base)]
            for entry in self.log:
                self._note(entry)

    def follows(self, entry: Entry) -> bool:
        """Whether this is the round after the newest one here."""
        newest = self.points[-1] if self.points else None
        return newest is not None and entry.step > newest.step and entry.base_digest == newest.digest

    def _note(self, entry: Entry) -> None:
        if not self.follows(entry):
            return
        base = self.points[0]
        point = SavePoint(
            kind="round",
            generation=entry.generation,
            step=entry.step,
            first_layer=base.first_layer,
            last_layer=base.last_layer,
            digest=entry.digest,
        )
        self.points.append(point)

    def begin(self, state: State) -> None:
        """A new base, and no rounds yet."""
        write_state(self._base, bare(state))
        self.log.clear()
        self.points = [state.point]

    def append(self, entry: Entry) -> bool:
        """A committed round; False if it does not lead on from the last one: then a new base is needed."""
        if not entry.digest or not self.follows(entry):
            return False
        self.log.append(entry)
        self._note(entry)
        return self.log.nbytes <= 4 * self.size or self.fold()

    def rebuild(self, point: SavePoint) -> State | None:
        """The state of a point, without moments; None if it is not here, or something is damaged."""
        if point not in self.points:
            return None
        state = load_state(self._base, self.points[0])
        if state is None or state.g.numel() != self.size:
            return None
        g, momentum = state.g, state.momentum
        try:
            for entry in self.log:
                if self.points[0].step < entry.step <= point.step:
                    g, momentum = replay(self.rule, g, momentum, entry)
        except (WireError, OSError):
            return None
        if digest(g) != point.digest:
            return None
        return State(point=point, g=g, m=None, v=None, updates=0, momentum=momentum)

    def fold(self) -> bool:
        """The newest round becomes the base; a crash in between leaves entries that the new base already has.

        False, and everything is let go, if the rounds cannot be done again: somebody sent what it did not decide.
        """
        state = self.rebuild(self.points[-1])
        if state is None:
            self.drop()
            return False
        self.begin(state)
        return True

    def drop(self) -> None:
        """Lets go of everything."""
        self._base.unlink(missing_ok=True)
        self.log.clear()
        self.points = []

    def close(self) -> None:
        self.log.close()


def bare(state: State) -> State:
    """What a keeper can vouch for: the reference and the outer momentum."""
    return State(point=state.point, g=state.g, m=None, v=None, updates=0, momentum=state.momentum)


def _trouble(path: Path, error: OSError) -> StateError:
    return StateError(f"{path}: {error}", hint="Free some space on that disk, or mend its rights.")
