"""How fast the lines between peers were, over time: means over minutes, of older times over longer spans.

What peers say of their lines is collected in memory; the mean of a minute is written when it is over, into the longer
spans too. A crash costs a minute.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ...protocol import control_pb2 as pb
from ...protocol.identity import PEER_ID_LENGTH
from .shapes import LinkPoint, LinkRow

DAY = 86400.0
SPANS = {60: DAY / 4, 600: 3 * DAY, 7200: 60 * DAY}  # seconds of a span, and how long it is kept
MOST_LINKS = 256  # of one peer
FASTEST = 1e12  # bytes per second, and seconds of a round trip, that anybody can have
FRESH = 2.5  # spans after which a line that nobody speaks of is as good as gone
PATHS: Mapping[str, Literal["direct", "punched", "relayed"]] = {p: p for p in ("direct", "punched", "relayed")}
Statement = tuple[str, Sequence[Any]]


class Way(NamedTuple):
    sender: str
    receiver: str


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Of what was said of a line since ``time``, the beginning of a minute."""

    time: int
    rate: float = 0.0
    rates: int = 0
    rtt: float = 0.0
    rtts: int = 0
    fastest: float = 0.0
    path: str | None = None

    def also(self, link: pb.Link) -> Mean:
        """With what was said once more."""
        rate, rtt = known(link.bytes_per_second) or 0.0, known(link.rtt_seconds) or 0.0
        return replace(
            self,
            rate=self.rate + rate,
            rates=self.rates + bool(rate),
            rtt=self.rtt + rtt,
            rtts=self.rtts + bool(rtt),
            fastest=max(self.fastest, rate),
            path=PATHS.get(link.path, self.path),
        )


def known(number: float) -> float | None:
    """None for what a peer does not know, or what makes no sense."""
    return number if math.isfinite(number) and 0 < number <= FASTEST else None


@dataclass(frozen=True, kw_only=True)
class LinkNews:
    """What is known after a batch of reports, and what writes it down."""

    statements: tuple[Statement, ...] = ()
    means: Mapping[Way, Mean] = field(default_factory=dict)
    swept: int = 0  # when what is too old was last let go of


