"""What the owner sees of a worker: one of five words, why, and until when. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from .gate import Verdict
from .pause import Pause
from .plan import View

Word = Literal["running", "yielding", "paused", "waiting", "needs you"]
WORDS: tuple[Word, ...] = ("running", "yielding", "paused", "waiting", "needs you")
FREE = Verdict(may_run=True)


@dataclass(frozen=True, kw_only=True)
class Here:
    """What a worker knows of itself. ``step``: steps done in its generation; ``trouble``: what only its owner can
    mend."""

    peer: str = ""
    connected: bool = False  # the control stream stands
    step: int = 0
    steps: int = 0
    finishing: bool = False
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """``until``: Unix time; None: nobody knows."""

    word: Word
    why: str = ""
    until: float | None = None

    def text(self, now: datetime) -> str:
        """One line: ``paused until 18:00, by you``."""
        when = f" until {clock(datetime.fromtimestamp(self.until), now)}" if self.until is not None else ""
        comma = "," if self.word == "paused" else ":"
        return f"{self.word}{when}{comma} {self.why}" if self.why else f"{self.word}{when}"


def condition(view: View | None, here: Here, pause: Pause | None, verdict: Verdict = FREE) -> Condition:
    """The first that holds. ``view``: the coordinator's newest; None while the worker is not in the run."""
    if here.trouble:
        return Condition(word="needs you", why=here.trouble)
    if pause is not None:
        return Condition(word="paused", why="by you", until=pause.until)
    if not verdict.may_run:
        until = verdict.until.timestamp() if verdict.until else None
        return Condition(word="yielding", why=verdict.reason, until=until)
    if view is None:
        return Condition(word="waiting", why="it gets ready" if here.connected else "for the coordinator")
    if not here.connected:
        return Condition(word="waiting", why="the coordinator does not answer; dialling again")
    place = view.plan.places.get(here.peer) if view.plan else None
    if view.phase == "preparing" and place:
        return Condition(word="waiting", why=f"its stage {place[0]} is got ready, then all begin together")
    if view.phase not in ("training", "finishing") or view.plan is None:
        return Condition(word="waiting", why=view.note or "for the run to begin")
    if place is None:
        if view.prospect is not None:
            return Condition(word="waiting", why=f"stage {view.prospect[0]} comes in; a place in the run follows")
        return Condition(word="waiting", why="for a place in the run")
    if view.note.startswith("held: ") or "nothing new is given out" in view.note:
        return Condition(word="waiting", why=view.note)
    if here.finishing:
        return Condition(word="running", why="it finishes its step and hands over")
    first, last = view.plan.layers[place[0]]
    if view.phase == "finishing":
        return Condition(word="running", why="the last round is published")
    return Condition(
        word="running", why=f"step {here.step} of {here.steps}, stage {place[0]} (layers {first}-{last - 1})"
    )


def clock(at: datetime, now: datetime) -> str:
    """A moment in words: the time, and the day where it is another."""
    days = (at.date() - now.date()) // timedelta(days=1)
    day = {0: "", 1: "tomorrow "}.get(days, f"{at:%a} " if 0 < days < 7 else f"{at:%Y-%m-%d} ")
    return f"{day}{at:%H:%M}"
