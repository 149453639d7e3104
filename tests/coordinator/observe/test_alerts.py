"""When alerts are raised and resolved: pure rules, so time is a number here."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from fake_source import FakeSource

from potluck.coordinator.dashboard.shapes import Point, RoundRow, StageRow
from potluck.coordinator.observe.alerts import NAMES, Judged, Look, Memory, judge
from potluck.protocol.config import ObserveConfig

START = 1000.0
STATE = msgspec.structs.replace(FakeSource().state(), now=START, rounds=(), stages=(), alerts=())
GB = 10**9


class Watched:
    """A run looked at again and again; what stays as it is need not be said."""

    def __init__(self, **settings: Any) -> None:
        self.config = ObserveConfig(**{"no_commit_minutes": 0, **settings})
        self.memory, self.now, self.state, self.number = Memory(), START, STATE, 0
        self.raised: list[str] = []
        self.resolved: list[str] = []
        self.seen: dict[str, Any] = {}
        self.last: Judged

    def look(self, later: float = 5.0, points: tuple[Point, ...] = (), **fields: Any) -> list[str]:
        """The names that stand then."""
        self.now += later
        known = {key: value for key, value in fields.items() if key in Look.__annotations__}
        self.seen |= known
        others = {key: value for key, value in fields.items() if key not in known}
        self.state = msgspec.structs.replace(self.state, **others)
        self.last = judge(Look(state=self.state, points=points, **self.seen), self.now, self.memory, self.config)
        self.memory = self.last.memory
        self.raised += [alert.name for alert in self.last.raised]
        self.resolved += [alert.name for alert in self.last.resolved]
        return [alert.name for alert in self.last.alerts]

    def losses(self, *losses: float, later: float = 5.0) -> list[str]:
        points = []
        for loss in losses:
            self.number += 1
            points.append(Point(id=self.number, step=self.number, tokens=0, time=self.now, train=loss, heldout=None))
        return self.look(later, tuple(points))

    def heldout(self, loss: float) -> list[str]:
        self.number += 1
        point = Point(id=self.number, step=self.number, tokens=0, time=self.now, train=None, heldout=loss)
        return self.look(points=(point,))


def a_round(at: float, degraded: bool = False) -> RoundRow:
    fields = {"round": 7, "step": 9, "replicas": 2, "samples": 4, "agree": True, "nbytes": 9, "seconds": 1.0}
    return RoundRow(**fields, committed=at, degraded=degraded)


def stages(*replicas: int) -> tuple[StageRow, ...]:
    return tuple(
        StageRow(stage=i, first_layer=i, last_layer=i, parameters=1, replicas=("p",) * n, is_thin=n == 1)
        for i, n in enumerate(replicas)
    )


def usual(number: int = 40) -> list[float]:
    return [4.0 + 0.05 * math.sin(i) for i in range(number)]


def test_nothing_is_wrong_with_a_quiet_run() -> None:
    run = Watched(no_commit_minutes=1)
    for i in range(200):
        now = run.now
        known = {"disk_free_nbytes": 50 * GB, "clock_offset": 0.01, "rounds": (a_round(now),), "stages": stages(2, 2)}
        run.look(**known)
        assert run.losses(4.0 - 0.001 * i) == []


def test_no_commit_while_it_trains() -> None:
    run = Watched(no_commit_minutes=10)
    assert run.look(3000.0, phase="waiting") == []
    assert run.look(phase="training") == []
    assert run.look(599.0) == [] and run.look(1.0) == ["no_commit"]
    assert run.last.alerts[0].since == run.now
    assert "10 min" in run.last.alerts[0].text
    run.look(600.0)
    assert "20 min" in run.last.alerts[0].text and run.last.alerts[0].since == run.now - 600
    assert run.look(rounds=(a_round(run.now),)) == [] and run.resolved == ["no_commit"]
    run.look(700.0)
    assert run.look(is_paused=True) == [] and run.look(is_paused=False) == [] and run.look(590.0) == []
    assert Watched(no_commit_minutes=0).look(1e9) == []


def test_a_run_whose_rounds_take_long_may_take_long() -> None:
    run = Watched(no_commit_minutes=10)
    hours = tuple(a_round(START - 3600.0 * i) for i in range(5))
    run.look(1.0, rounds=hours)
    assert run.look(2.9 * 3600) == [] and run.look(0.2 * 3600) == ["no_commit"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number(loss: float) -> None:
    run = Watched()
    assert run.losses(loss) == ["loss"] and "diverged" in run.last.alerts[0].text
    assert run.heldout(loss) == ["loss", "heldout_loss"]
    assert run.heldout(4.0) == ["loss"]
    run.losses(*usual(3))
    assert run.look(29.0) == ["loss"], "not before it has been right for a while"
    assert run.look(1.0) == []


def test_a_spike_is_told_once_and_stays_until_the_loss_is_back() -> None:
    run = Watched()
    run.losses(*usual())
    assert run.losses(9.0) == [], "one high step is none"
    assert run.losses(4.0, 4.0, 4.0) == []
    assert run.losses(9.0, 9.0) == ["loss"] and "from 4.0" in run.last.alerts[0].text
    since = run.last.alerts[0].since
    for _ in range(100):
        assert run.losses(9.0) == ["loss"], "what is too high is no measure of what is usual"
    assert run.losses(4.6, 4.6, 4.6) == ["loss"] and run.look(100.0) == ["loss"], "between the thresholds it stays"
    run.losses(4.1, 4.1, 4.1)
    assert run.look(30.0) == [] and run.raised == ["loss"] and run.resolved == ["loss"]
    assert since < run.now


def test_a_noisy_loss_is_no_spike_and_neither_is_its_beginning() -> None:
    run = Watched()
    assert run.losses(*[9.0, 2.0] * 9) == []
    run.losses(*[3.0, 5.0] * 30)
    assert run.losses(5.5, 5.5, 5.5) == []


def test_the_heldout_loss_rises() -> None:
    run = Watched()
    for loss in (7.0, 5.0, 4.0, 4.1):
        assert run.heldout(loss) == []
    assert run.heldout(5.0) == ["heldout_loss"] and run.heldout(4.6) == ["heldout_loss"]
    assert run.heldout(4.2) == []


def test_one_replica_left_of_a_stage_that_had_more() -> None:
    run = Watched()
    assert run.look(1000.0, stages=stages(1, 1)) == [], "a run of one replica each is as it was set up"
    run.look(stages=stages(2, 2))
    assert run.look(stages=stages(2, 1)) == [] and run.look(25.0) == [] and run.look(5.0) == ["thin_stage"]
    assert "Stage 1 has one replica left" in run.last.alerts[0].text
    run.look(stages=stages(1, 1))
    assert "Stages 0, 1 have" in run.last.alerts[0].text and len(run.raised) == 1
    run.look(stages=stages(2, 2))
    assert run.look(stages=stages(2, 1)) == ["thin_stage"], "back for a moment is not resolved"
    run.look(stages=stages(2, 2))
    assert run.look(30.0) == [] and run.resolved == ["thin_stage"]


def test_the_disk_has_a_margin() -> None:
    run = Watched(disk_free_gb=2)
    assert run.look(disk_free_nbytes=3 * GB) == []
    assert run.look(disk_free_nbytes=int(1.9 * GB)) == ["disk_low"] and "1.90 GB" in run.last.alerts[0].text
    assert run.look(1000.0, disk_free_nbytes=int(2.2 * GB)) == ["disk_low"]
    assert run.look(1000.0, disk_free_nbytes=None) == ["disk_low"], "nobody knows: it stays"
    run.look(disk_free_nbytes=3 * GB)
    assert run.look(60.0) == []
    assert Watched(disk_free_gb=0).look(disk_free_nbytes=0) == []


def test_a_disk_that_refuses() -> None:
    run = Watched()
    assert run.look(refusing="the disk is full") == [] and run.look(10.0) == ["disk_refuses"]
    assert run.last.alerts[0].text == "the disk is full"
    assert run.look(refusing=None) == ["disk_refuses"] and run.look(30.0) == []


def test_the_clock_is_set() -> None:
    run = Watched()
    run.look(clock_offset=4.0)
    assert run.look(100.0) == []
    run.look(clock_offset=-3600.0)
    assert run.look(10.0) == ["clock"] and "60 min behind" in run.last.alerts[0].text
    run.look(clock_offset=4.0)
    assert run.look(1000.0) == ["clock"]
    run.look(clock_offset=1.0)
    assert run.look(60.0) == []
    assert Watched(clock_seconds=0).look(clock_offset=1e6) == []


def test_a_degraded_run() -> None:
    run = Watched()
    assert run.look(rounds=(a_round(START, degraded=True),)) == ["degraded"]
    assert run.look(rounds=(a_round(START + 9),)) == [] and run.resolved == ["degraded"]
    run.look(rounds=(a_round(START, degraded=True),))
    assert run.look(phase="finished") == []


def test_time_that_runs_back_raises_nothing_and_breaks_nothing() -> None:
    run = Watched()
    run.look(refusing="full")
    assert run.look(-1e6) == [] and run.look(10.0) == ["disk_refuses"]


def test_all_at_once_and_every_rule_has_been_seen() -> None:
    run = Watched(no_commit_minutes=30)
    run.look(stages=stages(2))
    run.losses(math.nan)
    run.heldout(math.nan)
    wrong = {"disk_free_nbytes": 0, "refusing": "full", "clock_offset": 99.0, "stages": stages(1)}
    run.look(rounds=(a_round(START, degraded=True),), **wrong)
    assert run.look(4000.0) == list(NAMES)
    texts = [alert.text for alert in run.last.alerts]
    assert len(set(texts)) == len(texts) and all(texts)
