"""What must hold of an operator's orders, with every input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from potluck.coordinator.resume import operated_of
from potluck.coordinator.state import Command, Lease, RunState

from .broken import hold


def opened_again(state: RunState, kept: object) -> Iterator[str]:
    """Looks at what a coordinator starts with, beside what was written down last (None: nothing was)."""
    found = msgspec.to_builtins(operated_of(state))
    kept = msgspec.to_builtins(operated_of(RunState())) if kept is None else kept
    hold(found == kept, f"after a restart the orders are {found}, but {kept} were on the disk")
    if state.paused is not None:
        yield "a paused run is opened again"


def operated(before: RunState, after: RunState, commands: Sequence[Command]) -> Iterator[str]:
    """Looks at one input's turn; yields the situations that histories must come to."""
    banned = [p for p in after.members if p in after.bans]
    hold(not banned, f"{banned} are banned and here")
    if before.paused is None:
        return
    if after.paused is None:
        if after.phase == "training":
            yield "a pause goes on"
        return
    hold(not any(isinstance(c, Lease) for c in commands), "something is leased while the run is paused")
    if after.phase == "training" and after.until == after.committed.step:
        yield "a pause stands"
        hold(not after.leased_at and not after.rounds_done, "something is in the air while the run stands still")
