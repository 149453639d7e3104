"""Time as on a machine of a given speed: compute for real, then sleep until that machine would be done."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """``seconds`` for one microbatch through the whole model, forward and backward; 0: no sleeping.

    One thread computes at a time. A piece that took too long (others used the cores) is made up for by later pieces of
    the same computation; what cannot be made up for is counted in ``late``.
    """

    FORWARD = 1 / 3  # of a microbatch's work; backward has the rest

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self.late = 0.0  # seconds that computations ended after their time
        self.played = 0.0  # seconds that they should have taken
        self._clock, self._sleep = clock, sleep
        self._until = self._over = 0.0

    def start(self) -> None:
        """A computation begins."""
        self._over = 0.0
        self._until = self._clock()

    def finish(self, share: float) -> None:
        """A piece of it, ``share`` of a microbatch's whole work, has been computed."""
        if not self.seconds:
            return
        self.played += share * self.seconds
        self._until += share * self.seconds
        left = self._until - self._clock()
        if left > 0:
            self._sleep(left)
        over = max(0.0, -left)
        self.late += over - self._over
        self._over = over
