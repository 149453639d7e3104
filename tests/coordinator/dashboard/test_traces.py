"""Steps on record: what peers say is checked, written with the batch, and read again."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_steps import Swarm

from potluck.coordinator.dashboard import traces
from potluck.coordinator.dashboard.traces import TraceRecorder, read_step, read_steps
from potluck.coordinator.dashboard.track import MOST_NBYTES, MOST_OPS, packed, parsed, unpacked
from potluck.coordinator.store import Store
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import ModelConfig
from potluck.protocol.plan import Plan, Replica, Shape, StagePlan

SHAPE = Shape.of(ModelConfig(d_model=32, layers=4, heads=2, rotary_dim=8, seq_len=16), 300)
UNTIL = 1000  # leased
SWARM = Swarm(stages=[["a", "b"], ["c"]], microbatches=4, clocks={"b": 17.0, "c": 3.0})


def plan_of(swarm: Swarm, generation: int = 1) -> Plan:
    ends = [0, 2, 4] if len(swarm.stages) == 2 else list(range(len(swarm.stages) + 1))
    return Plan(
        generation=generation,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        stages=tuple(
            StagePlan(first_layer=ends[i], last_layer=ends[i + 1], replicas=tuple(Replica(peer=p) for p in stage))
            for i, stage in enumerate(swarm.stages)
        ),
        microbatches=2,
        microbatch_size=1,
    )


def reports(swarm: Swarm, step: int, generation: int = 1) -> list[tuple[str, pb.StepDone]]:
    _, told = swarm.step(begin=100.0 * step)
    return [(p, pb.StepDone(generation=generation, step=step, trace=trace)) for p, trace in told.items()]


class Records:
    """A recorder and its file."""

    def __init__(self, path: Path) -> None:
        self.store, self.recorder = Store(path), TraceRecorder(SHAPE)
        self.db = sqlite3.connect(path)

    def hear(self, said: list[tuple[str, pb.StepDone]], plan: Plan | None, now: float = 0.0) -> None:
        news = self.recorder.heard(said, plan, UNTIL, now)
        again = self.recorder.heard(said, plan, UNTIL, now)  # as when the disk refuses
        assert again.statements == news.statements
        self.store.write([], now, news.statements)
        self.recorder.take(news)

    def count(self, table: str) -> int:
        return int(self.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    found = Records(tmp_path / "run.sqlite")
    yield found
    found.db.close()
    found.store.close()


def test_a_step_is_on_record_once_everybody_has_told(records: Records) -> None:
    plan, (took, _) = plan_of(SWARM), SWARM.step()
    for step in range(3):
        said = reports(SWARM, step)
        records.hear(said[:2], plan, now=float(step))
        assert records.count("steps") == step
        records.hear(said[2:], plan, now=step + 0.5)
    rows = read_steps(records.db, 10, "newest")
    assert [r.step for r in rows] == [3, 2, 1] and [r.time for r in rows] == [2.5, 1.5, 0.5]
    assert all(r.seconds == pytest.approx(took, abs=0.05) and r.usual == pytest.approx(r.seconds) for r in rows)
    page = read_step(records.db, 2)
    assert page is not None and (page.before, page.after) == (1, 3)
    assert [(lane.peer, lane.stage) for lane in page.lanes] == [("a", 0), ("b", 0), ("c", 1)]
    assert page.path[0].start == pytest.approx(0.0, abs=1e-6)
    assert page.path[-1].end == pytest.approx(page.row.seconds, abs=1e-6)
    assert page.words and read_step(records.db, 8) is None
    records.hear(reports(SWARM, 1)[:2], plan)  # said again
    assert read_step(records.db, 2) == page
    time = records.recorder.time("c")
    assert time is not None and time.compute == pytest.approx(4 * 3.0 - 8 * 0.01, abs=0.01)
    assert records.recorder.time("x") is None


def test_a_peer_that_tells_nothing_is_a_lane_without_operations(records: Records) -> None:
    said = [(p, pb.StepDone(generation=1, step=0) if p == "b" else done) for p, done in reports(SWARM, 0)]
    records.hear(said, plan_of(SWARM))
    page = read_step(records.db, 1)
    assert page is not None and [len(lane.ops) for lane in page.lanes] == [5, 0, 9]


def test_who_never_says_that_a_step_is_done_does_not_hold_up_the_record(records: Records) -> None:
    plan = plan_of(SWARM)
    for step in range(12):
        records.hear([r for r in reports(SWARM, step) if r[0] != "c"], plan)
    assert [r.step for r in read_steps(records.db, 20, "newest")] == [4, 3, 2, 1]


def test_what_is_of_no_use_is_left_out(records: Records) -> None:
    plan, said = plan_of(SWARM), reports(SWARM, 0)
    records.hear([("x", said[0][1])], plan)  # nobody's
    records.hear(said, None)
    records.hear(reports(SWARM, 0, generation=9), plan)
    records.hear([(p, pb.StepDone(generation=1, step=UNTIL, trace=d.trace)) for p, d in said], plan)
    records.hear([(p, pb.StepDone(generation=1, step=0)) for p, _ in said], plan)  # a share of the steps is told
    assert records.count("steps") == records.count("traces") == 0
    records.hear(reports(SWARM, 1), plan)
    records.hear(reports(SWARM, 1, generation=2), plan_of(SWARM, 2))  # done again: it replaces what it was
    assert records.count("steps") == 1 and records.count("traces") == 3


def test_the_newest_and_the_slowest_are_kept(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "NEWEST", 5)
    monkeypatch.setattr(traces, "LEAST_NEWEST", 5)
    monkeypatch.setattr(traces, "SLOWEST", 2)
    slow = Swarm(stages=SWARM.stages, microbatches=4, forward={"c": 3.0})
    slower = Swarm(stages=SWARM.stages, microbatches=4, forward={"c": 4.0})
    for step in range(15):
        records.hear(reports({2: slow, 4: slower}.get(step, SWARM), step), plan_of(SWARM))
    assert [r.step for r in read_steps(records.db, 20, "newest")] == [15, 14, 13, 12, 11, 5, 3]
    assert [r.step for r in read_steps(records.db, 2, "slowest")] == [5, 3]
    assert records.count("traces") == 3 * 7
    page = read_step(records.db, 5)
    assert page is not None and page.words[0].startswith("The step took") and "c was slow" in page.words[0]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_trace_breaks_anything(data: st.DataObject) -> None:
    """Whatever a peer says: numbers of any size in lists of any length, or what makes no sense together."""
    whole = st.integers(0, 2**32 - 1)
    count = data.draw(st.integers(0, 6))

    def trace() -> pb.Trace:
        def few(values: st.SearchStrategy[int]) -> list[int]:
            return data.draw(st.lists(values, min_size=count, max_size=count + data.draw(st.integers(0, 1))))

        times = data.draw(st.sampled_from([whole, st.integers(0, 2_000_000), st.just(1)]))
        fields = {name: few(times) for name in ("pause", "took", "early", "decode", "encode", "told")}
        return pb.Trace(
            began=data.draw(st.integers(0, 2**64 - 1)),
            before=data.draw(whole),
            ops=few(st.integers(0, 31)),
            update=data.draw(whole),
            left_out=data.draw(st.integers(0, 2)),
            **fields,
        )

    said = [(p, pb.StepDone(generation=1, step=0, trace=trace())) for p in "abc"]
    news = TraceRecorder(SHAPE).heard(said, plan_of(SWARM), UNTIL, 0.0)
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE steps (step INTEGER PRIMARY KEY, generation, time, seconds)")
    db.execute("CREATE TABLE traces (step, peer, stage, work, begin, trace)")
    db.execute("CREATE TABLE peers (id, name)")
    for sql, values in news.statements:
        db.execute(sql, values)
    page = read_step(db, 1)
    if page is not None:
        assert page.path[-1].end - page.path[0].start == pytest.approx(page.row.seconds, rel=1e-6, abs=1e-3)
        assert all(a.end == b.start for a, b in zip(page.path, page.path[1:], strict=False))
    db.close()


def test_a_trace_is_no_longer_than_it_says() -> None:
    rng = random.Random(1)
    _, told = SWARM.step()
    good = told["c"]
    assert unpacked(good, "c", 1, 0.5) is not None and parsed(packed(good)) == good
    grown = pb.Trace.FromString(good.SerializeToString() + b"\xfa\x3f" + bytes([100]) + rng.randbytes(100))
    assert packed(grown) == good.SerializeToString()
    many = [2**32 - 1] * (MOST_OPS + 1)
    fields = dict.fromkeys(("ops", "pause", "took", "early", "decode", "encode", "told"), many)
    assert unpacked(pb.Trace(**fields), "c", 1, 0.5) is None
    longest = pb.Trace(**{name: x[:MOST_OPS] for name, x in fields.items()})
    assert parsed(packed(longest)) is None and len(packed(longest)) > MOST_NBYTES
    assert parsed(b"\xff") is None
