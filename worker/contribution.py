"""What a worker has done for its runs and what it cost, kept in its data folder over restarts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import msgspec

from ..protocol import control_pb2 as pb
from ..protocol.meter import Traffic
from ..protocol.plan import Plan
from .plan import View

FILE = "contribution.json"


class Totals(msgspec.Struct, kw_only=True):
    """``computed``: samples that this machine has trained its layers on, some perhaps in vain. ``committed``: those in
    rounds that count, as far as this worker has heard; ``work``: the same by the share of the model that it did for
    each. Bytes are the network's, ``seconds`` those in a run, ``joules`` the GPU's and processors' meanwhile."""

    computed: int = 0
    committed: int = 0
    work: float = 0.0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    joules: float | None = None
    since: str = ""  # the first day
    day: str = ""  # that the next two are of
    sent_today: int = 0
    received_today: int = 0


@dataclass(frozen=True, kw_only=True)
class Entered:
    """A round that was captured and is not decided yet."""

    generation: int
    attempt: int
    step: int
    samples: int
    share: float


class Contribution:
    """Adds up; owned by the event loop. A damaged file is begun anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.totals = Totals()
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self.totals = msgspec.json.decode(self.path.read_bytes(), type=Totals)
        self._entered: list[Entered] = []
        self._plan: Plan | None = None
        self._traffic = (0, 0)
        self._joules: float | None = None

    def save(self) -> None:
        """As well as the disk allows: training does not depend on it."""
        temporary = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            temporary.write_bytes(msgspec.json.encode(self.totals))
            temporary.replace(self.path)

    # In one run.

    def begin(self, joules: float | None) -> None:
        """A new session: its meter and its rounds start anew. ``joules``: what the machine's counters have by now."""
        self._entered.clear()
        self._plan, self._traffic, self._joules = None, (0, 0), joules

    def reported(self, body: dict[str, object], share: float) -> None:
        """What the worker tells the coordinator of its steps and rounds; ``share``: of the model, that its stage is."""
        for message in body.values():
            if isinstance(message, pb.StepDone):
                self.totals.computed += message.samples
            elif isinstance(message, pb.RoundDone):
                self._entered.append(
                    Entered(
                        generation=message.generation,
                        attempt=message.attempt,
                        step=message.step,
                        samples=message.samples,
                        share=share,
                    )
                )

    def follow(self, view: View) -> None:
        """The coordinator's newest word: rounds that it says are committed count."""
        plan = view.plan or self._plan
        if plan is None:
            return
        left = []
        for entered in self._entered:
            if counts(entered, plan, view.committed):
                self.totals.committed += entered.samples
                self.totals.work += entered.samples * entered.share
            elif entered.generation == plan.generation and entered.step > view.committed:
                left.append(entered)
        self._entered, self._plan = left, plan

    def spent(self, traffic: Iterable[Traffic], seconds: float, joules: float | None, today: date) -> tuple[int, int]:
        """What the meter has in all, seconds since the last call, what the machine's counters have. The bytes sent and
        received since the last call."""
        totals, day = self.totals, today.isoformat()
        totals.since = totals.since or day
        if totals.day != day:
            totals.day, totals.sent_today, totals.received_today = day, 0, 0
        now = [0, 0]
        for t in traffic:
            now[t.direction == "in"] += t.nbytes
        sent, received = (max(0, a - b) for a, b in zip(now, self._traffic, strict=True))
        self._traffic = (now[0], now[1])
        totals.sent += sent
        totals.received += received
        totals.sent_today += sent
        totals.received_today += received
        totals.seconds += seconds
        if joules is not None:
            totals.joules = (totals.joules or 0.0) + max(0.0, joules - (self._joules or 0.0))
            self._joules = joules
        return sent, received


def counts(entered: Entered, plan: Plan, committed: int) -> bool:
    """Whether a round is among those committed, as far as ``plan`` and the newest committed step tell."""
    if entered.step > committed:
        return False
    if entered.generation != plan.generation:  # it closed its generation, or was given up with it
        return (
            plan.origin == "round" and plan.origin_generation == entered.generation and entered.step <= plan.first_step
        )
    later = plan.lost[entered.attempt :]  # rounds on their way when somebody was lost are void
    return not later or entered.step <= later[0].since
