"""What the HTTP layer asks of a run, live or past."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from .shapes import (
    EventRow,
    Incident,
    LinkPoint,
    LinkRow,
    PeerPage,
    Point,
    RoundPage,
    RoundRow,
    Standing,
    State,
    StepPage,
    StepRow,
    TrafficPoint,
)


class Source(Protocol):
    """The first four answer from memory, in the event loop; the others read the run's file and may be asked in any
    thread, several at once. None stands for what is not there."""

    @property
    def version(self) -> int:
        """Differs whenever anything else does."""

    def state(self) -> State: ...

    async def changed(self, version: int) -> int:
        """The new version, as soon as it differs."""

    def points(self, after: int) -> list[Point]:
        """Those with a higher id, in order."""

    def news(self, after: int) -> list[EventRow]:
        """Events with a higher id, in order."""

    def state_at(self, at: float) -> State: ...

    def curve(self, most: int, until: float | None) -> list[Point]:
        """Down-sampled to at most ``most`` points."""

    def events(self, after: int, until: float | None, limit: int, kind: str | None) -> list[EventRow]: ...

    def incidents(self, until: float | None) -> list[Incident]: ...

    def rounds(self, before: int | None, limit: int) -> list[RoundRow]: ...

    def round(self, step: int) -> RoundPage | None: ...

    def peer(self, peer: str, at: float | None) -> PeerPage | None: ...

    def links(self, at: float | None) -> list[LinkRow]: ...

    def link(self, sender: str, receiver: str) -> list[LinkPoint]: ...

    def traffic(self, most: int, until: float | None) -> list[TrafficPoint]: ...

    def leaderboard(self) -> list[Standing]: ...

    def steps(self, limit: int, order: Literal["newest", "slowest"]) -> list[StepRow]: ...

    def step(self, step: int) -> StepPage | None: ...

    def evaluations(self) -> list[dict[str, Any]]: ...
