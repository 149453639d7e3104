"""The fold over a run's file, up to any moment: what the page showed then.

Events and points are folded in order, with a copy of the fold every :data:`EVERY` records, so that a moment is at most
that many away. Of the totals, only each peer's newest row until then matters.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ..events import DECODER, Event
from ..records import unpack
from .fold import Fold
from .rollups import COLUMNS, KEPT_ROUNDS, Book, Totals, slot_of
from .shapes import Incident, Point

EVERY = 2000  # records between two copies
FOREVER = 2.0**62
Rows = Callable[[str, Sequence[Any]], Iterable[tuple[Any, ...]]]
POINTS = "SELECT id, step, samples, time, train, heldout FROM points WHERE id > ? ORDER BY id"


class Columns:
    """Which of the newer tables and columns a file has."""

    def __init__(self, rows: Rows) -> None:
        self.tables = {name for (name,) in rows("SELECT name FROM sqlite_master WHERE type = 'table'", ())}
        known = {name for _, name, *_ in rows("PRAGMA table_info(events)", ())}
        self.step = "step" if "step" in known else "NULL"
        self.peer = "peer" if "peer" in known else "json_extract(data, '$.peer')"


class Replay:
    """Follows a file as it grows. Not thread-safe."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.incidents: list[Incident] = []
        self.steps: dict[int, int] = {}  # of events whose rows do not say it
        self.last_event = self.last_point = 0
        self._fold = Fold(seq_len)
        self._records = 0
        self._times = [-FOREVER]
        self._copies = [(self._fold.copy(), 0, 0)]  # with the ids of the last event and point in it

    @property
    def newest(self) -> Fold:
        return self._fold

    def follow(self, rows: Rows) -> None:
        """Takes what is new."""
        columns = Columns(rows)
        records = merged(
            rows(events_of(columns), (self.last_event,)), rows(POINTS, (self.last_point,)), self.seq_len, FOREVER
        )
        for record in records:
            if self._records % EVERY == EVERY - 1:
                self._times.append(max(self._times[-1], self._fold.time))
                self._copies.append((self._fold.copy(), self.last_event, self.last_point))
            self._records += 1
            if isinstance(record, Point):
                self.last_point = record.id
                self._fold.point(record)
                continue
            time, number, kind, text, event, step = record
            self.last_event = number
            row, incident = self._fold.event(number, time, kind, text, event, step)
            if incident:
                self.incidents.append(incident)
            if step is None:
                self.steps[number] = row.step

    def at(self, rows: Rows, moment: float) -> Fold:
        """As it was at ``moment``: newer records play no part. What is in the file by now must have been followed."""
        place = bisect.bisect_right(self._times, moment) - 1
        copy, event, point = self._copies[place]
        fold = copy.copy()
        columns = Columns(rows)
        until = "AND time <= ?"
        events = events_of(columns).replace(" ORDER", f" {until} ORDER")
        points = POINTS.replace(" ORDER", f" {until} ORDER")
        found = merged(rows(events, (event, moment)), rows(points, (point, moment)), self.seq_len, moment)
        for record in found:
            if isinstance(record, Point):
                fold.point(record)
            else:
                time, number, kind, text, happened, step = record
                fold.event(number, time, kind, text, happened, step)
        return fold


Happened = tuple[float, int, str, str, Event | None, int | None]


def events_of(columns: Columns) -> str:
    return f"SELECT time, id, kind, text, data, {columns.step} FROM events WHERE id > ? ORDER BY id"


def merged(
    events: Iterable[tuple[Any, ...]], points: Iterable[tuple[Any, ...]], seq_len: int, until: float
) -> Iterable[Happened | Point]:
    """Both in the order of their times; points of the same moment first, as their batch was shown."""
    left = iter(events)
    event = next(left, None)
    for number, step, samples, time, train, heldout in points:
        while event is not None and event[0] < time:
            yield happened(event)
            event = next(left, None)
        yield Point(id=number, step=step, tokens=samples * seq_len, time=time, train=train, heldout=heldout)
    while event is not None:
        yield happened(event)
        event = next(left, None)


def happened(row: tuple[Any, ...]) -> Happened:
    time, number, kind, text, data, step = row
    try:
        return time, number, kind, text, DECODER.decode(data), step
    except msgspec.DecodeError:  # another version's
        return time, number, kind, text, None, step


# The totals.

NEWEST = f"""
SELECT k.peer, {", ".join(f"s.{name}" for name in COLUMNS.split(", "))}
FROM peer_keys AS k JOIN peer_series AS s ON s.peer = k.key AND s.slot = (
    SELECT slot FROM peer_series WHERE peer = k.key AND slot <= ?1 AND time <= ?2 ORDER BY slot DESC LIMIT 1)
ORDER BY k.key"""


def book_at(rows: Rows, moment: float | None) -> Book:
    """The totals as they were written last until ``moment``; None: now, with all bytes since the last round, too."""
    book, tables = Book(), Columns(rows).tables
    if "peer_series" in tables:
        limit = FOREVER if moment is None else moment
        slot = 2**62 if moment is None else slot_of(moment)
        for peer, *values in rows(NEWEST, (slot, limit)):
            book.peer(peer, Totals(*values))
    if moment is None and "traffic" in tables:
        sent = "direction = 'out' OR purpose = 'data'"  # the coordinator, who gives out the data, keeps no meter
        sums = f"SELECT purpose, SUM(nbytes), SUM(dense_nbytes) FROM traffic WHERE {sent} GROUP BY purpose"
        book.traffic = {purpose: (nbytes, dense) for purpose, nbytes, dense in rows(sums, ())}
    elif "traffic_points" in tables:
        last = "SELECT totals, decided FROM traffic_points WHERE time <= ? ORDER BY time DESC LIMIT 1"
        book.decided_then = 0.0
        for totals, decided in rows(last, (moment,)):
            book.traffic, book.decided_then = purposes(totals), decided
    return book


def purposes(totals: str) -> dict[str, tuple[int, int]]:
    return {purpose: (nbytes, dense) for purpose, nbytes, dense in json.loads(totals)}


def remembered(rows: Rows, book: Book) -> None:
    """Gives a book the newest rounds, so that they can be taken back."""
    if "round_parts" in Columns(rows).tables:
        names = {key: peer for key, peer in rows("SELECT key, peer FROM peer_keys", ())}
        newest = rows("SELECT step, parts FROM round_parts ORDER BY step DESC LIMIT ?", (KEPT_ROUNDS,))
        book.remember([(step, unpack(parts, names)) for step, parts in reversed(list(newest))])
