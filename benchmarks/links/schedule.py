"""How good is the order of a step? An exact answer for small pipelines, and potluck's own rule, replayed.

One chain of stages does M microbatches: forwards 0..S-1, then backwards S-1..0 (the last stage's two are one). Every
stage does one thing at a time, and every hop carries one tensor at a time in each direction: ``wire`` seconds on the
line, ``latency`` more until it is there. Transfers overlap with computing.

This is a job shop with equal jobs, so that only *which way next* is to be decided, never for which microbatch.
:func:`best` searches all active schedules (Giffler and Thompson, Operations Research 8, 1960) with a lower bound.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

BACK = 1


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds, by stage; ``wire`` and ``latency`` by hop, the same both ways."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    wire: tuple[float, ...]
    latency: tuple[float, ...]

    @property
    def stages(self) -> int:
        return len(self.forward)


class Board:
    """A schedule in the making."""

    def __init__(self, times: Times, count: int) -> None:
        self.times, self.count = times, count
        stages = times.stages
        self.free = [0.0] * stages
        self.done = [[0, 0] for _ in range(stages)]  # forwards and backwards
        self.line = [[0.0, 0.0] for _ in times.wire]  # free from, by hop and direction
        self.ready = [([0.0] * count, [0.0] * count) for _ in range(stages)]  # when an input is there
        last = stages - 1
        self.work = [
            (0.0 if s == last else times.forward[s], times.backward[s] + (times.forward[s] if s == last else 0.0))
            for s in range(stages)
        ]

    def copy(self) -> Board:
        other = Board.__new__(Board)
        other.times, other.count, other.work = self.times, self.count, self.work
        other.free = self.free[:]
        other.done = [d[:] for d in self.done]
        other.line = [x[:] for x in self.line]
        other.ready = [(a[:], b[:]) for a, b in self.ready]
        return other

    def start_of(self, stage: int, way: int) -> float | None:
        """When the next forward (0) or backward (1) of a stage could start; None if its input is not under way."""
        last = self.times.stages - 1
        m = self.done[stage][way]
        if m >= self.count or (stage == last and way == 0):
            return None
        if way == 0:
            known = stage == 0 or m < self.done[stage - 1][0]
        elif stage == last:
            known = stage == 0 or m < self.done[stage - 1][0]
            way = 0
        else:
            known = m < self.done[stage + 1][BACK] and m < self.done[stage][0]
        return max(self.free[stage], self.ready[stage][way][m]) if known else None

    def do(self, stage: int, way: int) -> None:
        start = self.start_of(stage, way)
        assert start is not None
        end = self.free[stage] = start + self.work[stage][way]
        m = self.done[stage][way]
        self.done[stage][way] += 1
        hop, to = (stage, stage + 1) if way == 0 else (stage - 1, stage - 1)
        if 0 <= to < self.times.stages:
            self.line[hop][way] = max(end, self.line[hop][way]) + self.times.wire[hop]
            self.ready[to][way][m] = self.line[hop][way] + self.times.latency[hop]

    def bound(self) -> float:
        """No schedule that goes on from here ends earlier."""
        times, worst, tail = self.times, 0.0, 0.0
        for s in range(times.stages):
            left = [self.count - d for d in self.done[s]]
            if s == times.stages - 1:
                left[0] = 0
            todo = left[0] * self.work[s][0] + left[1] * self.work[s][1]
            if todo:
                starts = [t for way in (0, 1) if (t := self.start_of(s, way)) is not None]
                worst = max(worst, (min(starts) if starts else self.free[s]) + todo + tail)
            else:
                worst = max(worst, self.free[s])
            if s < len(times.wire):
                tail += times.wire[s] + times.latency[s] + times.backward[s]
        return worst

    @property
    def is_done(self) -> bool:
        return self.done[0][BACK] == self.count and all(d[BACK] == self.count for d in self.done)


def replay(times: Times, count: int, steps: int = 3, most: int | None = None) -> float:
    """Seconds of the last of ``steps`` steps by the worker's rule (``Pipeline._advance``): forwards go first until
    ``window`` microbatches are under way, then backwards; a stage that would wait widens its window, up to ``most``
    more than 1F1B's."""
    windows = [times.stages - s for s in range(times.stages)]
    limits = [count if most is None else w + most for w in windows]
    for _ in range(steps):
        board = Board(times, count)
        while not board.is_done:
            options = []
            for s in range(times.stages):
                back, ahead = board.start_of(s, BACK), board.start_of(s, 0)
                flights = board.done[s][0] - board.done[s][BACK]
                if back is not None:
                    options.append((back, 1, s, BACK))
                if ahead is not None and flights < limits[s]:
                    options.append((ahead, 0 if flights < windows[s] else 2, s, 0))
            _, _, stage, way = min(options)
            board.do(stage, way)
            windows[stage] = max(windows[stage], board.done[stage][0] - board.done[stage][BACK])
    return max(board.free)


