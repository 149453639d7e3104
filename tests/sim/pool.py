"""Many histories at once, on all cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from .checks import Broken
from .planted import PLANTED
from .world import simulate

CHUNK = 10
TESTS = Path(__file__).parent.parent


class Outcome(NamedTuple):
    """Of one seed. ``wrong`` is empty, or says what is."""

    seed: int
    wrong: str
    lines: str
    lost: bool
    reached: dict[str, int]


def try_seed(seed: int) -> Outcome:
    try:
        world = simulate(seed)
    except Broken as error:
        world = error.world  # type: ignore[attr-defined]
        return Outcome(seed, str(error), world.last_lines(), world.lost, world.watch.reached)
    return Outcome(seed, "", "", world.lost, world.watch.reached)


def try_seeds(seeds: Iterable[int]) -> list[Outcome]:
    return [try_seed(seed) for seed in seeds]


def hunt(bug: str, most: int) -> tuple[int, str]:
    """How many seeds it takes to find a planted bug, and as what; 0 if it is not found."""
    with PLANTED[bug]():
        for seed in range(most):
            if found := try_seed(seed).wrong:
                return seed + 1, found
    return 0, ""


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process for each core; they find this package by the path that they inherit."""
    found = [str(TESTS), str(TESTS / "support")]
    before = list(sys.path)
    sys.path += [path for path in found if path not in sys.path]
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            yield pool
            pool.shutdown(cancel_futures=True)
    finally:
        sys.path[:] = before


def outcomes(pool: ProcessPoolExecutor, seeds: range) -> Iterator[Outcome]:
    """As they come."""
    jobs: list[Future[list[Outcome]]] = [
        pool.submit(try_seeds, seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)
    ]
    for job in as_completed(jobs):
        yield from job.result()


def replay(seed: int) -> str:
    return f"{sys.executable} -m tests.sim {seed} --trace"
