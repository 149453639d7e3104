"""The dashboard: one read-only page, its data as JSON and CSV, and a stream of what changes.

It reads a `Source` and decides nothing. The page loads nothing from elsewhere: the strictest policy fits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import io
import json
import math
import mimetypes
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.errors import StateError

FILES = Path(__file__).with_name("web")
STATE_EVERY = timedelta(milliseconds=500)
POINTS_PER_EVENT = 2000
SAVE = {"Content-Disposition": 'attachment; filename="points.csv"'}
COLUMNS = ("id", "step", "tokens", "time", "train", "heldout")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Source(Protocol):
    """Where the page's numbers come from."""

    def state(self) -> dict[str, Any]:
        """Everything but the loss curve, JSON-able; its ``version`` differs whenever anything else does."""

    def points(self, after: int) -> list[dict[str, Any]]:
        """Points of the loss curve whose id is above ``after``, in order."""

    def evaluations(self) -> list[dict[str, Any]]:
        """What published models scored; the state's ``evaluations`` differs whenever this does."""

    async def changed(self, version: int) -> int:
        """Return the new version as soon as it differs from ``version``."""


@dataclass(frozen=True)
class Running:
    """A page being served."""

    server: uvicorn.Server
    task: asyncio.Task[None]
    closing: asyncio.Event

    async def close(self) -> None:
        """End the open streams, then the server: within half a second, or two if a reader is stuck."""
        self.closing.set()
        self.server.should_exit = True
        await self.task


def app(source: Source) -> Starlette:
    """The page and its data as an ASGI application."""
    # With `nosniff` a script of the wrong type does not run, and some systems map .js to text/plain.
    mimetypes.add_type("text/javascript", ".js")
    closing = asyncio.Event()

    async def index(request: Request) -> Response:
        return FileResponse(FILES / "index.html")

    async def healthz(request: Request) -> Response:
        return _json({"ok": True})

    async def state(request: Request) -> Response:
        return _json(source.state())

    async def evaluations(request: Request) -> Response:
        return _json(source.evaluations())

    def wanted(request: Request) -> list[dict[str, Any]]:
        return source.points(_after(request.query_params.get("after")))

    async def points(request: Request) -> Response:
        return _json(wanted(request))

    async def points_csv(request: Request) -> Response:
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(wanted(request))
        return Response(text.getvalue(), headers=SAVE, media_type="text/csv")

    async def events(request: Request) -> Response:
        # A browser that reconnects names the last point it has, which is newer than its address says.
        after = request.headers.get("last-event-id") or request.query_params.get("after")
        return EventSourceResponse(
            _events(source, _after(after), closing),
            ping=10,
            # Unlike a comment, an event tells the page that the line is alive.
            ping_message_factory=lambda: ServerSentEvent(event="ping", data="alive"),
            send_timeout=30,
        )

    routes = [
        *(Route("/", index), Route("/healthz", healthz)),
        Route("/api/state", state),
        Route("/api/evaluations", evaluations),
        Route("/api/points", points),
        Route("/api/points.csv", points_csv),
        Route("/api/events", events),
        Mount("/static", StaticFiles(directory=FILES)),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, Exception: _broken}
    page = Starlette(routes=routes, middleware=[Middleware(_StrictHeaders)], exception_handlers=handlers)
    page.state.closing = closing
    return page


async def serve(app: Starlette, host: str, port: int) -> tuple[Running, int]:
    """Serve inside the running loop, leaving signals alone; returns the handle and the port in use.

    Port 0 takes a free one. Raises `StateError` (code ``port``) when the address cannot be bound.
    """
    listener = _listen(host, port)
    quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "server_header": False}
    config = uvicorn.Config(app, lifespan="off", ws="none", timeout_graceful_shutdown=2, **quiet)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="dashboard")
    await server.ready.wait()
    return Running(server, task, app.state.closing), listener.getsockname()[1]


async def _events(source: Source, after: int, closing: asyncio.Event) -> AsyncIterator[ServerSentEvent]:
    closed = asyncio.ensure_future(closing.wait())
    changed: asyncio.Future[int] = asyncio.Future()
    try:
        while not closing.is_set():
            # Both are read before anything is sent, so a change in between is seen by `changed`.
            state, points = source.state(), source.points(after)
            for first in range(0, len(points), POINTS_PER_EVENT):
                batch = points[first : first + POINTS_PER_EVENT]
                after = batch[-1]["id"]
                yield ServerSentEvent(event="points", id=str(after), data=_dumps(batch))
            yield ServerSentEvent(event="state", data=_dumps(state), retry=1000)
            await asyncio.wait({closed}, timeout=STATE_EVERY.total_seconds())
            changed = asyncio.ensure_future(source.changed(state.get("version") or 0))
            await asyncio.wait({closed, changed}, return_when=asyncio.FIRST_COMPLETED)
            if changed.done():
                changed.result()
    finally:
        closed.cancel()
        changed.cancel()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        # `create_server` repeats the address in its message; the number alone reads better.
        code = error.errno if isinstance(error, OSError) and (error.errno or 0) > 0 else None
        why = "already in use" if code == errno.EADDRINUSE else os.strerror(code) if code else str(error)
        raise StateError(
            f"The dashboard cannot listen on {host}, port {port}: {why}",
            hint="Choose another port with --http-port (0 takes any free one)",
            code="port",
        ) from error


class _Server(uvicorn.Server):
    """Uvicorn as a guest: the coordinator owns the loop and the signals."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _StrictHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self.app(scope, receive, send_strict if scope["type"] == "http" else send)


def _after(text: str | None) -> int:
    """The id of the last point the reader has; none given means none."""
    if text is None:
        return -1
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise HTTPException(400, "'after' must be the id of a point: a whole number, 0 or more")
    return int(text)


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a loss that diverged: JSON has no word for it
        return json.dumps(_finite(value), separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(_dumps(value), status, headers=headers, media_type="application/json")


def _refused(request: Request, error: HTTPException) -> Response:
    hints = {400: "Try /api/points?after=0", 405: "This page only shows: use GET"}
    hint = hints.get(error.status_code, "Everything is linked from /")
    return _json({"error": error.detail, "hint": hint}, error.status_code, error.headers)


def _broken(request: Request, error: Exception) -> Response:
    # Answered outside the middleware, so the headers are added here.
    return _json({"error": "Internal error", "hint": "The coordinator's log says more"}, 500, HEADERS)