def one_f_one_b(times: Times, count: int, ahead: int = 1) -> float:
    """Seconds of a step by 1F1B with ``ahead`` more forwards than it needs: a backward always before a forward."""
    board = Board(times, count)
    while not board.is_done:
        options = []
        for s in range(times.stages):
            back, forward = board.start_of(s, BACK), board.start_of(s, 0)
            if back is not None:
                options.append((back, 0, s, BACK))
            if forward is not None and board.done[s][0] - board.done[s][BACK] < ahead + times.stages - s:
                options.append((forward, 1, s, 0))
        _, _, stage, way = min(options)
        board.do(stage, way)
    return max(board.free)


def best(times: Times, count: int, nodes: int = 200_000) -> tuple[float, bool]:
    """The shortest possible step, and whether that is proven; else the lower bound within ``nodes`` steps of search."""
    root = Board(times, count)
    top = min(replay(times, count), *(one_f_one_b(times, count, w) for w in range(count)))
    floor, left, stack = lower_bound(times, count), nodes, [root]
    while stack and top > floor * (1 + 1e-9):
        board = stack.pop()
        if board.bound() >= top * (1 - 1e-9):
            continue
        if board.is_done:
            top = max(board.free)
            continue
        if (left := left - 1) < 0:
            return floor, False
        options = [
            (t, s, way) for s in range(times.stages) for way in (0, 1) if (t := board.start_of(s, way)) is not None
        ]
        end, machine = min((t + board.work[s][way], s) for t, s, way in options)
        for t, s, way in sorted(options, reverse=True):
            if s == machine and t < end:
                after = board.copy()
                after.do(s, way)
                stack.append(after)
    return top, True


def lower_bound(times: Times, count: int) -> float:
    """Of any order: the fullest stage or line, behind the first forward's way to it and before the last one's back."""
    worst, head, tail = 0.0, 0.0, 0.0
    for s in range(times.stages):
        worst = max(worst, head + count * (times.forward[s] + times.backward[s]) + tail)
        if s < len(times.wire):
            here = times.forward[s] + times.latency[s], times.backward[s] + times.latency[s]
            beyond = times.forward[s + 1] + times.backward[s + 1]
            worst = max(worst, head + here[0] + (count + 1) * times.wire[s] + beyond + here[1] + tail)
            head, tail = head + here[0] + times.wire[s], tail + here[1] + times.wire[s]
    return worst


def even(stages: int, *, wire: float, latency: float) -> Times:
    """Stages of one second for a forward and its backward together (1 : 3, with recomputing), hops all alike."""
    hops = stages - 1
    return Times(
        forward=(0.25,) * stages, backward=(0.75,) * hops + (0.5,), wire=(wire,) * hops, latency=(latency,) * hops
    )


def uneven(stages: int, seed: int) -> Times:
    rng = random.Random(seed)
    speeds = [rng.uniform(0.5, 1.5) for _ in range(stages)]
    return Times(
        forward=tuple(0.25 * s for s in speeds),
        backward=tuple(0.75 * s for s in speeds),
        wire=tuple(rng.uniform(0.05, 1.0) for _ in range(stages - 1)),
        latency=tuple(rng.uniform(0.0, 0.5) for _ in range(stages - 1)),
    )
