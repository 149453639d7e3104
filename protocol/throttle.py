"""Limits on what may go over a line: a token bucket, and one that paces everything a worker sends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

from .meter import INTERNET, Overhead

BURST_SECONDS = 1.0


class Bucket:
    """At most ``mbps`` 10^6 bits a second in the long run, one second's worth at once; 0: no limit. Thread-safe."""

    def __init__(self, mbps: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = mbps * 125_000.0  # bytes a second
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = self._rate * BURST_SECONDS
        self._seen = clock()

    def take(self, nbytes: float) -> float:
        """Takes so many bytes' tokens, from those to come if need be; seconds to wait before the bytes may go."""
        if not self._rate:
            return 0.0
        with self._lock:
            self._refill()
            self._tokens -= nbytes
            return max(0.0, -self._tokens / self._rate)

    def wait_seconds(self) -> float:
        """Until everything taken so far is paid for, to the byte."""
        if not self._rate:
            return 0.0
        with self._lock:
            self._refill()
            return -self._tokens / self._rate if self._tokens <= -1.0 else 0.0

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._rate * BURST_SECONDS, self._tokens + (now - self._seen) * self._rate)
        self._seen = now


class Pace:
    """Keeps what goes out below ``mbps`` 10^6 bits a second, with what the layers below a message add.

    Frames wait for their turn (``wait_for``), one message at a time: a message goes once what went before is paid for,
    so no more than one is ever owed. What must not wait (acknowledgements, greetings) is only counted (``charge``), and
    the next frame waits for it.
    """

    def __init__(
        self,
        mbps: float,
        overhead: Overhead = INTERNET,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bucket, self._overhead, self._sleep = Bucket(mbps, clock), overhead, sleep

    async def wait_for(self, nbytes: int) -> None:
        """Until a message of ``nbytes`` may go; it counts from then on."""
        while (seconds := self._bucket.wait_seconds()) > 0:
            await self._sleep(seconds)
        self.charge(nbytes)

    def charge(self, nbytes: int) -> None:
        """Counts a message that goes at once."""
        self._bucket.take(nbytes + self._overhead.of(nbytes)[0])
