"""What workers say of their steps: real engines, with a slow peer or a slow line among them, and who gets the blame."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from potluck.coordinator.dashboard.shapes import StepPage
from potluck.coordinator.dashboard.traces import TraceRecorder, read_step
from potluck.coordinator.store import SCHEMA
from potluck.protocol import control_pb2 as pb
from potluck.protocol.frames import Frame, Kind
from potluck.protocol.plan import Plan, Shape
from potluck.worker.pipeline import Pipeline
from potluck.worker.tracing import LONGEST, MOST_OPS, TOLD_SECONDS, Tracer, is_told

FORWARD_SECONDS = 0.3  # by far the most of what a step takes
STEPS, DISTURBED = 5, 3  # from which step on one thing is slow; the very first one is longer than the others


class Watched:
    """A run of two stages with two replicas each, whose forwards take a known time; what it reports is recorded.

    ``slow`` says how long a forward takes at a peer, ``line`` how long a frame is on its way, from step
    ``DISTURBED`` on.
    """

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.reports = run, list[tuple[float, str, pb.StepDone]]()
        self.slow: Callable[[Plan, str], float] = lambda plan, peer: FORWARD_SECONDS
        self.line: Callable[[Plan, str, str], float] = lambda plan, sender, receiver: 0.0
        monkeypatch.setattr("potluck.worker.tracing.TOLD_SECONDS", 1e-6)
        output, put, watched = Pipeline._output, run.put, self

        def slowly(pipeline: Pipeline, batch: Any) -> Any:
            if torch.is_grad_enabled():
                is_slow = pipeline._begun > DISTURBED
                time.sleep(self.slow(pipeline.seat.plan, pipeline.seat.peer) if is_slow else FORWARD_SECONDS)
            return output(pipeline, batch)

        def heard(what: Any) -> None:
            report = getattr(what, "report", None)
            if report is not None and report.WhichOneof("body") == "step_done":
                self.reports.append((time.monotonic(), what.peer, report.step_done))
            put(what)

        class Worker(run.worker_class):  # type: ignore[misc]
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                post = self.links.post

                def later(peer: str, frame: Frame) -> None:
                    header = frame.header
                    is_slow = header.kind in (Kind.ACTIVATION, Kind.GRADIENT) and header.step >= DISTURBED
                    seconds = watched.line(self.links.plan, self.peer, peer) if is_slow else 0.0
                    if seconds:
                        threading.Timer(seconds, post, (peer, frame)).start()
                    else:
                        post(peer, frame)

                self.links.post = later

        monkeypatch.setattr(Pipeline, "_output", slowly)
        run.put, run.worker_class = heard, Worker

    def pages(self) -> list[StepPage]:
        """Trains; what is on record of every step."""
        plans: list[Plan] = []
        self.run.on_event = lambda event: plans.append(self.run.machine.plan) if self.run.machine.plan else None
        self.run.join("a", "b", "c", "d")
        self.run.finish()
        recorder = TraceRecorder(Shape.of(self.run.config.model, self.run.manifest.vocab_size))
        db = sqlite3.connect(":memory:")
        db.executescript(SCHEMA)
        for at, peer, done in self.reports:
            news = recorder.heard([(peer, done)], plans[-1], STEPS, at)
            recorder.take(news)
            for sql, values in news.statements:
                db.execute(sql, values)
        found = [read_step(db, step) for step in range(1, STEPS + 1)]
        db.close()
        assert all(page is not None for page in found)
        return [page for page in found if page is not None]


@pytest.fixture
def watched(local_run: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Watched:
    config = make_config(
        steps=STEPS, pipeline={"microbatches": 2}, coordinator={"wait_for": 4}, eval={"every": 100, "samples": 2}
    )
    return Watched(local_run(config), monkeypatch)


def undisturbed(pages: list[StepPage]) -> float:
    """How long a step takes at best: what else the machine does is nobody's here."""
    return min(page.row.seconds for page in pages[1:DISTURBED])


