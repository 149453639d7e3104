"""Serving states to newcomers, piece by piece, from a snapshot and in a thread of its own.

A ``State`` is never written to, so it is the snapshot; it is held as long as somebody asks for its pieces. The thread
waits for the owner's limit (:mod:`..protocol.throttle`) before each piece; the pieces go on a lane of their own, which
gives way to what training sends (:mod:`.links`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol.errors import WireError
from ..protocol.failpoints import failpoint
from ..protocol.frames import Frame, Header, Kind
from ..protocol.throttle import Bucket
from . import inventory as inv
from .inventory import Part, PieceName, StateName
from .stage import State

log = logging.getLogger(__name__)
MOST_REQUESTS = 64  # of one peer that may wait
HELD_SECONDS = 60.0  # a snapshot, after it was asked for last


@dataclass
class _Snapshot:
    state: State
    inventory: bytes
    asked: float


class Donor:
    """``find`` has a stage's state of a committed round, ``entry`` the encoded round after it; ``post`` sends."""

    def __init__(
        self,
        run: bytes,
        find: Callable[[StateName], State | None],
        entry: Callable[[StateName], bytes | None],
        post: Callable[[str, Frame], None],
        limit: Bucket,
    ) -> None:
        self._run, self._find, self._entry, self._post, self._limit = run, find, entry, post, limit
        self._waiting: dict[str, deque[tuple[StateName, PieceName]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._snapshots: dict[StateName, _Snapshot] = {}

    def ask(self, peer: str, request: Header) -> None:
        """A peer wants a piece; ``WireError`` if it wants too many at once, or nothing that a state has."""
        wanted = inv.read(request)
        with self._changed:
            waiting = self._waiting.setdefault(peer, deque())
            if len(waiting) >= MOST_REQUESTS:
                raise WireError(f"{peer[:8]} asks for too much of a state at once")
            waiting.append(wanted)
            self._changed.notify_all()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve_all, name="donor", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _next(self) -> tuple[str, StateName, PieceName] | None:
        """Peer by peer in turn; None when it is over."""
        with self._changed:
            while not self._closed:
                for peer, waiting in list(self._waiting.items()):
                    del self._waiting[peer]
                    if waiting:
                        name, piece = waiting.popleft()
                        self._waiting[peer] = waiting  # behind the others
                        return peer, name, piece
                self._changed.wait(HELD_SECONDS)
                self._let_go()
            return None

    def _let_go(self) -> None:
        now = time.monotonic()
        self._snapshots = {n: s for n, s in self._snapshots.items() if now - s.asked < HELD_SECONDS}

    def _serve_all(self) -> None:
        while (wanted := self._next()) is not None:
            peer, name, piece = wanted
            try:
                payload, total = self._piece(name, piece)
            except Exception:
                log.exception("a piece of the state of step %d cannot be served", name.step)
                payload, total = b"", 0
            delay = self._limit.take(len(payload))
            with self._changed:
                self._changed.wait_for(lambda: self._closed, delay)
            self._post(peer, inv.frame(Kind.STATE, self._run, name, piece, payload, total))

    def _piece(self, name: StateName, piece: PieceName) -> tuple[bytes, int]:
        """A piece's bytes and those of all pieces where only we know them; none if it is not here."""
        failpoint("worker.state.serve")
        if piece.part == Part.ENTRY:
            data = self._entry(name) or b""
            start = piece.number * inv.PIECE_NBYTES
            return data[start : start + inv.PIECE_NBYTES], len(data)
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            state = self._find(name)
            if state is None:
                return b"", 0
            self._let_go()
            state = state.shared()
            snapshot = self._snapshots[name] = _Snapshot(state, inv.encode(inv.inventory(state)), 0.0)
        snapshot.asked = time.monotonic()
        if piece.part == Part.INVENTORY:
            return snapshot.inventory, 0
        state = snapshot.state
        if not inv.vectors(state, piece.part) or piece.number >= inv.count(state.g.numel(), piece.part):
            return b"", 0
        return inv.cut(state, piece), 0
