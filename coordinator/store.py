"""The run on disk: one SQLite file, one writer, everything of a batch in one durable transaction.

WAL with ``synchronous=FULL``: what :meth:`Store.write` returned from is there after a power cut. Reports are
acknowledged and views sent only then. What a write that raised has left behind is undone, so it can be tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ..protocol.errors import StateError
from ..protocol.failpoints import failpoint
from .events import PeerJoined, RolledBack
from .records import pack
from .state import Command, Commit, Journal, Keep, Lease, Mark, Point, Relet, Remember, ReturnLeases, Uncommit

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT, generation INTEGER NOT NULL, step INTEGER NOT NULL, peer TEXT NOT NULL,
    first INTEGER NOT NULL, count INTEGER NOT NULL, state TEXT NOT NULL, round INTEGER, reason TEXT,
    expires REAL NOT NULL, changed REAL NOT NULL);
CREATE INDEX IF NOT EXISTS ledger_by_state ON ledger (state, step);
CREATE TABLE IF NOT EXISTS rounds (
    step INTEGER PRIMARY KEY, round INTEGER NOT NULL, generation INTEGER NOT NULL, sample INTEGER NOT NULL,
    digests TEXT NOT NULL, replicas INTEGER NOT NULL, samples INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    seconds REAL NOT NULL, committed REAL NOT NULL, degraded INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
    text TEXT NOT NULL, step INTEGER, peer TEXT);
CREATE TABLE IF NOT EXISTS points (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, samples INTEGER NOT NULL, time REAL NOT NULL,
    train REAL, heldout REAL);
CREATE TABLE IF NOT EXISTS peers (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, device TEXT NOT NULL, first_seen REAL NOT NULL,
    last_seen REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traffic (
    peer TEXT NOT NULL, session TEXT NOT NULL, purpose TEXT NOT NULL, direction TEXT NOT NULL,
    nbytes INTEGER NOT NULL, dense_nbytes INTEGER NOT NULL,
    PRIMARY KEY (peer, session, purpose, direction)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS round_parts (round INTEGER PRIMARY KEY, step INTEGER NOT NULL, parts BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS round_parts_by_step ON round_parts (step);
CREATE TABLE IF NOT EXISTS peer_keys (key INTEGER PRIMARY KEY, peer TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS peer_series (
    slot INTEGER NOT NULL, peer INTEGER NOT NULL, time REAL NOT NULL, samples INTEGER NOT NULL,
    computed REAL NOT NULL, sent INTEGER NOT NULL, received INTEGER NOT NULL, compute_seconds REAL NOT NULL,
    wait_seconds REAL NOT NULL, pace REAL, per_step REAL, generation INTEGER NOT NULL, step INTEGER NOT NULL,
    committed INTEGER NOT NULL, work REAL NOT NULL, rounds INTEGER NOT NULL, decided REAL NOT NULL,
    PRIMARY KEY (slot, peer)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS peer_series_by_peer ON peer_series (peer, slot);
CREATE TABLE IF NOT EXISTS traffic_points (
    time REAL PRIMARY KEY, step INTEGER NOT NULL, samples INTEGER NOT NULL, totals TEXT NOT NULL,
    decided REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY, generation INTEGER NOT NULL, time REAL NOT NULL, seconds REAL NOT NULL);
CREATE INDEX IF NOT EXISTS steps_by_seconds ON steps (seconds);
CREATE TABLE IF NOT EXISTS traces (
    step INTEGER NOT NULL, peer TEXT NOT NULL, stage INTEGER NOT NULL, work REAL NOT NULL, begin REAL, trace BLOB,
    PRIMARY KEY (step, peer)) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS traces_of_steps AFTER DELETE ON steps
    BEGIN DELETE FROM traces WHERE step = OLD.step; END;
CREATE TABLE IF NOT EXISTS ways (
    id INTEGER PRIMARY KEY, sender TEXT NOT NULL, receiver TEXT NOT NULL, fastest REAL, UNIQUE (sender, receiver));
CREATE TABLE IF NOT EXISTS links (
    way INTEGER NOT NULL, span INTEGER NOT NULL, time INTEGER NOT NULL, rate REAL, rtt REAL, path TEXT,
    PRIMARY KEY (way, span, time)) WITHOUT ROWID;
"""
# Columns that files of earlier versions lack, and what fills them: run before the indices that name them.
ADDED = (
    ("events", "step", "INTEGER", None),
    ("events", "peer", "TEXT", "json_extract(data, '$.peer')"),
    ("peer_series", "per_step", "REAL", None),
)
NAMED = """
INSERT OR IGNORE INTO peers
    SELECT peer, json_extract(data, '$.name'), json_extract(data, '$.device'), MIN(time), MAX(time)
    FROM events WHERE kind = 'PeerJoined' AND peer IS NOT NULL GROUP BY peer;"""
