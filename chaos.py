"""``potluck demo --chaos``: kills, stops and starts the demo's processes at random while it trains.

Nobody is warned: SIGKILL takes a process wherever it is, SIGSTOP is the lid of a laptop. What must hold at the end is
what always must: every sample is committed exactly once.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from .coordinator.verify import FILE, verify

if TYPE_CHECKING:
    from .demo import Crew
    from .screen import Screen

PAUSE_SECONDS = (8.0, 16.0)  # between two blows
DOWN_SECONDS = (1.0, 5.0)  # before a killed process is started again
STOPPED_SECONDS = (2.0, 25.0)
LAST_SHARE = 0.9  # of the steps: then the run is left alone
BLOWS = {"kill": 5, "stop": 2, "coordinator": 2}  # how often, relatively


class Chaos:
    """Strikes whenever :meth:`tick` is called and it is time. The same seed makes the same choices."""

    def __init__(self, crew: Crew, show: Screen, seed: int | None) -> None:
        self.crew, self.show = crew, show
        self.seed = random.randrange(10**6) if seed is None else seed
        self.done = Counter[str]()
        self._random = random.Random(self.seed)
        self._next = 0.0
        self._down: dict[str, float] = {}  # workers that are killed, until when
        self._stopped: dict[str, float] = {}
        self._coordinator_until: float | None = None

    @property
    def coordinator_is_down(self) -> bool:
        return self._coordinator_until is not None

    def tick(self, state: dict[str, Any] | None) -> None:
        """``state``: what the page says, None while nobody answers."""
        now = time.monotonic()
        self._mend(now, answers=state is not None)
        if state is None or state["phase"] != "training" or state["step"] > LAST_SHARE * state["steps"]:
            return
        if not self._next:
            self._next = now + self._random.uniform(*PAUSE_SECONDS)
        if now >= self._next:
            self._next = now + self._random.uniform(*PAUSE_SECONDS)
            self._strike(now)

    def _strike(self, now: float) -> None:
        blow = self._random.choices(list(BLOWS), list(BLOWS.values()))[0]
        hit = {*self._down, *self._stopped}
        standing = sorted(name for name, p in self.crew.members.items() if name not in hit and p.poll() is None)
        if blow == "coordinator":
            if not self.coordinator_is_down and self.crew.coordinator:
                self.crew.coordinator.kill()
                self._coordinator_until = now + self._random.uniform(*DOWN_SECONDS)
                self._count("the coordinator is killed", blow)
        elif len(hit) * 2 < self.crew.workers and standing:
            name = self._random.choice(standing)
            if blow == "kill":
                self.crew.members.pop(name).kill()
                self._down[name] = now + self._random.uniform(*DOWN_SECONDS)
                self._count(f"{name} is killed", blow)
            else:
                seconds = self._random.uniform(*STOPPED_SECONDS)
                self.crew.members[name].send_signal(signal.SIGSTOP)
                self._stopped[name] = now + seconds
                self._count(f"{name} is stopped for {seconds:.0f} s", blow)

    def _count(self, line: str, blow: str) -> None:
        self.done[blow] += 1
        self.show.say(f"chaos: {line}")

    def _mend(self, now: float, *, answers: bool) -> None:
        if self._coordinator_until is not None and now >= self._coordinator_until:
            self._coordinator_until = None
            self.crew.restart_coordinator()
            self.show.say("chaos: the coordinator is started again")
        for name in [n for n, until in self._down.items() if now >= until and answers]:  # else it could not join
            del self._down[name]
            self.crew.start_worker(name)
            self.show.say(f"chaos: {name} is started again")
        for name, process in list(self.crew.members.items()):
            if answers and process.poll():  # it was just starting when the coordinator was killed, and gave up
                self.crew.start_worker(name)
        for name in [n for n, until in self._stopped.items() if now >= until]:
            del self._stopped[name]
            self._wake(name)

    def _wake(self, name: str) -> None:
        with contextlib.suppress(KeyError, ProcessLookupError):
            self.crew.members[name].send_signal(signal.SIGCONT)
            self.show.say(f"chaos: {name} goes on")

    def end(self) -> None:
        """Nobody stays stopped: a stopped process could not be ended in order."""
        for name in list(self._stopped):
            del self._stopped[name]
            self._wake(name)

    def proof(self) -> list[str]:
        """What was done, and what the ledger says of it."""
        done = self.done
        report = verify(self.crew.folder / "coordinator" / FILE)
        return [
            f"Workers killed {done['kill']} times and stopped {done['stop']} times,"
            f" the coordinator killed {done['coordinator']} times (--seed {self.seed}).",
            *report.lines(),
        ]
