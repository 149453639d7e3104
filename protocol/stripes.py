"""Over how many connections a hop goes: one, until losses hold it back and more are seen to help.

A TCP that takes every loss for a full line (cubic, Reno) gets, with random losses, the same small rate on each of its
connections however fast the line is, so twice the connections carry twice as much; on a line that loses packets only
because it is full they carry no more. A full line shows in the round trip, which has its queue in it; the rest shows by
trying: the number is doubled, and stays so if the rate rises by a fifth or more; else it goes back, and is not tried
again for a while. Nothing here has a clock or a socket.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from .striped import MOST_CONNECTIONS

LEAST_LOSS = 2e-4  # of segments: below it one connection of cubic goes at 30 Mbit/s and more over 40 ms
FULL = 1.5  # times the shortest round trip: from here on a line is full
GAIN = 1.2  # that a doubling must bring
FAR = 0.5  # of the best rate that was reached: below it something is wrong, where losses cannot be seen
TRIAL_LOOKS = 3  # that a doubling has to bring it, on average: a few frames a look are little to go by
REST_LOOKS = 8, 200  # at a channel that sends, after a trial that did not help: the first time, and at most
CLEAN_LOOKS = 200  # without losses, after which one connection will do again


class Seen(NamedTuple):
    """What a channel did between two looks. ``loss``: segments repeated of those sent; None if nobody tells. ``wait``:
    the round trip over the shortest there was."""

    bytes_per_second: float
    loss: float | None
    wait: float = 1.0

    @property
    def by_chance(self) -> bool:
        """Whether packets are lost although the line is not full."""
        return self.loss is not None and self.loss >= LEAST_LOSS and self.wait < FULL


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``before``: the rate with half as many connections, while more are on trial, and ``tried`` the rates since;
    ``rest``: looks without trials, and ``pause`` of how many the next such rest is."""

    connections: int = 1
    least: int = 1
    most: int = MOST_CONNECTIONS
    before: float | None = None
    tried: tuple[float, ...] = ()
    best: float = 0.0
    rest: int = 0
    pause: int = REST_LOOKS[0]
    clean: int = 0

    def after(self, seen: Seen) -> Choice:
        """What follows from one look."""
        now = replace(
            self, best=max(self.best, seen.bytes_per_second), rest=max(0, self.rest - 1), before=None, tried=()
        )
        if self.before is not None:
            tried = (*self.tried, seen.bytes_per_second)
            if sum(tried) < GAIN * self.before * len(tried):
                if len(tried) < TRIAL_LOOKS:
                    return replace(now, before=self.before, tried=tried)
                return now._resting(self.connections // 2)
            now = replace(now, pause=REST_LOOKS[0])
        lossy = seen.by_chance or (seen.loss is None and seen.bytes_per_second < FAR * self.best)
        now = replace(now, clean=0 if seen.loss is None or seen.loss >= LEAST_LOSS else self.clean + 1)
        if now.clean >= CLEAN_LOOKS and now.connections > now.least:
            return replace(now, connections=now.least, clean=0)
        if lossy and not now.rest and 2 * now.connections <= now.most:
            return replace(now, connections=2 * now.connections, before=seen.bytes_per_second)
        return now

    def failed(self, connections: int) -> Choice:
        """So many could not be opened, or they are not to be had: it stays as it was with ``connections``."""
        return replace(self, before=None, tried=())._resting(connections)

    def _resting(self, connections: int) -> Choice:
        pause = min(4 * self.pause, REST_LOOKS[1])
        return replace(self, connections=connections, rest=self.pause, pause=pause)
