"""A run's file as the dashboard asks it: of a run that is over, or beside a coordinator that writes to it.

Every question opens the file anew, for reading, as :mod:`..snapshot` does: the coordinator is not disturbed, nothing is
written, and any thread may ask. Folds of what was read are kept, so the next question reads only what is new.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from ...protocol import config as run_config
from ...protocol.errors import ConfigError, StateError
from ..events import QUIET
from ..masking import masked
from ..records import unpack
from ..snapshot import HINT, RESTORE, Snapshot, look
from ..state import Part
from . import shapes
from .fold import QUOTING, Fold
from .links import nbytes_of, read_link, read_links
from .picture import COMPRESSED, Frame, peer_row, picture, standings
from .replay import FOREVER, Columns, Replay, Rows, book_at, purposes
from .rollups import NONE, SLOT_SECONDS, SPANS, Book
from .scores import Scores
from .traces import read_step, read_steps

T = TypeVar("T")
LOOK_SECONDS = 1.0  # between two looks for what is new
MOST_INCIDENTS = 2000
LESS_TELLING = ("joined", "left")  # groups that are left out first where there are too many incidents
PEER_EVENTS = 50  # of a peer's page, the newest
ROUND = "round, step, replicas, samples, nbytes, seconds, committed, degraded"
POINT = "id, step, samples, time, train, heldout"


class Archive:
    """The dashboard's :class:`.source.Source` of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: tuple[Frame, Replay] | None = None

    def _look(self, ask: Callable[[Frame, Replay, Rows], T]) -> T:
        return self._look_at(lambda frame, replay, rows, db: ask(frame, replay, rows))

    def _look_at(self, ask: Callable[[Frame, Replay, Rows, sqlite3.Connection], T]) -> T:
        """``StateError`` if the file is missing, foreign or damaged."""

        def read(snapshot: Snapshot) -> T:
            with self._lock:  # one fold, followed by one thread at a time
                if self._known is None:
                    frame = frame_of(snapshot)
                    self._known = frame, Replay(frame.seq_len)
                frame, replay = self._known
                replay.follow(snapshot.select)
                return ask(frame, replay, snapshot.select, snapshot.db)

        return look(self.path, read, whole=False)

    # What a live board answers from memory.

    @property
    def version(self) -> int:
        """Differs when anything was written since."""

        def newest(snapshot: Snapshot) -> int:
            [(events,), (points,)] = (
                next(iter(snapshot.select(f"SELECT COALESCE(MAX(id), 0) FROM {table}", ())))
                for table in ("events", "points")
            )
            return int(events) + int(points) + 1

        return look(self.path, newest, whole=False)

    async def changed(self, version: int) -> int:
        while True:  # nobody tells: another process writes
            if (found := await asyncio.to_thread(lambda: self.version)) != version:
                return found
            await asyncio.sleep(LOOK_SECONDS)

    def state(self) -> shapes.State:
        """As the run stands at its newest record."""

        def ask(frame: Frame, replay: Replay, rows: Rows) -> shapes.State:
            book, fold = book_at(rows, None), replay.newest
            last = max([fold.time, *(totals.time for totals in book.peers.values())])
            version = replay.last_event + replay.last_point + 1
            return picture(frame, fold, book, last, at=None, version=version, scores=scored(rows, FOREVER).version)

        return self._look(ask)

    def points(self, after: int) -> list[shapes.Point]:
        def ask(frame: Frame, replay: Replay, rows: Rows) -> list[shapes.Point]:
            found = rows(f"SELECT {POINT} FROM points WHERE id > ? ORDER BY id", (after,))
            return [point_of(row, frame.seq_len) for row in found]

        return self._look(ask)

    def news(self, after: int) -> list[shapes.EventRow]:
        return [row for row in self._look(lambda frame, replay, rows: list(replay.newest.events)) if row.id > after]

    # The past.

    def state_at(self, at: float) -> shapes.State:
        """As the page showed it at a moment. A peer's totals are as of its newest row until then: a minute before at
        most, or longer where the rows have been thinned."""

        def ask(frame: Frame, replay: Replay, rows: Rows) -> shapes.State:
            fold, book = replay.at(rows, at), book_at(rows, at)
            version = replay.last_event + replay.last_point + 1
            return picture(frame, fold, book, at, at=at, version=version, scores=scored(rows, at).version)

        return self._look(ask)

    def curve(self, most: int, until: float | None) -> list[shapes.Point]:
        def ask(frame: Frame, replay: Replay, rows: Rows) -> list[shapes.Point]:
            return curve(rows, frame.seq_len, max(4, most), FOREVER if until is None else until)

        return self._look(ask)

    def events(self, after: int, until: float | None, limit: int, kind: str | None) -> list[shapes.EventRow]:
        """Oldest first."""
        which, value = ("kind = ?", kind) if kind else ("kind != ?", QUIET[0])
        where = f"id > ? AND time <= ? AND {which} ORDER BY id LIMIT ?"
        return self._look(
            lambda frame, replay, rows: events(
                rows, replay, where, (after, FOREVER if until is None else until, value, limit)
            )
        )

    def incidents(self, until: float | None) -> list[shapes.Incident]:
        """The newest, if there are very many: of comings and goings less than of what explains a curve."""
        found = self._look(lambda frame, replay, rows: list(replay.incidents))
        if until is not None:
            found = [incident for incident in found if incident.time <= until]
        if (over := len(found) - MOST_INCIDENTS) > 0:
            minor = [incident.id for incident in found if incident.group in LESS_TELLING]
            dropped = set(minor[:over])
            found = [incident for incident in found if incident.id not in dropped]
        return found[-MOST_INCIDENTS:]

    def rounds(self, before: int | None, limit: int) -> list[shapes.RoundRow]:
        """Committed ones, newest first."""
        sql = f"SELECT {ROUND} FROM rounds WHERE step < ? ORDER BY step DESC LIMIT ?"
        first = 2**62 if before is None else before
        return self._look(lambda frame, replay, rows: [round_of(row) for row in rows(sql, (first, limit))])

    def round(self, step: int) -> shapes.RoundPage | None:
        return self._look(lambda frame, replay, rows: round_page(rows, replay.newest, step))

    def peer(self, peer: str, at: float | None) -> shapes.PeerPage | None:
        def ask(frame: Frame, replay: Replay, rows: Rows) -> shapes.PeerPage | None:
            fold = replay.newest if at is None else replay.at(rows, at)
            return peer_page(frame, fold, replay, book_at(rows, at), rows, peer, at)

        return self._look(ask)

    def traffic(self, most: int, until: float | None) -> list[shapes.TrafficPoint]:
        def ask(frame: Frame, replay: Replay, rows: Rows) -> list[shapes.TrafficPoint]:
            return traffic(rows, frame.seq_len, max(2, most), FOREVER if until is None else until)

        return self._look(ask)

    def leaderboard(self) -> list[shapes.Standing]:
        return self._look(lambda frame, replay, rows: standings(frame, replay.newest, book_at(rows, None)))

    def evaluations(self) -> list[dict[str, Any]]:
        return self._look(lambda frame, replay, rows: scored(rows, FOREVER).rows())

    # Lines and single steps.

    def links(self, at: float | None) -> list[shapes.LinkRow]:
        def ask(fold: Fold, db: sqlite3.Connection) -> list[shapes.LinkRow]:
            caps = {person.peer: nbytes_of(person.caps.upload_mbps) for person in fold.persons.values()}
            return read_links(db, fold.time if at is None else at, caps)

        return self._traced("links", ask, [])

    def link(self, sender: str, receiver: str) -> list[shapes.LinkPoint]:
        return self._traced("links", lambda fold, db: read_link(db, sender, receiver), [])

    def steps(self, limit: int, order: Literal["newest", "slowest"]) -> list[shapes.StepRow]:
        return self._traced("steps", lambda fold, db: read_steps(db, limit, order), [])

    def step(self, step: int) -> shapes.StepPage | None:
        return self._traced("steps", lambda fold, db: read_step(db, step), None)

    def _traced(self, table: str, ask: Callable[[Fold, sqlite3.Connection], T], otherwise: T) -> T:
        """``otherwise``: of a file that is older than this table."""

        def read(frame: Frame, replay: Replay, rows: Rows, db: sqlite3.Connection) -> T:
            return ask(replay.newest, db) if table in Columns(rows).tables else otherwise

        return self._look_at(read)


