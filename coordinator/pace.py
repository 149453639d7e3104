"""How long the next step may take, from how long those before it took: when nothing moves, somebody hangs."""

from __future__ import annotations

from dataclasses import dataclass, replace

LEAST_SECONDS = 10.0  # of patience: a home machine is busy with something else now and then
LEARNED = 5  # steps before anything is concluded
TIMES, DEVIATIONS = 3.0, 8.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Smoothed time of a step and its mean deviation, as TCP keeps them of round trips (Jacobson, SIGCOMM 1988)."""

    step: int = -1  # steps that everybody has done
    since: float = 0.0  # when that was reached
    mean_seconds: float = 0.0
    deviation_seconds: float = 0.0
    count: int = 0

    def reached(self, step: int, now: float, *, learn: bool) -> Pace:
        """Everybody has done ``step`` steps. ``learn``: the time it took says something about the next one. The first
        word after a restart tells where they are, not how long that took."""
        if step == self.step:
            return self
        if not learn or step < self.step or self.step < 0:
            return replace(self, step=step, since=now)
        took = (now - self.since) / (step - self.step)
        mean = took if not self.count else self.mean_seconds + (took - self.mean_seconds) / 8
        deviation = took / 2 if not self.count else self.deviation_seconds
        deviation += (abs(took - mean) - deviation) / 4
        return Pace(step=step, since=now, mean_seconds=mean, deviation_seconds=deviation, count=self.count + 1)

    def grace_seconds(self, lease_seconds: float) -> float:
        """How long nothing may move, the lease at the longest."""
        if self.count < LEARNED:
            return lease_seconds
        expected = TIMES * self.mean_seconds + DEVIATIONS * self.deviation_seconds
        return min(lease_seconds, max(LEAST_SECONDS, expected))
