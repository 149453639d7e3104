"""What the dashboard shows: a fold of the events, points and reports, kept in memory."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..protocol import control_pb2 as pb
from ..protocol.architecture import TITLES
from ..protocol.config import RunConfig
from ..protocol.frames import Purpose
from ..protocol.identity import PEER_ID_LENGTH
from ..protocol.plan import Shape
from .clock import Clock
from .scores import Scores
from .state import Commit, Journal, Point, Rules, RunState, Said
from .store import Store

COMPRESSED = (
    "activation",
    "gradient",
    "weights",
)  # purposes with an uncompressed counterfactual of their own
PURPOSES = frozenset(p.value for p in Purpose)
MOST_NBYTES = 2**62  # that the database holds, whatever a worker claims
PATHS = ("direct", "punched", "relayed")
MOST_LINKS = 256  # of one peer, that are shown
RATE_SECONDS = 20.0  # window of the shown speed


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a batch of reports says of its peers: shown once it is on disk."""

    steps: tuple[tuple[str, pb.StepDone], ...] = ()
    traffic: Mapping[tuple[str, str, str, str], tuple[int, int]] = field(default_factory=dict)
    links: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def statements(self) -> list[tuple[str, list[Any]]]:
        """What keeps the byte counts."""
        return [
            ("INSERT OR REPLACE INTO traffic VALUES (?,?,?,?,?,?)", [*key, *total])
            for key, total in self.traffic.items()
        ]


@dataclass(kw_only=True)
class PeerFigures:
    """What one peer has reported about itself."""

    samples: int = 0
    seconds_per_step: float | None = None


NOTHING = Heard()


