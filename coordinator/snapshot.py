"""A run's file as somebody else reads it: one moment of it, nothing written, no belief in what stands there.

A running coordinator is not disturbed: in WAL mode readers and the writer do not wait for each other. Without a log
beside it the file is read as it lies, so that not even SQLite's own helper files are made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ..protocol.errors import StateError

FILE = "run.sqlite"
LONGEST_NBYTES = 2**24  # of one stored value
ATTEMPTS = 5
BUSY_SECONDS = 10.0
HINT = "Name a run's data folder (its coordinator's --data-dir), or the run's name."
RESTORE = "Restore it from a copy."
T = TypeVar("T")
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class LedgerRow(Struct, frozen=True, array_like=True):
    TABLE: ClassVar[str] = "ledger"
    id: int
    generation: Positive
    step: Count
    peer: str
    first: Count
    count: Positive
    state: Literal["leased", "committed", "returned"]
    round: int | None
    reason: str | None

    @property
    def end(self) -> int:
        return self.first + self.count


class RoundRow(Struct, frozen=True, array_like=True):
    TABLE: ClassVar[str] = "rounds"
    step: Positive
    round: Positive
    generation: Positive
    sample: Positive
    digests: str
    replicas: Positive
    samples: Positive
    nbytes: Count
    seconds: float


class EventRow(Struct, frozen=True, array_like=True):
    TABLE: ClassVar[str] = "events"
    id: int
    kind: str
    data: str


Row = TypeVar("Row", LedgerRow, RoundRow, EventRow)


class Snapshot:
    """An open read transaction."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self.db = path, db

    def rows(self, kind: type[Row]) -> Iterator[tuple[Any, Row | str]]:
        """A table's keys and rows in order, read as one goes along; what is wrong with a row, instead of it."""
        names = kind.__struct_fields__
        for row in self.db.execute(f"SELECT {', '.join(names)} FROM {kind.TABLE} ORDER BY {names[0]}"):
            try:
                yield row[0], msgspec.convert(row, kind)
            except msgspec.ValidationError as error:
                yield row[0], named(str(error), names)

    def select(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows as they lie there."""
        return self.db.execute(sql, values).fetchall()

    def newest_of(self, *kinds: str) -> str | None:
        """The kind of the newest event that is one of ``kinds``."""
        marks = ", ".join("?" * len(kinds))
        rows = self.db.execute(f"SELECT kind FROM events WHERE kind IN ({marks}) ORDER BY id DESC LIMIT 1", kinds)
        return next((kind for (kind,) in rows), None)

    def last_id(self, table: str) -> int | None:
        """The highest id ever given in a table; None if the file is older than this being kept."""
        if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'").fetchall():
            return None
        found = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchall()
        return found[0][0] if found and isinstance(found[0][0], int) else 0

    def meta(self, key: str, kind: type[T], default: T) -> T:
        """A stored value; ``StateError`` if it is not what it must be."""
        found = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchall()
        if not found:
            return default
        try:
            return msgspec.json.decode(found[0][0] if isinstance(found[0][0], str) else b"", type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            text = f"{self.path} is damaged: what is stored as `{key}` cannot be read: {error}"
            raise StateError(text, hint=RESTORE, code="damaged") from None


def named(text: str, names: tuple[str, ...]) -> str:
    """A complaint about ``$[3]`` with the column's name."""
    what, _, place = text.partition(" - at `$[")
    number = place.partition("]")[0]
    return f"{names[int(number)]}: {what}" if number.isdigit() else what


def finished(path: Path) -> bool:
    """Whether the run has done all its steps and published the last model, as its file says now."""

    def read(snapshot: Snapshot) -> bool:
        return snapshot.newest_of("PlanIssued", "Finished") == "Finished"  # with more steps it goes on by a plan

    return look(path, read, whole=False)


def look(path: Path, read: Callable[[Snapshot], T], *, whole: bool = True) -> T:
    """What ``read`` finds in the run's file at one moment. Raises ``StateError`` if it is none, or damaged; without
    ``whole``, only if what ``read`` reads of it is."""
    for _ in range(ATTEMPTS):
        before = stamp(path)
        try:
            found = _look(path, logged=before[0], read=read, whole=whole)
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: SQLite's own words quote damaged bytes
            if before[0] or stamp(path) == before:
                known = error if isinstance(error, sqlite3.Error) else sqlite3.DatabaseError("its schema is not text")
                raise refused(path, known) from None
        else:
            if before[0] or stamp(path) == before:  # else a coordinator has begun to write meanwhile
                return found
    raise StateError(f"{path} changes all the time", hint="Try again once its coordinator is up.")


def _look(path: Path, *, logged: bool, read: Callable[[Snapshot], T], whole: bool) -> T:
    how = "mode=ro" if logged else "mode=ro&immutable=1"
    address = f"{path.resolve().as_uri()}?{how}"
    with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as db:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_NBYTES)
        db.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("BEGIN")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if missing := {"ledger", "rounds", "events", "meta"} - tables:
            raise StateError(f"{path} is not a run's file: it has no table {min(missing)}", hint=HINT, code="foreign")
        if not whole:
            return read(Snapshot(path, db))
        [(health,), *_] = db.execute("PRAGMA integrity_check(1)").fetchall() or [("no answer",)]
        if health != "ok":
            raise refused(path, sqlite3.DatabaseError(str(health)))
        return read(Snapshot(path, db))


def stamp(path: Path) -> tuple[bool, int, int]:
    """Whether a log lies beside the file (a coordinator writes, or was killed), and what a writer would change."""
    try:
        about = path.stat()
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}", hint=HINT, code="missing") from None
    if not path.is_file():
        raise StateError(f"{path} is not a file", hint=HINT, code="foreign")
    return path.with_name(f"{path.name}-wal").exists(), about.st_size, about.st_mtime_ns


def refused(path: Path, error: sqlite3.Error) -> StateError:
    text = str(error)
    if "not a database" in text or "no such column" in text:
        return StateError(f"{path} is not a run's file: {text}", hint=HINT, code="foreign")
    if "unable to open" in text or "readonly" in text:
        hint = "Check its rights; a file with its -wal beside it must lie in a folder that can be written."
        return StateError(f"{path}: {text}", hint=hint)
    return StateError(f"{path} is damaged: {text}", hint=RESTORE, code="damaged")
