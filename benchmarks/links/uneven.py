"""One machine of four is slower than the others: a step before and after its stage's microbatches are shared anew."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.netlab.lab import Lab
from benchmarks.netlab.profiles import PROFILES, UNLIMITED
from potluck.coordinator.sharing import best_shares, last_done
from potluck.protocol.plan import even_shares

from .runs import Crew, pace
from .scale import MICROBATCHES, Layout, run_config

STEPS = 5  # measured before, and after


@dataclass(kw_only=True)
class Uneven:
    """``calculated``: how many times as fast the stage of the slow machine can be at best."""

    layout: str
    profile: str
    times: float  # as long as others need for a microbatch, of one machine
    before: float  # seconds a step
    after: float
    shares: list[list[int]]
    calculated: float


def share(layout: Layout, times: float, line: str, folder: Path) -> Uneven:
    """Trains until the shares have changed by themselves, and some steps more."""
    count = layout.stages * layout.replicas
    there = PROFILES[line].scaled(rate=layout.rate_factor, time=layout.time_factor).after(UNLIMITED)
    with Lab(there, hosts=1 + count) as lab:
        crew = Crew(lab, run_config(layout, "default", steps=100_000, host=lab.address(0)), pace(layout), count, folder)
        crew.slow = {1: times}

        def plans() -> list[list[list[int]]]:
            events = crew.rows("SELECT data FROM events WHERE kind = 'PlanIssued' ORDER BY id")
            return [json.loads(data).get("shares", []) for (data,) in events]

        try:
            crew.start()
            first = crew.wait(2)
            begin = crew.wait(first + STEPS)
            crew.until(lambda: any(any(stage) for plan in plans()[1:] for stage in plan))
            known = max(crew.times())
            crew.wait(known + 3 + STEPS)
            seconds, shares = crew.times(), plans()[-1]
        finally:
            crew.stop()
    last, paces = max(seconds), [times, *[1.0] * (layout.replicas - 1)]
    every = MICROBATCHES * layout.replicas
    even = last_done(even_shares(every, layout.replicas), paces)
    return Uneven(
        layout=layout.name,
        profile=line,
        times=times,
        before=(seconds[begin] - seconds[first]) / (begin - first),
        after=(seconds[last] - seconds[last - STEPS]) / STEPS,
        shares=shares,
        calculated=even / last_done(best_shares(every, paces) or even_shares(every, layout.replicas), paces),
    )
