"""Time as on a machine of a given speed: compute for real, then sleep until that machine would be done."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

SCHEDULE = Path("/proc/thread-self/schedstat")


def busy_seconds() -> float:
    """How long this thread has computed or waited for a core: without sleeping, and without waiting for a network."""
    computed, queued, _ = SCHEDULE.read_text(encoding="ascii").split()
    return (int(computed) + int(queued)) / 1e9


class Pace:
    """``seconds`` for one microbatch through the whole model, forward and backward; 0: no sleeping.

    One thread computes at a time. A piece that took too long (others used the cores) is made up for by later pieces of
    the same computation; what cannot be made up for is counted in ``late``. What a system waits for amid a computation,
    such as a blocking all-reduce, comes on top, as it would on that machine.
    """

    FORWARD = 1 / 3  # of a microbatch's work; backward has the rest

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = busy_seconds,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self.late = 0.0  # seconds that computations ended after their time
        self.played = 0.0  # seconds that they should have taken
        self._clock, self._busy, self._sleep = clock, busy, sleep
        self._since = self._owed = self._slept = self._over = 0.0

    def figures(self) -> dict[str, float]:
        return {"late": self.late, "played": self.played}

    def start(self) -> None:
        """A computation begins."""
        if self.seconds:
            self._since = self._busy()
            self._owed = self._slept = self._over = 0.0

    def finish(self, share: float) -> None:
        """A piece of it, ``share`` of a microbatch's whole work, has been computed."""
        if not self.seconds:
            return
        self.played += share * self.seconds
        self._owed += share * self.seconds
        left = self._owed - self._slept - (self._busy() - self._since)
        if left > 0:
            before = self._clock()
            self._sleep(left)
            self._slept += self._clock() - before
        over = max(0.0, -left)
        self.late += over - self._over
        self._over = over
