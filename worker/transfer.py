"""Fetching the state of a stage, piece by piece, from everybody who has it.

First the donors' inventories, then the pieces: every donor is asked for a few at a time, so a fast one gives more. What
a slow one still owes at the end is asked elsewhere too, and what a silent one owes at once. The reference is whole when
its digest is the run's; a piece whose hash is wrong costs its donor the trade. Pieces lie on disk as they come
(:mod:`.partial`), so that a fetch which is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..protocol.errors import WireError
from ..protocol.frames import Frame, Kind
from ..protocol.plan import SavePoint
from ..protocol.throttle import Bucket
from . import inventory as inv
from .checkpoint import check
from .inventory import Inventory, Part, PieceName, StateName
from .mailbox import Fenced
from .partial import Partial, Whole
from .stage import State

log = logging.getLogger(__name__)
WINDOW = 4  # pieces on their way from one donor
TICK_SECONDS = 0.2
SILENCE_SECONDS = 30.0  # a donor that owes pieces and sends none for so long is asked no more
LISTING_NBYTES_PER_SECOND = 50e6  # at which the slowest donor hashes its state
Arrivals = queue.SimpleQueue[tuple[str, StateName, PieceName, Frame]]


class LackingError(WireError):
    """Nobody who was asked gave a state. ``donors`` have said that they lack it, or gave what is no good; others are
    silent, which may be the line's fault, or ours."""

    def __init__(self, message: str, donors: Sequence[str]) -> None:
        super().__init__(message)
        self.donors = tuple(donors)


class Desk:
    """What is on its way to us: only pieces that were asked for come in. Thread-safe."""

    def __init__(self, run: bytes, post: Callable[[str, Frame], None]) -> None:
        self._run, self._post = run, post
        self._expected: dict[tuple[str, StateName, PieceName], Arrivals] = {}
        self._lock = threading.Lock()

    def ask(self, peer: str, name: StateName, piece: PieceName, arrivals: Arrivals) -> None:
        with self._lock:
            self._expected[peer, name, piece] = arrivals
        self._post(peer, inv.frame(Kind.STATE_REQUEST, self._run, name, piece))

    def put(self, peer: str, frame: Frame) -> None:
        """From the network; ``WireError`` for what nobody asked for."""
        name, piece = inv.read(frame.header)
        with self._lock:
            arrivals = self._expected.pop((peer, name, piece), None)
        if arrivals is None:
            raise WireError(f"{peer[:8]} sends a piece of a state that was not asked for")
        arrivals.put((peer, name, piece, frame))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A committed round of a stage of ``size`` weights; its digest is the run's."""

    point: SavePoint
    size: int
    moments: bool = True  # a keeper has no use for them

    @property
    def name(self) -> StateName:
        return StateName.of(self.point)


@dataclass
class _Donor:
    peer: str
    heard: float
    listing: Inventory | None = None
    owes: dict[PieceName, float] = field(default_factory=dict)  # since when


