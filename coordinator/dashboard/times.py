"""Where each peer's time goes in a step: computing, or waiting, and for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .shapes import StepTime, Wait
from .track import Step

NEWEST = 0.2  # weight of a step in the moving mean
MOST_WAITS = 8  # by whom, that are told
LEAST_SECONDS = 1e-4  # of a wait that is told


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one peer in a step, or their mean over several."""

    compute: float = 0.0
    codec: float = 0.0
    update: float = 0.0
    wire: float = 0.0
    other: float = 0.0
    waits: Mapping[str, float] = field(default_factory=dict)

    def mean(self, newer: Spent) -> Spent:
        """The moving mean with one more step."""

        def mixed(old: float, new: float) -> float:
            return old + NEWEST * (new - old)

        waits = {p: mixed(self.waits.get(p, 0.0), newer.waits.get(p, 0.0)) for p in {*self.waits, *newer.waits}}
        return Spent(
            compute=mixed(self.compute, newer.compute),
            codec=mixed(self.codec, newer.codec),
            update=mixed(self.update, newer.update),
            wire=mixed(self.wire, newer.wire),
            other=mixed(self.other, newer.other),
            waits={p: s for p, s in waits.items() if s >= LEAST_SECONDS},
        )

    def row(self) -> StepTime:
        longest = sorted(self.waits.items(), key=lambda item: -item[1])[:MOST_WAITS]
        return StepTime(
            compute=self.compute,
            codec=self.codec,
            update=self.update,
            wire=self.wire,
            waits=tuple(Wait(peer=p, seconds=s) for p, s in longest),
            other=self.other,
        )


def spent(step: Step, i: int) -> Spent:
    """Of one track, which has told. While an input had not come, its sender had yet to send it (``waits``), or it was
    under way (``wire``); who has not told what he did had sent it."""
    track = step.tracks[i]
    compute = codec = update = wire = 0.0
    other = track.before or 0.0
    waits: dict[str, float] = {}
    for j, d in enumerate(track.done):
        took, free = d.end - d.start, step.free((i, j))
        if d.kind == "update":
            update += took
        else:
            codec += d.decode + d.encode
            compute += took - d.decode - d.encode
        came = free
        if d.arrived is not None and d.arrived > free:
            came = d.arrived
            source = step.source((i, j))
            sent = free if source is None else min(came, max(free, step.at(source).end))
            wire += came - sent
            if source is not None and sent > free:
                sender = step.tracks[source[0]].peer
                waits[sender] = waits.get(sender, 0.0) + sent - free
        if j == track.gap:
            compute += d.start - came
        else:
            other += d.start - came
    return Spent(compute=compute, codec=codec, update=update, wire=wire, other=other, waits=waits)
