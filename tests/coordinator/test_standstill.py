"""A standstill's own rules: what may pass, when to try again, whose time counts, what is left of a failed upload."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from failing_disk import FailingDisk
from scripted_run import committed

from potluck.coordinator import events as ev
from potluck.coordinator.doors import Doors
from potluck.coordinator.run import step
from potluck.coordinator.standstill import NOTES, Standstill
from potluck.coordinator.state import Journal, Lease, Tick, Unpublished
from potluck.coordinator.store import PASSING, PASSING_CODES, Store, passing
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import StateError

FULL = StateError("the disk is full", code="disk-full")
LEASE = Lease(generation=1, step=0, peer="a", first=0, count=6, expires=9.0)


def test_time_that_stood_still_counts_for_nobody() -> None:
    run = committed("a", "b")
    hour = 3600.0
    commands = step(run.rules, run.state, Tick(), run.now + hour)[1]
    assert len(commands) > 3, "without the shift everybody is silent and every lease has expired"
    state, event = Standstill(since=run.now, error=FULL).resumed(run.state, run.now + hour)
    assert event.text == "The disk was full for 60 min; nothing is lost, the run goes on"
    run.state, run.now = state, run.now + hour
    assert run.do(Tick()) == []
    silent = run.do(Tick(), later=run.rules.silence_seconds + 1.0)  # from now on it runs as always
    assert next(c.event.kind for c in silent if isinstance(c, Journal)) == "PeerGone"


def test_the_time_between_two_tries_is_bounded() -> None:
    standing, pauses = Standstill(since=0.0, error=FULL), []
    for _ in range(2000):
        pauses.append(standing.pause_seconds)
        standing = standing.again(FULL)
    assert pauses[:5] == [0.5, 1.0, 2.0, 4.0, 5.0] and pauses[-1] == 5.0


def test_every_passing_error_has_its_words() -> None:
    assert set(NOTES) == PASSING_CODES
    for code in PASSING_CODES:
        assert ev.StoodStill(seconds=12.3, cause=code).text.endswith(" for 12 s; nothing is lost, the run goes on")
    assert ev.StoodStill(seconds=12.3, cause="disk-full").text.startswith("The disk was full for 12 s")


PASS = [*PASSING, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_BUSY_RECOVERY]
FINAL = [
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR),
    *(sqlite3.SQLITE_READONLY_DBMOVED, sqlite3.SQLITE_IOERR_CORRUPTFS, sqlite3.SQLITE_CORRUPT_INDEX),
]


@pytest.mark.parametrize(("codes", "may_pass"), [(PASS, True), (FINAL, False)], ids=["passing", "final"])
def test_what_may_pass_is_known_by_its_code(codes: list[int], may_pass: bool, tmp_path: Path) -> None:
    disk = FailingDisk(tmp_path / "run.sqlite")
    for code in codes:
        disk.refuse = lambda number, tries, code=code: code
        with pytest.raises(StateError) as caught:
            disk.write([LEASE], 1.0)
        assert passing(caught.value) is may_pass and caught.value.hint, code
    del disk.refuse
    assert disk.rows("SELECT * FROM ledger") == []
    disk.write([LEASE], 1.0)
    disk.close()


def test_a_file_that_another_program_holds_may_pass(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "run.sqlite"), sqlite3.connect(tmp_path / "run.sqlite", isolation_level=None)
    store.rows("PRAGMA busy_timeout = 10")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateError) as caught:
        store.write([LEASE], 1.0)
    assert caught.value.code == "busy"
    other.execute("ROLLBACK")
    other.close()
    store.write([LEASE], 1.0)
    store.close()


@pytest.mark.parametrize("which", ["run.sqlite", "run.sqlite-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_what_goes_into_a_deleted_file_is_not_acknowledged(which: str, replaced: bool, tmp_path: Path) -> None:
    """SQLite itself notices nothing."""
    store = Store(tmp_path / "run.sqlite")
    store.write([LEASE], 1.0)
    data = (tmp_path / which).read_bytes()
    (tmp_path / which).rename(tmp_path / "elsewhere")
    if replaced:
        (tmp_path / which).write_bytes(data)
    with pytest.raises(StateError, match="deleted or replaced") as caught:
        store.write([LEASE], 1.0)
    assert not passing(caught.value) and "Put it back" in caught.value.hint
    store.close()


@pytest.mark.parametrize("phase", ["training", "finishing"])
def test_a_model_that_does_not_fit_does_not_hold_up_the_training(phase: Any) -> None:
    """A worker asked to publish does nothing else: only the last model is worth that."""
    run, last = committed("a", "b"), phase == "finishing"
    run.state = replace(run.state, phase=phase, publish=4)
    [command] = run.do(Unpublished(step=4, why="full"))
    assert isinstance(command, Journal) and command.event == ev.PublishFailed(step=4, why="full", again=last)
    assert command.event.text.startswith("Model of step 4 is not published (full); ")
    assert run.state.publish == (4 if last else None)
    assert len(run.do(Unpublished(step=4, why="full"))) == last  # not asked for any more


class FullDisk:
    """A publisher whose disk takes ``nbytes`` in all."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.nbytes, self.done = folder, 10, 0
        self.trouble: tuple[int, str] | None = None
        real = Path.open

        def open_(path: Path, *arguments: Any) -> Any:
            file = real(path, *arguments)
            write = file.write

            def limited(data: bytes) -> int:
                if file.tell() + len(data) > self.nbytes:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                return write(data)

            return Limited(file, limited)

        monkeypatch.setattr(Path, "open", open_)

    def stage_nbytes(self, stage: int) -> int:
        return 1000

    def begin(self, step: int, generation: int) -> None:
        pass

    def drop(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def part(self, step: int, stage: int) -> Path:
        return self.folder / f"{stage}.part"

    async def arrived(self, step: int, stage: int) -> None:
        self.part(step, stage).rename(self.folder / f"{stage}")
        self.trouble, self.done = None, self.done + 1


class Limited:
    def __init__(self, file: Any, write: Any) -> None:
        self.file, self.write = file, write
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


async def test_an_upload_that_the_disk_refuses_leaves_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = committed("a", "b")
    put: list[Any] = []
    hub = SimpleNamespace(state=run.state, put=put.append)
    publisher = FullDisk(tmp_path, monkeypatch)
    doors: Any = Doors.__new__(Doors)
    doors.hub, doors.publisher = hub, publisher
    data = b"x" * 40
    first = pb.UploadPiece(step=4, stage=0, nbytes=40, sha256=hashlib.sha256(data).digest(), data=data[:8])

    async def pieces() -> AsyncIterator[pb.UploadPiece]:
        yield pb.UploadPiece(data=data[8:])

    for _ in range(3):
        with pytest.raises(StateError, match="the coordinator's disk is full"):
            await doors.receive(first, pieces(), run.plan)
        assert os.listdir(tmp_path) == []
    assert put == [Unpublished(step=4, why="the coordinator's disk is full")]
    publisher.nbytes = 40
    await doors.receive(first, pieces(), run.plan)
    assert publisher.done == 1 and os.listdir(tmp_path) == ["0"]
