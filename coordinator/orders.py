"""What the operator ordered, as events (see :mod:`.operating`)."""

from __future__ import annotations

from .event import Event


def reason(why: str) -> str:
    """An operator's reason behind a sentence; nothing if there is none."""
    return f": {why}" if why else ""


class Paused(Event, frozen=True, kw_only=True):
    """The operator: nothing new is leased. ``step``: where the leased ones end."""

    who: str
    why: str
    step: int

    @property
    def text(self) -> str:
        return f"Paused by {self.who} after step {self.step}{reason(self.why)}"


class Resumed(Event, frozen=True, kw_only=True):
    who: str
    why: str
    seconds: float  # since it was paused

    @property
    def text(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"Resumed by {self.who} after {time}{reason(self.why)}"


class Drained(Event, frozen=True, kw_only=True):
    peer: str
    name: str
    who: str
    why: str

    @property
    def text(self) -> str:
        return f"{self.name} is drained by {self.who}, it finishes its step and hands over{reason(self.why)}"


class Banned(Event, frozen=True, kw_only=True):
    """A key is not let in any more; if its peer was there, it is dropped like a lost one."""

    peer: str
    name: str
    who: str
    why: str

    @property
    def text(self) -> str:
        return f"{self.name} is banned by {self.who}{reason(self.why)}"


class Unbanned(Event, frozen=True, kw_only=True):
    peer: str
    name: str
    who: str
    why: str

    @property
    def text(self) -> str:
        return f"{self.name} may join again, says {self.who}{reason(self.why)}"


class CheckpointAsked(Event, frozen=True, kw_only=True):
    """The operator: the first round committed from ``step`` on is published."""

    step: int
    who: str
    why: str

    @property
    def text(self) -> str:
        return f"A checkpoint is asked for by {self.who}, of the next round{reason(self.why)}"
