"""One clock for what many peers say by their own.

Between two neighbours, frames and their acknowledgements are what NTP's packets are (Mills, RFC 5905): the least time
that anything took in each direction, by both clocks, differs by twice what the clocks do, *if* the quickest ways there
and back take equally long. An acknowledgement is short, so that a slow line one way does not look like a late clock.
Where no acknowledgement is known, half the difference between the two directions goes into the clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .track import Step

STEPS = 16  # the newest, whose least times count: clocks drift
Pair = tuple[str, str]  # sender, receiver
Known = TypeVar("Known")


def delays(step: Step) -> dict[Pair, float]:
    """The least that anything took from one peer to another in a step, by the clocks of both; may be negative."""
    least: dict[Pair, float] = {}

    def seen(sender: str, receiver: str, seconds: float) -> None:
        least[sender, receiver] = min(seconds, least.get((sender, receiver), seconds))

    for i, track in enumerate(step.tracks):
        for j, d in enumerate(track.done):
            if d.arrived is not None and (source := step.source((i, j))) is not None:
                sender, sent = step.tracks[source[0]].peer, step.at(source)
                seen(sender, track.peer, d.arrived - sent.end)
                if sent.told is not None:
                    seen(track.peer, sender, sent.told - d.arrived)
    return least


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """What is known of the peers' clocks in one generation: they begin anew with every one. ``heard``: what the
    coordinator's clock showed more than a peer's when it heard that the peer was done."""

    seen: Mapping[Pair, tuple[float, ...]] = field(default_factory=dict)
    heard: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def learnt(self, step: Step, heard: Mapping[str, float]) -> Clocks:
        """With one more step, its tracks on their own clocks; ``heard``: when its end was heard of."""
        late = {t.peer: heard[t.peer] - t.end for t in step.tracks if t.done and t.peer in heard}
        return Clocks(seen=newest(self.seen, delays(step)), heard=newest(self.heard, late))

    def aligned(self, step: Step) -> Step:
        """The tracks of a step on one clock.

        Peers who have to do with each other are a crew; crews are put beside each other by when the coordinator heard
        of them, the soonest of each crew: all ways to the coordinator are taken to be as long.
        """
        left = [t.peer for t in step.tracks if t.done]
        ahead: dict[str, float] = {}
        least = {pair: min(x) for pair, x in self.seen.items()}
        while left:
            crew = ahead_of(left, least)
            late = min((min(self.heard[p]) + x for p, x in crew.items() if p in self.heard), default=0.0)
            ahead |= {p: x - late for p, x in crew.items()}
            left = [p for p in left if p not in crew]
        return Step(tracks=tuple(t.later(-ahead[t.peer]) if t.done else t for t in step.tracks))


def newest(old: Mapping[Known, tuple[float, ...]], new: Mapping[Known, float]) -> dict[Known, tuple[float, ...]]:
    """The newest values with one more each."""
    out = dict(old)
    for key, value in new.items():
        out[key] = (*old.get(key, ()), value)[-STEPS:]
    return out


def ahead_of(peers: Sequence[str], least: Mapping[Pair, float]) -> dict[str, float]:
    """Seconds by which each peer's clock is ahead of the first one's, along the ways with the shortest round trips;
    without those that no way leads to."""
    near: dict[str, list[tuple[str, float, float]]] = {}
    for (a, b), there in least.items():
        if (back := least.get((b, a))) is not None:
            near.setdefault(a, []).append((b, (there - back) / 2, max(0.0, there + back)))
    found: dict[str, float] = {}
    heap = [(0.0, peer, 0.0) for peer in peers[:1]]
    while heap:
        doubt, peer, ahead = heapq.heappop(heap)
        if peer in found:
            continue
        found[peer] = ahead
        for other, further, more in near.get(peer, ()):
            if other not in found:
                heapq.heappush(heap, (doubt + more, other, ahead + further))
    return found