def frame_of(snapshot: Snapshot) -> Frame:
    raw = snapshot.meta("config", dict[str, Any] | None, None)  # type: ignore[arg-type]
    if raw is None:
        raise StateError(f"{snapshot.path}: no run was ever opened in it", hint=HINT, code="foreign")
    try:
        config = run_config.convert(raw, f"{snapshot.path}: the run's configuration")
    except ConfigError as error:
        raise StateError(error.one_line(), hint=RESTORE, code="damaged") from None
    vocab_size = snapshot.meta("vocab_size", int, config.data.vocab_size)
    return Frame(config, snapshot.meta("run_id", str, ""), vocab_size)


def scored(rows: Rows, until: float) -> Scores:
    return Scores.of(rows, until)


def point_of(row: tuple[Any, ...], seq_len: int) -> shapes.Point:
    number, step, samples, time, train, heldout = row
    return shapes.Point(id=number, step=step, tokens=samples * seq_len, time=time, train=train, heldout=heldout)


def round_of(row: tuple[Any, ...]) -> shapes.RoundRow:
    number, step, replicas, samples, nbytes, seconds, committed, degraded = row
    return shapes.RoundRow(
        round=number,
        step=step,
        replicas=replicas,
        samples=samples,
        agree=True,
        nbytes=nbytes,
        seconds=seconds,
        committed=committed,
        degraded=bool(degraded),
    )


