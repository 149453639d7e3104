"""``potluck ledger verify``: silent on every real history, and no single wrong row gets past it."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept_run import KeptRun, gone_on, with_a_lost_round, with_a_stop

from potluck.coordinator.verify import Report, verify
from potluck.protocol.errors import StateError

from ..sim.world import World, simulate

HISTORIES = 20
LEDGER = "generation, step, peer, first, count, state, round, reason, expires, changed"


def clean(path: Path) -> Report:
    report = verify(path)
    assert not report.problems, "\n".join(report.lines())
    return report


@pytest.mark.parametrize("begin", range(0, HISTORIES, 10))
def test_every_simulated_history_verifies_while_it_runs_and_after(begin: int) -> None:
    """Kills, lost lines, restarts, stops, rot: beside the writer, which is not disturbed, and at the end."""
    for seed in range(begin, begin + 10):
        seen = [0]

        def look(world: World, seen: list[int] = seen) -> None:
            seen[0] += 1
            if seen[0] % 100 == 0 or world.finished:
                path = world.coordinator.disk.path
                assert clean(path).samples == world.watch.now.committed[2]

        world = simulate(seed, look=look)
        assert world.finished or world.lost


def test_lost_rounds_and_stops_verify(tmp_path: Path) -> None:
    for restarted in (False, True):
        run = with_a_lost_round(tmp_path / f"lost-{restarted}", restarted=restarted)
        report = clean(run.store.path)
        assert (report.rounds, report.lost_rounds, report.samples) == (2, 1, 12 * 6)
        assert report.returned["its round is lost"].samples == 8 * 6
    run = with_a_stop(tmp_path / "stop")
    assert clean(run.store.path).leased.samples == 3 * 6
    gone_on(run)
    assert clean(run.store.path).leased.samples == 5 * 6
    run.to(12)
    assert clean(run.store.path).samples == 12 * 6


def test_a_killed_coordinators_file_and_its_copy_without_the_log(tmp_path: Path) -> None:
    run = with_a_lost_round(tmp_path / "run")
    path, copy = run.store.path, tmp_path / "copy"
    copy.mkdir()
    for name in ("run.sqlite", "run.sqlite-wal"):
        shutil.copy(path.with_name(name), copy)
    assert clean(copy / "run.sqlite") == clean(path)
    run.store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    assert clean(alone / "run.sqlite") == clean(path)
    assert [p.name for p in alone.iterdir()] == ["run.sqlite"]


# Planted damage.


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Closed files of clean runs.

    Leases in ``lost``: ids 1-8 in round 1, 9-16 in lost round 2, 17-20 returned, 21-24 in round 3, 25-26 leased.
    """
    folder = tmp_path_factory.mktemp("kept")
    runs: dict[str, Callable[[Path], KeptRun]] = {
        "lost": with_a_lost_round,
        "stop": with_a_stop,
        "on": lambda place: gone_on(with_a_stop(place)),
    }
    paths = {}
    for name, make in runs.items():
        run = make(folder / name)
        run.store.close()
        clean(run.store.path)
        paths[name] = run.store.path
    return paths


