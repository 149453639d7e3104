"""The dashboard over HTTP: one page, its data as JSON and CSV, and a stream of what changes.

It answers from a `Source` by the table in :mod:`.endpoints` and decides nothing. The page loads nothing from elsewhere:
the strictest policy fits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mimetypes
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...protocol.errors import StateError
from . import openapi
from .answers import FASTEST, WORTH_PACKING, Answers
from .endpoints import TABLE, Endpoint
from .parameters import Refused, read
from .shapes import Refusal
from .source import Source
from .stream import Feed, Place

FILES = Path(__file__).with_name("page")
SEND_SECONDS = 30.0  # that a reader of the stream may take for one message
PING_SECONDS = 10.0
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


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


def app(
    source: Source,
    routes: Sequence[BaseRoute] = (),
    *,
    ready: Callable[[], str | None] = lambda: None,
    operations: Sequence[openapi.Operation] = (),
) -> Starlette:
    """The page and its data as an ASGI application. ``ready`` says why the run cannot go on, None if it can; ``routes``
    are further ones, and ``operations`` what the API's description says of them."""
    # With `nosniff` a script of the wrong type does not run, and some systems map .js to text/plain.
    mimetypes.add_type("text/javascript", ".js")
    closing = asyncio.Event()
    answers, feed = Answers(source), Feed(source)
    files = StaticFiles(directory=FILES)
    description = msgspec.json.encode(openapi.document(TABLE, operations))

    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    async def healthz(request: Request) -> Response:
        return _json(openapi.Health(ok=True))

    async def readyz(request: Request) -> Response:
        why = ready()
        return _json(openapi.Health(ok=not why, why=why), 503 if why else 200)

    async def described(request: Request) -> Response:
        return Response(description, media_type="application/json")

    async def stream(request: Request) -> Response:
        # A browser that reconnects names the last message it has, which is newer than its address says.
        given = read((openapi.AFTER,), {}, request.query_params.multi_items())
        last = request.headers.get("last-event-id") or given["after"]
        after = Place.parse(last) if last is not None else None
        feed.check()
        return EventSourceResponse(
            feed.read(after, closing),
            ping=PING_SECONDS,
            # Unlike a comment, an event tells the page that the line is alive.
            ping_message_factory=lambda: ServerSentEvent(event="ping", data="alive"),
            send_timeout=SEND_SECONDS,
        )

    asked = [route for endpoint in TABLE for route in _routes(endpoint, answers)]
    page = Starlette(
        routes=[
            *(Route("/", index), Route("/healthz", healthz), Route("/readyz", readyz)),
            *(Route("/api/openapi.json", described), Route("/api/stream", stream)),
            *asked,
            *routes,
            Mount("/static", files),
        ],
        middleware=[
            Middleware(_StrictHeaders),
            Middleware(GZipMiddleware, minimum_size=WORTH_PACKING, compresslevel=FASTEST),
        ],
        exception_handlers={HTTPException: _refused, Exception: _broken},
    )
    page.router.redirect_slashes = False
    page.state.closing = closing
    return page


def _routes(endpoint: Endpoint, answers: Answers) -> list[Route]:
    """The endpoint's address and, for a list, that of its CSV."""

    async def answer(request: Request, as_csv: bool = False) -> Response:
        arguments = read(endpoint.params, request.path_params, request.query_params.multi_items())
        wants_packed = "gzip" in request.headers.get("accept-encoding", "")
        found = await answers.find(endpoint, arguments, as_csv, wants_packed)
        headers = {"Vary": "Accept-Encoding"}
        if as_csv:
            headers["Content-Disposition"] = f'attachment; filename="{endpoint.name}.csv"'
        body = found.body
        if wants_packed and found.packed is not None:
            headers["Content-Encoding"], body = "gzip", found.packed
        return Response(body, headers=headers, media_type="text/csv" if as_csv else "application/json")

    async def as_table(request: Request) -> Response:
        return await answer(request, as_csv=True)

    tables = [Route(f"{endpoint.path}.csv", as_table)] if endpoint.columns else []
    return [*tables, Route(endpoint.path, answer)]  # in this order: a name in the path takes a dot, too


async def serve(app: Starlette, host: str, port: int) -> tuple[Running, int]:
    """Serve inside the running loop, leaving signals alone; returns the handle and the port in use.

    Port 0 takes a free one. Raises `StateError` (code ``port``) when the address cannot be bound.
    """
    listener = _listen(host, port)
    quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "server_header": False}
    config = uvicorn.Config(_CutOff(app), lifespan="off", ws="none", timeout_graceful_shutdown=2, **quiet)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="dashboard")
    await server.ready.wait()
    return Running(server, task, app.state.closing), listener.getsockname()[1]


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


class _CutOff:
    """Whoever takes too long to read is hung up on at once: a connection that is closed in order would keep what it is
    still to be sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except SendTimeoutError:
            transport = getattr(getattr(send, "__self__", None), "transport", None)
            if not transport:
                raise
            transport.abort()
            await asyncio.sleep(0)  # uvicorn hears of it


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


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers=headers, media_type="application/json")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Refused):
        hint = error.hint
    elif error.status_code == 405:
        hint = "Use " + (error.headers or {}).get("Allow", "GET")
    else:
        hint = "Everything is linked from /, and described at /api/openapi.json"
    return _json(Refusal(error=error.detail, hint=hint), error.status_code, error.headers)


def _broken(request: Request, error: Exception) -> Response:
    # Answered outside the middleware, so the headers are added here.
    return _json(Refusal(error="Internal error", hint="The coordinator's log says more"), 500, HEADERS)