def test_a_slow_peer_gets_the_blame(watched: Watched) -> None:
    def is_slow(plan: Plan, peer: str) -> bool:
        return plan.peer_of(1, 0) == peer

    blamed: set[str] = set()

    def slow(plan: Plan, peer: str) -> float:
        if is_slow(plan, peer):
            blamed.add(peer)
        return FORWARD_SECONDS * (3 if is_slow(plan, peer) else 1)

    watched.slow = slow
    pages = watched.pages()
    (peer,) = blamed
    found = []
    for page in pages[DISTURBED:]:
        assert f": {peer} was slow" in page.words[0], page.words
        about = [c for c in page.counterfactuals if c.peer == peer and c.receiver is None and "as quick" in c.text]
        found.append(about[0].seconds)
        assert page.row.seconds > 1.5 * undisturbed(pages)
    assert min(found) == pytest.approx(undisturbed(pages), rel=0.25)


def test_a_slow_line_gets_the_blame(watched: Watched) -> None:
    """One way only, of one pair: the receiver's clock may not look late instead."""
    blamed: set[tuple[str, str]] = set()

    def line(plan: Plan, sender: str, receiver: str) -> float:
        if (sender, receiver) != (plan.peer_of(0, 0), plan.peer_of(1, 0)):
            return 0.0
        blamed.add((sender, receiver))
        return 4 * FORWARD_SECONDS

    watched.line = line
    pages = watched.pages()
    ((sender, receiver),) = blamed
    found = []
    for page in pages[DISTURBED:]:
        assert f": the slow line from {sender} to {receiver}" in page.words[0], page.words
        found.append(next(c for c in page.counterfactuals if (c.peer, c.receiver) == (sender, receiver)).seconds)
        assert page.row.seconds > 1.5 * undisturbed(pages)
    assert min(found) == pytest.approx(undisturbed(pages), rel=0.25)


def test_of_short_steps_a_share_is_told_and_the_slow_ones() -> None:
    usual = 0.1
    told = [step for step in range(1000) if is_told(step, usual, usual)]
    assert TOLD_SECONDS / 2 <= 1000 * usual / len(told) / 1 <= 2 * TOLD_SECONDS
    other = [step for step in range(1000) if is_told(step, usual, 1.3 * usual)]
    assert set(told) <= set(other) or set(other) <= set(told)  # who measures a little less agrees on most
    assert is_told(1, 0.2, usual) and not is_told(1, 0.12, usual)
    assert is_told(1, 0.1, None) and all(is_told(step, 10.0, 10.0) for step in range(9))


def traced(ops: int, step: int = 0) -> pb.Trace:
    """Of a step with so many forwards, each of a second, by a clock that counts its readings."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    tracer = Tracer(clock)
    tracer.begin(step)
    for m in range(ops):
        tracer.end(tracer.start(step, m, None, is_backward=False))
    updating = clock()
    told = tracer.done(updating, {(Kind.ACTIVATION, 1): now[0]})
    assert told is not None
    return told


def test_a_trace_says_when_what_was_done() -> None:
    trace = traced(2)
    assert list(trace.ops) == [0, 4] and list(trace.took) == [500_000] * 2 and list(trace.pause) == [500_000] * 2
    assert list(trace.told) == [0, 500_001] and list(trace.early) == [0, 0]
    assert (trace.before, trace.pause_update, trace.update, trace.left_out) == (0, 500_000, 500_000, 0)


def test_of_a_long_step_the_middle_is_left_out() -> None:
    trace = traced(MOST_OPS + 10)
    half = MOST_OPS // 2
    assert len(trace.ops) == MOST_OPS and trace.left_out == 10
    assert trace.ops[half - 1] // 4 == half - 1 and trace.ops[half] // 4 == half + 10
    assert trace.pause[half] > 10 * 500_000  # the rest went in them
    assert len(traced(16).SerializeToString()) < 250  # eight microbatches


def test_a_clock_that_jumps_is_no_error() -> None:
    times = iter([0.0, 5.0, 4.0, 1e9, 0.0])
    tracer = Tracer(lambda: next(times))
    tracer.begin(0)
    tracer.end(tracer.start(0, 0, None, is_backward=False))
    trace = tracer.done(1e9, {})
    assert trace is not None and list(trace.took) == [LONGEST] and list(trace.pause) == [0] and trace.update == 0
