"""A run that exists in memory only, with something to say to every question, for tests of what is built on `Source`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from potluck.coordinator.dashboard.shapes import (
    Caps,
    Counterfactual,
    Eta,
    EventRow,
    Goodput,
    Incident,
    Lane,
    LinkPoint,
    LinkRow,
    Op,
    PeerPage,
    PeerPoint,
    PeerRow,
    Point,
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
    Traffic,
    TrafficPoint,
    Wait,
)

START = 1.7e9
HOSTILE = '</script><script>alert(1)</script><!-- =cmd|"x"'


def peer_id(number: int) -> str:
    return f"{number:02x}" * 32 if number < 256 else f"{number:064x}"


class FakeSource:
    """``steps_done`` steps of a run with ``peers`` peers; `add` makes another. ``asked`` counts questions by name."""

    def __init__(self, points: int = 3, peers: int = 2, name: str = "peer") -> None:
        self.version = 1
        self.name = name
        self.curve_points: list[Point] = []
        self.happened: list[EventRow] = []
        self.peers = [self._peer(number) for number in range(peers)]
        self.fields: dict[str, Any] = {}
        self.asked: dict[str, int] = {}
        self.waiting = 0
        self.before_answer: Callable[[str], None] = lambda question: None
        self._wake = asyncio.Event()
        for _ in range(points):
            self.add()

    # What tests do to it.

    def add(self) -> None:
        """One more point and one more event."""
        number = len(self.curve_points) + 1
        heldout = 4.2 if number % 2 else None
        self.curve_points.append(
            Point(id=number, step=number, tokens=number * 100, time=START + number, train=4.0, heldout=heldout)
        )
        text = f"{self.name} {number} joined"
        self.happened.append(
            EventRow(id=number, time=START + number, step=number, kind="PeerJoined", text=text, peer=peer_id(0))
        )
        self.changes()

    def changes(self, **fields: Any) -> None:
        """The state's fields from now on."""
        self.fields.update(fields)
        self.version += 1
        self._wake.set()
        self._wake = asyncio.Event()

    def moves(self, number: int, **fields: Any) -> None:
        """A peer's row changes."""
        self.peers[number] = msgspec.structs.replace(self.peers[number], **fields)
        self.changes()

    def _peer(self, number: int) -> PeerRow:
        mine, other = peer_id(number), peer_id(number + 1)
        time = StepTime(compute=0.5, codec=0.1, update=0.1, wire=0.2, waits=(Wait(peer=other, seconds=0.1),))
        return PeerRow(
            id=mine,
            name=f"{self.name} {number}",
            region="eu",
            stage=number % 2,
            state="training",
            samples=32,
            work=16.0,
            sent=1000,
            received=2000,
            last_seen=START,
            seconds_per_step=1.0,
            tokens_per_second=1024.0,
            device="cpu",
            time=time,
            links=(self._link(mine, other),),
        )

    def _link(self, sender: str, receiver: str) -> LinkRow:
        rate = {"rtt_seconds": 0.04, "bytes_per_second": 1e6, "cap": 2e6, "share": 0.5}
        return LinkRow(sender=sender, receiver=receiver, path="direct", time=START, **rate)

    # What a `Source` answers.

    def _asked(self, question: str) -> None:
        self.asked[question] = self.asked.get(question, 0) + 1
        self.before_answer(question)

    def state(self) -> State:
        self._asked("state")
        return self._state(None)

    def _state(self, at: float | None) -> State:
        stages = [
            StageRow(stage=i, first_layer=i, last_layer=i, parameters=10, replicas=(peer_id(i),), is_thin=True)
            for i in range(2)
        ]
        run = RunRow(name=self.name, id="ab12", model="GPT-J shape", stages=2, preset="potluck", codec="int4")
        step = len(self.curve_points)
        known: dict[str, Any] = {
            **{"version": self.version, "now": time.time(), "at": at, "run": run, "phase": "training", "note": ""},
            **{"is_paused": False, "started": START, "step": step, "steps": 120, "generation": 1},
            **{"train_loss": 4.0, "heldout_loss": 4.2, "heldout_first": 7.7, "tokens": step * 100},
            **{"tokens_per_second": 3200.5, "eta_seconds": 60.0, "eta": Eta(low=50.0, high=70.0)},
            **{"goodput": Goodput(committed=9.0, computed=10.0), "round": 3, "bytes_per_token": 400.0},
            **{"dense_bytes_per_token": 9000.0, "traffic": self._traffic(), "stages": tuple(stages)},
            **{"peers": tuple(self.peers), "rounds": tuple(self.rounds(None, 30)), "alerts": (), "published": None},
            **{"events": tuple(self.happened[-40:][::-1]), "evaluations": 0},
        }
        return State(**{**known, **self.fields})

    async def changed(self, version: int) -> int:
        self.waiting += 1
        try:
            while self.version == version:
                await self._wake.wait()
            return self.version
        finally:
            self.waiting -= 1

    def points(self, after: int) -> list[Point]:
        return self.curve_points[after:]

    def news(self, after: int) -> list[EventRow]:
        return self.happened[after:]

    def state_at(self, at: float) -> State:
        self._asked("state_at")
        return self._state(at)

    def curve(self, most: int, until: float | None) -> list[Point]:
        self._asked("curve")
        return [point for point in self.curve_points if until is None or point.time <= until][:most]

    def events(self, after: int, until: float | None, limit: int, kind: str | None) -> list[EventRow]:
        self._asked("events")
        rows = [row for row in self.happened if row.id > after and (until is None or row.time <= until)]
        return [row for row in rows if kind in (None, row.kind)][:limit]

    def incidents(self, until: float | None) -> list[Incident]:
        lost = Incident(id=1, time=START + 0.5, step=0, group="lost", text=f"{self.name} is lost", peer=peer_id(0))
        return [lost] if until is None or lost.time <= until else []

    def rounds(self, before: int | None, limit: int) -> list[RoundRow]:
        rows = [
            RoundRow(
                **{"round": n, "step": n * 8, "replicas": 2, "samples": 16, "agree": True, "nbytes": 99},
                **{"seconds": 0.5, "committed": START + n, "degraded": n == 2},
            )
            for n in (3, 2, 1)
        ]
        return [row for row in rows if before is None or row.step < before][:limit]

    def round(self, step: int) -> RoundPage | None:
        found = [row for row in self.rounds(None, 30) if row.step == step]
        part = RoundPart(
            peer=peer_id(0), name=self.name, stage=0, samples=8, nbytes=50, seconds=0.4, digest="0123456789abcdef"
        )
        return RoundPage(row=found[0], parts=(part,), before=None, after=None) if found else None

    def peer(self, peer: str, at: float | None) -> PeerPage | None:
        found = [row for row in self.peers if row.id == peer]
        point = PeerPoint(
            time=START, seconds=60.0, samples=8, sent=10, received=20, compute_seconds=40.0, wait_seconds=5.0
        )
        rest: dict[str, Any] = {"layers": (0, 1), "rounds": 2, "rank": 1, "history": (point,), "first_seen": START}
        if not found:
            return None
        return PeerPage(row=found[0], caps=Caps(upload_mbps=10.0), events=tuple(self.happened[:5]), **rest)

    def links(self, at: float | None) -> list[LinkRow]:
        return [link for peer in self.peers for link in peer.links]

    def link(self, sender: str, receiver: str) -> list[LinkPoint]:
        return [LinkPoint(time=START, bytes_per_second=1e6, rtt_seconds=0.04)]

    def _traffic(self) -> tuple[Traffic, ...]:
        return (Traffic(purpose="activation", nbytes=40, dense_nbytes=800), Traffic(purpose="weights", **ZERO))

    def traffic(self, most: int, until: float | None) -> list[TrafficPoint]:
        return [TrafficPoint(time=START, step=1, tokens=100, traffic=self._traffic())]

    def leaderboard(self) -> list[Standing]:
        self._asked("leaderboard")
        return [
            Standing(
                **{"rank": i + 1, "peer": row.id, "name": row.name, "region": "eu", "work": row.work},
                **{"tokens": 1600.0, "share": 0.5, "rounds": 2, "first_seen": START, "is_here": True},
            )
            for i, row in enumerate(self.peers)
        ]

    def steps(self, limit: int, order: str) -> list[StepRow]:
        rows = [StepRow(step=n, time=START + n, seconds=1.0 + n, usual=1.0) for n in (1, 2)]
        return rows[::-1][:limit]

    def step(self, step: int) -> StepPage | None:
        found = [row for row in self.steps(9, "newest") if row.step == step]
        lane = Lane(
            peer=peer_id(0), name=self.name, stage=0, ops=(Op(kind="forward", microbatch=0, start=0.0, end=0.5),)
        )
        path = Segment(what="wire", peer=peer_id(0), start=0.0, end=0.5, receiver=peer_id(1))
        other = Counterfactual(text=f"without {self.name}", seconds=0.8, peer=peer_id(0))
        if not found:
            return None
        words = (f"{self.name} was slow",)
        return StepPage(
            row=found[0], words=words, path=(path,), lanes=(lane,), counterfactuals=(other,), before=1, after=None
        )

    def evaluations(self) -> list[dict[str, Any]]:
        score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 60}
        tasks = [{"name": "a", "metric": "macro-f1", "score": score}, {"name": "b", "metric": "x", "skipped": "no"}]
        row = {"step": 8, "suite": "offline", "time": START, "label": "mean macro-f1", "score": score, "tasks": tasks}
        return [row, {**row, "step": 4, "label": "", "score": None, "tasks": []}]


ZERO = {"nbytes": 0, "dense_nbytes": 0}
