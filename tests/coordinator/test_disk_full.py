"""The hub on a disk that refuses: nothing takes effect, nobody is punished, and it goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from scripted_hub import CONFIG, Hand, a_hub, disk, finished

from potluck.coordinator import hub as shell
from potluck.coordinator import service, standstill
from potluck.coordinator.hub import Hub, Item, Line
from potluck.coordinator.state import Member, Said, Tick
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import StateError

FULL, IOERR = sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE


@pytest.fixture
async def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.setattr(shell, "BATCH", 2)  # many commits
    monkeypatch.setattr(standstill, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(standstill, "MOST_SECONDS", 0.01)
    made = a_hub(CONFIG, tmp_path)
    await made.start()
    yield made
    await made.close()


def a_crew(hub: Hub) -> list[Hand]:
    uploads: set[tuple[int, int]] = set()
    return [Hand(peer, hub, CONFIG, uploads) for peer in ("a", "b")]


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("code", [FULL, IOERR], ids=["full", "input/output error"])
@pytest.mark.parametrize("every", [1, 2, 3])
async def test_a_run_finishes_though_its_disk_refuses_again_and_again(code: int, every: int, hub: Hub) -> None:
    """Joins, plans, leases, commits, evaluations: whatever the refused batch holds. A hand checks what it is sent."""
    began = disk(hub).committed
    disk(hub).refuse = lambda number, tries: code if number % every == 0 and tries < 2 else None
    crew = a_crew(hub)
    await finished(hub, crew)
    disk(hub).refuse = lambda number, tries: None
    await until(lambda: not hub.standing and hub._queue.empty())
    times = len([number for number in range(began, disk(hub).committed) if number % every == 0])
    assert disk(hub).refused >= 2 * times - 2 > 10
    for hand in crew:
        assert hand.acks == sorted(set(hand.acks)) and hand.acks[-1] == hand.said
    rows = await hub.read(disk(hub).rows, "SELECT first, count, state FROM ledger ORDER BY first")
    ends = [first + count for first, count, _ in rows]
    assert [first for first, _, _ in rows] == [0, *ends[:-1]] and ends[-1] == 8 * 2
    assert {state for _, _, state in rows} == {"committed"}
    kinds = [kind for (kind,) in await hub.read(disk(hub).rows, "SELECT kind FROM events ORDER BY id")]
    assert abs(kinds.count("StoodStill") - times) <= 1 and "RolledBack" not in kinds
    assert kinds.count("RoundCommitted") == 3 and kinds.count("TrainingStarted") == 1
    steps = await hub.read(disk(hub).rows, "SELECT step FROM points WHERE train IS NOT NULL ORDER BY id")
    assert [step for (step,) in steps] == list(range(1, 9))
    kept = await hub.read(disk(hub).rows, "SELECT COUNT(*) FROM traffic")
    assert kept == [(2,)]


async def test_while_it_refuses_everybody_is_told_why_once(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    codes = [FULL]
    disk(hub).refuse = lambda number, tries: codes[0] if codes and number == 6 else None
    crew = a_crew(hub)
    working = asyncio.create_task(finished(hub, crew))
    await until(lambda: hub.standing and hub.standing.tries > 5)
    before = hub.board.state()
    assert before.note == "the coordinator's disk is full: nothing new is given out until it is mended"
    assert all(hand.notes[-1] == before.note for hand in crew)
    assert str(disk(hub).path) not in before.note
    codes[0] = IOERR
    await until(lambda: hub.standing and hub.standing.error.code == "disk")
    assert "refuses to write" in hub.board.state().note and "refuses to write" in crew[0].notes[-1]
    assert hub.board.state().step == before.step and hub.board.state().peers[0].samples == 0
    await until(lambda: hub.standing and hub.standing.tries > 20)
    codes.clear()
    await working
    errors = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2 and "disk is full" in errors[0] and "Free some space" in errors[0]
    assert any(r.message.startswith("The disk refused to write for ") for r in caplog.records)
    assert hub.board.state().note == "the run is complete"


async def test_what_comes_in_meanwhile_is_bounded(hub: Hub) -> None:
    crew = a_crew(hub)
    working = asyncio.create_task(finished(hub, crew))
    disk(hub).refuse = lambda number, tries: FULL if number == 6 else None
    await until(lambda: hub.standing and hub.standing.tries > 5)
    before = hub._queue.qsize()
    for number in range(2000):
        await hub.report(crew[0], pb.Up(heartbeat=pb.Heartbeat(state=f"state {number}")))
        guest = Line(f"guest-{number}", b"guest-%d" % number)  # comes, waits at the door, gives up
        hub.connect(guest)
        entering = asyncio.create_task(hub.enter(guest, Member(peer=guest.peer, name="guest", session=guest.session)))
        await asyncio.sleep(0)
        view = await guest.outbox.get()
        assert view is not None and view.view.note.startswith("the coordinator's disk is full")
        entering.cancel()
        hub.hang_up(guest)
    assert hub._queue.qsize() <= before + 1 and len(hub._beats) <= 2

    async def babble() -> None:
        for number in range(10**6):
            await hub.report(crew[1], pb.Up(seq=10**7 + number, leaving=pb.Leaving()))

    babbling = asyncio.create_task(babble())
    await until(lambda: crew[1].waiting_nbytes > shell.MOST_WAITING_NBYTES)
    waiting = hub._queue.qsize()
    assert waiting < 2 * shell.MOST_WAITING_NBYTES / shell.REPORT_NBYTES
    await asyncio.sleep(0.01)
    assert hub._queue.qsize() == waiting and not babbling.done()
    for task in (babbling, working):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("code", [None, FULL], ids=["hangs", "refuses"])
async def test_time_without_a_disk_makes_nobody_silent(
    code: int | None, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of an hour, or an hour of refused ones: the clock is moved, nobody waits."""
    late, real, loop = [0.0], hub.clock, asyncio.get_running_loop()
    monkeypatch.setattr(hub, "clock", lambda: real() + late[0])

    def hang(number: int, tries: int) -> int | None:
        if number % 4 == 3 and not tries:
            late[0] += 3600.0
            loop.call_soon_threadsafe(hub.put, Tick())
            return code
        return None

    disk(hub).refuse = hang
    await finished(hub, a_crew(hub))
    kinds = [kind for (kind,) in await hub.read(disk(hub).rows, "SELECT kind FROM events ORDER BY id")]
    assert late[0] > 10000.0 and "RolledBack" not in kinds[: kinds.index("Finished")] and kinds.count("PlanIssued") == 1


