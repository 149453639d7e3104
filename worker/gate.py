"""Whether this machine may work now: a pure function of the owner's rules, of what is observed, and of the time.

Moments are naive local times, as a clock on the wall shows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from ..protocol.errors import ConfigError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = timedelta(days=1)
WINDOW = re.compile(r"^(?:(?P<days>[a-z,\-\s]+?)\s+)?(?P<start>\d{1,2}:\d\d)\s*-\s*(?P<end>\d{1,2}:\d\d)$")
HINT = "Write --hours 22:00-08:00, or --hours 'sat,sun 00:00-24:00', or --hours 'mon-fri 18:00-23:30'."


@dataclass(frozen=True, kw_only=True)
class Window:
    """From ``start`` to ``end``, minutes after midnight; an end that is not after the start is on the next day.
    ``days``: those that it starts on, 0 is Monday."""

    start: int
    end: int
    days: frozenset[int] = frozenset(range(7))

    @classmethod
    def parse(cls, text: str) -> Window:
        """``ConfigError`` for what says no hours."""
        found = WINDOW.match(text.strip().lower())
        if not found:
            raise ConfigError(f"{text!r} says no hours", hint=HINT)
        start, end = (_minutes(found[part], text) for part in ("start", "end"))
        return cls(start=start % 1440, end=end, days=_days(found["days"] or "mon-sun", text))

    def spans(self, now: datetime) -> Iterable[tuple[datetime, datetime]]:
        """Those that begin from the day before ``now`` to a week later."""
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        for offset in range(-1, 8):
            day = midnight + offset * DAY
            if day.weekday() in self.days:
                begin, end = (day + timedelta(minutes=m) for m in (self.start, self.end))
                yield begin, end if end > begin else end + DAY

    def __str__(self) -> str:
        days = "" if len(self.days) == 7 else ",".join(DAYS[d] for d in sorted(self.days)) + " "
        return days + "-".join(f"{m // 60:02}:{m % 60:02}" for m in (self.start, self.end))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the owner lets this machine do. No ``hours``: always. ``yield_to``: programs that have it for themselves."""

    hours: tuple[Window, ...] = ()
    on_battery: bool = False
    yield_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the machine is at. ``programs``: of ``Rules.yield_to``, those that run."""

    on_battery: bool = False
    programs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``until``: when it may change by the hours alone; None: nobody knows. ``at_once``: somebody waits for the
    machine."""

    may_run: bool
    reason: str = ""
    until: datetime | None = None
    at_once: bool = False


def decide(rules: Rules, observed: Observed, now: datetime) -> Verdict:
    """What holds now, the most pressing reason first."""
    if observed.programs:
        return Verdict(may_run=False, reason=f"{observed.programs[0]} is running", at_once=True)
    if observed.on_battery and not rules.on_battery:
        return Verdict(may_run=False, reason="on battery")
    if not rules.hours:
        return Verdict(may_run=True)
    spans = sorted(span for window in rules.hours for span in window.spans(now))
    closing = now
    for begin, end in spans:  # those that follow without a gap are one
        if begin <= closing < end:
            closing = end
    if closing > now:
        return Verdict(may_run=True, until=closing if closing < now + 6 * DAY else None)
    return Verdict(may_run=False, reason="outside its hours", until=min(b for b, _ in spans if b > now))


def _minutes(text: str, whole: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if not ((hours < 24 and minutes < 60) or (hours, minutes) == (24, 0)):
        raise ConfigError(f"{whole!r}: there is no {text}", hint=HINT)
    return hours * 60 + minutes


def _days(text: str, whole: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.replace(" ", ",").split(","):
        first, _, last = part.partition("-")
        if part and not {first, last or first} <= set(DAYS):
            raise ConfigError(f"{whole!r}: {part!r} is no day", hint=HINT)
        if part:
            a, b = DAYS.index(first), DAYS.index(last or first)
            found |= {d % 7 for d in range(a, b + 1 if b >= a else b + 8)}
    return frozenset(found)
