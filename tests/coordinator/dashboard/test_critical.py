"""The critical path, and how long a step would have taken otherwise: by hand, and for any step at all."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_steps import ACK_SECONDS, Swarm

from potluck.coordinator.dashboard.clocks import Clocks
from potluck.coordinator.dashboard.critical import path
from potluck.coordinator.dashboard.times import spent
from potluck.coordinator.dashboard.track import Done, Step, Track, unpacked
from potluck.coordinator.dashboard.whatif import Order, changes, with_quick_line, without, without_slowness
from potluck.coordinator.dashboard.why import words
from potluck.protocol import control_pb2 as pb


def name(peer: str) -> str:
    return peer


def read(swarm: Swarm, told: dict[str, pb.Trace], **works: float) -> Step:
    """What everybody says, on one clock."""
    tracks = []
    for stage, replicas in enumerate(swarm.stages):
        for peer in replicas:
            track = unpacked(told[peer], peer, stage, works.get(peer, 1 / len(swarm.stages)))
            assert track is not None
            tracks.append(track)
    step = Step(tracks=tuple(tracks))
    heard = {t.peer: t.end - swarm.clocks.get(t.peer, 0.0) + ACK_SECONDS for t in step.tracks}
    return Clocks().learnt(step, heard).aligned(step)


def test_crews_that_have_nothing_to_do_with_each_other_are_put_beside_each_other() -> None:
    """By when the coordinator heard of them, of many steps and of whoever has the shorter way."""
    swarm = Swarm(stages=[["a", "b"], ["c", "d"]], clocks={"a": 5.0, "b": 700.0, "c": 80.0, "d": 9.0})
    clocks = Clocks()
    first, second = {"a": 0.3, "b": 0.02, "c": 0.01, "d": 0.9}, {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1.0}
    for number, ways in enumerate([first, second]):
        _, told = swarm.step(begin=100.0 * number)
        tracks = [unpacked(told[p], p, s, 0.5) for s, stage in enumerate(swarm.stages) for p in stage]
        step = Step(tracks=tuple(t for t in tracks if t))
        ends = {t.peer: t.end - swarm.clocks[t.peer] for t in step.tracks}
        clocks = clocks.learnt(step, {p: ends[p] + way for p, way in ways.items()})
    for track in clocks.aligned(step).tracks:
        assert track.end == pytest.approx(ends[track.peer], abs=0.03)


def length(step: Step) -> float:
    pieces = path(step)
    return pieces[-1].end - pieces[0].start


def test_the_path_of_one_microbatch_goes_there_and_back() -> None:
    a = Track(
        peer="a",
        stage=0,
        work=0.5,
        before=0.5,
        begin=10.0,
        done=(
            Done(kind="forward", microbatch=0, start=10.0, end=11.0, encode=0.2),
            Done(kind="backward", microbatch=0, start=17.0, end=19.0, arrived=16.9, decode=0.3),
            Done(kind="update", microbatch=None, start=19.0, end=19.5),
        ),
    )
    b = Track(
        peer="b",
        stage=1,
        work=0.5,
        begin=9.0,
        done=(
            Done(kind="forward", microbatch=0, start=13.0, end=14.0, arrived=13.0),
            Done(kind="backward", microbatch=0, start=14.0, end=16.0),
            Done(kind="update", microbatch=None, start=16.0, end=16.4),
        ),
    )
    found = [(s.what, s.peer, s.receiver, round(s.start, 6), round(s.end, 6)) for s in path(Step(tracks=(a, b)))]
    assert found == [
        ("round", "a", None, 9.5, 10.0),
        ("compute", "a", None, 10.0, 10.8),
        ("codec", "a", None, 10.8, 11.0),
        ("wire", "a", "b", 11.0, 13.0),
        ("compute", "b", None, 13.0, 14.0),
        ("compute", "b", None, 14.0, 16.0),
        ("wire", "b", "a", 16.0, 16.9),
        ("codec", "a", None, 16.9, 17.0),
        ("codec", "a", None, 17.0, 17.3),
        ("compute", "a", None, 17.3, 19.0),
        ("update", "a", None, 19.0, 19.5),
    ]


def test_a_path_ends_at_what_keeps_its_peer_busy() -> None:
    """The input had come long before: what was done before it is what counts."""
    a = Track(
        peer="a",
        stage=0,
        work=1.0,
        done=(
            Done(kind="forward", microbatch=0, start=0.0, end=3.0),
            Done(kind="backward", microbatch=0, start=3.0, end=5.0, arrived=1.0),
            Done(kind="update", microbatch=None, start=5.0, end=6.0),
        ),
    )
    assert [s.what for s in path(Step(tracks=(a,)))] == ["compute", "compute", "update"]


def test_who_has_not_told_is_behind_the_line_that_was_waited_for() -> None:
    swarm = Swarm(stages=[["a"], ["b"], ["c"]], microbatches=1)
    _, told = swarm.step()
    tracks = [unpacked(told[p], p, s, 1 / 3) for s, p in ((0, "a"), (2, "c"))]
    step = Step(tracks=(*(t for t in tracks if t), Track(peer="b", stage=1, work=1 / 3)))
    waited = [s for s in path(step) if s.what == "wire"]
    assert [(s.peer, s.receiver) for s in waited] == [("b", "a")] and waited[0].end - waited[0].start > 4.0
    assert words(path(step), changes(step, path(step), name), 1.0, name, {})


@pytest.mark.parametrize("ahead", [0.0, 1000.0])
def test_clocks_that_differ_do_not_move_the_blame(ahead: float) -> None:
    """One line is slow one way only, which looks like a late clock to whoever knows of no acknowledgements."""
    swarm = Swarm(stages=[["a"], ["b"]], wire={("a", "b"): 3.0}, clocks={"b": ahead})
    took, told = swarm.step()
    step = read(swarm, told)
    assert length(step) == pytest.approx(took, abs=0.02)
    wires = {(s.peer, s.receiver): s.end - s.start for s in path(step) if s.what == "wire" if s.receiver}
    assert wires["a", "b"] == pytest.approx(3.0, abs=0.05)
    first = words(path(step), changes(step, path(step), name), 5.0, name, {"a": 0, "b": 1})[0]
    assert "the slow line from a to b" in first
    saved = with_quick_line(Order.of(step, path(step)[0].start), ("a", "b"))
    quick, _ = Swarm(stages=swarm.stages).step()
    assert saved == pytest.approx(quick, rel=0.05)


def test_a_peer_that_is_slower_than_its_mate() -> None:
    stages = [["a"], ["b", "c"], ["d"]]
    slow = Swarm(stages=stages, forward={"a": 0.2, "b": 3.0, "d": 0.2}, microbatches=6, clocks={"c": -77.0 + 200})
    even = Swarm(stages=stages, forward={"a": 0.2, "d": 0.2}, microbatches=6)
    took, told = slow.step(begin=100.0)
    step = read(slow, told)
    pieces = path(step)
    found = changes(step, pieces, name)
    assert words(pieces, found, took / 2, name, {})[0].startswith(f"The step took {took:.1f} s where")
    assert "b was slow" in words(pieces, found, took, name, {})[0]
    order = Order.of(step, pieces[0].start)
    assert without_slowness(order, step, "b") == pytest.approx(even.step()[0], rel=0.25)  # the order is the slow one's
    gone = Swarm(stages=[["a"], ["c"], ["d"]], forward={"a": 0.2, "d": 0.2}, microbatches=6)
    assert without(step, pieces[0].start, "b") == pytest.approx(gone.step()[0], rel=0.1)
    assert without(step, pieces[0].start, "a") is None
    assert {c.told.peer for c in found} >= {"b"}
    assert all(c.told.seconds < length(step) for c in found)


def test_alone_in_its_stage_a_peer_is_measured_by_the_others_for_its_share_of_the_work() -> None:
    swarm = Swarm(stages=[["a"], ["b"], ["c"]], forward={"a": 1.0, "b": 6.0, "c": 1.0})
    _, told = swarm.step()
    step = read(swarm, told, a=0.25, b=0.5, c=0.25)
    even = Swarm(stages=swarm.stages, forward={"a": 1.0, "b": 2.0, "c": 1.0})
    found = without_slowness(Order.of(step, path(step)[0].start), step, "b")
    assert found == pytest.approx(even.step()[0], rel=0.1)


def test_where_a_peers_time_goes() -> None:
    swarm = Swarm(stages=[["a"], ["b"]], microbatches=1, wire={("a", "b"): 2.0, ("b", "a"): 0.5})
    _, told = swarm.step()
    step = read(swarm, told)
    a, b = spent(step, 0), spent(step, 1)
    assert (a.compute, a.codec, a.update) == pytest.approx((2.98, 0.02, 0.1), abs=1e-3)
    assert a.wire == pytest.approx(0.5, abs=0.05)
    assert a.waits["b"] == pytest.approx(5.0, abs=0.05)  # and it for the line
    assert b.wire == pytest.approx(2.0, abs=0.05) and b.waits["a"] == pytest.approx(1.0, abs=0.05)
    whole = a.mean(a)
    assert whole == a and whole.row().waits[0].peer == "b"


def test_orders_that_go_in_circles_have_no_length() -> None:
    def lane(peer: str, stage: int, *order: tuple[str, int]) -> Track:
        done = [
            Done(kind=kind, microbatch=m, start=i, end=i + 1, arrived=i if (stage, kind) != (0, "forward") else None)  # type: ignore[arg-type]
            for i, (kind, m) in enumerate(order)
        ]
        update = Done(kind="update", microbatch=None, start=len(order), end=len(order))
        return Track(peer=peer, stage=stage, work=0.5, done=(*done, update))

    a = lane("a", 0, ("forward", 1), ("backward", 1), ("forward", 0), ("backward", 0))
    b = lane("b", 1, ("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1))
    c = lane("c", 2, ("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1))
    step = Step(tracks=(a, b, c))
    assert Order.of(step, 0.0).seconds() is None
    assert changes(step, path(step), name) == []


@st.composite
def swarms(draw: st.DrawFn) -> Swarm:
    rng = random.Random(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 4))
    stages = [[f"{s}{r}" for r in range(draw(st.integers(1, 3)))] for s in range(count)]
    peers = [p for stage in stages for p in stage]
    return Swarm(
        stages=stages,
        microbatches=draw(st.integers(1, 6)),
        forward={p: rng.uniform(0.05, 4.0) for p in peers},
        wire={(p, q): rng.uniform(0.01, 3.0) for p in peers for q in peers},
        clocks={p: rng.uniform(0, 1e6) for p in peers},
    )


@settings(max_examples=60, deadline=None)
@given(swarm=swarms(), seed=st.integers(0, 2**32))
def test_any_step(swarm: Swarm, seed: int) -> None:
    took, told = swarm.step(begin=50.0)
    step = read(swarm, told)
    pieces = path(step)
    assert all(a.end == b.start for a, b in itertools.pairwise(pieces))
    assert all(s.start < s.end for s in pieces) and pieces[-1].end == step.end
    idle = {p for p in swarm.peers if not told[p].ops}
    assert not idle or len(idle) < len(swarm.peers)
    if len(swarm.stages) > 1:
        assert length(step) == pytest.approx(took, abs=max(swarm.wire.values()) + ACK_SECONDS)
    order = Order.of(step, pieces[0].start)
    recorded = order.seconds()
    assert recorded == pytest.approx(length(step), abs=1e-6)
    rng = random.Random(seed)
    quicker = {id(n): n.seconds * rng.random() for n in order.nodes.values()}
    assert (order.seconds(took=lambda n: quicker[id(n)]) or 0.0) <= length(step) + 1e-6
    lines = {id(n): min(n.wire, rng.random()) for n in order.nodes.values()}
    assert (order.seconds(wired=lambda n: lines[id(n)]) or 0.0) <= length(step) + 1e-6
    assert all(0 < c.told.seconds < length(step) for c in changes(step, pieces, name))
    for i, track in enumerate(step.tracks):
        s = spent(step, i)
        total = s.compute + s.codec + s.update + s.wire + s.other + sum(s.waits.values())
        assert total == pytest.approx(track.end - track.begin + (track.before or 0.0), abs=1e-6)