async def test_a_machine_that_sleeps_makes_nobody_silent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    late, taken, get = [0.0], [0], hub._queue.get
    real = hub.clock
    monkeypatch.setattr(hub, "clock", lambda: real() + late[0])

    async def sleep() -> Item:
        """While the hub waits for something to happen."""
        item = await get()
        taken[0] += 1
        if taken[0] % 4 == 3:
            late[0] += 3600.0
            hub.put(Tick())
        return item

    monkeypatch.setattr(hub._queue, "get", sleep)
    await finished(hub, a_crew(hub))
    kinds = [kind for (kind,) in await hub.read(disk(hub).rows, "SELECT kind FROM events ORDER BY id")]
    assert late[0] > 10000.0 and "RolledBack" not in kinds[: kinds.index("Finished")]
    assert kinds.count("PlanIssued") == 1


async def test_a_stop_does_not_wait_for_the_disk_for_ever(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STUCK_SECONDS", 0.05)
    disk(hub).refuse = lambda number, tries: FULL if number >= 6 else None
    working = asyncio.create_task(finished(hub, a_crew(hub)))
    await until(lambda: hub.standing)
    up = service.Running(hub=hub, board=hub.board, ticket="", page="", address="")
    with pytest.raises(StateError, match=r"the disk is full; .*nothing acknowledged is lost") as caught:
        await service.stop(up)
    assert caught.value.code == "disk-full" and "the same command goes on" in caught.value.hint
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, "deleted"])
async def test_what_never_gets_better_ends_the_run(code: int | str, hub: Hub) -> None:
    def refuse(number: int, tries: int) -> int | None:
        if number == 6 and code == "deleted":
            disk(hub).path.unlink()
        return code if number == 6 and isinstance(code, int) else None

    disk(hub).refuse = refuse
    crew = a_crew(hub)
    working = asyncio.create_task(finished(hub, crew))
    with pytest.raises((StateError, ExceptionGroup)):
        await working
    assert hub.failed and hub.failed.hint and hub.failed.code != "disk"
    assert hub.board.state().note == hub.failed.one_line()
    told = [len(hand.acks) for hand in crew]
    await hub.report(crew[0], pb.Up(seq=99, leaving=pb.Leaving()))
    await asyncio.sleep(0.02)
    assert [len(hand.acks) for hand in crew] == told


async def test_refused_counts_are_written_with_the_next_try(hub: Hub) -> None:
    """The board shows no byte and no sample that is not on disk."""
    reports = [(b"s", Said(peer="a", report=pb.Up(step_done=pb.StepDone(samples=3))))]
    traffic = pb.Traffic(peer="x", direction="out", purpose="weights", nbytes=7, dense_nbytes=9)
    reports.append((b"s", Said(peer="a", report=pb.Up(heartbeat=pb.Heartbeat(traffic=[traffic])))))
    first, again = hub.board.heard(reports), hub.board.heard(reports)
    assert first.statements == again.statements != []
    hub.board.update(hub.state, [], 1.0, again)
    assert hub.board.heard(reports).statements == []
