"""The coordinator's disk: the real store on a file in memory, which refuses, is slow, and loses what was not synced."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck.coordinator.state import Command
from potluck.coordinator.store import Store

if TYPE_CHECKING:
    from .checks import Watch

SYNCED = 2  # PRAGMA synchronous=FULL: a commit is on the medium when it returns


class Disk:
    """A machine's medium; it outlives every process."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path, self.rng = path, rng
        self.refusing: int | None = None  # SQLite's code
        self.slowness = 1.0
        self._unsynced: bytes | None = None  # the file as it was before the last commit, if that may be lost

    def seconds(self) -> float:
        """That a write takes, before or after its commit."""
        return self.rng.uniform(0.0005, 0.004) * self.slowness

    def before_commit(self, synced: bool) -> None:
        if self.refusing is not None:
            error = sqlite3.OperationalError("refused by the disk")
            error.sqlite_errorcode = self.refusing
            raise error
        self._unsynced = None if synced else _copy(self.path)

    def power_fails(self) -> None:
        """What was committed without a sync is gone. The store must be closed."""
        if self._unsynced is not None:
            for name in ("-wal", "-shm"):
                self.path.with_name(self.path.name + name).unlink(missing_ok=True)
            self.path.write_bytes(self._unsynced)
            self._unsynced = None


def _copy(path: Path) -> bytes:
    with sqlite3.connect(path) as other:
        return other.serialize()


class SimStore(Store):
    """The real one; ``watch`` learns what became durable."""

    def __init__(self, disk: Disk, watch: Watch) -> None:
        self.disk, self.watch = disk, watch
        super().__init__(disk.path)
        self.synced = self._db.execute("PRAGMA synchronous").fetchone()[0] >= SYNCED
        self._db.execute("PRAGMA synchronous=OFF")

    def write(self, commands: Iterable[Command], now: float, extra: Sequence[tuple[str, Sequence[Any]]] = ()) -> None:
        commands = list(commands)
        super().write(commands, now, extra)
        self.watch.written(commands)
        self.watch.world.look(self.watch.world)

    def _commit(self) -> None:
        self.disk.before_commit(self.synced)
        super()._commit()
