"""Answers of the dashboard's API for tests of its page, as the types that the coordinator answers with."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec

from potluck.coordinator.dashboard.shapes import (
    Caps,
    Counterfactual,
    EventRow,
    Goodput,
    Lane,
    LinkPoint,
    LinkRow,
    Op,
    PeerPage,
    PeerPoint,
    PeerRow,
    RoundPage,
    RoundPart,
    RoundRow,
    RunRow,
    Segment,
    StageRow,
    Standing,
    State,
    StepPage,
    StepRow,
    StepTime,
    Wait,
)

NOW = 1_763_900_000.0
HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = (
    "dora",
    "garage",
    "attic-3090",
    "kitchen",
    "lab4",
    "old-titan",
    "blue",
    "mira",
    "node7",
    "winter",
    "zoe",
    "hut",
)


def peer_id(index: int) -> str:
    return f"{index:04x}" * 16


def name_of(index: int) -> str:
    return NAMES[index] if index < len(NAMES) else f"{NAMES[index % len(NAMES)]}-{index}"


def link(sender: int, receiver: int, rate: float | None, rtt: float | None, path: Any = "direct") -> LinkRow:
    cap = 1.25e6 * (1 + sender % 4) if sender % 3 else None
    share = None if rate is None else min(1.0, rate / (cap or 5e6))
    ends = {"sender": peer_id(sender), "receiver": peer_id(receiver)}
    return LinkRow(**ends, path=path, rtt_seconds=rtt, bytes_per_second=rate, cap=cap, share=share, time=NOW - 4)


def links(stages: int, replicas: int, seed: int = 0) -> list[LinkRow]:
    """Of neighbours in the pipeline, both ways, and among the replicas of a stage."""
    chance = random.Random(seed)
    found = []
    for a in range(stages * replicas):
        for b in range(stages * replicas):
            apart = abs(a // replicas - b // replicas)
            if a != b and apart <= 1 and chance.random() < min(1.0, 8 / replicas):
                path = chance.choices(("direct", "punched", "relayed"), (6, 3, 1))[0]
                rate = 10 ** chance.uniform(4.6, 7.1) * (0.3 if path == "relayed" else 1)
                found.append(link(a, b, rate, chance.uniform(0.004, 0.14), path))
    return found


def peers(stages: int, replicas: int, *, free: int = 0, first_name: str | None = None) -> list[PeerRow]:
    chance = random.Random(1)
    known = links(stages, replicas)
    rows = []
    for i in range(stages * replicas + free):
        stage = i // replicas if i < stages * replicas else None
        slow = 3.2 if i == 0 else chance.uniform(0.8, 1.6)
        others = [j for j in (i - replicas, i + replicas) if 0 <= j < stages * replicas]
        waits = tuple(Wait(peer=peer_id(j), seconds=chance.uniform(0.2, 1.8)) for j in others)
        time = StepTime(compute=slow, codec=0.24, update=0.3, wire=0.5, waits=waits, other=0.2)
        away = stage is not None and i % 21 == 20
        state = "away" if away else "training" if stage is not None else ("waiting", "loading")[i % 2]
        row = PeerRow(
            id=peer_id(i),
            name=first_name if i == 0 and first_name else name_of(i),
            region="DE" if i % 2 else "",
            stage=stage,
            state=state,
            samples=4000 - 30 * i,
            work=(4000 - 30 * i) / max(1, stages),
            sent=12_300_000_000 - i * 10_000_000,
            received=4_560_000_000,
            last_seen=NOW - 3,
            seconds_per_step=4.6 if stage is not None else None,
            tokens_per_second=5300.0 if stage is not None else None,
            device="NVIDIA GeForce RTX 3090, 24 GB",
            time=time if stage is not None and not away else None,
            links=tuple(one for one in known if one.sender == peer_id(i))[:12],
        )
        rows.append(row)
    return rows


def state(stages: int = 3, replicas: int = 2, *, free: int = 3, thin: int = 1, first_name: str | None = None) -> State:
    everybody = peers(stages, replicas, free=free, first_name=first_name)
    rows = [
        StageRow(
            stage=s,
            first_layer=4 * s,
            last_layer=4 * s + 3,
            parameters=151_000_000,
            replicas=tuple(peer.id for peer in everybody if peer.stage == s)[: 1 if s == thin else None],
            is_thin=s == thin,
        )
        for s in range(stages)
    ]
    run = RunRow(name="home", id="ab12", model="GPT-J shape", stages=stages, preset="potluck", codec="int4")
    empty: dict[str, Any] = {"traffic": (), "rounds": (), "events": (), "alerts": (), "evaluations": 0}
    nothing = dict.fromkeys(("at", "eta", "eta_seconds", "bytes_per_token", "dense_bytes_per_token", "published"))
    return State(
        **empty,
        **nothing,
        version=1,
        now=NOW,
        run=run,
        phase="training",
        note="",
        is_paused=False,
        started=NOW - 86_400,
        step=1200,
        steps=5000,
        generation=2,
        train_loss=3.1,
        heldout_loss=3.2,
        heldout_first=10.8,
        tokens=48_000_000,
        tokens_per_second=3200.5,
        goodput=Goodput(committed=90.0, computed=100.0),
        round=150,
        stages=tuple(rows),
        peers=tuple(everybody),
    )


def peer_page(row: PeerRow, text: str = "dora took over stage 0") -> PeerPage:
    history = []
    for i in range(48):
        busy = 0.6 + 0.3 * math.sin(i / 5)
        history.append(
            PeerPoint(
                time=NOW - (48 - i) * 600,
                seconds=600.0,
                samples=round(100 * busy),
                sent=round(4e8 * busy),
                received=round(1.5e8 * busy),
                compute_seconds=600 * busy,
                wait_seconds=500 * (1 - busy),
            )
        )
    history.append(msgspec.structs.replace(history[-1], time=NOW - 480, seconds=120.0))
    kinds = ("PeerJoined", "LeaseLost", "PeerJoined", "StageMoved")
    events = [
        EventRow(id=i, time=NOW - 4000 + 900 * i, step=1000 + i, kind=kind, text=text, peer=row.id)
        for i, kind in enumerate(kinds)
    ]
    return PeerPage(
        row=row,
        caps=Caps(memory_gb=20.0, upload_mbps=30.0),
        first_seen=NOW - 86_400,
        layers=(0, 4),
        rounds=148,
        rank=1,
        history=tuple(history),
        events=tuple(events),
    )


def round_page(everybody: list[PeerRow], *, odd: bool = False, degraded: bool = False) -> RoundPage:
    parts = [
        RoundPart(
            peer=peer.id,
            name=peer.name,
            stage=peer.stage,
            samples=64 + i % 3,
            nbytes=3_000_000 + 400_000 * (i % 4),
            seconds=2.4 + 0.9 * (i % 5),
            digest=f"{peer.stage + 1:016x}" if not odd or i else "dead" * 4,
        )
        for i, peer in enumerate(everybody)
        if peer.stage is not None
    ]
    row = RoundRow(
        round=150,
        step=1200,
        replicas=len(parts),
        samples=sum(part.samples for part in parts),
        agree=not odd,
        nbytes=sum(part.nbytes for part in parts),
        seconds=6.1,
        committed=NOW - 30,
        degraded=degraded,
    )
    return RoundPage(row=row, parts=tuple(parts), before=1192, after=None)


def step_page(stages: int = 3, replicas: int = 2, micro: int = 4, names: dict[str, str] | None = None) -> StepPage:
    """A pipeline in which the second stage's first replica is slow; the path runs through it."""
    lanes, path = [], []
    for s in range(stages):
        for r in range(replicas):
            peer = peer_id(s * replicas + r)
            ops = []
            slow = 2.2 if (s, r) == (1, 0) else 1.0
            for m in range(micro):
                start = 0.35 * s + 0.4 * m * (slow if s >= 1 else 1)
                ops.append(Op(kind="forward", microbatch=m, start=start, end=start + 0.3 * slow))
                back = 4.0 + 0.5 * (stages - s) + 0.75 * m
                ops.append(Op(kind="backward", microbatch=m, start=back, end=back + 0.55 * min(slow, 1.3)))
            end = ops[-1].end + 0.6
            ops.append(Op(kind="update", microbatch=None, start=end, end=end + 0.5))
            lanes.append(
                Lane(peer=peer, name=(names or {}).get(peer, name_of(s * replicas + r)), stage=s, ops=tuple(ops))
            )
    ends = [peer_id(s * replicas) for s in range(stages)]
    path = [
        Segment(what="compute", peer=ends[0], start=0.0, end=0.3, microbatch=0),
        Segment(what="wire", peer=ends[0], receiver=ends[1], start=0.3, end=0.5, microbatch=0),
        Segment(what="compute", peer=ends[1], start=0.5, end=3.9, microbatch=3),
        Segment(what="codec", peer=ends[1], start=3.9, end=4.0),
        Segment(what="wire", peer=ends[1], receiver=ends[-1], start=4.0, end=4.5, microbatch=3),
        Segment(what="compute", peer=ends[-1], start=4.5, end=7.2, microbatch=3),
        Segment(what="wire", peer=ends[-1], receiver=ends[0], start=7.2, end=8.0, microbatch=3),
        Segment(what="compute", peer=ends[0], start=8.0, end=8.6, microbatch=3),
        Segment(what="update", peer=ends[0], start=8.6, end=9.1),
    ]
    words = (
        f"{lanes[replicas].name} was the slowest machine: its forward passes took twice as long as those beside it.",
        "Its line to lab4 was half as fast as usual, 0.9 Mbit/s.",
    )
    return StepPage(
        row=StepRow(step=1200, time=NOW - 60, seconds=9.1, usual=6.2),
        words=words,
        path=tuple(path),
        lanes=tuple(lanes),
        counterfactuals=(
            Counterfactual(text=f"without {lanes[replicas].name}", seconds=7.4, peer=ends[1]),
            Counterfactual(text="if nothing had been sent", seconds=8.2),
            Counterfactual(text="if its line were as fast as usual", seconds=9.1, peer=ends[1], receiver=ends[-1]),
        ),
        before=1199,
        after=1201,
    )


