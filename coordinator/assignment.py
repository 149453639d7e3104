"""Who holds which stage: contiguous stages, peers spread by declared speed, moving as few as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageNeed:
    """What a stage asks: relative work per token, and memory to hold it."""

    work: float
    memory_gb: float


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a peer brings. ``home`` is the stage whose state it already holds, ``keeps`` those it could take over."""

    speed: float
    memory_gb: float
    home: int | None = None
    keeps: frozenset[int] = frozenset()


MOVE_GAIN = 0.8  # a peer moves only if the slowest stage gets at least this much faster


def assign(stages: Sequence[StageNeed], offers: Mapping[str, Offer]) -> list[list[str]] | None:
    """Peers of every stage, sorted by id, or None if some stage cannot be held by anyone free.

    Peers stay at home; newcomers go where work per speed is highest; an empty stage takes the fastest peer that
    another stage can spare; last, peers move while that clearly relieves the slowest stage.
    """
    placed: list[set[str]] = [set() for _ in stages]

    def load(s: int, without: str = "", extra: str = "") -> float:
        speed = sum(offers[p].speed for p in placed[s] if p != without) + (offers[extra].speed if extra else 0.0)
        return stages[s].work / speed if speed > 0 else float("inf")

    def fits(peer: str, s: int) -> bool:
        return offers[peer].memory_gb >= stages[s].memory_gb

    def fill(s: int, seen: set[int]) -> bool:
        """Moves a peer to an empty stage, and others after it if that leaves a stage empty (an augmenting path)."""
        seen.add(s)
        able = [
            (len(placed[o]), s in offers[p].keeps, offers[p].speed, p, o)
            for o in range(len(stages))
            for p in placed[o]
            if fits(p, s)
        ]
        for *_, peer, origin in sorted(able, reverse=True):
            if origin not in seen:
                placed[origin].remove(peer)
                if placed[origin] or fill(origin, seen):
                    placed[s].add(peer)
                    return True
                placed[origin].add(peer)
        return False

    order = sorted(offers, key=lambda p: (-offers[p].speed, p))
    for peer in order:
        home = offers[peer].home
        if home is not None and home < len(stages) and fits(peer, home):
            placed[home].add(peer)
    for peer in order:
        if not any(peer in s for s in placed):
            options = [s for s in range(len(stages)) if fits(peer, s)]
            if options:
                placed[max(options, key=lambda s: (load(s), -s))].add(peer)
    for s in range(len(stages)):
        if not placed[s] and not fill(s, set()):
            return None
    for _ in range(len(offers)):
        slowest = max(range(len(stages)), key=load)
        before = load(slowest)
        moves = [
            (max(load(o, without=p), load(slowest, extra=p)), p, o)
            for o in range(len(stages))
            if o != slowest and len(placed[o]) > 1
            for p in sorted(placed[o])
            if fits(p, slowest)
        ]
        if not moves or min(moves)[0] > MOVE_GAIN * before:
            break
        _, peer, origin = min(moves)
        placed[origin].remove(peer)
        placed[slowest].add(peer)
    return [sorted(s) for s in placed]
