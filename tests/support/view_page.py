"""A page that mounts one view of the dashboard over made-up answers, under the dashboard's own strict policy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from browser import Page, browser
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from potluck.coordinator.dashboard import server

SCRIPT = Path(__file__).with_name("view_page.js")
VIEWS = ("lanes", "matrix", "peer", "round", "step", "leaderboard", "operate")
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>One view</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><link rel="stylesheet" href="/static/style.css">
<link rel="stylesheet" href="/static/detail.css"><script type="module" src="/view_page.js"></script></head>
<body><header><h1>One view</h1></header><main id="main"></main></body></html>"""


@contextlib.asynccontextmanager
async def view_page(answers: dict[str, Any], *, is_live: bool = True) -> AsyncIterator[str]:
    """Serves ``answers``, shapes by their path in the API, and gives the page's address.

    Its hash names view, parameters and moment as in the dashboard: ``#/peer/ID?at=UNIX``, ``#/`` for the lanes. The
    page keeps what was asked for in ``window.asked`` and sent by an operator in ``window.sent``.
    """
    data = msgspec.json.encode({"answers": answers, "live": is_live})

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE, headers=server.HEADERS)

    async def script(request: Request) -> Response:
        return Response(SCRIPT.read_text(), media_type="text/javascript")

    async def answer(request: Request) -> Response:
        return Response(data, media_type="application/json")

    static = Mount("/static", StaticFiles(directory=server.FILES))
    routes = [Route("/", page), Route("/view_page.js", script), Route("/answers.json", answer), static]
    app = Starlette(routes=routes)
    app.state.closing = asyncio.Event()
    running, port = await server.serve(app, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        await running.close()


@contextlib.asynccontextmanager
async def opened(profile: Path, made: dict[str, Any], *, is_live: bool = True) -> AsyncIterator[Page]:
    async with view_page(made, is_live=is_live) as address, browser(profile) as page:
        await page.open(address + "#/nothing")
        await page.until("document.body.dataset.shown === '#/nothing'")  # or the first view would be mounted twice
        await page.look(1280, 900)
        yield page
        html = await page.value("document.documentElement.outerHTML")
        for word in ("NaN", "undefined", "null", "Infinity", "[object"):
            assert word not in html, html[max(0, html.find(word) - 200) :][:300]
        assert await page.value("document.images.length") == 0
        assert page.complaints == []


async def go(page: Page, address: str, until: str = "main .card, main .problem") -> str:
    """Opens a view; the words on it."""
    await page.value(f"location.hash = '{address}'")
    await page.until(f"document.body.dataset.shown === '{address}' && document.querySelector('{until}')")
    return await words(page)


async def words(page: Page, where: str = "main") -> str:
    return await page.value(f"document.querySelector('{where}').innerText")


async def holds(page: Page, where: str, *parts: str) -> None:
    shown = await words(page, where)
    for part in parts:
        assert part in shown, (part, shown)


async def press(page: Page, *keys: str) -> None:
    for key in keys:
        await page.call("Input.dispatchKeyEvent", type="keyDown", key=key)


async def focused(page: Page) -> str:
    return await page.value("document.activeElement.ariaLabel ?? document.activeElement.textContent")
