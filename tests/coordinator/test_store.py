"""The run on disk: what was written is there, all of it or nothing, whatever kills the process."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.coordinator import events as ev
from potluck.coordinator.state import Commit, Journal, Lease, Mark, Point, Remember, ReturnLeases, Uncommit
from potluck.coordinator.store import Store
from potluck.protocol.errors import StateError

STOP = Mark(kind="step", generation=3, step=9, sample=54, holders=(("a", "b"), ("c",)))


def a_lease(at: int, **changes: Any) -> Lease:
    fields = {"generation": 1, "step": at, "peer": "a", "first": at * 6, "count": 6, "expires": 99.0}
    return Lease(**{**fields, **changes})


def a_commit(at: int, number: int, **changes: Any) -> Commit:
    mark = Mark(kind="round", generation=1, step=at, sample=at * 6, digests=(bytes([at]), b"\xff"))
    return Commit(
        **{
            "mark": mark,
            "round": number,
            "replicas": 2,
            "samples": 6,
            "nbytes": 5,
            "seconds": 1.0,
            "degraded": False,
            **changes,
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "run.sqlite")
    yield store
    store.close()


def ledger(store: Store) -> list[tuple[Any, ...]]:
    return store.rows("SELECT first, count, state, round, reason FROM ledger ORDER BY id")


def test_marks_and_settings_come_back_as_they_were(tmp_path: Path) -> None:
    first = Store(tmp_path / "deep" / "run.sqlite")
    commits = [a_commit(at, i + 1) for i, at in enumerate((2, 4, 7))]
    first.write([*commits, Remember(generation=5, stop=STOP)], 10.0)
    first.set_meta(config={"name": "x", "list": [1, None, "é"]}, port=0)
    first.close()
    again = Store(tmp_path / "deep" / "run.sqlite")
    assert again.marks() == [c.mark for c in reversed(commits)]
    assert again.marks(limit=1) == [commits[-1].mark]
    assert again.stop_mark() == STOP and again.meta("generation") == 5
    assert again.meta("config") == {"name": "x", "list": [1, None, "é"]} and again.meta("port", 7) == 0
    assert again.meta("nothing", 3) == 3
    again.write([Remember(generation=6, stop=None)], 11.0)
    assert again.stop_mark() is None
    again.close()


def ledger_counts(store: Store) -> dict[str, int]:
    return dict(store.rows("SELECT state, SUM(count) FROM ledger GROUP BY state"))


def test_the_ledger_follows_a_sample_to_its_end(store: Store) -> None:
    store.write([a_lease(0), a_lease(1)], 1.0)
    store.write([a_commit(1, 1)], 2.0)
    store.write([ReturnLeases(reason="a worker is lost"), a_lease(1, generation=2)], 3.0)
    assert ledger(store) == [
        (0, 6, "committed", 1, None),
        (6, 6, "returned", None, "a worker is lost"),
        (6, 6, "leased", None, None),
    ]
    store.write([a_commit(2, 2)], 4.0)
    assert ledger_counts(store) == {"committed": 12, "returned": 6}
    store.write([Uncommit(step=1)], 5.0)
    assert ledger_counts(store) == {"committed": 6, "returned": 12} and [m.step for m in store.marks()] == [1]


def test_events_and_points_are_kept(store: Store) -> None:
    store.write([Journal(event=ev.HeldOut(step=3, loss=1.5)), Point(step=3, tokens_samples=18, heldout=1.5)], 1.0)
    assert store.rows("SELECT kind, text FROM events") == [("HeldOut", "Held-out loss 1.5000 at step 3")]
    assert store.rows("SELECT step, samples, train, heldout FROM points") == [(3, 18, None, 1.5)]


@pytest.mark.parametrize(
    "bad",
    [
        a_lease(2, peer=None),
        a_lease(2, count=2**63),
        a_commit(2, 2, seconds=float("nan")),
    ],
    ids=["missing value", "too large", "not a number"],
)
def test_an_error_in_a_batch_leaves_nothing_of_it(store: Store, bad: Any) -> None:
    store.write([a_lease(0)], 1.0)
    with pytest.raises(StateError):
        store.write([a_lease(1), a_commit(1, 1), bad], 2.0)
    with pytest.raises(StateError):
        store.write([a_lease(1)], 2.0, [("INSERT INTO nowhere VALUES (?)", [1])])
    assert [row[:3] for row in ledger(store)] == [(0, 6, "leased")] and store.marks() == []
    store.write([a_lease(1)], 3.0)
    assert len(ledger(store)) == 2


def test_a_full_disk_is_said_with_a_way_out_and_spoils_nothing(store: Store) -> None:
    store.write([a_lease(0)], 1.0)
    pages = store.rows("PRAGMA page_count")[0][0]
    store.rows(f"PRAGMA max_page_count = {pages}")
    store.write([a_lease(1)], 1.0)
    with pytest.raises(StateError, match="the disk is full") as caught:
        store.write([a_lease(at, peer="p" * 500) for at in range(2, 1000)], 2.0)
    assert len(ledger(store)) == 2
    assert "Free some space" in caught.value.hint
    with pytest.raises(StateError, match="the disk is full"):
        store.set_meta(big="x" * 10_000)
    store.rows("PRAGMA max_page_count = 1000000")
    store.set_meta(small=1)
    store.write([a_lease(2)], 3.0)
    assert len(ledger(store)) == 3
    assert store.rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("what", ["a file is in the way", "it is a folder", "it is something else"])
def test_a_place_that_cannot_be_written_is_a_state_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    if what == "a file is in the way":
        path.write_text("not a folder")
        path = path / "run.sqlite"
    elif what == "it is a folder":
        path.mkdir()
    else:
        path.write_bytes(b"this is no database " * 100)
    with pytest.raises(StateError) as caught:
        Store(path)
    assert str(path) in str(caught.value) and caught.value.hint


def test_a_folder_without_rights_is_a_state_error(tmp_path: Path) -> None:
    """As a process that may write everywhere sees it: the database itself refuses."""
    path = tmp_path / "run.sqlite"
    Store(path).close()
    store = Store(path)
    store.rows("PRAGMA query_only = 1")
    with pytest.raises(StateError, match="readonly"):
        store.write([a_lease(0)], 1.0)
    with pytest.raises(StateError, match="readonly"):
        store.set_meta(port=1)
    store.close()


WRITER = """
import sys
from pathlib import Path
from potluck.coordinator.state import Commit, Lease, Mark
from potluck.coordinator.store import Store

store = Store(Path(sys.argv[1]))
marks = store.marks()
at = marks[0].step if marks else 0
while True:
    lease = Lease(generation=1, step=at, peer="a", first=at * 6, count=6, expires=0.0)
    mark = Mark(kind="round", generation=1, step=at + 1, sample=at * 6 + 6, digests=(b"x",))
    store.write([lease, Commit(mark=mark, round=at, replicas=1, samples=6, nbytes=0, seconds=0.0, degraded=False)], 0.0)
    at += 1
    sys.stdout.write(f"{at}\\n")
    sys.stdout.flush()
"""


def test_a_process_killed_while_it_commits_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    acknowledged = 0
    for kill in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(3 + 7 * kill):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = int(([str(acknowledged)] + writer.stdout.read().splitlines(keepends=False))[-1])
        store = Store(path)
        done = store.marks()[0].step
        assert acknowledged <= done <= acknowledged + 1
        assert ledger(store) == [(at * 6, 6, "committed", at, None) for at in range(done)]
        store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
