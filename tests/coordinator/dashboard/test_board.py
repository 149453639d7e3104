"""What only the live state knows, beside what is folded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from manifests import MANIFEST
from scripted_hub import CONFIG

from potluck.coordinator import events as ev
from potluck.coordinator.dashboard.board import Board
from potluck.coordinator.dashboard.shapes import Alert
from potluck.coordinator.service import open_run, rules_of
from potluck.coordinator.state import Caps, Journal, Member, RunState, Said
from potluck.coordinator.store import Store
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan, Replica, SavePoint, StagePlan

RULES = rules_of(CONFIG, MANIFEST)
LAYERS = RULES.division(2).layers


def a_plan(*stages: tuple[str, ...]) -> Plan:
    return Plan(
        generation=3,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        microbatches=2,
        microbatch_size=1,
        stages=tuple(
            StagePlan(first_layer=a, last_layer=b, replicas=tuple(Replica(peer=p, addresses=()) for p in peers))
            for (a, b), peers in zip(LAYERS, stages, strict=True)
        ),
    )


def a_state(*peers: str, plan: Plan | None = None) -> RunState:
    members = {p: Member(peer=p, name=p.upper(), region="moon", ready=3, state="training") for p in peers}
    return RunState(phase="training", members=members, plan=plan, generation=3, until=10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "run.sqlite")) as store:
        open_run(store, CONFIG, MANIFEST)
        yield store


@pytest.fixture
async def board(store: Store) -> Board:
    return Board(CONFIG, RULES, "0123", MANIFEST.vocab_size, store)


def hear(board: Board, state: RunState, now: float, *reports: tuple[str, pb.Up]) -> None:
    heard = board.heard([(b"s", Said(peer=peer, report=up)) for peer, up in reports], (), now)
    board.update(state, [], now, heard)


def beat(**link: object) -> pb.Up:
    return pb.Up(heartbeat=pb.Heartbeat(links=[pb.Link(**link)]))  # type: ignore[arg-type]


async def test_samples_count_by_their_stages_share_of_the_work(board: Board) -> None:
    plan = a_plan(("a",), ("b",))
    state = a_state("a", "b", plan=plan)
    board.update(state, [], 1.0)
    done = [pb.Up(step_done=pb.StepDone(generation=3, step=n, samples=s)) for n, s in ((0, 2), (1, 10**9), (1, 2))]
    hear(board, state, 2.0, ("a", done[0]), ("b", done[0]))
    assert sum(t.computed for t in board._book.peers.values()) == pytest.approx(2.0)  # both stages of two samples
    assert board.state().goodput.computed == 0.0  # its round is not over
    hear(board, state, 3.0, ("a", done[1]), ("a", done[2]))
    assert board.state().peers[0].samples == 2 + plan.samples_per_step  # nobody does more in a step, nor one twice
    hear(board, a_state("b", plan=a_plan(("b",), ())), 4.0, ("a", done[2]))
    strange = pb.Up(step_done=pb.StepDone(generation=4, step=9, samples=2))
    before = board.state().goodput
    hear(board, state, 5.0, ("a", strange))
    assert board.state().goodput == before


async def test_a_peers_speed_is_that_of_its_newest_steps(board: Board) -> None:
    state = a_state("a", "b", plan=a_plan(("a",), ("b",)))
    board.update(state, [], 1.0)
    assert [row.tokens_per_second for row in board.state().peers] == [None, None]
    for step in range(40):
        slow = pb.StepDone(generation=3, step=step, samples=2, compute_seconds=6.0, wait_seconds=2.0)
        fast = pb.StepDone(generation=3, step=step, samples=2, compute_seconds=3.0 if step < 10 else 1.0)
        hear(board, state, 2.0 + step, ("a", pb.Up(step_done=slow)), ("b", pb.Up(step_done=fast)))
    seq_len = CONFIG.model.seq_len
    slow_speed, fast_speed = (row.tokens_per_second for row in board.state().peers)
    assert slow_speed == pytest.approx(2 * seq_len / 8.0)
    assert fast_speed == pytest.approx(2 * seq_len, rel=0.01)


async def test_links_say_how_much_of_them_is_in_use(board: Board) -> None:
    state = a_state("a", "b")
    capped = replace(state.members["a"], caps=Caps(upload_mbps=8.0))
    state = replace(state, members={**state.members, "a": capped})
    board.update(state, [], 1.0)
    hear(board, state, 2.0, ("a", beat(peer="b", path="direct", bytes_per_second=5e5, rtt_seconds=0.02)))
    [link] = board.state().peers[0].links
    assert (link.sender, link.receiver, link.path, link.cap, link.share, link.time) == (
        "a",
        "b",
        "direct",
        1e6,
        0.5,
        2.0,
    )
    for rate in (4e5, 1e5):
        hear(board, state, 3.0, ("b", beat(peer="a", path="sideways", bytes_per_second=rate)))
    [link] = board.state().peers[1].links
    assert (link.path, link.rtt_seconds, link.cap, link.share) == (None, None, None, 0.25)  # of the fastest it was
    assert len(board.links(None)) == 2
    board.update(a_state("a"), [], 4.0)
    assert board.state().peers[0].links == () and board.links(None)


async def test_a_stage_is_thin_where_nobody_could_go_on(board: Board) -> None:
    plan = a_plan(("a", "b"), ("c",))
    state = a_state("a", "b", "c", "d", plan=plan)
    board.update(state, [], 1.0)
    assert [stage.is_thin for stage in board.state().stages] == [False, True]
    first, last = LAYERS[1]
    point = SavePoint(kind="round", generation=3, step=4, first_layer=first, last_layer=last, digest=b"d")
    ready = replace(state.members["d"], prepared=point)
    board.update(replace(state, members={**state.members, "d": ready}), [], 2.0)
    assert [stage.is_thin for stage in board.state().stages] == [False, False]
    board.update(replace(state, members={**state.members, "d": replace(ready, away=9.0)}), [], 3.0)
    assert [stage.is_thin for stage in board.state().stages] == [False, True]


async def test_what_a_peer_does_is_what_its_state_says(board: Board) -> None:
    state = a_state("a", "b", "c", plan=a_plan(("a",), ("b",)))
    members = {**state.members, "a": replace(state.members["a"], away=9.0), "b": replace(state.members["b"], ready=0)}
    board.update(replace(state, phase="preparing", members=members), [], 1.0)
    rows = board.state().peers
    assert [(row.state, row.stage, row.name, row.region) for row in rows] == [
        ("away", 0, "A", "moon"),
        ("loading", 1, "B", "moon"),
        ("waiting", None, "C", "moon"),
    ]


async def test_the_newest_events_are_told_as_they_are_stored(board: Board, store: Store) -> None:
    quiet = Journal(event=ev.PhaseChanged(phase="training"))
    loud = [Journal(event=ev.Waiting(why=f"for {n}")) for n in range(3)]
    for now, commands in ((1.0, [loud[0], quiet]), (2.0, [loud[1], loud[2]])):
        store.write(commands, now)
        board.update(RunState(), commands, now)
    assert [row.id for row in board.news(0)] == [1, 3, 4] and board.news(3)[0].text == "Waiting: for 2"
    assert board.news(0) == await asyncio.to_thread(board.events, 0, None, 10, None)
    assert board.state().events == tuple(reversed(board.news(0)))


async def test_a_change_is_told_and_an_alert_is_one(board: Board) -> None:
    version = board.version
    waiting = asyncio.create_task(board.changed(version))
    await asyncio.sleep(0)
    alert = Alert(name="stuck", text="nothing happens", since=1.0)
    board.alert([alert])
    assert await waiting == board.version != version and board.state().alerts == (alert,)
    version = board.version
    board.alert([alert])
    assert board.version == version
    assert board.state() is not board.state() and board.state().peers is board.state().peers  # made once
