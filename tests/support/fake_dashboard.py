"""A made-up run behind the dashboard's HTTP contract: every number follows from the step, so any moment can be asked
for. Small by default; a benchmark makes it large."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potluck.coordinator import dashboard
from potluck.coordinator.dashboard import shapes

PAGE = Path(dashboard.__file__).with_name("page")
CSP = "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
HOSTILE = "<img src=x onerror=alert(1)>"
START = 1_764_000_000.0
SECONDS = 2.0  # a step
TOKENS = 1600  # of a step
NAMES = ("ada", HOSTILE, "carl", "dora", "emil", "fay")
# Step, group, whose it is, and what the page says; the hostile name is among them.
TOLD = (
    (2, "joined", 3, "dora joined"),
    (30, "divided", None, "A new division: 2 stages, 3 replicas each"),
    (60, "lost", 1, f"{HOSTILE} is lost"),
    (66, "joined", 1, f"{HOSTILE} is back"),
    (90, "degraded", None, "Round 11 is degraded: 2 of 3 replicas"),
    (120, "lost", 3, "dora is lost"),
    (121, "back", None, "Step 120 is taken back to 118"),
    (150, "joined", 3, "dora is back"),
    (170, "paused", None, "The operator paused the run: new disk"),
    (200, "left", 5, "fay left"),
)


def wobble(step: int, of: int = 0) -> float:
    """Between -1 and 1, the same for the same step."""
    return math.sin(step * 12.9898 + of * 78.233) * math.cos(step * 4.1414 + of)


@dataclass
class FakeRun:
    steps: int = 480
    step: int = 240
    peers: int = 6
    stages: int = 2
    phase: str = "training"
    note: str = ""
    id: str = "ab12"
    version: int = 1
    told: tuple[tuple[int, str, int | None, str], ...] = TOLD
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    evaluations_version: int = 0
    alerts: tuple[shapes.Alert, ...] = ()
    asked: list[str] = field(default_factory=list)  # every path and query, in order
    is_finite: bool = True

    def __post_init__(self) -> None:
        self._news = asyncio.Event()

    # What a test does to the run.

    def update(self, **fields: Any) -> None:
        for name, value in fields.items():
            assert hasattr(self, name)
            setattr(self, name, value)
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    async def changed(self, version: int) -> None:
        while self.version == version:
            await self._news.wait()

    # What the page asks.

    def time(self, step: float) -> float:
        return START + SECONDS * step

    def step_at(self, at: float | None) -> int:
        return self.step if at is None else max(0, min(self.step, int((at - START) / SECONDS + 1e-6)))

    def train(self, step: int) -> float:
        return 2.3 + 5.4 * math.exp(-step / (self.steps / 8)) + 0.16 * wobble(step)

    def heldout(self, step: int) -> float | None:
        return self.train(step) + 0.12 if step % 20 == 0 and step else None

    def point(self, step: int) -> shapes.Point:
        return shapes.Point(
            id=step,
            step=step,
            tokens=step * TOKENS,
            time=self.time(step),
            train=self.train(step),
            heldout=self.heldout(step),
        )

    def points(self, after: int) -> list[shapes.Point]:
        return [self.point(step) for step in range(max(1, after + 1), self.step + 1)]

    def curve(self, most: int, until: float | None) -> list[shapes.Point]:
        last = self.step_at(until)
        every = max(1, math.ceil(last / most))
        return [self.point(step) for step in range(last, 0, -every)][::-1]

    def incidents(self, until: float | None) -> list[shapes.Incident]:
        last = self.step_at(until)
        return [
            shapes.Incident(
                id=number,
                time=self.time(at),
                step=at,
                group=group,
                text=text,
                peer=None if who is None else peer_id(who),
            )
            for number, (at, group, who, text) in enumerate(self.told, start=1)
            if at <= last
        ]

    def events(self, after: int, until: float | None = None) -> list[shapes.EventRow]:
        rows = [
            shapes.EventRow(id=i.id, time=i.time, step=i.step, kind=i.group, text=i.text, peer=i.peer)
            for i in self.incidents(until)
        ]
        return [row for row in rows if row.id > after]

    def traffic(self, step: int) -> tuple[shapes.Traffic, ...]:
        tokens = step * TOKENS
        rows = (("activation", 41, 800), ("gradient", 43, 800), ("update", 3.1, 190), ("control", 0.4, 0))
        return tuple(
            shapes.Traffic(purpose=p, nbytes=int(n * tokens), dense_nbytes=int(d * tokens)) for p, n, d in rows
        )

    def traffic_points(self, most: int, until: float | None) -> list[shapes.TrafficPoint]:
        last = self.step_at(until)
        every = max(1, math.ceil(last / most))
        return [
            shapes.TrafficPoint(time=self.time(s), step=s, tokens=s * TOKENS, traffic=self.traffic(s))
            for s in range(last, 0, -every)
        ][::-1]

    def peer(self, number: int, step: int) -> shapes.PeerRow | None:
        states = [(at, group) for at, group, who, _ in self.told if who == number and at <= step]
        last = states[-1][1] if states else "joined"
        if last == "left":
            return None
        samples = step * 2 + number
        return shapes.PeerRow(
            id=peer_id(number),
            name=NAMES[number] if number < len(NAMES) else f"peer {number}",
            region="",
            stage=number % self.stages,
            state="lost" if last == "lost" else "training",
            samples=samples,
            work=samples / self.stages,
            sent=samples * 12_300,
            received=samples * 11_900,
            last_seen=self.time(states[-1][0]) if last == "lost" else self.time(step),
            seconds_per_step=1.7,
            tokens_per_second=602.0,
            device="NVIDIA GeForce RTX 3060" if number % 2 else "cpu",
            links=(
                shapes.LinkRow(
                    sender=peer_id(number),
                    receiver=peer_id((number + 1) % self.peers),
                    path="relayed" if number % 5 == 4 else "direct",
                    rtt_seconds=0.03,
                    bytes_per_second=2.4e6,
                ),
            ),
        )

    def round_row(self, number: int) -> shapes.RoundRow:
        return shapes.RoundRow(
            round=number,
            step=number * 8,
            replicas=2 if number == 11 else 3,
            samples=48,
            agree=True,
            nbytes=1_234_567,
            seconds=2.4 + wobble(number),
            committed=self.time(number * 8) + 1,
            degraded=number == 11,
        )

    def state(self, at: float | None = None) -> shapes.State:
        step = self.step_at(at)
        now = self.time(self.step) if at is None else at
        peers = tuple(row for row in (self.peer(n, step) for n in range(self.peers)) if row)
        left = (self.steps - step) * SECONDS
        rounds = step // 8
        held = [value for value in (self.heldout(s) for s in range(step - step % 20, step + 1)) if value]
        is_over = step == self.steps
        return shapes.State(
            version=self.version,
            now=now,
            at=at,
            run=shapes.RunRow(
                name="demo", id=self.id, model="GPT-J shape", stages=self.stages, preset="potluck", codec="int4"
            ),
            phase=self.phase if at is None or not is_over else "finished",
            note=self.note,
            is_paused=170 <= step < 172 and bool(self.told),
            started=START,
            step=step,
            steps=self.steps,
            generation=1,
            train_loss=(self.train(step) if self.is_finite else float("nan")) if step else None,
            heldout_loss=held[-1] if held else None,
            heldout_first=self.heldout(20) if step >= 20 else None,
            tokens=step * TOKENS,
            tokens_per_second=None if is_over else TOKENS / SECONDS,
            eta_seconds=None if is_over else left,
            eta=None if is_over else shapes.Eta(low=left * 0.9, high=left * 1.4),
            goodput=shapes.Goodput(committed=step * 16.0, computed=step * 17.0),
            round=rounds,
            bytes_per_token=87.5 if step else None,
            dense_bytes_per_token=1790.0 if step else None,
            traffic=self.traffic(step) if step else (),
            stages=tuple(
                shapes.StageRow(
                    stage=s,
                    first_layer=2 * s,
                    last_layer=2 * s + 1,
                    parameters=2_100_000,
                    replicas=tuple(row.id for row in peers if row.stage == s),
                    is_thin=False,
                )
                for s in range(self.stages if peers else 0)
            ),
            peers=peers,
            rounds=tuple(self.round_row(n) for n in range(rounds, max(0, rounds - 30), -1)),
            events=tuple(self.events(-1, at)[::-1][:40]),
            alerts=self.alerts if at is None else (),
            published=None,
            evaluations=self.evaluations_version,
        )


def peer_id(number: int) -> str:
    return f"{number:02x}" * 32


def answer(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def messages(run: FakeRun, point: int, event: int, closing: asyncio.Event, every: float) -> AsyncIterator[Any]:
    """What the stream sends: only what differs from what this connection was told."""
    told: dict[str, Any] = {}
    peers: dict[str, Any] | None = None
    closed = asyncio.ensure_future(closing.wait())
    while not closing.is_set():
        version = run.version
        whole = msgspec.to_builtins(run.state())
        rows = {row["id"]: row for row in whole.pop("peers")}
        points, events = run.points(point), run.events(event)
        point, event = max([point, *(p.id for p in points)]), max([event, *(e.id for e in events)])
        del whole["events"]
        parts = {name: value for name, value in whole.items() if told.get(name, ...) != value}
        parts |= {"version": version, "now": whole["now"]}
        told = whole
        sent: list[tuple[str, Any]] = [("points", points), ("events", events), ("state", parts)]
        changed = [row for name, row in rows.items() if peers is None or peers.get(name) != row]
        gone = [] if peers is None else sorted(peers.keys() - rows.keys())
        if peers is None or changed or gone:
            sent.append(("peers", {"rows": changed, "gone": gone, "all": peers is None}))
        peers = rows
        for kind, data in sent:
            if data:
                yield ServerSentEvent(
                    event=kind, id=f"{point}.{event}", data=msgspec.json.encode(data).decode(), retry=300
                )
        await asyncio.wait({closed}, timeout=every)
        news = asyncio.ensure_future(run.changed(version))
        await asyncio.wait({closed, news}, return_when=asyncio.FIRST_COMPLETED)
        news.cancel()
    closed.cancel()


def app(run: FakeRun, *, every: float = 0.05) -> Starlette:
    """The page and the run's answers as an ASGI application, under the strict policy."""
    closing = asyncio.Event()

    def until(request: Request, name: str = "until") -> float | None:
        return float(request.query_params[name]) if name in request.query_params else None

    async def api(request: Request) -> Response:
        path = request.path_params["path"]
        run.asked.append(f"{path}?{request.url.query}" if request.url.query else path)
        most = int(request.query_params.get("most", 2000))
        after = int(request.query_params.get("after", 0))
        answers = {
            "state": lambda: run.state(until(request, "at")),
            "curve": lambda: run.curve(most, until(request)),
            "points": lambda: run.points(after),
            "events": lambda: run.events(after, until(request)),
            "incidents": lambda: run.incidents(until(request)),
            "traffic": lambda: run.traffic_points(most, until(request)),
            "evaluations": lambda: run.evaluated,
        }
        if path not in answers:
            return answer({"error": "Not found", "hint": "Everything is linked from /"}, 404)
        return answer(answers[path]())

    async def stream(request: Request) -> Response:
        resume = request.headers.get("last-event-id") or request.query_params.get("after") or "0.0"
        run.asked.append(f"stream?after={resume}")
        point, event = (int(part) for part in resume.split("."))
        return EventSourceResponse(messages(run, point, event, closing, every), ping=10)

    async def index(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes = [
        Route("/", index),
        Route("/api/stream", stream),
        Route("/api/{path:path}", api),
        Mount("/static", StaticFiles(directory=PAGE)),
    ]
    made = Starlette(routes=routes, middleware=[Middleware(Strict)])
    made.state.closing = closing
    return made


class Strict:
    """Adds the policy under which the page has to work."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(
                    {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
                )
            await send(message)

        await self.app(scope, receive, send_strict if scope["type"] == "http" else send)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def served(run: FakeRun, port: int = 0, **options: Any) -> AsyncIterator[int]:
    """The port where the run is shown, until the block ends."""
    made = app(run, **options)
    config = uvicorn.Config(
        made, port=port, lifespan="off", ws="none", log_config=None, log_level="warning", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        made.state.closing.set()
        server.should_exit = True
        await asyncio.wait_for(task, 5)
