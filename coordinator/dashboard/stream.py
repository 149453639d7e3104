"""Server-sent events: what changes, to every reader only what it was not told yet.

One task follows the source for all readers and takes a *shot* of it at most every half a second: each part of the
state and each peer's row as JSON, with the number of the shot that it last changed in. A reader is a place in that
history, so a message is put together once, however many readers stand at the same place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from .parameters import PLACE, Refused
from .shapes import EventRow, Point, State
from .source import Source

log = logging.getLogger(__name__)
SHOT_SECONDS = 0.5  # between two states
SLOWEST_SECONDS = 5.0  # the same, however many read
MOST_READERS = 500
EASY_READERS = 25  # that are served without taking longer
EASY_NBYTES = 2e6  # a second, to all readers together, that do not make it take longer either
MOST_ROWS = 2000  # points or events in one message
MOST_OLD_EVENTS = 1000  # asked of the file at once
MOST_GONE = 5000  # peers that are gone, remembered
APART = ("peers", "points", "events", "version", "now")  # fields of the state that are no part of its message


@dataclass(frozen=True)
class Place:
    """What a reader has: the ids of its last point and its last event. Its text is the id of a message."""

    point: int
    event: int

    @classmethod
    def parse(cls, text: str) -> Place:
        if not re.fullmatch(PLACE, text):
            raise Refused(400, "Last-Event-ID must be two whole numbers, as 120.45", "Give back a message's id")
        return cls(*map(int, text.split(".")))

    def __str__(self) -> str:
        return f"{self.point}.{self.event}"


@dataclass(frozen=True)
class Shot:
    """``parts`` and ``rows``: JSON by name or peer, with the number of the shot it last changed in; ``gone``: peers
    that left the state, by the same numbers, complete after ``forgotten``. ``recent``: later events are in memory."""

    number: int
    version: int
    now: float
    taken: float  # by time.monotonic
    parts: dict[str, tuple[int, bytes]]
    rows: dict[str, tuple[int, bytes]]
    nbytes: int  # of what changed with it
    gone: tuple[tuple[int, str], ...]
    forgotten: int
    recent: int
    made: dict[object, bytes] = field(default_factory=dict)  # messages
    points: dict[int, list[Point]] = field(default_factory=dict)
    news: dict[int, list[EventRow]] = field(default_factory=dict)


def taken(state: State, before: Shot | None) -> Shot:
    """The next shot."""
    number = before.number + 1 if before else 1
    encode = msgspec.json.encode

    def renewed(new: dict[str, bytes], old: dict[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
        return {k: was if (was := old.get(k)) and was[1] == data else (number, data) for k, data in new.items()}

    fields = {name: encode(getattr(state, name)) for name in State.__struct_fields__ if name not in APART}
    parts = renewed(fields, before.parts if before else {})
    rows = renewed({peer.id: encode(peer) for peer in state.peers}, before.rows if before else {})
    left = [(number, peer) for peer in (before.rows if before else {}) if peer not in rows]
    gone = [(at, peer) for at, peer in (before.gone if before else ()) if peer not in rows] + left
    return Shot(
        number=number,
        version=state.version,
        now=state.now,
        taken=time.monotonic(),
        parts=parts,
        rows=rows,
        nbytes=sum(len(data) for told in (parts, rows) for at, data in told.values() if before and at == number),
        gone=tuple(gone[-MOST_GONE:]),
        forgotten=gone[-MOST_GONE - 1][0] if len(gone) > MOST_GONE else before.forgotten if before else 0,
        recent=min((event.id for event in state.events), default=1) - 1,
    )


class Feed:
    """Serves all readers of one source; costs nothing while there is none."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.readers = 0
        self._shot: Shot | None = None
        self._next = asyncio.Event()  # set with the next shot; replaced then
        self._following: asyncio.Task[None] | None = None

    @property
    def seconds(self) -> float:
        """Between two shots: the more readers, and the more changes, the longer."""
        sending = self.readers * (self._shot.nbytes if self._shot else 0) / EASY_NBYTES
        return min(SLOWEST_SECONDS, max(SHOT_SECONDS * max(1.0, self.readers / EASY_READERS), sending))

    def check(self) -> None:
        """`Refused` with 429 while there are too many readers."""
        if self.readers >= MOST_READERS:
            raise Refused(429, "Too many pages follow this run", "Try again later", {"Retry-After": "10"})

    async def read(self, after: Place | None, closing: asyncio.Event) -> AsyncIterator[bytes]:
        """Messages for one reader: first everything but the points and events up to ``after``, then what changes. None:
        every point, and those events that the state shows."""
        closed = asyncio.ensure_future(closing.wait())
        try:
            with self._reader() as following:
                told, shot = 0, self._newest()
                place = after or Place(0, shot.recent)
                while True:
                    sent = time.monotonic()
                    yield self._state(shot, told, place) + self._peers(shot, told, place)
                    async for reached, rows in self._rows(shot, place):
                        place = reached
                        yield rows
                    told = shot.number
                    while self._newest().number == told:
                        news = asyncio.ensure_future(self._next.wait())
                        await asyncio.wait({closed, news, following}, return_when=asyncio.FIRST_COMPLETED)
                        news.cancel()
                        if closed.done() or following.done():
                            return
                    rest = sent + self.seconds - time.monotonic()
                    if rest > 0:
                        await asyncio.wait({closed, following}, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
                    shot = self._newest()
                    if closed.done() or following.done() or told < shot.forgotten:
                        return  # whoever lags that far begins anew
        finally:
            closed.cancel()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[asyncio.Task[None]]:
        if self._following is None or self._following.done():
            self._shot = taken(self.source.state(), self._shot)
            self._following = asyncio.create_task(self._follow(), name="dashboard-feed")
        self.readers += 1
        try:
            yield self._following
        finally:
            self.readers -= 1
            if not self.readers:
                self._following.cancel()
                self._following = self._shot = None

    def _newest(self) -> Shot:
        assert self._shot
        return self._shot

    async def _follow(self) -> None:
        try:
            while True:
                shot = self._newest()
                await self.source.changed(shot.version)
                await asyncio.sleep(max(0.0, shot.taken + self.seconds - time.monotonic()))
                self._shot = taken(self.source.state(), shot)
                self._next.set()
                self._next = asyncio.Event()
        except Exception:
            log.exception("The dashboard's stream has failed; readers start again")

    def _state(self, shot: Shot, told: int, place: Place) -> bytes:
        now = shot.now + time.monotonic() - shot.taken
        parts = [f'"version":{shot.version},"now":{now!r}'.encode()]
        parts += [b'"%s":%s' % (name.encode(), data) for name, (at, data) in shot.parts.items() if at > told]
        return message("state", b"{%s}" % b",".join(parts), place, retry=not told)

    def _peers(self, shot: Shot, told: int, place: Place) -> bytes:
        """Nothing if no row has changed; ``all`` says that these are all rows."""
        key = ("peers", told)
        if key not in shot.made:
            rows = [data for at, data in shot.rows.values() if at > told]
            gone = [peer for at, peer in shot.gone if at > told] if told else []
            data = b'{"rows":[%s],"gone":%s' % (b",".join(rows), msgspec.json.encode(gone))
            shot.made[key] = b"" if told and not rows and not gone else data + (b"}" if told else b',"all":true}')
        data = shot.made[key]
        return message("peers", data, place) if data else b""

    async def _rows(self, shot: Shot, place: Place) -> AsyncIterator[tuple[Place, bytes]]:
        """Points and events behind ``place``, with the place that each message leads to."""
        if place.point not in shot.points:
            shot.points[place.point] = self.source.points(place.point)
        points = shot.points[place.point]
        for first in range(0, len(points), MOST_ROWS):
            some = points[first : first + MOST_ROWS]
            place = Place(some[-1].id, place.event)
            yield place, message("points", self._encoded(shot, some), place)
        while place.event < shot.recent:  # long ago: from the file
            old = await asyncio.to_thread(self.source.events, place.event, None, MOST_OLD_EVENTS, None)
            if not old:
                break
            place = Place(place.point, old[-1].id)
            yield place, message("events", msgspec.json.encode(old), place)
        if place.event not in shot.news:
            shot.news[place.event] = self.source.news(place.event)
        if news := shot.news[place.event]:
            place = Place(place.point, news[-1].id)
            yield place, message("events", self._encoded(shot, news), place)

    def _encoded(self, shot: Shot, rows: Sequence[Point] | Sequence[EventRow]) -> bytes:
        key = (type(rows[0]), rows[0].id, rows[-1].id)
        if key not in shot.made:
            data = msgspec.json.encode(rows)
            if len(rows) == MOST_ROWS:
                return data  # a piece of a long curve: seldom asked for, and too much to keep
            shot.made[key] = data
        return shot.made[key]


def message(event: str, data: bytes, place: Place, retry: bool = False) -> bytes:
    """One event; JSON as msgspec writes it has no line breaks."""
    head = f"event: {event}\nid: {place}\n" + ("retry: 1000\n" if retry else "")
    return b"%sdata: %s\n\n" % (head.encode(), data)
