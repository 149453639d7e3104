"""A run's file as the dashboard asks it: every answer of a synthetic run, files of older versions, damage."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from scripted_hub import CONFIG

from benchmarks.dashboard_run import write_run
from potluck.coordinator import events as ev
from potluck.coordinator.card import gathered
from potluck.coordinator.dashboard.archive import Archive
from potluck.coordinator.dashboard.shapes import State
from potluck.coordinator.dashboard.source import Source
from potluck.coordinator.state import Commit, Journal, Mark, Part, Point
from potluck.coordinator.store import Store
from potluck.protocol.errors import StateError

PEERS, STEPS = 6, 400
BEFORE = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT, generation INTEGER NOT NULL, step INTEGER NOT NULL, peer TEXT NOT NULL,
    first INTEGER NOT NULL, count INTEGER NOT NULL, state TEXT NOT NULL, round INTEGER, reason TEXT,
    expires REAL NOT NULL, changed REAL NOT NULL);
CREATE INDEX ledger_by_state ON ledger (state, step);
CREATE TABLE rounds (
    step INTEGER PRIMARY KEY, round INTEGER NOT NULL, generation INTEGER NOT NULL, sample INTEGER NOT NULL,
    digests TEXT NOT NULL, replicas INTEGER NOT NULL, samples INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    seconds REAL NOT NULL, committed REAL NOT NULL, degraded INTEGER NOT NULL);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
    text TEXT NOT NULL);
CREATE TABLE points (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, samples INTEGER NOT NULL, time REAL NOT NULL,
    train REAL, heldout REAL);
CREATE TABLE peers (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, device TEXT NOT NULL, first_seen REAL NOT NULL,
    last_seen REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE traffic (
    peer TEXT NOT NULL, session TEXT NOT NULL, purpose TEXT NOT NULL, direction TEXT NOT NULL,
    nbytes INTEGER NOT NULL, dense_nbytes INTEGER NOT NULL,
    PRIMARY KEY (peer, session, purpose, direction)) WITHOUT ROWID;
INSERT INTO events (time, kind, data, text) VALUES
    (10.0, 'RunOpened', '{"type":"RunOpened","name":"old","step":0,"generation":0}', 'Run old opened'),
    (11.0, 'PeerJoined', '{"type":"PeerJoined","peer":"aa","name":"anna","device":"cpu"}', 'anna joined (cpu)'),
    (11.5, 'PeerJoined', '{"type":"PeerJoined","peer":"bb","name":"ben","device":"cpu"}', 'ben joined (cpu)'),
    (12.0, 'PlanIssued', '{"type":"PlanIssued","generation":1,"step":0,"origin":"init","stages":[["anna"],["ben"]]}',
        'Plan 1 from step 0: stage 0: anna; stage 1: ben'),
    (12.5, 'TrainingStarted', '{"type":"TrainingStarted","generation":1,"step":0}', 'Training starts'),
    (14.0, 'RoundCommitted', '{"type":"RoundCommitted","round":1,"step":2,"replicas":2,"samples":4,"nbytes":7,
        "seconds":0.5}', 'Round 1 committed at step 2: 4 samples, all replicas agree'),
    (15.0, 'Beamed', '{"type":"Beamed","peer":"aa","where":"up"}', 'anna is beamed up'),
    (16.0, 'Faulted', '{"type":"Faulted","peer":"aa","name":"anna","what":"x"}', 'anna reports: no 10.9.8.7:55 there');
INSERT INTO points (step, samples, time, train, heldout) VALUES (1, 2, 13.0, 3.0, NULL), (2, 4, 13.5, 2.0, NULL);
INSERT INTO rounds VALUES (2, 1, 1, 4, '["00", "01"]', 2, 4, 7, 0.5, 14.0, 0);
INSERT INTO traffic VALUES ('aa', '00', 'weights', 'out', 70, 700);
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.sqlite"
    write_run(path, PEERS, STEPS)
    return path


@pytest.fixture(scope="module")
def archive(path: Path) -> Archive:
    return Archive(path)


@pytest.fixture(scope="module")
def last(archive: Archive) -> State:
    return archive.state()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """As the version before this one has left it."""
    path = tmp_path / "run.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(BEFORE)
        config = msgspec.json.encode(CONFIG).decode()
        db.executemany("INSERT INTO meta VALUES (?,?)", [("config", config), ("run_id", '"0123"')])
        db.commit()
    return path


def test_it_is_a_source(archive: Archive) -> None:
    source: Source = archive
    assert source.version > 1


def test_the_end_of_a_run(archive: Archive, last: State) -> None:
    assert (last.step, last.steps, last.phase, last.at) == (STEPS, STEPS, "finished", None)
    assert "synthetic" in last.run.name and last.run.stages == 3 and len(last.peers) == PEERS
    assert last.goodput.committed == pytest.approx(last.tokens / 128)
    assert last.goodput.computed > last.goodput.committed  # steps were done twice
    assert last.bytes_per_token and last.dense_bytes_per_token and last.dense_bytes_per_token > last.bytes_per_token
    assert last.evaluations and len(archive.evaluations()) == len({row["step"] for row in archive.evaluations()})
    assert archive.version == last.version


def test_a_moment_in_the_middle(archive: Archive, last: State) -> None:
    round_ = archive.rounds(None, 100)[8]
    then = archive.state_at(round_.committed)
    assert (then.at, then.step, then.phase) == (round_.committed, round_.step, "training")
    assert then.rounds[0].round == round_.round and all(e.time <= round_.committed for e in then.events)
    assert then.eta and then.eta_seconds and 0 < then.eta.low <= then.eta_seconds <= then.eta.high
    assert then.train_loss and last.train_loss and then.train_loss > last.train_loss
    assert archive.state_at(0.0).step == 0 and archive.state_at(0.0).peers == ()
    assert archive.state_at(1e12).step == STEPS


def test_a_curve_keeps_its_extremes_and_its_held_out_points(archive: Archive) -> None:
    whole = archive.points(0)
    assert archive.curve(10_000, None) == whole
    few = archive.curve(100, None)
    train = [p.train for p in whole if p.train is not None]
    lows, highs = ([getattr(p, name) for p in few if p.train is not None] for name in ("low", "high"))
    assert len(few) <= 100 and (min(lows), max(highs)) == (min(train), max(train))
    assert [p for p in few if p.heldout is not None] == [p for p in whole if p.heldout is not None]
    assert few[-1].step == STEPS and [p.id for p in few] == sorted(p.id for p in few)
    assert len(archive.curve(10, None)) <= 10
    middle = whole[len(whole) // 2].time
    assert archive.curve(50, middle)[-1].time <= middle < archive.curve(50, None)[-1].time
    assert archive.curve(50, 0.0) == []


def test_events_come_in_pages(archive: Archive) -> None:
    everything = archive.events(0, None, 10_000, None)
    assert [row.id for row in everything] == sorted({row.id for row in everything})
    assert not any(row.kind == "PhaseChanged" for row in everything)
    first = archive.events(0, None, 5, None)
    assert first == everything[:5] and archive.events(first[-1].id, None, 5, None) == everything[5:10]
    rounds = archive.events(0, None, 10_000, "RoundCommitted")
    assert rounds and {row.kind for row in rounds} == {"RoundCommitted"}
    assert all(row.time <= rounds[3].time for row in archive.events(0, rounds[3].time, 10_000, None))
    assert archive.news(everything[-3].id) == everything[-2:]
    lost = next(row for row in everything if row.kind == "PeerGone")
    assert lost.peer and 80 < lost.step < 90


def test_incidents_say_what_happened(archive: Archive) -> None:
    found = archive.incidents(None)
    assert {row.group for row in found} == {"lost", "joined", "back", "divided"}
    lost = next(row for row in found if row.group == "lost")
    assert archive.incidents(lost.time) == [lost]
    assert [row.step for row in found] != [0] * len(found)


def test_a_round_says_who_brought_what(archive: Archive) -> None:
    newest, *older = archive.rounds(None, 3)
    assert archive.rounds(newest.step, 2) == older and archive.rounds(1, 5) == []
    page = archive.round(older[0].step)
    assert page and page.row == older[0] and (page.before, page.after) == (older[1].step, newest.step)
    assert len(page.parts) == page.row.replicas and sum(part.nbytes for part in page.parts) == page.row.nbytes
    for stage in range(3):
        mine = [part for part in page.parts if part.stage == stage]
        assert sum(part.samples for part in mine) == page.row.samples and len({part.digest for part in mine}) == 1
        assert all(len(part.digest) == 16 and part.name for part in mine)
    assert archive.round(older[0].step + 1) is None


def test_a_peer_has_a_page(archive: Archive, last: State) -> None:
    page = archive.peer(last.peers[0].id, None)
    assert page and page.row == last.peers[0] and page.rounds and page.rank and page.caps.memory_gb
    assert sum(point.samples for point in page.history) == page.row.samples
    assert sum(point.sent for point in page.history) == page.row.sent
    assert all(0 < point.seconds <= 120.0 for point in page.history)
    dead = next(incident for incident in archive.incidents(None) if incident.group == "lost")
    assert dead.peer
    then = archive.peer(dead.peer, dead.time)
    assert then and then.row.state == "gone" and then.layers is None and then.events[1].kind == "PeerGone"
    now = archive.peer(dead.peer, None)
    assert now and now.row.state == "training" and now.first_seen == then.first_seen < dead.time
    assert archive.peer("nobody", None) is None and archive.peer(dead.peer, 0.0) is None


def test_the_leaderboard_adds_up(archive: Archive, last: State) -> None:
    rows = archive.leaderboard()
    assert [row.rank for row in rows] == sorted(row.rank for row in rows) and len(rows) == PEERS
    assert sum(row.work for row in rows) == pytest.approx(last.goodput.committed)
    assert sum(row.tokens for row in rows) == pytest.approx(last.tokens)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.peer: row.work for row in rows} == {peer.id: peer.work for peer in last.peers}


def test_traffic_grows(archive: Archive) -> None:
    points = archive.traffic(5, None)
    totals = [sum(row.nbytes for row in point.traffic) for point in points]
    assert 2 <= len(points) <= 5 and totals == sorted(totals) and points[-1].step == STEPS
    assert [p.time for p in points] == sorted(p.time for p in points)
    assert archive.traffic(100, points[0].time)[-1].time == points[0].time


def test_many_threads_may_ask(archive: Archive, path: Path) -> None:
    fresh, found = Archive(path), list[object]()

    def ask(number: int) -> None:
        moment = archive.rounds(None, 100)[number].committed
        found.append(fresh.state_at(moment) == archive.state_at(moment))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_run_of_an_older_version_is_read(old: Path) -> None:
    """As it lies there: nothing is added to it."""
    before = old.read_bytes()
    archive = Archive(old)
    state = archive.state()
    assert (state.step, state.round, state.tokens, state.phase) == (2, 1, 4 * 8, "training")
    assert [stage.replicas for stage in state.stages] == [("aa",), ("bb",)]
    assert state.traffic[0].nbytes == 70 and state.goodput.committed == 0.0
    assert [row.step for row in archive.events(0, None, 10, None)] == [0, 0, 0, 0, 0, 2, 2, 2]
    assert archive.events(0, None, 10, "Beamed")[0].peer == "aa"
    assert "10.9.8.7" not in archive.events(0, None, 10, "Faulted")[0].text
    page = archive.round(2)
    assert page and page.parts == ()
    seen = archive.peer("aa", None)
    assert seen and seen.history == () and [row.kind for row in seen.events] == ["Faulted", "Beamed", "PeerJoined"]
    assert (archive.links(None), archive.link("aa", "bb"), archive.steps(9, "newest")) == ([], [], [])
    assert (archive.leaderboard(), archive.traffic(9, None), archive.step(1)) == ([], [], None)
    assert archive.state_at(12.2).phase == "preparing"
    assert old.read_bytes() == before


def test_a_run_of_an_older_version_goes_on(old: Path) -> None:
    with closing(Store(old)) as store:
        assert dict(store.rows("SELECT kind, peer FROM events WHERE peer IS NOT NULL")).keys() == {
            "PeerJoined",
            "Beamed",
            "Faulted",
        }
        assert store.rows("SELECT id, name, first_seen FROM peers") == [("aa", "anna", 11.0), ("bb", "ben", 11.5)]
        part = Part(peer="aa", stage=0, samples=4, work=2.0, nbytes=3, seconds=0.1, digest=b"\x07" * 32)
        mark = Mark(kind="round", generation=1, step=4, sample=8, digests=(b"\x07" * 32,) * 2)
        told = {"round": 2, "replicas": 2, "samples": 4, "nbytes": 3, "seconds": 0.1, "degraded": False}
        commit = Commit(mark=mark, parts=(part,), **told)  # type: ignore[arg-type]
        done = Journal(event=ev.RoundCommitted(step=4, **told))  # type: ignore[arg-type]
        store.write([Point(step=4, tokens_samples=8, train=1.0), commit, done], 20.0)
    with closing(Store(old)) as store:
        assert gathered(store, 8, "0123").tokens == 64
    archive = Archive(old)
    assert archive.state().tokens == 64 and archive.events(8, None, 9, None)[0].step == 4
    page = archive.round(4)
    assert page and [(part.name, part.digest) for part in page.parts] == [("anna", "07" * 8)]
    assert page.before == 2


def test_beside_a_coordinator_that_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(Store(path)) as store:
        store.set_meta(config=msgspec.to_builtins(CONFIG), run_id="0123")
        archive = Archive(path)
        version = archive.version
        for step in range(1, 4):
            store.write([Point(step=step, tokens_samples=step * 2, train=1.0)], float(step))
            assert archive.state().step == step and archive.version > version
            version = archive.version
        assert [point.step for point in archive.points(1)] == [2, 3]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        Archive(tmp_path / "none").state()
    empty = tmp_path / "run.sqlite"
    with closing(Store(empty)):
        pass
    with pytest.raises(StateError, match="no run was ever opened in it"):
        Archive(empty).state()
    with closing(Store(empty)) as store:
        store.set_meta(config={"name": "x", "strange": 1})
    with pytest.raises(StateError, match="strange"):
        Archive(empty).curve(5, None)