JOINED = """INSERT INTO peers VALUES (?,?,?,?,?) ON CONFLICT (id)
    DO UPDATE SET name = excluded.name, device = excluded.device, last_seen = excluded.last_seen"""
INDICES = """
CREATE INDEX IF NOT EXISTS events_by_kind ON events (kind, id);
CREATE INDEX IF NOT EXISTS events_by_peer ON events (peer, id) WHERE peer IS NOT NULL;
CREATE INDEX IF NOT EXISTS points_by_time ON points (time);
"""

# What may pass by itself, by SQLite's primary result code: the `StateError`'s code, and what to do. All else is final.
PASSING = {
    sqlite3.SQLITE_FULL: ("disk-full", "Free some space"),
    sqlite3.SQLITE_IOERR: ("disk", "Look after the disk"),
    sqlite3.SQLITE_NOMEM: ("disk", "Free some memory"),
    sqlite3.SQLITE_CANTOPEN: ("disk", "Check that its folder exists and may be written"),
    sqlite3.SQLITE_PERM: ("disk", "Mend its rights"),
    sqlite3.SQLITE_READONLY: ("disk", "Mend its rights, or mount its disk for writing"),
    sqlite3.SQLITE_BUSY: ("busy", "End the program that holds it"),
    sqlite3.SQLITE_LOCKED: ("busy", "End the program that holds it"),
    sqlite3.SQLITE_PROTOCOL: ("busy", "End the program that holds it"),
}
PAGE_NBYTES = 4096  # of the database: the least that is written
NOTHING_LOST = "nothing acknowledged is lost."
PASSING_CODES = frozenset(code for code, _ in PASSING.values())
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
MOVED = (sqlite3.SQLITE_READONLY_DBMOVED, sqlite3.SQLITE_IOERR_CORRUPTFS)  # final, unlike others of their kind


def passing(error: StateError) -> bool:
    """Whether the same write may succeed later."""
    return error.code in PASSING_CODES


