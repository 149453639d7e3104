"""Who keeps what of whom: peers that can take a stage over when all of its replicas are gone."""

from __future__ import annotations

import hashlib

from .plan import Plan


def keepers_of(plan: Plan, stage: int, count: int) -> tuple[str, ...]:
    """The ``count`` peers that keep a stage's base and redo log, none of its own replicas; fewer if there are fewer.

    A lone replica's stage has one keeper at most: nothing of its rounds is compressed with a loss, so telling of them
    costs about 3 bytes a weight. A pure function of the plan: every peer has a rank for every stage (rendezvous
    hashing), so that one who comes or goes moves few bases; who keeps fewer than its share of the stages goes first.
    """
    return all_keepers(plan, count)[stage]


def all_keepers(plan: Plan, count: int) -> tuple[tuple[str, ...], ...]:
    """The keepers of every stage."""
    places = {r.peer: number for number, stage in enumerate(plan.stages) for r in stage.replicas}
    peers = sorted(places)
    load = dict.fromkeys(peers, 0)
    share = -(-len(plan.stages) * count // len(peers))
    out = []
    for number, stage in enumerate(plan.stages):
        able = [p for p in peers if places[p] != number]
        able.sort(key=lambda p: (load[p] >= share, _rank(stage.first_layer, p)))
        chosen = able[: count if len(stage.replicas) > 1 else min(count, 1)]
        for peer in chosen:
            load[peer] += 1
        out.append(tuple(sorted(chosen)))
    return tuple(out)


def kept_by(plan: Plan, peer: str, count: int) -> tuple[int, ...]:
    """The stages that a peer keeps."""
    return tuple(i for i, keepers in enumerate(all_keepers(plan, count)) if peer in keepers)


def _rank(first_layer: int, peer: str) -> bytes:
    return hashlib.blake2b(f"{first_layer}:{peer}".encode(), digest_size=8).digest()