@pytest.fixture
def damaged(kept: dict[str, Path], tmp_path: Path) -> Callable[..., Report]:
    def damage(*statements: str, name: str = "lost") -> Report:
        path = tmp_path / "run.sqlite"
        shutil.copy(kept[name], path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            for statement in statements:
                assert db.execute(statement).rowcount, statement
        return verify(path)

    return damage


def again(where: str, **changes: str) -> str:
    """A copy of a ledger row, under a new id."""
    values = ", ".join(changes.get(name, name) for name in LEDGER.split(", "))
    return f"INSERT INTO ledger ({LEDGER}) SELECT {values} FROM ledger WHERE {where}"


# What was done to the file, and what must be said about it. See the comment of `kept`.
PLANTED: dict[str, tuple[list[str], list[str]]] = {
    "a range twice": (
        [again("id = 22")],
        [
            "ledger row 27: samples [54, 60) leased or committed a second time",
            "ledger row 27: step 5, samples [54, 60)",
        ],
    ),
    "a hole": (
        ["DELETE FROM ledger WHERE id = 5"],
        [
            "ledger row 6: row 5 is missing before it",
            "ledger row 6: samples [24, 30) before it neither leased nor committed",
            "rounds at step 4: round 1 has 48 samples, its leases add up to 42",
        ],
    ),
    "an overlap": (
        ["UPDATE ledger SET count = 9 WHERE id = 3"],
        ["ledger row 4: samples [18, 21) leased or committed a second time", "ledger row 3: step 1, samples [12, 21)"],
    ),
    "a round that is none": (
        ["UPDATE ledger SET round = 9 WHERE id = 4"],
        ["ledger row 4: committed to round 9, which does not exist"],
    ),
    "a round that was lost": (
        ["UPDATE ledger SET round = 2 WHERE id = 23"],
        ["ledger row 23: committed to round 2, which does not exist"],
    ),
    "another round": (
        ["UPDATE ledger SET round = 1 WHERE id = 21"],
        ["ledger row 21: step 4 is not one of round 1, [0, 4)", "generation 3 was over when round 1 was committed"],
    ),
    "a wrong sum": (
        ["UPDATE rounds SET samples = 47 WHERE step = 4"],
        ["rounds at step 4: it is not what event 8 tells", "round 1 has 47 samples, its leases add up to 48"],
    ),
    "a wrong mark": (
        ["UPDATE rounds SET sample = 73 WHERE step = 8"],
        [
            "rounds at step 8: 24 samples from sample 48 do not end at sample 73",
            "the newest round ends at sample 73, the committed leases at 72",
        ],
    ),
    "rounds that do not increase": (
        ["UPDATE rounds SET round = 1 WHERE step = 8"],
        ["rounds at step 8: round 1 follows round 1"],
    ),
    "a round without its digests": (
        ["""UPDATE rounds SET digests = '["00", ""]' WHERE step = 4"""],
        ["rounds at step 4: its digests are not one of every stage (2)"],
    ),
    "a round that is gone": (
        ["DELETE FROM rounds WHERE step = 8"],
        ["rounds: round 3 at step 8 is missing, which event 24 tells of", "ledger row 21: committed to round 3, which"],
    ),
    "an event that is gone": (
        ["DELETE FROM events WHERE id = 8"],
        ["events row 9: row 8 is missing before it", "rounds at step 4: the journal knows no such round 1"],
    ),
    "the last event that is gone": (
        ["DELETE FROM events WHERE id = 24"],
        [
            "events: the last id is 23, but 24 was the last one given",
            "rounds at step 8: the journal knows no such round",
        ],
    ),
    "a rollback nobody told of": (
        ["DELETE FROM events WHERE id = 22"],
        [
            "events row 23: row 22 is missing",
            "events row 23: training starts at step 4, but the last round was at step 8",
        ],
    ),
    "a generation that goes back": (
        ["UPDATE events SET data = replace(data, '\"generation\": 3', '\"generation\": 1') WHERE id = 21"],
        ["events row 21: generation 1 follows generation 2", "meta: generation 3 is stored, the journal's newest is 2"],
    ),
    "an event of no kind": (
        ['UPDATE events SET data = \'{"type": "Eclipse"}\' WHERE id = 8'],
        ["events row 8: RoundCommitted cannot be read: Invalid value 'Eclipse'"],
    ),
    "an event that is no text": (
        ["UPDATE events SET data = x'00' WHERE id = 3"],
        ["events row 3: data: Expected `str`"],
    ),
    "a lease of an old generation": (
        ["UPDATE ledger SET generation = 1 WHERE id = 26"],
        [
            "ledger row 26: leased in generation 1, after generation 3 had begun",
            "leased still, in generation 1, which is",
        ],
    ),
    "a lease of no generation": (
        ["UPDATE ledger SET generation = 4 WHERE id = 26"],
        ["ledger row 26: generation 4 has never trained"],
    ),
    "a lease that was never returned": (
        ["UPDATE ledger SET state = 'leased', round = NULL, reason = NULL WHERE id = 16"],
        [
            "ledger row 16: leased still, in generation 1, which is over",
            "ledger row 16: samples [48, 90) before it neither leased nor committed",
            "of lost round 2, 48 samples went back by the journal and 42 by the leases",
        ],
    ),
    "a state nobody knows": (
        ["UPDATE ledger SET state = 'dropped' WHERE id = 26"],
        ["ledger row 26: state: Invalid enum value 'dropped'"],
    ),
    "no reason": (["UPDATE ledger SET reason = NULL WHERE id = 18"], ["ledger row 18: returned without a reason"]),
    "a reason too many": (
        ["UPDATE ledger SET reason = 'x' WHERE id = 1"],
        ["ledger row 1: committed, and with a reason for its return"],
    ),
    "somebody else's part": (
        ["UPDATE ledger SET peer = 'x' WHERE id = 23"],
        ["ledger row 23: leased to x, this part is d"],
    ),
    "half a step": (
        ["DELETE FROM ledger WHERE id = 20"],
        ["ledger row 21: row 20 is missing", "ledger: only 1 of 2 replicas have a lease of step 9 in generation 1"],
    ),
    "the last lease that is gone": (
        ["DELETE FROM ledger WHERE id = 26"],
        ["ledger: the last id is 25, but 26 was the last one given"],
    ),
    "text for a number": (["UPDATE ledger SET first = 'many' WHERE id = 2"], ["ledger row 2: first: Expected `int`"]),
    "a negative number": (["UPDATE ledger SET count = -6 WHERE id = 2"], ["ledger row 2: count: Expected `int` >= 1"]),
    "huge numbers": (
        [f"UPDATE ledger SET first = {2**63 - 1}, count = {2**63 - 1}, step = {2**63 - 1} WHERE id = 26"],
        [f"ledger row 26: samples [78, {2**63 - 1}) before it neither leased nor committed"],
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_damage_is_named(damaged: Callable[..., Report], name: str) -> None:
    statements, expected = PLANTED[name]
    report = damaged(*statements)
    lines = report.lines()
    for text in expected:
        assert any(text in line for line in lines), "\n".join(lines)
    assert f"The ledger is wrong in {report.problems} place" in "\n".join(lines)


def test_a_stop_that_does_not_fit_its_leases(damaged: Callable[..., Report]) -> None:
    report = damaged("DELETE FROM ledger WHERE id = 7", "DELETE FROM sqlite_sequence", name="stop")
    assert "meta: stopped at sample 42, but the leases end at 36" in map(str, report.findings)
    report = damaged("UPDATE ledger SET first = first + 6 WHERE generation = 2", name="on")
    assert "ledger row 8: step 7, samples [48, 54) in generation 2: step 7, samples [42, 48) was next" in map(
        str, report.findings
    )


def test_at_most_twenty_are_shown(damaged: Callable[..., Report]) -> None:
    report = damaged("UPDATE ledger SET generation = 77")
    shown = [line for line in report.lines() if line.startswith("  ")]
    assert report.problems > 21 and len(shown) == 21 and shown[-1] == f"  and {report.problems - 20} more"


COLUMNS = {
    "first": [-6, -1, 1, 6, 48, 2**40],
    "count": [-5, -1, 1, 6, 2**40],
    "step": [-1, 1, 4],
    "generation": [-2, -1, 1, 2],
    "round": [-1, 1, 2, None],
    "state": ["leased", "committed", "returned", "dropped", ""],
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_single_wrong_row_gets_past_it(kept: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Deleted, doubled, or with one column changed: nothing of that is harmless."""
    path = tmp_path / "run.sqlite"
    shutil.copy(kept[data.draw(st.sampled_from(sorted(kept)))], path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        rows = db.execute("SELECT id, first, count, step, generation, round, state FROM ledger").fetchall()
        row = data.draw(st.sampled_from(rows))
        how = data.draw(st.sampled_from(["delete", "double", *COLUMNS]))
        if how == "delete":
            db.execute("DELETE FROM ledger WHERE id = ?", (row[0],))
        elif how == "double":
            db.execute(again(f"id = {row[0]}"))
        else:
            old = row[("id", "first", "count", "step", "generation", "round", "state").index(how)]
            change = data.draw(st.sampled_from(COLUMNS[how]))
            new = change if not isinstance(change, int) else (old or 0) + change
            if new == old:
                return
            db.execute(f"UPDATE ledger SET {how} = ? WHERE id = ?", (new, row[0]))
    assert verify(path).problems, (how, row)


# Files that are none.


def spoiled(kept: Path, place: Path) -> Iterator[tuple[str, str]]:
    """Puts something wrong in the place, and says which error is due."""
    whole = kept.read_bytes()
    yield "No such file", "missing"
    place.mkdir()
    yield "is not a file", "foreign"
    place.rmdir()
    for content in (b"", b"this is no database " * 100):
        place.write_bytes(content)
        yield "is not a run's file", "foreign"
    for length in (len(whole) // 2, 5000, 100):
        place.write_bytes(whole[:length])
        yield "", ""
    place.write_bytes(whole[:8192] + b"\xff" * 4096 + whole[12288:])
    yield "is damaged", "damaged"
    for statement, text, code in [
        ("DROP TABLE rounds", "is not a run's file: it has no table rounds", "foreign"),
        ("ALTER TABLE ledger DROP COLUMN reason", "is not a run's file: no such column: reason", "foreign"),
        ("UPDATE meta SET value = '{' WHERE key = 'config'", "what is stored as `config` cannot be read", "damaged"),
        (
            "UPDATE meta SET value = x'ff' WHERE key = 'generation'",
            "what is stored as `generation` cannot be",
            "damaged",
        ),
        ("UPDATE meta SET value = printf('%.*c', 9999, '[') WHERE key = 'stop'", "what is stored as `stop`", "damaged"),
        ("DELETE FROM meta", "no run was ever opened in it", "foreign"),
    ]:
        place.write_bytes(whole)
        with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute(statement)
        yield text, code


def test_what_is_no_run_is_said_in_one_line(kept: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "run.sqlite"
    for text, code in spoiled(kept["lost"], place):
        with pytest.raises(StateError) as caught:
            verify(place)
        assert text in str(caught.value) and str(place) in str(caught.value) and caught.value.hint
        assert code in ("", caught.value.code), caught.value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_end_in_a_report_or_a_clear_error(
    kept: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    place, content = tmp_path / "run.sqlite", bytearray(kept["lost"].read_bytes())
    for _ in range(data.draw(st.integers(1, 40))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    place.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with contextlib.suppress(StateError):
        verify(place).lines()


def test_a_schema_that_is_no_text_is_damage(kept: dict[str, Path], tmp_path: Path) -> None:
    place, content = tmp_path / "run.sqlite", kept["lost"].read_bytes()
    damaged = content.replace(b"CREATE TABLE ledger", b"CREAT\x80 TABLE ledger")
    assert damaged != content
    place.write_bytes(damaged)
    with pytest.raises(StateError) as caught:
        verify(place)
    assert caught.value.code == "damaged"
