"""The run's time: what the clock on the wall said once, and from then on the time that really passes."""

from __future__ import annotations

import time


class Clock:
    """Seconds since 1970. Setting the machine's clock does not move it, so no lease expires over that."""

    def __init__(self) -> None:
        self._start = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._start + time.monotonic()
