"""Whole runs in virtual time, under faults: a thousand histories hold, and every planted bug is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from .planted import PLANTED
from .pool import hunt, outcomes, replay, workers

SEEDS = 1000
MOST_TO_FIND = 200  # seeds for a planted bug
REACHED = (  # situations without which the histories would prove little
    *("Uncommit", "RoundRefused", "RolledBack", "StoodStill", "Stopped", "Stopping", "HeldOut", "Published"),
    *("a report is taken twice", "a step_done of another generation", "a round_done of another generation"),
    *("a fault of another generation", "a saved of another generation", "an orderly stop is gone on from"),
    *("Rerouted", "Relet", "Held", "Degraded", "a generation loses a second one", "a round_done of another attempt"),
    *(
        "a plan from an older round",
        "a step_done of who is lost",
        "a plan of uneven shares",
        "Moving",
        "Moved",
        "Redivided",
        *("Paused", "Resumed", "Drained", "Banned", "Unbanned", "CheckpointAsked", "a pause stands", "a pause goes on"),
        "a paused run is opened again",
    ),
)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with workers() as found:
        yield found


@pytest.fixture(scope="module")
def hunts(pool: ProcessPoolExecutor) -> dict[str, Future[tuple[int, str]]]:
    return {bug: pool.submit(hunt, bug, MOST_TO_FIND) for bug in PLANTED}


def test_a_thousand_histories_hold(pool: ProcessPoolExecutor) -> None:
    reached: dict[str, int] = {}
    for outcome in outcomes(pool, range(SEEDS)):
        assert not outcome.wrong, f"{outcome.lines}\n{outcome.wrong}\nreplay: {replay(outcome.seed)}"
        for what, count in outcome.reached.items():
            reached[what] = reached.get(what, 0) + count
    assert all(reached.get(what) for what in REACHED), [what for what in REACHED if not reached.get(what)]


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(
    bug: str, hunts: dict[str, Future[tuple[int, str]]], record_property: Callable[[str, object], None]
) -> None:
    seeds, found = hunts[bug].result()
    assert seeds, f"{bug}: not found in {MOST_TO_FIND} histories"
    record_property("seeds", seeds)
    record_property("found", found)
