"""What is read back from a run's file is what was shown while it went on."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_hub import CONFIG, Hand, a_hub, finished
from told_history import Told, same

from potluck.coordinator.dashboard import replay, rollups
from potluck.coordinator.dashboard.archive import Archive
from potluck.coordinator.dashboard.picture import picture
from potluck.coordinator.dashboard.shapes import State
from potluck.coordinator.store import Store


@pytest.fixture(autouse=True)
def every_row_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each change instead of each minute, and many copies of the fold."""
    for module in (rollups, replay):
        monkeypatch.setattr(module, "slot_of", lambda time: int(time * 1e6))
    monkeypatch.setattr(replay, "EVERY", 7)


PEERS = st.sampled_from("abcd")
DEEDS = st.one_of(
    st.tuples(st.just("join"), PEERS),
    st.tuples(st.just("gone"), PEERS),
    st.tuples(st.just("plan"), st.sampled_from([2, 2, 1])),
    st.tuples(st.just("train"), st.floats(0.0, 9.0)),
    st.tuples(st.just("train"), st.floats(0.0, 9.0)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("back"), st.sampled_from([0, 1, 2, 99])),
    st.tuples(st.just("restart")),
)


async def told(folder: Path, deeds: list[tuple[object, ...]]) -> None:
    """Tells it; the newest moment must be read back as it is shown, and all earlier ones as they were."""
    run = Told(folder)
    growing = Archive(run.path)
    seen: list[State] = []
    for name, *arguments in deeds:
        getattr(run, str(name))(*arguments)
        read = growing.state_at(run.now)
        assert same(read) == same(run.shown())
        seen.append(read)
    run.finish()
    run.store.close()
    later = Archive(run.path)
    for state in seen:
        assert state.at is not None
        again = later.state_at(state.at)
        assert {**same(again), "traffic": again.traffic} == {**same(state), "traffic": state.traffic}
    assert later.state().phase == "finished"
    assert same(later.state()) == same(growing.state())


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DEEDS, max_size=20))
def test_replay_is_what_was_shown(deeds: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(told(Path(folder), [("join", "a"), ("join", "b"), ("plan",), *deeds]))


async def test_a_whole_story(tmp_path: Path) -> None:
    """Joins, a death, a rollback, rounds that are lost, another division, a restart and the end."""
    deeds: list[tuple[object, ...]] = [("join", "a"), ("join", "b"), ("join", "c"), ("plan",)]
    deeds += [("train", 2.0), ("train", 1.9), ("commit",), ("train", 1.8), ("gone", "c"), ("back", 0), ("plan",)]
    deeds += [("train", 1.8), ("train", 1.7), ("commit",), ("train", 1.6), ("commit",), ("restart",), ("back", 2)]
    deeds += [("plan", 1), ("train", 1.8), ("join", "d"), ("train", 1.7), ("commit",), ("restart",), ("train", 1.5)]
    await told(tmp_path, deeds)
    archive = Archive(tmp_path / "run.sqlite")
    state = archive.state()
    assert (state.step, state.round, state.tokens, state.phase) == (5, 4, 4 * 4 * 8, "finished")
    assert [row.round for row in state.rounds] == [4, 1]
    assert {incident.group for incident in archive.incidents(None)} == {"lost", "back", "divided", "joined"}
    assert not any("10.1.2.3" in row.text for row in archive.events(0, None, 100, None))
    ranks = {row.peer: (row.rank, row.rounds) for row in archive.leaderboard()}
    assert ranks == {"a": (1, 2), "b": (1, 2), "c": (3, 1), "d": (3, 1)}
    assert state.goodput.committed <= state.goodput.computed
    middle = archive.state_at(state.rounds[-1].committed)
    assert middle.step == 2 and [peer.id for peer in middle.peers] == ["a", "b", "c"] and middle.phase == "training"


async def test_what_a_hub_has_shown(tmp_path: Path) -> None:
    """The real machine, its real commands: after every batch, the file says what the page does."""
    hub = a_hub(CONFIG, tmp_path)
    board, update = hub.board, hub.board.update
    archive = Archive(board.archive.path)

    pairs: list[tuple[State, State, State]] = []

    def look(state: object, commands: object, now: float, heard: object = None) -> None:
        update(state, commands, now, heard)  # type: ignore[arg-type]
        folded = picture(board._frame, board._fold, board._book, now, at=now, version=0, scores=0)
        pairs.append((board.state(), folded, archive.state_at(now)))

    board.update = look  # type: ignore[method-assign, assignment]
    await hub.start()
    uploads: set[tuple[int, int]] = set()
    try:
        await finished(hub, [Hand(peer, hub, CONFIG, uploads) for peer in ("anna", "ben")])
    finally:
        await hub.close()
    for live, folded, read in pairs:
        assert same(read) == same(folded)
        assert (read.phase, read.note, read.step, read.round) == (live.phase, live.note, live.step, live.round)
        assert (read.tokens, read.generation, read.goodput) == (live.tokens, live.generation, live.goodput)
        assert {peer.id for peer in read.peers} == {peer.id for peer in live.peers}
        assert [stage.replicas for stage in read.stages] == [stage.replicas for stage in live.stages]
        assert [stage.first_layer for stage in read.stages] == [stage.first_layer for stage in live.stages]
    with closing(Store(board.archive.path)) as store:  # where peers can be dialled: kept for going on, and no longer
        assert store.meta("crew", "none") is None
    last = archive.state()
    assert {live.phase for live, _, _ in pairs} >= {"preparing", "training", "finishing", "finished"}
    assert last.step == CONFIG.steps and last.goodput.committed == last.tokens / 8 == 16.0
    page = archive.round(last.rounds[0].step)
    assert page and [part.samples for part in page.parts] and {part.peer for part in page.parts} == {"anna", "ben"}
    assert page.before == last.rounds[1].step and page.after is None
    assert [row.rank for row in archive.leaderboard()] == [1, 2]
    assert sum(row.share for row in archive.leaderboard()) == pytest.approx(1.0)
