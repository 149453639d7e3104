"""Whether two states of the coordinator are the same."""

from __future__ import annotations

from dataclasses import replace

from potluck.coordinator.state import RunState


def same(one: RunState, other: RunState) -> bool:
    """Equal, but for the last bits of their times."""

    def rounded(state: RunState) -> RunState:
        return replace(
            state,
            since=round(state.since, 4),
            last_join=round(state.last_join, 4),
            unaware={p: round(at, 4) for p, at in state.unaware.items()},
            paused=state.paused and replace(state.paused, since=round(state.paused.since, 4)),
            held=state.held and round(state.held, 4),
            barred={p: replace(bar, until=round(bar.until, 4)) for p, bar in state.barred.items()},
            pace=replace(
                state.pace,
                since=round(state.pace.since, 4),
                mean_seconds=round(state.pace.mean_seconds, 4),
                deviation_seconds=round(state.pace.deviation_seconds, 4),
            ),
            leased_at={s: round(t, 4) for s, t in state.leased_at.items()},
            members={
                p: replace(
                    m,
                    joined=round(m.joined, 4),
                    last_seen=round(m.last_seen, 4),
                    away=m.away and round(m.away, 4),
                    busy=m.busy and round(m.busy, 4),
                )
                for p, m in state.members.items()
            },
        )

    return rounded(one) == rounded(other)
