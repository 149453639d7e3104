"""Whether the machine is the run's or its owner's right now: pauses, and what the gate says, followed over time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..protocol.errors import StateError
from . import pause as pauses
from .condition import FREE
from .gate import Observed, Rules, Verdict, decide
from .observe import observe
from .pause import Pause

LOOK_SECONDS = 2.0  # between two looks at the machine; a pause acts at once
CALM_SECONDS = 20.0  # that a battery or a program must be gone: joining again costs everybody something


@dataclass(frozen=True, kw_only=True)
class Hold:
    """The machine is not the run's. ``at_once``: its owner waits for it."""

    at_once: bool


class Switch:
    """Owned by the event loop; ``follow`` must run."""

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        observe: Callable[[Rules], Observed] = observe,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules
        self._folder, self._observe, self._clock = folder, observe, clock
        self.pause: Pause | None = pauses.load(folder, clock())
        self.verdict: Verdict = FREE
        self._observed = Observed()
        self._calm_since: float | None = None  # since when nothing would keep the machine from working
        self._changed = asyncio.Event()

    @property
    def hold(self) -> Hold | None:
        """What keeps the machine from working now; None: nothing."""
        if self.pause is not None:
            return Hold(at_once=True)
        return None if self.verdict.may_run else Hold(at_once=self.verdict.at_once)

    def pause_until(self, until: float | None) -> None:
        """``StateError`` if that cannot be kept: then nothing is paused."""
        pause = Pause(until=until)
        pauses.save(self._folder, pause)
        self.pause = pause
        self._changed.set()

    def resume(self) -> None:
        """Ends the pause; what the gate says stays."""
        pauses.save(self._folder, None)
        self.pause = None
        self._changed.set()

    async def look(self) -> None:
        """Observes the machine once and decides anew."""
        self._observed = await asyncio.to_thread(self._observe, self.rules)
        self._decide()

    async def follow(self) -> None:
        """Looks now and then, and whenever a pause ends."""
        while True:
            await self.look()
            left = LOOK_SECONDS
            if self.pause is not None and self.pause.until is not None:
                left = min(left, max(0.05, self.pause.until - self._clock()))
            await asyncio.sleep(left)

    async def until(self, true: Callable[[Hold | None], bool]) -> None:
        """Waits until ``true`` holds of what keeps the machine from working."""
        while not true(self.hold):
            self._changed.clear()
            await self._changed.wait()

    def _decide(self) -> None:
        now = self._clock()
        if self.pause is not None and self.pause.until is not None and self.pause.until <= now:
            self.pause = None
            with contextlib.suppress(StateError):  # it says itself when it ended
                pauses.save(self._folder, None)
        verdict = decide(self.rules, self._observed, datetime.fromtimestamp(now))
        if verdict.may_run and not self.verdict.may_run and self.verdict.until is None:
            self._calm_since = now if self._calm_since is None else self._calm_since
            if now - self._calm_since < CALM_SECONDS:
                verdict = self.verdict
        else:
            self._calm_since = None
        self.verdict = verdict
        self._changed.set()