def steps(number: int = 40) -> list[StepRow]:
    chance = random.Random(2)
    return [
        StepRow(step=1200 - i, time=NOW - 60 - 7 * i, seconds=6 + chance.random() + 3.1 * (i % 9 == 0), usual=6.4)
        for i in range(number)
    ]


def standings(everybody: list[PeerRow]) -> list[Standing]:
    work = sum(peer.work for peer in everybody)
    return [
        Standing(
            rank=i + 1,
            peer=peer.id,
            name=peer.name,
            region=peer.region,
            work=peer.work,
            tokens=peer.work * 1024,
            share=peer.work / work,
            rounds=148 - i,
            first_seen=NOW - 86_400 + 60 * i,
            is_here=i % 5 != 4,
        )
        for i, peer in enumerate(everybody)
    ]


def link_points(number: int = 90) -> list[LinkPoint]:
    return [
        LinkPoint(
            time=NOW - (number - i) * 60,
            bytes_per_second=None if 40 < i < 46 else 1.6e6 + 6e5 * math.sin(i / 7),
            rtt_seconds=0.031 + 0.01 * abs(math.sin(i / 11)),
        )
        for i in range(number)
    ]


def answers(stages: int = 3, replicas: int = 2, name: str | None = None) -> dict[str, Any]:
    """All that a page may ask of a run: answers by their path. ``name``: of the first peer, of an odd sort."""
    now = state(stages, replicas, first_name=name)
    first = now.peers[0]
    known = links(stages, replicas)
    some = {f"api/links/{one.sender}/{one.receiver}": link_points() for one in known[:40]}
    return {
        "api/state": now,
        "api/links": known,
        "api/leaderboard": standings([peer for peer in now.peers if peer.stage is not None]),
        "api/steps": steps(),
        "api/steps/1200": step_page(stages, replicas, names={first.id: first.name}),
        "api/rounds/1200": round_page(list(now.peers), degraded=True),
        f"api/peers/{first.id}": peer_page(first, f"{first.name} took over stage 0"),
        **some,
    }