def curve(rows: Rows, seq_len: int, most: int, until: float) -> list[shapes.Point]:
    """At most ``most`` points: held-out ones are kept, at most half of all; of training losses, where they are too
    many, the mean of so many steps each with its extremes."""
    kept = list(rows(f"SELECT {POINT} FROM points WHERE heldout IS NOT NULL AND time <= ? ORDER BY id", (until,)))
    if len(kept) > most // 2:
        kept = [kept[round(i * (len(kept) - 1) / (most // 2 - 1))] for i in range(most // 2)]
    found = [point_of(row, seq_len) for row in kept]
    where = "FROM points WHERE train IS NOT NULL AND heldout IS NULL AND time <= ?"
    [(count, first, last)] = rows(f"SELECT COUNT(*), MIN(id), MAX(id) {where}", (until,))
    room = most - len(found)
    if count <= room:
        found += [point_of(row, seq_len) for row in rows(f"SELECT {POINT} {where} ORDER BY id", (until,))]
    else:
        width = math.ceil((last - first + 1) / room)
        # Counted from the end, so that the newest stretch is a whole one and the newest point its last.
        sql = f"""
            SELECT p.id, p.step, p.samples, p.time, b.mean, b.low, b.high FROM points AS p JOIN (
                SELECT MAX(id) AS id, AVG(train) AS mean, MIN(train) AS low, MAX(train) AS high {where}
                GROUP BY (? - id) / ?) AS b ON b.id = p.id ORDER BY p.id"""
        for number, step, samples, time, mean, low, high in rows(sql, (until, last, width)):
            tokens = samples * seq_len
            found.append(
                shapes.Point(
                    id=number, step=step, tokens=tokens, time=time, train=mean, heldout=None, low=low, high=high
                )
            )
    return sorted(found, key=lambda point: point.id)


def events(rows: Rows, replay: Replay, where: str, values: tuple[Any, ...]) -> list[shapes.EventRow]:
    columns = Columns(rows)
    sql = f"SELECT id, time, {columns.step}, kind, text, {columns.peer} FROM events WHERE {where}"
    return [
        shapes.EventRow(
            id=number,
            time=time,
            step=replay.steps.get(number, 0) if step is None else step,
            kind=kind,
            text=masked(text) if kind in QUOTING else text,
            peer=peer,
        )
        for number, time, step, kind, text, peer in rows(sql, values)
    ]


def round_page(rows: Rows, fold: Fold, step: int) -> shapes.RoundPage | None:
    found = list(rows(f"SELECT {ROUND} FROM rounds WHERE step = ?", (step,)))
    if not found:
        return None
    row, parts = round_of(found[0]), tuple[Part, ...]()
    if "round_parts" in Columns(rows).tables:
        names = {key: peer for key, peer in rows("SELECT key, peer FROM peer_keys", ())}
        for (data,) in rows("SELECT parts FROM round_parts WHERE round = ?", (row.round,)):
            parts = unpack(data, names)
    beside = ("MAX(step) FROM rounds WHERE step <", "MIN(step) FROM rounds WHERE step >")
    [(before,)], [(after,)] = (list(rows(f"SELECT {which} ?", (step,))) for which in beside)
    return shapes.RoundPage(
        row=row,
        parts=tuple(
            shapes.RoundPart(
                peer=part.peer,
                name=fold.persons[part.peer].name if part.peer in fold.persons else part.peer[:6],
                stage=part.stage,
                samples=part.samples,
                nbytes=part.nbytes,
                seconds=part.seconds,
                digest=part.digest.hex()[:16],
            )
            for part in parts
        ),
        before=before,
        after=after,
    )


def peer_page(
    frame: Frame, fold: Fold, replay: Replay, book: Book, rows: Rows, peer: str, at: float | None
) -> shapes.PeerPage | None:
    person = fold.persons.get(peer)
    if person is None:
        return None
    until, columns = FOREVER if at is None else at, Columns(rows)
    row = peer_row(frame, fold, book, peer)
    layers = fold.layers or (frame.division(len(fold.seats)) if fold.seats else ())
    rank = next((standing.rank for standing in standings(frame, fold, book) if standing.peer == peer), None)
    where = f"{columns.peer} = ? AND time <= ? ORDER BY id DESC LIMIT ?"
    return shapes.PeerPage(
        row=row,
        caps=person.caps,
        first_seen=person.first_seen,
        layers=None if row.stage is None else layers[row.stage],
        rounds=book.peers.get(peer, NONE).rounds,
        rank=rank,
        history=tuple(history(rows, columns, peer, person.first_seen, until)),
        events=tuple(events(rows, replay, where, (peer, until, PEER_EVENTS))),
    )


def history(rows: Rows, columns: Columns, peer: str, since: float, until: float) -> list[shapes.PeerPoint]:
    """Differences of neighbouring totals. There are no empty rows: a piece that follows a gap begins two spans before
    its end."""
    if "peer_series" not in columns.tables:
        return []
    sums = "samples, sent, received, compute_seconds, wait_seconds"
    sql = f"""
        SELECT time, {sums} FROM peer_series WHERE peer = (SELECT key FROM peer_keys WHERE peer = ?) AND time <= ?
        ORDER BY slot"""
    found, newest = [], list(rows(sql, (peer, until)))
    last = newest[-1][0] if newest else 0.0
    before: tuple[Any, ...] = (since, 0, 0, 0, 0.0, 0.0)
    for row in newest:
        age = last - row[0]
        span = next((span for limit, span in reversed(SPANS) if age > limit), SLOT_SECONDS)
        samples, sent, received, compute, wait = (
            max(0, new - old) for new, old in zip(row[1:], before[1:], strict=True)
        )
        found.append(
            shapes.PeerPoint(
                time=row[0],
                seconds=min(max(0.0, row[0] - before[0]), 2.0 * span),
                samples=samples,
                sent=sent,
                received=received,
                compute_seconds=compute,
                wait_seconds=wait,
            )
        )
        before = row
    return found


def traffic(rows: Rows, seq_len: int, most: int, until: float) -> list[shapes.TrafficPoint]:
    """Of every n-th committed round, and the newest."""
    if "traffic_points" not in Columns(rows).tables:
        return []
    where = "FROM traffic_points WHERE time <= ?"
    [(count,)] = rows(f"SELECT COUNT(*) {where}", (until,))
    every = max(1, math.ceil(count / most))
    sql = f"""
        SELECT time, step, samples, totals FROM (
            SELECT *, ROW_NUMBER() OVER (ORDER BY time DESC) AS place {where})
        WHERE (place - 1) % ? = 0 ORDER BY time"""
    found = []
    for time, step, samples, totals in rows(sql, (until, every)):
        book = Book()
        book.traffic = purposes(totals)
        found.append(
            shapes.TrafficPoint(time=time, step=step, tokens=samples * seq_len, traffic=book.by_purpose(COMPRESSED))
        )
    return found
