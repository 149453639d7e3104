"""Where a step's time goes: its critical path, found by walking back from its end.

From the last thing that was done we go to what it began after: the thing that this peer did before, or, if it waited,
the arrival of its input, and through the line to what the sender did before it handed that over. Every second of the
step is on the path once, as one of

    compute PEER       forward or backward
    codec PEER         encoding and decoding, and between an arrival and who waited for it
    wire PEER -> PEER  from handing over to arriving: the line's queue, its rate, its latency
    update PEER        the optimizer
    round PEER         between two steps: the capture of a round, waiting for a round that is due, or for leases
"""

from __future__ import annotations

from typing import Literal

from .shapes import Segment
from .track import Done, Place, Step

What = Literal["compute", "codec", "wire", "update", "round"]


def began(step: Step) -> float:
    """When a step began: as the one before was done everywhere, or, if there was none, with the first thing done."""
    told = [t for t in step.tracks if t.done]
    ends = [t.begin - t.before for t in told if t.before is not None]
    found = max(ends) if ends else min((t.done[0].start for t in told), default=0.0)
    return min(found, step.end)


class Walk:
    """Back in time from the step's end. Every piece ends where the one after it begins, so that none is counted twice
    and none is missing, whatever the clocks say."""

    def __init__(self, step: Step) -> None:
        self.step, self.begin, self.at = step, began(step), step.end
        self.pieces: list[Segment] = []

    def back(
        self, to: float, what: What, peer: str, microbatch: int | None = None, receiver: str | None = None
    ) -> None:
        """From where we are to ``to``, if that is earlier; not beyond the step's beginning."""
        if (to := max(to, self.begin)) < self.at:
            piece = Segment(what=what, peer=peer, start=to, end=self.at, microbatch=microbatch, receiver=receiver)
            self.pieces.append(piece)
            self.at = to

    def through(self, peer: str, d: Done) -> None:
        """What was done, from its end to its beginning."""
        if d.kind == "update":
            self.back(d.start, "update", peer)
            return
        self.back(d.end, "codec", peer, d.microbatch)
        self.back(d.end - d.encode, "codec", peer, d.microbatch)
        self.back(d.start + d.decode, "compute", peer, d.microbatch)
        self.back(d.start, "codec", peer, d.microbatch)


def path(step: Step) -> list[Segment]:
    """The critical path, from the step's beginning to its end; empty if nobody has told anything. Somebody may have
    begun before: replicas wait for each other at rounds alone."""
    told = [(track.end, i) for i, track in enumerate(step.tracks) if track.done]
    if not told:
        return []
    walk = Walk(step)
    i = max(told)[1]
    place: Place = (i, len(step.tracks[i].done) - 1)
    seen: set[Place] = set()
    while place not in seen and walk.at > walk.begin:
        seen.add(place)
        i, j = place
        track, d, free = step.tracks[i], step.at(place), step.free(place)
        walk.through(track.peer, d)
        if d.arrived is not None and d.arrived > free:
            walk.back(d.arrived, "codec", track.peer, d.microbatch)
            source = step.source(place)
            if source is not None and source not in seen:
                sender = step.tracks[source[0]].peer
                walk.back(step.at(source).end, "wire", sender, d.microbatch, track.peer)
                place = source
                continue
            if (silent := step.silent(place)) is not None:
                walk.back(free, "wire", silent, d.microbatch, track.peer)
        walk.back(free, "compute" if j == track.gap or not j else "codec", track.peer, d.microbatch)
        if j:
            place = i, j - 1
    walk.back(walk.begin, "round", step.tracks[place[0]].peer)
    return walk.pieces[::-1]
