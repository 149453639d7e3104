"""While the disk takes no writes: when to try again, what is said meanwhile, and time that counts for nobody."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..protocol.errors import StateError
from . import events as ev
from .state import RunState

FIRST_SECONDS, MOST_SECONDS = 0.5, 5.0  # between two tries
NOTES = {
    "disk-full": "the coordinator's disk is full",
    "disk": "the coordinator's disk refuses to write",
    "busy": "another program holds the coordinator's file",
}


@dataclass(frozen=True, kw_only=True)
class Standstill:
    """The store refuses everything since ``since`` (on the state's clock); ``error`` is its last word."""

    since: float
    error: StateError
    tries: int = 1

    def again(self, error: StateError) -> Standstill:
        """One more try was refused."""
        return replace(self, error=error, tries=self.tries + 1)

    @property
    def pause_seconds(self) -> float:
        """Until the next try."""
        return min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** min(self.tries - 1, 10))

    @property
    def note(self) -> str:
        """For everybody: without the operator's paths."""
        return f"{NOTES[self.error.code]}: nothing new is given out until it is mended"

    def resumed(self, state: RunState, now: float) -> tuple[RunState, ev.StoodStill]:
        """The state as it goes on from ``now``, and what is written down about it."""
        seconds = now - self.since
        return shifted(state, seconds), ev.StoodStill(seconds=max(0.0, seconds), cause=self.error.code)


def shifted(state: RunState, seconds: float) -> RunState:
    """The state as if everything in it had happened ``seconds`` later: nobody's time has run meanwhile."""
    return replace(
        state,
        since=state.since + seconds,
        pace=replace(state.pace, since=state.pace.since + seconds),
        held=None if state.held is None else state.held + seconds,
        barred={peer: replace(bar, until=bar.until + seconds) for peer, bar in state.barred.items()},
        move=None if state.move is None else replace(state.move, since=state.move.since + seconds),
        redivide=None if state.redivide is None else replace(state.redivide, since=state.redivide.since + seconds),
        looked=state.looked + seconds,
        whole_until=state.whole_until + seconds,
        uneven=None if state.uneven is None else state.uneven + seconds,
        shared=state.shared and state.shared + seconds,
        last_join=state.last_join + seconds,
        paused=None if state.paused is None else replace(state.paused, since=state.paused.since + seconds),
        unaware={peer: at + seconds for peer, at in state.unaware.items()},
        leased_at={step: expires + seconds for step, expires in state.leased_at.items()},
        members={
            peer: replace(
                member,
                joined=member.joined + seconds,
                last_seen=member.last_seen + seconds,
                away=None if member.away is None else member.away + seconds,
                busy=None if member.busy is None else member.busy + seconds,
            )
            for peer, member in state.members.items()
        },
    )
