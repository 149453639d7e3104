"""Totals: what counts, what is taken back, and what is left of old rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from potluck.coordinator.dashboard.replay import book_at, remembered
from potluck.coordinator.dashboard.rollups import (
    DAY,
    MOST_NBYTES,
    SLOT_SECONDS,
    SPANS,
    THINNED,
    Book,
    Thinning,
    Totals,
    kept,
    traffic_point,
)
from potluck.coordinator.state import Commit, Mark, Part
from potluck.coordinator.store import Store


def part(peer: str, samples: int, work: float) -> Part:
    return Part(
        peer=peer, stage=ord(peer) - ord("a"), samples=samples, work=work, nbytes=10, seconds=0.5, digest=b"\x01" * 32
    )


def a_commit(number: int, *parts: Part) -> Commit:
    mark = Mark(kind="round", generation=1, step=number * 10, sample=number * 40, digests=(b"\x01" * 32,))
    return Commit(
        mark=mark, round=number, replicas=len(parts), samples=40, nbytes=9, seconds=1.0, degraded=False, parts=parts
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "run.sqlite")) as store:
        yield store


def test_a_step_counts_once_and_nonsense_is_bounded() -> None:
    book = Book()
    book.stepped("a", 5.0, (1, 0), 8, 0.25, 2.0, 1.0)
    book.stepped("a", 6.0, (1, 0), 8, 0.25, 2.0, 1.0)  # told again after a restart
    assert book.peers["a"] == Totals(
        time=5.0,
        samples=8,
        computed=2.0,
        compute_seconds=2.0,
        wait_seconds=1.0,
        pace=3.0,
        per_step=8.0,
        generation=1,
        step=0,
    )
    book.stepped("a", 7.0, (1, 1), 8, 0.25, float("nan"), float("inf"))
    assert (book.peers["a"].compute_seconds, book.peers["a"].samples) == (2.0, 16)
    assert book.peers["a"].pace == pytest.approx(2.4) and book.peers["a"].per_step == 8.0
    for _ in range(3):
        book.moved("a", 8.0, "weights", "out", MOST_NBYTES, MOST_NBYTES)
    assert book.peers["a"].sent == MOST_NBYTES and book.traffic == {"weights": (MOST_NBYTES, MOST_NBYTES)}
    book.moved("a", 9.0, "weights", "in", 5, 5)  # the sender has counted it
    book.moved("a", 9.0, "data", "in", 7, 7)  # the coordinator has not
    assert book.peers["a"].received == 12 and book.traffic["data"] == (7, 7) and "control" not in book.traffic


def test_rounds_that_are_lost_give_back_what_they_gave() -> None:
    book = Book()
    book.follow([a_commit(1, part("a", 40, 30.1), part("b", 40, 9.9))], 1.0)
    once = dict(book.peers)
    book.follow([a_commit(2, part("a", 40, 30.2)), a_commit(3, part("a", 40, 0.7), part("c", 1, 1.0))], 2.0)
    assert book.peers["a"].rounds == 3 and book.work == pytest.approx(71.9)
    book.back(10, 3.0)
    assert {p: (t.work, t.committed, t.rounds) for p, t in book.peers.items() if t.rounds} == {
        p: (t.work, t.committed, t.rounds) for p, t in once.items()
    }
    book.back(0, 4.0)
    assert book.work == 0.0 and all(t.rounds == 0 for t in book.peers.values())


def test_a_change_leaves_the_book_it_came_from_alone() -> None:
    book = Book()
    book.follow([a_commit(1, part("a", 40, 30.0))], 1.0)
    other = book.copy()
    other.follow([a_commit(2, part("a", 40, 30.0))], 2.0)
    other.back(0, 3.0)
    other.moved("a", 3.0, "weights", "out", 5, 5)
    assert book.peers["a"].rounds == 1 and book.traffic == {}
    book.back(0, 3.0)
    assert book.peers["a"].rounds == 0


def test_after_a_restart_rounds_can_still_be_taken_back(store: Store) -> None:
    book, before = Book(), Book()
    for number in (1, 2, 3):
        command = a_commit(number, part("a", 40, 30.25), part("b", 40, 9.75))
        book.follow([command], float(number))
        store.write([command], float(number), [*kept(before, book), traffic_point(book, command, float(number))])
        before = book.copy()
    again = book_at(store.rows, None)
    assert again.peers == book.peers
    remembered(store.rows, again)
    again.back(10, 9.0)
    assert {p: (t.work, t.committed, t.rounds) for p, t in again.peers.items()} == {
        "a": (30.25, 40, 1),
        "b": (9.75, 40, 1),
    }


def test_old_rows_become_fewer_and_their_newest_stay(store: Store) -> None:
    """Two peers, a row each minute for 16 days: totals at the end of every span are as they were."""
    first, days = SLOT_SECONDS * 7200 * 1000, 16
    count = days * DAY // SLOT_SECONDS
    store.rows("INSERT INTO peer_keys VALUES (1, 'a'), (2, 'b')")
    rows = [
        (first // SLOT_SECONDS + i, peer, first + i * SLOT_SECONDS + 30.0 + peer, i)
        for i in range(count)
        for peer in (1, 2)
    ]
    insert = "INSERT INTO peer_series VALUES (?,?,?,?,0,0,0,0,0,NULL,NULL,0,0,0,0,0,0)"
    point = "INSERT INTO traffic_points VALUES (?,1,1,'[]',0)"
    store.write([], 0.0, [(insert, list(row)) for row in rows])
    store.write([], 0.0, [(point, [first + i * SLOT_SECONDS + 30.0]) for i in range(count)])
    now = first + days * DAY
    whole = [book_at(store.rows, first + day * DAY - 1.0).peers for day in range(1, days + 1)]
    thinning, turns = Thinning(), 0
    while True:
        done, statements = thinning.due(now, first + 31.0)
        if not statements:
            break
        store.write([], now, statements)
        thinning, turns = Thinning(done), turns + 1
    assert turns > 10  # a few at once, however long nobody looked
    assert Thinning(store.meta(THINNED)).due(now, first)[1] == []
    fine = DAY // SLOT_SECONDS
    coarse = (13 * DAY) // 600 + (2 * DAY) // 7200
    assert [n for (n,) in store.rows("SELECT COUNT(*) FROM peer_series GROUP BY peer")] == [fine + coarse] * 2
    assert store.rows("SELECT COUNT(*) FROM traffic_points") == [(fine + coarse,)]
    assert [book_at(store.rows, first + day * DAY - 1.0).peers for day in range(1, days + 1)] == whole
    assert SPANS == ((DAY, 600), (14 * DAY, 7200))


def test_goodput_leaves_out_the_steps_whose_round_is_not_over() -> None:
    book = Book()
    for step in range(12):
        for peer, work in (("a", 0.75), ("b", 0.25)):
            book.stepped(peer, step + 1.0, (1, step), 4, work, 1.0, 0.0)
    assert (book.work, book.decided) == (0.0, 0.0)
    book.follow([a_commit(1, part("a", 40, 30.0), part("b", 40, 10.0))], 13.0)
    assert (book.work, book.decided) == (40.0, 40.0)  # the two steps after it are awaited
    again = Book()
    for peer, totals in book.peers.items():  # a restart: which steps they are is not known any more
        again.peer(peer, totals)
    assert again.decided == book.decided
    again.follow([a_commit(2, part("a", 8, 6.0), part("b", 8, 2.0))], 14.0)
    assert (again.work, again.decided) == (48.0, 48.0)
    heard = book.peers["b"].time
    book.back(10, 14.0)  # nobody has what was done since
    assert (book.work, book.decided) == (40.0, 40.0)
    assert book.peers["b"].time == heard
    for step in range(10, 20):
        book.stepped("a", step + 6.0, (2, step), 4, 1.0, 1.0, 0.0)
    book.follow([a_commit(2, part("a", 40, 40.0))], 30.0)
    assert (book.work, book.decided) == (80.0, 88.0)
