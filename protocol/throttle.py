"""A limit on what may go over a line: a token bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_SECONDS = 1.0


class Bucket:
    """At most ``mbps`` 10^6 bits a second in the long run, one second's worth at once; 0: no limit. Thread-safe."""

    def __init__(self, mbps: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = mbps * 125_000.0  # bytes a second
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = self._rate * BURST_SECONDS
        self._seen = clock()

    def take(self, nbytes: int) -> float:
        """Takes so many bytes' tokens, from those to come if need be; seconds to wait before the bytes may go."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = self._clock()
            self._tokens = min(self._rate * BURST_SECONDS, self._tokens + (now - self._seen) * self._rate)
            self._seen = now
            self._tokens -= nbytes
            return max(0.0, -self._tokens / self._rate)