class Board:
    """The dashboard's ``Source`` (see :mod:`.web`)."""

    def __init__(self, config: RunConfig, rules: Rules, run_id: str, vocab_size: int, store: Store) -> None:
        self.config, self.rules, self.run_id, self.vocab_size = config, rules, run_id, vocab_size
        self.version = 1
        self.published: str | None = None
        self.clock = Clock()
        self._state = RunState()
        self._changed = asyncio.Condition()
        self._figures: dict[str, PeerFigures] = {}
        self._links: dict[str, list[dict[str, Any]]] = {}  # of each peer to others, as it last said
        self._traffic: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        self._load(store)

    def _load(self, store: Store) -> None:
        seq_len = self.config.model.seq_len
        self._points = [
            {"id": i, "step": s, "tokens": n * seq_len, "time": t, "train": train, "heldout": heldout}
            for i, s, n, t, train, heldout in store.rows(
                "SELECT id, step, samples, time, train, heldout FROM points ORDER BY id"
            )
        ]
        recent = store.rows("SELECT id, time, kind, text FROM events ORDER BY id DESC LIMIT 100")
        self._events = deque(
            ({"id": i, "time": t, "kind": k, "text": text} for i, t, k, text in reversed(recent)), maxlen=100
        )
        rounds = store.rows(
            "SELECT round, step, replicas, samples, nbytes, seconds, committed, degraded FROM rounds"
            " ORDER BY step DESC LIMIT 30"
        )
        self._rounds = deque(
            (round_row(*row) for row in reversed(rounds)),
            maxlen=30,
        )
        self._scores = Scores.read(store)
        first = store.rows("SELECT MIN(time) FROM events")
        self._started = first[0][0] or self.clock()
        for peer, session, purpose, direction, nbytes, dense in store.rows("SELECT * FROM traffic"):
            self._traffic[peer, session, purpose, direction] = (nbytes, dense)

    # What comes in.

    def heard(self, reports: Sequence[tuple[bytes, Said]]) -> Heard:
        """What is new in what workers said, with their sessions. Nothing of it is shown before :meth:`update`."""
        steps: list[tuple[str, pb.StepDone]] = []
        traffic: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        links: dict[str, list[dict[str, Any]]] = {}
        for session, said in reports:
            body = said.report.WhichOneof("body")
            if body == "step_done":
                steps.append((said.peer, said.report.step_done))
            elif body == "heartbeat":
                links[said.peer] = [link_row(link) for link in said.report.heartbeat.links[:MOST_LINKS]]
                totals: dict[tuple[str, str], tuple[int, int]] = {}
                for t in said.report.heartbeat.traffic:
                    if t.purpose not in PURPOSES or t.direction not in ("in", "out"):
                        continue
                    nbytes, dense = totals.get((t.purpose, t.direction), (0, 0))
                    sums = (min(nbytes + t.nbytes, MOST_NBYTES), min(dense + t.dense_nbytes, MOST_NBYTES))
                    totals[t.purpose, t.direction] = sums
                for (purpose, direction), total in totals.items():
                    key = (said.peer, session.hex(), purpose, direction)
                    if traffic.get(key, self._traffic.get(key)) != total:
                        traffic[key] = total
        return Heard(steps=tuple(steps), traffic=traffic, links=links)

    def _step_done(self, peer: str, done: pb.StepDone) -> None:
        figures = self._figures.setdefault(peer, PeerFigures())
        figures.samples += done.samples
        seconds, old = done.compute_seconds + done.wait_seconds, figures.seconds_per_step
        figures.seconds_per_step = seconds if old is None else 0.8 * old + 0.2 * seconds

    def update(
        self, state: RunState, commands: Sequence[Journal | Point | Commit], now: float, heard: Heard = NOTHING
    ) -> None:
        """The state after a batch, and what was written down in it."""
        self._state = state
        self._traffic.update(heard.traffic)
        self._links = {peer: rows for peer, rows in {**self._links, **heard.links}.items() if peer in state.members}
        for peer, done in heard.steps:
            self._step_done(peer, done)
        for command in commands:
            if isinstance(command, Journal):
                last = self._events[-1]["id"] if self._events else 0
                event = command.event
                self._scores.take(last + 1, now, event)
                self._events.append({"id": last + 1, "time": now, "kind": event.kind, "text": event.text})
            elif isinstance(command, Point):
                last = self._points[-1]["id"] if self._points else 0
                self._points.append(
                    {
                        "id": last + 1,
                        "step": command.step,
                        "tokens": command.tokens_samples * self.config.model.seq_len,
                        "time": now,
                        "train": command.train,
                        "heldout": command.heldout,
                    }
                )
            else:
                c = command
                values = (c.round, c.mark.step, c.replicas, c.samples, c.nbytes, c.seconds, now, c.degraded)
                self._rounds.append(round_row(*values))
        self._notify()

    def publish(self, path: str) -> None:
        self.published = path
        self._notify()

    def _notify(self) -> None:
        self.version += 1

        async def wake() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._waking = asyncio.get_running_loop().create_task(wake())

    # What the page asks.

    def evaluations(self) -> list[dict[str, Any]]:
        return self._scores.rows()

    def points(self, after: int) -> list[dict[str, Any]]:
        low, high = 0, len(self._points)
        while low < high:
            middle = (low + high) // 2
            if self._points[middle]["id"] <= after:
                low = middle + 1
            else:
                high = middle
        return self._points[low:]

    async def changed(self, version: int) -> int:
        async with self._changed:
            await self._changed.wait_for(lambda: self.version != version)
        return self.version

    def state(self) -> dict[str, Any]:
        state, config, model = self._state, self.config, self.config.model
        train = [p for p in self._points[-40:] if p["train"] is not None]
        heldout = [p for p in self._points if p["heldout"] is not None]
        steps_done = max((p["step"] for p in train), default=state.committed.step)
        tokens = state.committed.sample * model.seq_len
        speed = self._speed(train)
        per_step = None
        if len(train) > 1:
            per_step = (train[-1]["time"] - train[0]["time"]) / max(1, train[-1]["step"] - train[0]["step"])
        traffic = self._by_purpose()
        sent = sum(t["nbytes"] for t in traffic)
        dense = sum(t["dense_nbytes"] if t["purpose"] in COMPRESSED else t["nbytes"] for t in traffic)
        layers = state.plan.layers if state.plan else self.rules.division(state.committed.stages).layers
        sizes = Shape.of(model, self.vocab_size)
        counts = [sizes.size(*stage) for stage in layers]
        shape = f"{model.layers} layers, d = {model.d_model}"
        forward, backward = config.activations.forward, config.activations.backward
        codec = f"{forward} both ways" if forward == backward else f"{forward} forward, {backward} backward"
        return {
            "version": self.version,
            "now": self.clock(),
            "run": {
                "name": config.name,
                "id": self.run_id,
                "model": f"{TITLES[model.architecture]} shape, {sum(counts) / 1e6:.1f} M parameters, {shape}",
                "stages": len(layers),
                "preset": config.sync.preset,
                "codec": codec,
            },
            "phase": state.phase,
            "note": state.note,
            "started": self._started,
            "step": steps_done,
            "steps": config.steps,
            "generation": state.generation,
            "train_loss": smoothed([p["train"] for p in train]),
            "heldout_loss": heldout[-1]["heldout"] if heldout else None,
            "heldout_first": heldout[0]["heldout"] if heldout else None,
            "tokens": tokens,
            "tokens_per_second": speed if state.phase == "training" else None,
            "eta_seconds": (config.steps - steps_done) * per_step if per_step and state.phase == "training" else None,
            "round": state.rounds,
            "bytes_per_token": sent / tokens if tokens else None,
            "dense_bytes_per_token": dense / tokens if tokens else None,
            "traffic": traffic,
            "stages": [
                {
                    "stage": i,
                    "first_layer": a,
                    "last_layer": b - 1,
                    "parameters": n,
                    "replicas": [r.peer for r in state.plan.replicas[i]] if state.plan else [],
                }
                for i, ((a, b), n) in enumerate(zip(layers, counts, strict=True))
            ],
            "peers": [self._peer(m.peer) for m in state.members.values()],
            "rounds": list(reversed(self._rounds)),
            "events": list(reversed(self._events))[:40],
            "published": self.published,
            "evaluations": self._scores.version,
        }

    def _peer(self, peer: str) -> dict[str, Any]:
        state, member = self._state, self._state.members[peer]
        place = state.plan.places.get(peer) if state.plan else None
        shown = "leaving" if member.leaving else member.state
        if state.phase == "preparing" and place and state.plan and member.ready != state.plan.generation:
            shown = "loading"
        elif place is None:
            shown = "waiting"
        shown = "away" if member.away is not None else shown
        figures = self._figures.get(peer, PeerFigures())
        totals = {"in": 0, "out": 0}
        for (owner, _, _, direction), (nbytes, _) in self._traffic.items():
            if owner == peer:
                totals[direction] = totals.get(direction, 0) + nbytes
        return {
            "id": peer,
            "name": member.name,
            "stage": place[0] if place else None,
            "state": shown,
            "samples": figures.samples,
            "sent": totals["out"],
            "received": totals["in"],
            "last_seen": member.last_seen,
            "seconds_per_step": figures.seconds_per_step,
            "device": member.device,
            "links": [link for link in self._links.get(peer, []) if link["peer"] in state.members],
        }

    def _speed(self, train: list[dict[str, Any]]) -> float | None:
        recent = [p for p in train if p["time"] >= self.clock() - RATE_SECONDS]
        if len(recent) < 2 or recent[-1]["time"] <= recent[0]["time"]:
            return None
        return (recent[-1]["tokens"] - recent[0]["tokens"]) / (recent[-1]["time"] - recent[0]["time"])

    def _by_purpose(self) -> list[dict[str, Any]]:
        totals: dict[str, tuple[int, int]] = {}
        for (_, _, purpose, direction), (nbytes, dense) in self._traffic.items():
            if direction == "out" or purpose == "data":  # data comes from the coordinator, which keeps no meter
                old = totals.get(purpose, (0, 0))
                totals[purpose] = (old[0] + nbytes, old[1] + dense)
        return [
            {"purpose": p, "nbytes": n, "dense_nbytes": d if p in COMPRESSED else n}
            for p, (n, d) in sorted(totals.items())
        ]


def link_row(link: pb.Link) -> dict[str, Any]:
    """What a peer says of its way to another one; None for what it does not know, or makes no sense."""

    def known(number: float) -> float | None:
        return number if math.isfinite(number) and number > 0 else None

    return {
        "peer": link.peer[:PEER_ID_LENGTH],
        "path": link.path if link.path in PATHS else None,
        "rtt_seconds": known(link.rtt_seconds),
        "bytes_per_second": known(link.bytes_per_second),
    }


def round_row(
    number: int, step: int, replicas: int, samples: int, nbytes: int, seconds: float, committed: float, degraded: bool
) -> dict[str, Any]:
    return {
        "round": number,
        "step": step,
        "replicas": replicas,
        "samples": samples,
        "agree": True,  # a round whose replicas differ is refused, not committed
        "nbytes": nbytes,
        "seconds": seconds,
        "committed": committed,
        "degraded": bool(degraded),
    }


def smoothed(values: Sequence[float]) -> float | None:
    """Exponential mean of the newest values."""
    mean: float | None = None
    for value in values:
        mean = value if mean is None else 0.9 * mean + 0.1 * value
    return mean