class Store:
    """Not thread-safe: one thread owns it. Every method raises ``StateError`` when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, tuple[int, int]] = {}  # device and number of what we have open
        self._step: int | None = None  # steps done; None: not looked up yet
        self._keys: dict[str, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(SCHEMA)
            self._add_columns()
            self._db.executescript(INDICES)
        except (sqlite3.Error, OSError) as error:
            raise self._refused(error) from None

    def _add_columns(self) -> None:
        for table, column, kind, filling in ADDED:
            if column in {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}:
                continue
            filled = f"UPDATE {table} SET {column} = {filling} WHERE json_valid(data);{NAMED}" if filling else ""
            self._db.executescript(f"BEGIN IMMEDIATE; ALTER TABLE {table} ADD COLUMN {column} {kind}; {filled} COMMIT")

    def close(self) -> None:
        self._db.close()

    # Writing.

    def write(self, commands: Iterable[Command], now: float, extra: Sequence[tuple[str, Sequence[Any]]] = ()) -> None:
        """Carries out what touches the disk, all or nothing, and returns when it is durable."""
        ordered = list(commands)
        with self._transaction():
            for command in ordered:  # a batch's events come after its points, however they are ordered
                if isinstance(command, Point) and command.train is not None:
                    self._step = command.step
            for command in ordered:
                self._write(command, now)
            for sql, values in extra:
                self._db.execute(sql, values)

    def _write(self, command: Command, now: float) -> None:
        run = self._db.execute
        match command:
            case Journal(event=event):
                data = json.dumps(msgspec.to_builtins(event))
                run(
                    "INSERT INTO events (time, kind, data, text, step, peer) VALUES (?,?,?,?,?,?)",
                    (now, event.kind, data, event.text, self._reached(), getattr(event, "peer", None)),
                )
                if isinstance(event, RolledBack):
                    self._step = event.step
                elif isinstance(event, PeerJoined):
                    run(JOINED, (event.peer, event.name, event.device, now, now))
            case Lease():
                lease = (command.generation, command.step, command.peer, command.first, command.count)
                run(
                    "INSERT INTO ledger (generation, step, peer, first, count, state, expires, changed)"
                    " VALUES (?,?,?,?,?,'leased',?,?)",
                    (*lease, command.expires, now),
                )
            case Relet(generation=generation, peer=peer, holders=holders):
                self._db.executemany(
                    "UPDATE ledger SET peer=?, changed=? WHERE state='leased' AND generation=? AND peer=? AND first=?",
                    [(holder, now, generation, peer, first) for first, holder in holders.items()],
                )
            case ReturnLeases(reason=reason):
                run(
                    "UPDATE ledger SET state='returned', reason=?, changed=? WHERE state='leased'",
                    (reason, now),
                )
            case Commit(mark=mark):
                run(
                    "UPDATE ledger SET state='committed', round=?, changed=? WHERE state='leased' AND step < ?",
                    (command.round, now, mark.step),
                )
                digests = json.dumps([d.hex() for d in mark.digests])
                run(
                    "INSERT OR REPLACE INTO rounds VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        *(mark.step, command.round, mark.generation, mark.sample, digests),
                        *(command.replicas, command.samples, command.nbytes, command.seconds, now, command.degraded),
                    ),
                )
                if command.parts:
                    packed = pack(command.parts, {part.peer: self._key(part.peer) for part in command.parts})
                    run("INSERT OR REPLACE INTO round_parts VALUES (?,?,?)", (command.round, mark.step, packed))
            case Uncommit(step=step):
                run(
                    "UPDATE ledger SET state='returned', reason='its round is lost', changed=?"
                    " WHERE state IN ('committed', 'leased') AND step >= ?",
                    (now, step),
                )
                run("DELETE FROM rounds WHERE step > ?", (step,))
                run("DELETE FROM round_parts WHERE step > ?", (step,))
            case Remember(generation=generation, stop=stop):
                self._set("generation", generation)
                self._set("stop", None if stop is None else mark_to_json(stop))
            case Keep(values=values):
                for key, value in values.items():
                    self._set(key, value)
            case Point():
                run(
                    "INSERT INTO points (step, samples, time, train, heldout) VALUES (?,?,?,?,?)",
                    (command.step, command.tokens_samples, now, command.train, command.heldout),
                )

    def _key(self, peer: str) -> int:
        """The short name of a peer in this file."""
        if peer not in self._keys:
            self._db.execute("INSERT OR IGNORE INTO peer_keys (peer) VALUES (?)", (peer,))
            self._keys[peer] = next(self._db.execute("SELECT key FROM peer_keys WHERE peer = ?", (peer,)))[0]
        return self._keys[peer]

    def _reached(self) -> int:
        """Steps done: of the newest loss, or of the rollback after it."""
        if self._step is None:
            points = "SELECT time, step FROM points WHERE train IS NOT NULL ORDER BY id DESC LIMIT 1"
            place = "FROM events WHERE kind = 'RolledBack' ORDER BY id DESC LIMIT 1"
            backs = f"SELECT time, json_extract(data, '$.step') {place}"
            (at, step), (back, to) = (next(iter(self._db.execute(sql)), (-1.0, 0)) for sql in (points, backs))
            self._step = int(to if back >= at else step)
        return self._step

    def set_meta(self, **values: Any) -> None:
        """Stores JSON values by name."""
        with self._transaction():
            for key, value in values.items():
                self._set(key, value)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._undo()  # if that failed after the last write
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._still_there()
            failpoint("coordinator.store.commit")
            self._commit()
            failpoint("coordinator.store.committed")
        except BaseException as error:
            self._step, self._keys = None, {}
            with contextlib.suppress(sqlite3.Error):
                self._undo()
            if isinstance(error, sqlite3.Error | OverflowError | OSError):
                raise self._refused(error) from None
            raise

    def _undo(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def _still_there(self) -> None:
        """SQLite goes on writing into files that somebody has deleted: then nothing may be acknowledged."""
        for path in (self.path, self.path.with_name(self.path.name + "-wal")):
            try:
                found = os.stat(path)
            except FileNotFoundError:
                raise self._moved(path) from None
            if self._files.setdefault(path, (found.st_dev, found.st_ino)) != (found.st_dev, found.st_ino):
                raise self._moved(path)

    def _moved(self, path: Path) -> StateError:
        return StateError(
            f"{path} was deleted or replaced while the run was using it",
            hint="Put it back as it was, from a copy if need be: the same command goes on from there.",
            code="moved",
        )

    def _set(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (key, json.dumps(value)))

    # Reading.

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._refused(error) from None

    def meta(self, key: str, default: Any = None) -> Any:
        found = self.rows("SELECT value FROM meta WHERE key=?", (key,))
        return json.loads(found[0][0]) if found else default

    def marks(self, limit: int = 50) -> list[Mark]:
        """Committed rounds, newest first."""
        rows = self.rows("SELECT generation, step, sample, digests FROM rounds ORDER BY step DESC LIMIT ?", (limit,))
        return [
            Mark(kind="round", generation=g, step=s, sample=n, digests=tuple(map(bytes.fromhex, json.loads(d))))
            for g, s, n, d in rows
        ]

    def stop_mark(self) -> Mark | None:
        stored = self.meta("stop")
        return None if stored is None else mark_from_json(stored)

    def _refused(self, error: Exception) -> StateError:
        """By SQLite's codes: :data:`PASSING` or final."""
        extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR if isinstance(error, OSError) else 0)
        primary = extended & 0xFF
        if primary == sqlite3.SQLITE_FULL or (primary == sqlite3.SQLITE_IOERR and self._no_room()):
            code, hint = PASSING[sqlite3.SQLITE_FULL]
            return StateError(f"{self.path}: the disk is full", hint=f"{hint}: {NOTHING_LOST}", code=code)
        if primary in PASSING and extended not in MOVED:
            code, hint = PASSING[primary]
            return StateError(f"{self.path}: {error}", hint=f"{hint}: {NOTHING_LOST}", code=code)
        if primary in DAMAGED or extended in MOVED:
            hint = "Restore it from a copy, or start a new run with another --data-dir."
            return StateError(f"{self.path}: {error}", hint=hint, code="damaged")
        return StateError(f"{self.path}: {error}", hint="This is potluck's own mistake: please report it.")

    def _no_room(self) -> bool:
        """SQLite names a full disk so only where it writes the database itself."""
        try:
            return shutil.disk_usage(self.path.parent).free < PAGE_NBYTES
        except OSError:
            return False


def mark_to_json(mark: Mark) -> dict[str, Any]:
    return {
        "kind": mark.kind,
        "generation": mark.generation,
        "step": mark.step,
        "sample": mark.sample,
        "digests": [d.hex() for d in mark.digests],
        "holders": [list(h) for h in mark.holders],
    }


def mark_from_json(data: dict[str, Any]) -> Mark:
    return Mark(
        kind=data["kind"],
        generation=data["generation"],
        step=data["step"],
        sample=data["sample"],
        digests=tuple(map(bytes.fromhex, data["digests"])),
        holders=tuple(tuple(h) for h in data["holders"]),
    )