class Fetch:
    """One state's transfer. ``run`` blocks; for a thread that may."""

    def __init__(
        self,
        wanted: Wanted,
        donors: Sequence[str],
        desk: Desk,
        folder: Path,
        limit: Bucket,
        stopped: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``stopped``: looked at now and then; ``Fenced`` is raised once it says so."""
        self.wanted, self._desk, self._limit, self._stopped, self._clock = wanted, desk, limit, stopped, clock
        self._folder = folder
        self._donors = {p: _Donor(p, clock()) for p in donors}
        self._arrivals: Arrivals = queue.SimpleQueue()
        self._whole: dict[PieceName, Whole] = {}
        self._partial: Partial | None = None
        self._missing: dict[PieceName, None] | None = None  # in order; None: to be found out anew
        self._ask_from = 0.0
        self._why = "nobody has it"
        self._lacking: list[str] = []
        self.nbytes = 0  # that came

    def run(self) -> State:
        """The state, checked; ``LackingError`` if nobody who was asked has it."""
        self._partial = Partial(self._folder, self.wanted.size)
        try:
            self._whole = {w.piece: w for w in self._partial.resume()}
            for donor in self._donors.values():
                self._desk.ask(donor.peer, self.wanted.name, PieceName(Part.INVENTORY, 0), self._arrivals)
            while (state := self._step()) is None:
                if self._stopped():
                    raise Fenced
        except BaseException:
            self._partial.close()
            raise
        self._partial.drop()
        return state

    def _step(self) -> State | None:
        """One turn: asks what may be asked, then takes what comes within a tick."""
        chosen = self._chosen()
        if chosen is not None:
            if self._missing is None:
                self._missing = dict.fromkeys(self._find_missing())
            if not self._missing and not self._hopes_for_moments():
                return self._finished(chosen)
            self._ask(chosen, self._missing)
        self._give_up_on_the_silent()
        if not self._donors:
            raise LackingError(self._why, self._lacking)
        wait = min(TICK_SECONDS, max(0.001, self._ask_from - self._clock())) if self._ask_from else TICK_SECONDS
        while True:
            try:
                self._take(*self._arrivals.get(timeout=wait))
            except queue.Empty:
                return None
            wait = 0.0

    # What is to be had, and what of it.

    def _chosen(self) -> Inventory | None:
        """The listing that the reference is fetched by: the first that came, one with moments if there is any."""
        listings = [d.listing for d in self._donors.values() if d.listing is not None]
        return max(listings, key=lambda listing: bool(listing.moments), default=None)

    def _updates(self) -> int | None:
        """Behind the moments to be fetched: replicas may differ in it only where one began anew."""
        known = [d.listing.updates for d in self._donors.values() if d.listing is not None and d.listing.moments]
        return max(known, default=None)

    def _hopes_for_moments(self) -> bool:
        return self.wanted.moments and self._updates() is None and any(d.listing is None for d in self._donors.values())

    def _find_missing(self) -> list[PieceName]:
        chosen = self._chosen()
        assert chosen is not None
        parts = [Part.G]
        if chosen.momentum:
            parts.append(Part.MOMENTUM)
        if self.wanted.moments and self._updates() is not None:
            parts.append(Part.MOMENTS)
        pieces = (PieceName(part, i) for part in parts for i in range(inv.count(self.wanted.size, part)))
        return [piece for piece in pieces if not self._is_whole(piece)]

    def _is_whole(self, piece: PieceName) -> bool:
        """Whether it is here, and as those say who are asked now."""
        whole, chosen = self._whole.get(piece), self._chosen()
        if whole is None or chosen is None:
            return False
        return whole.updates == self._updates() if piece.part == Part.MOMENTS else whole.hash == chosen.hash(piece)

    def _gives(self, donor: _Donor, piece: PieceName, chosen: Inventory) -> bool:
        listing = donor.listing
        if listing is None:
            return False
        if piece.part == Part.MOMENTS:
            return bool(listing.moments) and listing.updates == self._updates()
        return listing.hash(piece) == chosen.hash(piece)

    # Asking and taking.

    def _ask(self, chosen: Inventory, missing: dict[PieceName, None]) -> None:
        now = self._clock()
        owed: dict[PieceName, float] = {}
        for donor in self._donors.values():
            for piece, since in donor.owes.items():
                owed[piece] = max(since, owed.get(piece, since))
        fresh = [p for p in missing if p not in owed]
        # At the end: what is owed longest, by others, once more.
        again = sorted((p for p in missing if p in owed and now - owed[p] > 5 * TICK_SECONDS), key=owed.__getitem__)
        for donor in sorted(self._donors.values(), key=lambda d: len(d.owes)):
            for pieces in (fresh, again):
                for piece in list(pieces):
                    if now < self._ask_from or len(donor.owes) >= WINDOW:
                        break
                    if piece in donor.owes or not self._gives(donor, piece, chosen):
                        continue
                    pieces.remove(piece)
                    self._ask_from = now + self._limit.take(inv.nbytes(self.wanted.size, piece))
                    if not donor.owes:
                        donor.heard = now
                    donor.owes[piece] = now
                    self._desk.ask(donor.peer, self.wanted.name, piece, self._arrivals)

    def _take(self, peer: str, name: StateName, piece: PieceName, frame: Frame) -> None:
        donor = self._donors.get(peer)
        if donor is None or name != self.wanted.name:
            return
        donor.heard = self._clock()
        donor.owes.pop(piece, None)
        try:
            if not frame.payload:
                raise WireError(f"{peer[:8]} does not hold it")
            if piece.part == Part.INVENTORY:
                donor.listing, self._missing = inv.decode(frame.payload, self.wanted.size), None
            else:
                self._keep(donor, piece, frame.payload)
        except WireError as error:
            self._refuse(donor, str(error))

    def _keep(self, donor: _Donor, piece: PieceName, data: bytes) -> None:
        assert donor.listing is not None and self._partial is not None
        digest = hashlib.sha256(data).digest()
        if len(data) != inv.nbytes(self.wanted.size, piece) or digest != donor.listing.hash(piece):
            raise WireError(f"{donor.peer[:8]} sends other pieces than it lists")
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        if not torch.isfinite(values).all():
            raise WireError("its numbers are not finite")
        if piece.part == Part.MOMENTS and bool((values[len(values) // 2 :] < 0).any()):
            raise WireError("its v, means of squares, has negative numbers")
        self.nbytes += len(data)
        whole = Whole(piece, donor.listing.updates, digest)
        self._partial.put(whole, data)
        self._whole[piece] = whole
        if self._missing is not None and self._is_whole(piece):
            self._missing.pop(piece, None)

    def _refuse(self, donor: _Donor, why: str, *, silent: bool = False) -> None:
        log.warning("the state of step %d from %s: %s", self.wanted.point.step, donor.peer[:8], why)
        self._why = why
        if not silent:
            self._lacking.append(donor.peer)
        self._donors.pop(donor.peer, None)
        self._missing = None

    def _give_up_on_the_silent(self) -> None:
        now = self._clock()
        for donor in list(self._donors.values()):
            listing_seconds = self.wanted.size * 12 / LISTING_NBYTES_PER_SECOND
            patience = SILENCE_SECONDS + (listing_seconds if donor.listing is None else 0.0)
            if (donor.owes or donor.listing is None) and now - donor.heard > patience:
                self._refuse(donor, f"{donor.peer[:8]} does not answer", silent=True)

    def _finished(self, chosen: Inventory) -> State | None:
        """All pieces are here. None if the reference is not the run's: then whoever listed it is asked no more."""
        assert self._partial is not None
        size, updates = self.wanted.size, self._updates() if self.wanted.moments else None
        (g,) = inv.assemble(size, Part.G, self._partial.read(Part.G))
        momentum = m = v = None
        if chosen.momentum:
            (momentum,) = inv.assemble(size, Part.MOMENTUM, self._partial.read(Part.MOMENTUM))
        if updates is not None:
            m, v = inv.assemble(size, Part.MOMENTS, self._partial.read(Part.MOMENTS))
        state = State(point=self.wanted.point, g=g, m=m, v=v, updates=updates or 0, momentum=momentum)
        try:
            check(state, size)
        except ValueError as error:
            for donor in [d for d in self._donors.values() if d.listing is not None and d.listing.g == chosen.g]:
                self._refuse(donor, str(error))
            return None
        return state
