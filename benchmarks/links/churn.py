"""Workers that lose power and come back while they train behind home lines: real processes, in scaled time.

Machines go at random, at a given share an hour of the *real* run, by SIGKILL and with their line cut, so that nobody is
told; they are back after five minutes of it in the mean, with their folders. What does not scale makes it harder: a
worker takes its eight seconds to start, and a broken line is waited for its three.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.netlab.lab import Lab
from benchmarks.netlab.profiles import UNLIMITED, Profile
from benchmarks.netlab.traces import Turn, sessions
from potluck.coordinator.verify import verify

from .runs import Crew, pace, quicken
from .scale import Layout, run_config

BACK_SECONDS = 300.0


@dataclass(kw_only=True)
class Churn:
    """``problems``: what ``potluck ledger verify`` finds wrong. ``up``: mean share of machines that were there."""

    layout: str
    profile: str
    share_per_hour: float
    seconds: float  # from the first committed round to the end: standing still at the end counts
    deaths: int
    up: float
    samples_per_second: float
    problems: list[str]


def endure(profile: Profile, layout: Layout, share: float, *, seconds: float, seed: int, folder: Path) -> Churn:
    """Trains ``seconds`` behind the profile's lines while ``share`` of the machines go in an hour of the real run."""
    count = layout.stages * layout.replicas
    there = profile.scaled(rate=layout.rate_factor, time=layout.time_factor).after(UNLIMITED)
    turns = [
        Turn(turn.seconds * layout.time_factor, 1 + turn.host, turn.up)
        for turn in sessions(
            seed,
            hosts=count,
            share_per_hour=share,
            back_seconds=BACK_SECONDS,
            duration=seconds / layout.time_factor,
        )
    ]
    with Lab(there, hosts=1 + count) as lab:
        for i in range(1, 1 + count):
            lab.set(i, UNLIMITED)
        config = run_config(layout, "default", steps=100_000, host=lab.address(0))
        config["checkpoint"]["save_rounds"] = 1
        crew = Crew(lab, config, pace(layout), count, folder)
        try:
            crew.start()
            crew.until(lambda: crew.rows("SELECT 1 FROM rounds"))
            for i in range(1, 1 + count):
                lab.set(i, there.line(i))
                quicken(lab, i, layout.time_factor)
            up = live(lab, crew, turns, seconds, count)
            ended = time.time()
            rounds = crew.rows("SELECT committed, sample FROM rounds ORDER BY step")
        finally:
            crew.stop()
    report = verify(folder / "coordinator" / "run.sqlite")
    (begin, first), (_, last) = rounds[0], rounds[-1]
    return Churn(
        layout=layout.name,
        profile=profile.name,
        share_per_hour=share,
        seconds=ended - begin,
        deaths=sum(not turn.up for turn in turns),
        up=up,
        samples_per_second=(last - first) / (ended - begin),
        problems=report.lines() if report.problems else [],
    )


def live(lab: Lab, crew: Crew, turns: list[Turn], seconds: float, count: int) -> float:
    """Follows the trace; returns the mean share of machines that were up."""
    begun, down, absent, before = time.monotonic(), set[int](), 0.0, 0.0
    for turn in [*turns, Turn(seconds, 0, True)]:
        while (now := time.monotonic() - begun) < turn.seconds:
            crew.until(lambda: True)
            time.sleep(min(0.5, turn.seconds - now))
        absent, before = absent + len(down) * (now - before), now
        if turn.host == 0:
            break
        if turn.up:
            down.discard(turn.host)
            lab.mend(turn.host)
            crew.join(turn.host)
        else:
            down.add(turn.host)
            lab.cut(turn.host)
            crew.kill(turn.host)
    return 1 - absent / before / count