class LinkRecorder:
    """Collects what peers say of their lines."""

    def __init__(self) -> None:
        self._now = LinkNews()

    def heard(self, beats: Sequence[tuple[str, pb.Heartbeat]], peers: Mapping[str, object], now: float) -> LinkNews:
        """What a batch of heartbeats of ``peers`` adds; it counts once :meth:`take` has it."""
        shortest, longest = min(SPANS), max(SPANS)
        minute, statements = int(now // shortest) * shortest, list[Statement]()
        means = dict(self._now.means)
        for peer, beat in beats:
            for link in beat.links[:MOST_LINKS]:
                way = Way(peer, link.peer[:PEER_ID_LENGTH])
                if peer in peers and way.receiver in peers:
                    if (mean := means.get(way)) is None or mean.time != minute:
                        statements += [] if mean is None else written(way, mean)
                        mean = Mean(time=minute)
                    means[way] = mean.also(link)
        for way, mean in list(means.items()):  # of those who say nothing more
            if mean.time < minute - shortest:
                statements += written(way, means.pop(way))
        swept = int(now // longest) * longest
        if statements and swept > self._now.swept:
            statements += sweeping(now)
        else:
            swept = self._now.swept
        return LinkNews(statements=tuple(statements), means=means, swept=swept)

    def take(self, recorded: LinkNews) -> None:
        """What was heard is on disk."""
        self._now = replace(recorded, statements=())


def written(way: Way, mean: Mean) -> list[Statement]:
    """A minute's mean, and those of the longer spans that it is a part of: each minute there counts for as much as the
    span's length says."""
    if not mean.rates and not mean.rtts and mean.path is None:
        return []
    rate = mean.rate / mean.rates if mean.rates else None
    rtt = mean.rtt / mean.rtts if mean.rtts else None
    shortest = min(SPANS)
    rows: list[Statement] = [
        (
            "INSERT INTO ways (sender, receiver, fastest) VALUES (?,?,?) ON CONFLICT (sender, receiver)"
            " DO UPDATE SET fastest = MAX(fastest, excluded.fastest)",
            [*way, mean.fastest],
        )
    ]
    for span in SPANS:
        start = mean.time // span * span
        share = 1 / ((mean.time - start) // shortest + 1)  # of this minute in the mean so far
        rows.append((WRITE, [span, start, rate, rtt, mean.path, *way, share, share]))
    return rows


WRITE = """INSERT INTO links SELECT id, ?, ?, ?, ?, ? FROM ways WHERE sender=? AND receiver=?
    ON CONFLICT (way, span, time) DO UPDATE SET path = COALESCE(excluded.path, path),
        rate = COALESCE(rate + (excluded.rate - rate) * ?, excluded.rate, rate),
        rtt = COALESCE(rtt + (excluded.rtt - rtt) * ?, excluded.rtt, rtt)"""


def sweeping(now: float) -> list[Statement]:
    """Lets go of what is too old, and of lines of which nothing is left."""
    old: list[Statement] = [
        ("DELETE FROM links WHERE span=? AND time < ?", [span, int(now - kept)]) for span, kept in SPANS.items()
    ]
    return [*old, ("DELETE FROM ways WHERE NOT EXISTS (SELECT 1 FROM links WHERE way = ways.id)", [])]


def nbytes_of(mbps: float | None) -> float | None:
    """Megabits per second, as owners name their limits, in bytes per second."""
    return None if mbps is None else mbps * 1e6 / 8


# Reading.


def read_links(db: sqlite3.Connection, at: float, caps: Mapping[str, float | None] | None = None) -> list[LinkRow]:
    """How every line was at a moment, by the shortest span on record. ``caps``: what owners allow, in bytes per second,
    by sender."""
    found: dict[Way, LinkRow] = {}
    for span in SPANS:
        rows = db.execute(
            "SELECT w.sender, w.receiver, w.fastest, l.path, l.rtt, l.rate, MAX(l.time) FROM ways w"
            " JOIN links l ON l.way = w.id AND l.span = ? AND l.time <= ? AND l.time > ? GROUP BY w.id",
            (span, at, at - FRESH * span),
        )
        for sender, receiver, fastest, path, rtt, rate, time in rows:
            cap = (caps or {}).get(sender)
            row = LinkRow(
                sender=sender,
                receiver=receiver,
                path=path,
                rtt_seconds=rtt,
                bytes_per_second=rate,
                cap=cap,
                share=share(rate, cap, fastest),
                time=float(time + span),
            )
            found.setdefault(Way(sender, receiver), row)
    return [found[way] for way in sorted(found)]


def share(rate: float | None, cap: float | None, fastest: float | None) -> float | None:
    """Of what an owner allows, or of the fastest that a line was seen to be, that is in use."""
    most = cap or fastest
    return None if rate is None or not most else rate / most


def read_link(db: sqlite3.Connection, sender: str, receiver: str) -> list[LinkPoint]:
    """The history of a line, oldest first: the finest that is on record of each time."""
    way = db.execute("SELECT id FROM ways WHERE sender=? AND receiver=?", (sender, receiver)).fetchone()
    points: list[LinkPoint] = []
    until = math.inf  # what is finer begins
    for span in SPANS if way else ():
        rows = db.execute(
            "SELECT time, rate, rtt FROM links WHERE way=? AND span=? AND time + span <= ? ORDER BY time DESC",
            (way[0], span, min(until, 1e18)),
        ).fetchall()
        points += [LinkPoint(time=float(t), bytes_per_second=rate, rtt_seconds=rtt) for t, rate, rtt in rows]
        until = min(until, rows[-1][0]) if rows else until
    return points[::-1]
