"""Who is there when: pure functions of a seed. At second 0 everybody is up, unless a turn at 0 says otherwise."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True, order=True)
class Turn:
    """At ``seconds`` after the start ``host`` comes (``up``) or goes."""

    seconds: float
    host: int
    up: bool


def sessions(seed: int, *, hosts: int, share_per_hour: float, back_seconds: float, duration: float) -> list[Turn]:
    """Hosts go independently, at a rate of ``share_per_hour`` of those present, and are back ``back_seconds`` later.

    Both times are exponential, the second with that mean. ``duration`` in seconds. A host's turns do not depend on how
    many hosts there are, nor on ``duration``.
    """
    if share_per_hour < 0 or back_seconds <= 0:
        raise ValueError("share_per_hour must be 0 or more, back_seconds more than 0")
    turns = []
    for host in range(hosts):
        rng = random.Random(f"{seed}/{host}")
        at, up = 0.0, True
        while share_per_hour:
            at += rng.expovariate(share_per_hour / HOUR if up else 1 / back_seconds)
            if at >= duration:
                break
            up = not up
            turns.append(Turn(at, host, up))
    return sorted(turns)


def daylight(
    seed: int, *, hosts: int, low: float, high: float, duration: float, day_seconds: float = DAY
) -> list[Turn]:
    """Hosts that follow the day: the share present is ``low`` at second 0, midnight, ``high`` half a day later.

    Between them it is a cosine. Every host has its own threshold, so some are always there and some only at noon, and a
    clock of its own, wrong by up to a 24th of a day either way. ``day_seconds`` makes days shorter.
    """
    if not 0 <= low < high <= 1:
        raise ValueError("0 <= low < high <= 1")
    rng = random.Random(seed)
    thresholds = [(k + rng.random()) / hosts for k in range(hosts)]
    rng.shuffle(thresholds)
    turns = []
    for host, threshold in enumerate(thresholds):
        late = rng.uniform(-1, 1) / 24
        if threshold <= low:
            continue
        if threshold >= high:
            turns.append(Turn(0.0, host, False))
            continue
        morning = math.acos(1 - 2 * (threshold - low) / (high - low)) / math.tau
        if not morning <= -late % 1 < 1 - morning:
            turns.append(Turn(0.0, host, False))
        for day in range(-1, math.ceil(duration / day_seconds) + 1):
            for at, up in ((day + morning + late, True), (day + 1 - morning + late, False)):
                if 0 < at * day_seconds < duration:
                    turns.append(Turn(at * day_seconds, host, up))
    return sorted(turns)
