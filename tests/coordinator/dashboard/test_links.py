"""How fast the lines between peers were, over time."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator

import pytest

from potluck.coordinator.dashboard.links import DAY, LinkRecorder, read_link, read_links
from potluck.coordinator.store import SCHEMA
from potluck.protocol import control_pb2 as pb

PEERS = {"a": 0, "b": 0, "c": 0}
HOUR = 3600.0


class Records:
    def __init__(self) -> None:
        self.recorder, self.db = LinkRecorder(), sqlite3.connect(":memory:")
        self.db.executescript(SCHEMA)

    def say(self, now: float, rate: float = 1e6, rtt: float = 0.05, *, to: str = "b", path: str = "direct") -> None:
        link = pb.Link(peer=to, path=path, rtt_seconds=rtt, bytes_per_second=rate)
        news = self.recorder.heard([("a", pb.Heartbeat(links=[link]))], PEERS, now)
        for sql, values in news.statements:
            self.db.execute(sql, values)
        self.recorder.take(news)

    def count(self, span: int) -> int:
        return int(self.db.execute("SELECT COUNT(*) FROM links WHERE span=?", (span,)).fetchone()[0])


@pytest.fixture
def records() -> Iterator[Records]:
    found = Records()
    yield found
    found.db.close()


def test_a_minute_is_written_when_it_is_over(records: Records) -> None:
    records.say(0.0, rate=1e6)
    records.say(30.0, rate=3e6)
    assert records.count(60) == 0
    records.say(61.0, rate=5e6)
    (row,) = read_links(records.db, 70.0)
    assert (row.sender, row.receiver, row.path, row.rtt_seconds) == ("a", "b", "direct", pytest.approx(0.05))
    assert row.bytes_per_second == pytest.approx(2e6) and row.time == 60.0
    assert row.share == pytest.approx(2 / 3) and row.cap is None
    assert read_links(records.db, 70.0, {"a": 4e6})[0].share == pytest.approx(0.5)
    assert read_links(records.db, 10 * HOUR) == []


def test_longer_spans_are_means_of_their_minutes(records: Records) -> None:
    for minute in range(21):
        records.say(60.0 * minute, rate=1e6 if minute < 10 else 3e6)
    assert (records.count(60), records.count(600), records.count(7200)) == (20, 2, 1)
    rates = dict(records.db.execute("SELECT time, rate FROM links WHERE span=600"))
    assert rates == {0: pytest.approx(1e6), 600: pytest.approx(3e6)}
    assert records.db.execute("SELECT rate FROM links WHERE span=7200").fetchone()[0] == pytest.approx(2e6)


def test_what_is_old_is_in_longer_spans_and_then_gone(records: Records) -> None:
    for at in range(0, int(5 * DAY), 60):
        records.say(float(at), to="b" if at < DAY else "c")
    assert records.count(60) <= DAY / 4 / 60 + 7200 / 60 and records.count(600) <= 3 * 144 + 12 + 2
    history = read_link(records.db, "a", "c")
    times = [p.time for p in history]
    assert times == sorted(set(times)) and times[0] <= DAY + 7200 and times[-1] >= 5 * DAY - 180
    assert read_link(records.db, "a", "b") and read_link(records.db, "b", "a") == []
    records.say(70 * DAY, to="c")
    records.say(70 * DAY + 61, to="c")
    assert [(r.sender, r.receiver) for r in read_links(records.db, 70 * DAY + 70)] == [("a", "c")]
    assert records.db.execute("SELECT COUNT(*) FROM ways").fetchone()[0] == 1


def test_who_says_nothing_more_is_written_too(records: Records) -> None:
    records.say(0.0)
    records.say(200.0, to="c")
    assert [(r.sender, r.receiver) for r in read_links(records.db, 90.0)] == [("a", "b")]
    assert len(records.recorder._now.means) == 1


def test_what_makes_no_sense_is_unknown(records: Records) -> None:
    for at, rate, rtt in ((0.0, math.nan, -1.0), (20.0, math.inf, math.nan), (61.0, 0.0, 0.0), (122.0, 1e300, 1e300)):
        records.say(at, rate, rtt, path="by pigeon")
    assert read_links(records.db, 130.0) == []
    records.say(130.0, rate=-5.0, rtt=0.1, path="by pigeon")
    records.say(190.0)
    (row,) = read_links(records.db, 190.0)
    assert (row.bytes_per_second, row.rtt_seconds, row.path, row.share) == (None, pytest.approx(0.1), None, None)
    records.say(195.0, to="x")  # nobody
    assert len(records.recorder._now.means) == 1
