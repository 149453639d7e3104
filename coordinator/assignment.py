"""Who holds which stage: contiguous stages, peers spread by declared speed, moving as few as possible."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageNeed:
    """What a stage asks: relative work per token, and memory to hold it; of a GPU, less than of a machine without."""

    work: float
    memory_gb: float
    gpu_gb: float | None = None  # None: as much

    def gigabytes(self, device: str) -> float:
        return self.memory_gb if device == "cpu" or self.gpu_gb is None else self.gpu_gb


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a peer brings. ``home`` is the stage whose state it already holds, ``keeps`` those it could take over."""

    speed: float
    memory_gb: float
    device: str = "cpu"
    home: int | None = None
    keeps: frozenset[int] = frozenset()

    def holds(self, need: StageNeed) -> bool:
        return self.memory_gb >= need.gigabytes(self.device)


MOVE_GAIN = 0.8  # a peer moves only if the slowest stage gets at least this much faster


def load(need: StageNeed, offers: Mapping[str, Offer], peers: Collection[str]) -> float:
    """Time per token of a stage held by these peers."""
    speed = sum(offers[p].speed for p in peers)
    return need.work / speed if speed > 0 else float("inf")


def slowest(stages: Sequence[StageNeed], offers: Mapping[str, Offer]) -> float:
    """Time per token of the slowest stage if these peers hold them; infinite if they cannot."""
    seats = assign(stages, offers, moves=False)  # near to the best, and quick
    if seats is None:
        return float("inf")
    return max(load(need, offers, peers) for need, peers in zip(stages, seats, strict=True))


def relief(
    stages: Sequence[StageNeed],
    offers: Mapping[str, Offer],
    placed: Sequence[set[str]],
    may: Callable[[str, int, int], bool] = lambda peer, origin, stage: True,
) -> tuple[str, int, int] | None:
    """The move that relieves the slowest stage most: who, from where, and to that stage; None if none clearly does.

    ``may`` says whether a peer may move from a stage to another one; a stage's last peer stays in any case.
    """
    loads = [load(need, offers, peers) for need, peers in zip(stages, placed, strict=True)]
    thin = max(range(len(stages)), key=lambda s: loads[s])
    moves = []
    for origin, peers in enumerate(placed):
        for p in sorted(peers) if origin != thin and len(peers) > 1 else ():
            if offers[p].holds(stages[thin]) and may(p, origin, thin):
                after = load(stages[origin], offers, peers - {p}), load(stages[thin], offers, placed[thin] | {p})
                moves.append((max(after), origin == 0, p, origin))  # the first stage's replicas make the batch
    if not moves or min(moves)[0] > MOVE_GAIN * loads[thin]:
        return None
    *_, peer, origin = min(moves)
    return peer, origin, thin


def assign(stages: Sequence[StageNeed], offers: Mapping[str, Offer], *, moves: bool = True) -> list[list[str]] | None:
    """Peers of every stage, sorted by id, or None if some stage cannot be held by anyone free.

    Peers stay at home; newcomers go where work per speed is highest; an empty stage takes the fastest peer that
    another stage can spare; last, unless they are to stay (``moves``), peers move while that clearly relieves the
    slowest stage.
    """
    placed: list[set[str]] = [set() for _ in stages]

    def fits(peer: str, s: int) -> bool:
        return offers[peer].holds(stages[s])

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
                placed[max(options, key=lambda s: (load(stages[s], offers, placed[s]), -s))].add(peer)
    for s in range(len(stages)):
        if not placed[s] and not fill(s, set()):
            return None
    for _ in range(len(offers) if moves else 0):
        if (found := relief(stages, offers, placed)) is None:
            break
        peer, origin, thin = found
        placed[origin].remove(peer)
        placed[thin].add(peer)
    return [sorted(s) for s in placed]
