"""What a run has sent and done, as running totals: of each peer, and of all together by purpose.

A row of ``peer_series`` says how far a peer had come at its ``time``; there is one for each minute in which it did
anything. Because they are totals, making an old stretch coarser is leaving rows out: the newest of each span stays.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ..events import RolledBack
from ..state import Commit, Journal, Part
from .shapes import Traffic

SLOT_SECONDS = 60
DAY = 86400
SPANS = ((DAY, 600), (14 * DAY, 7200))  # older than this: one row for so many seconds
KEPT_ROUNDS = 64  # that can be taken back one by one: more than the state machine keeps marks of
MOST_OPEN = 4096  # steps of a peer that await their round; of more, the oldest count as decided
THINNED = "thinned"  # in `meta`: slots below which each span of SPANS is done
WINDOWS_AT_ONCE = 20
MOST_NBYTES = 2**62  # that the database holds, whatever a worker claims
MOST_SECONDS = 1e6  # of one step, that are believed

Statement = tuple[str, list[Any]]


class Totals(Struct, frozen=True):
    """Of one peer. ``computed``: whole samples that it trained, by its stage's share of the work; ``decided``: those of
    them that no round is awaited for any more, ``work``: that are committed. ``pace``: seconds of a step, ``per_step``:
    samples that it trained in one, the newest counting most of both."""

    time: float = 0.0
    samples: int = 0
    computed: float = 0.0
    sent: int = 0
    received: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    pace: float | None = None
    per_step: float | None = None
    generation: int = 0  # and step, of its newest report of one
    step: int = -1
    committed: int = 0  # samples
    work: float = 0.0
    rounds: int = 0
    decided: float = 0.0


def recent(before: float | None, value: float) -> float:
    """A mean in which the newest counts most."""
    return value if before is None else 0.8 * before + 0.2 * value


COLUMNS = ", ".join(Totals.__struct_fields__)
NONE = Totals()


class Book:
    """All totals. Reads and writes nothing: rows come in by :meth:`peer`, and go out as statements."""

    def __init__(self) -> None:
        self.peers: dict[str, Totals] = {}
        self.traffic: dict[str, tuple[int, int]] = {}  # by purpose: bytes, and the same uncompressed
        self.decided_then: float | None = None  # at a moment of the past, to the round
        self._rounds: deque[tuple[int, Mapping[str, Totals]]] = deque(maxlen=KEPT_ROUNDS)
        self._open: dict[str, tuple[tuple[int, float], ...]] = {}  # computed in which step, before its round

    def copy(self) -> Book:
        """Another one to change. What is in it is never changed."""
        book = Book()
        book.peers, book.traffic, book._rounds = dict(self.peers), dict(self.traffic), self._rounds.copy()
        book._open = dict(self._open)
        return book

    def peer(self, peer: str, totals: Totals) -> None:
        self.peers[peer] = totals

    @property
    def work(self) -> float:
        """Whole samples that count, summed so that the order of the peers makes no difference."""
        return math.fsum(totals.work for totals in self.peers.values())

    @property
    def decided(self) -> float:
        """Whole samples that were computed, again or in vain too. A step whose round is not over is left out: it is not
        lost."""
        if self.decided_then is not None:
            return self.decided_then
        return math.fsum(totals.decided for totals in self.peers.values())

    def change(self, peer: str, now: float, **changes: Any) -> None:
        self.peer(peer, msgspec.structs.replace(self.peers.get(peer, NONE), time=now, **changes))

    def stepped(self, peer: str, now: float, place: tuple[int, int], samples: int, work: float, *times: float) -> None:
        """A peer has done a step: ``place`` is its generation and step, ``times`` are of computing and waiting. One
        that is told again, after a restart of this process, counts once."""
        old = self.peers.get(peer, NONE)
        if place <= (old.generation, old.step):
            return
        compute, wait = (time if 0.0 <= time <= MOST_SECONDS else 0.0 for time in times)
        seconds = compute + wait
        self._open[peer] = (*self._awaiting(peer)[-MOST_OPEN:], (place[1], samples * work))
        self.change(
            peer,
            now,
            samples=old.samples + samples,
            computed=old.computed + samples * work,
            compute_seconds=old.compute_seconds + compute,
            wait_seconds=old.wait_seconds + wait,
            pace=recent(old.pace, seconds),
            per_step=recent(old.per_step, samples),
            generation=place[0],
            step=place[1],
        )

    def _awaiting(self, peer: str) -> tuple[tuple[int, float], ...]:
        """After a restart nobody knows the steps one by one: they count as the newest."""
        totals = self.peers.get(peer, NONE)
        rest = totals.computed - totals.decided
        return self._open.get(peer, ((totals.step, rest),) if rest > 0 else ())

    def _decide(self, step: int) -> None:
        """What was computed in steps before that one counts by now, or never will."""
        for peer, totals in list(self.peers.items()):
            if totals.computed > totals.decided:
                later = tuple(done for done in self._awaiting(peer) if done[0] >= step)
                self._open[peer] = later
                decided = totals.computed - math.fsum(amount for _, amount in later)
                if decided > totals.decided:  # its time stays: it was not heard of
                    self.peer(peer, msgspec.structs.replace(totals, decided=decided))

    def moved(self, peer: str, now: float, purpose: str, direction: str, nbytes: int, dense: int) -> None:
        """So many bytes more."""
        old = self.peers.get(peer, NONE)
        if direction == "out":
            self.change(peer, now, sent=min(max(0, old.sent + nbytes), MOST_NBYTES))
        else:
            self.change(peer, now, received=min(max(0, old.received + nbytes), MOST_NBYTES))
        if direction == "out" or purpose == "data":  # data comes from the coordinator, which keeps no meter
            sums = self.traffic.get(purpose, (0, 0))
            self.traffic[purpose] = (
                min(max(0, sums[0] + nbytes), MOST_NBYTES),
                min(max(0, sums[1] + dense), MOST_NBYTES),
            )

    def committed(self, step: int, parts: Iterable[Part], now: float) -> None:
        """A round is committed."""
        self._decide(step)
        before = {}
        for part in parts:
            old = before[part.peer] = self.peers.get(part.peer, NONE)
            self.change(
                part.peer,
                now,
                committed=old.committed + part.samples,
                work=old.work + part.work,
                rounds=old.rounds + 1,
            )
        self._rounds.append((step, before))

    def back(self, step: int, now: float) -> None:
        """Rounds after ``step`` count no more: one of the newest is gone on from, or the beginning."""
        if step == 0:
            self._rounds.clear()
            for peer, totals in list(self.peers.items()):
                if totals.rounds:
                    self.change(peer, now, committed=0, work=0.0, rounds=0)
        while self._rounds and self._rounds[-1][0] > step:
            for peer, old in self._rounds.pop()[1].items():
                self.change(peer, now, committed=old.committed, work=old.work, rounds=old.rounds)

    def follow(self, commands: Iterable[object], now: float) -> None:
        """What a batch does to what counts."""
        for command in commands:
            if isinstance(command, Commit):
                self.committed(command.mark.step, command.parts, now)
            elif isinstance(command, Journal) and isinstance(command.event, RolledBack):
                self.back(command.event.step, now)

    def remember(self, rounds: Iterable[tuple[int, Sequence[Part]]]) -> None:
        """The newest rounds, oldest first, as they lie in the file: so that they can be taken back after a restart."""
        later = dict(self.peers)
        kept: list[tuple[int, Mapping[str, Totals]]] = []
        for step, parts in reversed(list(rounds)):
            before = {}
            for part in parts:
                old = later.get(part.peer, NONE)
                work = max(0.0, old.work - part.work)
                samples, count = max(0, old.committed - part.samples), max(0, old.rounds - 1)
                before[part.peer] = later[part.peer] = msgspec.structs.replace(
                    old, committed=samples, work=work, rounds=count
                )
            kept.append((step, before))
        self._rounds.extend(reversed(kept))

    def by_purpose(self, compressed: Sequence[str]) -> tuple[Traffic, ...]:
        """What has no uncompressed counterpart of its own counts as it is."""
        return tuple(
            Traffic(purpose=p, nbytes=n, dense_nbytes=d if p in compressed else n)
            for p, (n, d) in sorted(self.traffic.items())
        )


# What is written.


def kept(before: Book, after: Book) -> list[Statement]:
    """The peers whose totals a batch has changed."""
    found: list[Statement] = []
    marks = ",".join("?" * len(Totals.__struct_fields__))
    insert = (
        f"INSERT OR REPLACE INTO peer_series (slot, peer, {COLUMNS})"
        f" VALUES (?, (SELECT key FROM peer_keys WHERE peer = ?), {marks})"
    )
    for peer, totals in after.peers.items():
        old = before.peers.get(peer)
        if old is totals:
            continue
        if old is None:
            found.append(("INSERT OR IGNORE INTO peer_keys (peer) VALUES (?)", [peer]))
        found.append((insert, [slot_of(totals.time), peer, *msgspec.structs.astuple(totals)]))
    return found


def traffic_point(book: Book, commit: Commit, now: float) -> Statement:
    """All bytes, and what was computed, as they stood when a round was committed."""
    totals = json.dumps([[purpose, *sums] for purpose, sums in sorted(book.traffic.items())])
    return (
        "INSERT OR REPLACE INTO traffic_points (time, step, samples, totals, decided) VALUES (?,?,?,?,?)",
        [now, commit.mark.step, commit.mark.sample, totals, book.decided],
    )


def slot_of(time: float) -> int:
    return int(time // SLOT_SECONDS)


class Thinning:
    """What is to be left out as time goes by: span after span, a few at once. ``done``: slots below which that is done,
    for each of :data:`SPANS`."""

    def __init__(self, done: Sequence[int] = ()) -> None:
        self.done = list(done) if len(done) == len(SPANS) else []

    def due(self, now: float, first: float) -> tuple[list[int], list[Statement]]:
        """What is ``done`` after these statements; the run began at ``first``."""
        done = self.done or [slot_of(first) // (span // SLOT_SECONDS) * (span // SLOT_SECONDS) for _, span in SPANS]
        after, found = list(done), list[Statement]()
        for i, (age, span) in enumerate(SPANS):
            width = span // SLOT_SECONDS
            limit = slot_of(now - age) // width * width
            while after[i] < limit and len(found) < 2 * WINDOWS_AT_ONCE:
                found += thin(after[i], after[i] + width)
                after[i] += width
        if found:
            found.append(("INSERT OR REPLACE INTO meta VALUES (?,?)", [THINNED, json.dumps(after)]))
        return after, found


def thin(first: int, end: int) -> list[Statement]:
    """Leaves the newest of slots [first, end)."""
    newer = (
        "SELECT 1 FROM peer_series AS n WHERE n.peer = peer_series.peer AND n.slot > peer_series.slot AND n.slot < ?"
    )
    times = [first * SLOT_SECONDS, end * SLOT_SECONDS]
    window = "time >= ? AND time < ?"
    newest = f"SELECT MAX(time) FROM traffic_points WHERE {window}"
    return [
        (f"DELETE FROM peer_series WHERE slot >= ? AND slot < ? AND EXISTS ({newer})", [first, end, end]),
        (f"DELETE FROM traffic_points WHERE {window} AND time < ({newest})", [*times, *times]),
    ]
