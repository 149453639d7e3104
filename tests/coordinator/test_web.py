"""The dashboard's server: what it answers, what it streams, and how it ends."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from potluck.coordinator import web
from potluck.protocol.errors import StateError

PATHS = [
    "/",
    "/static/app.js",
    "/static/style.css",
    "/api/state",
    "/api/evaluations",
    "/api/points",
    "/api/points.csv",
    "/healthz",
]


class FakeSource:
    """A hub with a few points, to which tests add more."""

    def __init__(self, points: int = 3) -> None:
        self.version = 1
        self.curve: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.extra: dict[str, Any] = {}
        self.waiting = 0
        for _ in range(points):
            self.add()

    def add(self) -> None:
        number = len(self.curve) + 1
        point = {"id": number, "step": number, "tokens": number * 100, "time": 1.76e9 + number}
        self.curve.append({**point, "train": 4.0, "heldout": 4.2 if number % 2 else None})
        self.version += 1
        self.news.set()
        self.news = asyncio.Event()

    def state(self) -> dict[str, Any]:
        return {"version": self.version, "now": 1.76e9, "run": {"name": "demo"}, **self.extra}

    def points(self, after: int) -> list[dict[str, Any]]:
        return [point for point in self.curve if point["id"] > after]

    def evaluations(self) -> list[dict[str, Any]]:
        return [{"step": 1, "suite": "text", "score": {"value": math.nan}}]

    async def changed(self, version: int) -> int:
        self.waiting += 1
        try:
            while self.version == version:
                await self.news.wait()
            return self.version
        finally:
            self.waiting -= 1


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
async def client(source: FakeSource) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(web.app(source), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def address(source: FakeSource) -> AsyncIterator[str]:
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}"
    await asyncio.wait_for(running.close(), 5)


class Reader:
    """Takes one event after the other from a stream."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.lines = response.aiter_lines()

    async def event(self, wanted: str) -> dict[str, Any]:
        """The next event of this kind, as {"event", "id", "data"}."""
        async with asyncio.timeout(5):
            fields: dict[str, Any] = {}
            async for line in self.lines:
                name, _, value = line.partition(":")
                if line:
                    fields[name] = value.strip()
                elif fields.get("event") == wanted:
                    return {**fields, "data": json.loads(fields["data"])}
                else:
                    fields = {}
        raise AssertionError(f"the stream ended before an event '{wanted}'")


def ids(event: dict[str, Any]) -> list[int]:
    return [point["id"] for point in event["data"]]


def strict(response: httpx.Response) -> bool:
    return all(response.headers.get(name) == value for name, value in web.HEADERS.items())


@pytest.mark.parametrize("path", [*PATHS, "/nothing", "/static/nothing", "/static/../web.py", "/api/points?after=x"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_every_answer_is_strict(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert strict(response), response.headers
    assert response.status_code < 500
    assert "unsafe" not in response.headers["content-security-policy"]


@pytest.mark.parametrize("path", [*PATHS, "/api/events"])
async def test_only_reading_is_allowed(client: httpx.AsyncClient, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        response = await client.request(method, path)
        assert response.status_code == 405
        assert set(response.json()) == {"error", "hint"}
    head = await client.head(path)
    assert head.status_code == 200
    assert head.content == b""


async def test_state_and_points(client: httpx.AsyncClient, source: FakeSource) -> None:
    assert (await client.get("/api/state")).json() == source.state()
    assert (await client.get("/api/points")).json() == source.curve
    assert (await client.get("/api/points?after=2")).json() == source.curve[2:]
    assert (await client.get("/api/points?after=99")).json() == []
    [row] = (await client.get("/api/evaluations")).json()
    assert row == {"step": 1, "suite": "text", "score": {"value": None}}
    assert (await client.get("/healthz")).json() == {"ok": True}


async def test_csv_has_the_same_points(client: httpx.AsyncClient, source: FakeSource) -> None:
    response = await client.get("/api/points.csv")
    assert response.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(response.text.splitlines()))
    assert [row["heldout"] for row in rows] == ["4.2", "", "4.2"]
    assert [int(row["tokens"]) for row in rows] == [point["tokens"] for point in source.curve]


@pytest.mark.parametrize("after", ["x", "", "-1", "1.5", "9" * 30, "１", "1;2"])
@pytest.mark.parametrize("path", ["/api/points", "/api/points.csv", "/api/events"])
async def test_bad_value_says_what_is_expected(client: httpx.AsyncClient, path: str, after: str) -> None:
    response = await client.get(path, params={"after": after})
    assert response.status_code == 400
    assert "whole number" in response.json()["error"]
    assert response.json()["hint"]


async def test_diverged_loss_is_still_json(client: httpx.AsyncClient, source: FakeSource) -> None:
    source.extra = {"train_loss": math.nan, "rounds": [{"seconds": math.inf}]}
    state = (await client.get("/api/state")).json()
    assert state["train_loss"] is None
    assert state["rounds"] == [{"seconds": None}]


async def test_broken_source_says_so_without_detail(client: httpx.AsyncClient, source: FakeSource) -> None:
    source.extra = {"secret": object()}
    response = await client.get("/api/state")
    assert response.status_code == 500
    assert strict(response)
    assert "object" not in response.text


async def test_stream_starts_with_everything_then_follows(address: str, source: FakeSource) -> None:
    async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/api/events") as response:
        assert strict(response)
        assert response.headers["content-type"].startswith("text/event-stream")
        reader = Reader(response)
        points = await reader.event("points")
        assert (ids(points), points["id"]) == ([1, 2, 3], "3")
        assert (await reader.event("state"))["data"] == source.state()
        source.add()
        source.add()
        assert ids(await reader.event("points")) == [4, 5]
        assert (await reader.event("state"))["data"]["version"] == source.version


async def test_states_keep_their_distance(address: str, source: FakeSource) -> None:
    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/api/events") as response:
        reader = Reader(response)
        await reader.event("state")
        began = loop.time()
        source.add()
        await reader.event("state")
        assert loop.time() - began > 0.8 * web.STATE_EVERY.total_seconds()


async def test_reconnecting_misses_and_repeats_nothing(address: str, source: FakeSource) -> None:
    got: list[int] = []
    async with httpx.AsyncClient() as client:
        async with client.stream("GET", f"{address}/api/events?after=1") as response:
            points = await Reader(response).event("points")
            got += ids(points)
        source.add()
        # The browser repeats the old address; the header is the newer word.
        last = {"Last-Event-ID": points["id"]}
        async with client.stream("GET", f"{address}/api/events?after=1", headers=last) as response:
            reader = Reader(response)
            got += ids(await reader.event("points"))
            source.add()
            got += ids(await reader.event("points"))
    assert got == [2, 3, 4, 5]


async def test_long_curve_comes_in_pieces(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(web, "POINTS_PER_EVENT", 2)
    async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/api/events") as response:
        reader = Reader(response)
        assert ids(await reader.event("points")) == [1, 2]
        assert ids(await reader.event("points")) == [3]


async def test_port_in_use_is_one_line_with_a_hint(source: FakeSource) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StateError, match="already in use") as caught:
            await web.serve(web.app(source), "127.0.0.1", port)
    assert caught.value.code == "port"
    assert "--http-port" in caught.value.hint
    assert "\n" not in caught.value.one_line()
    assert str(port) in caught.value.one_line()


async def test_impossible_address_is_the_same_kind_of_error(source: FakeSource) -> None:
    for host, port in (("127.0.0.1", 70000), ("203.0.113.7", 0)):
        with pytest.raises(StateError, match=f"{host}, port {port}"):
            await web.serve(web.app(source), host, port)


async def test_closing_ends_open_streams(source: FakeSource) -> None:
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/api/events") as response:
        reader = Reader(response)
        await reader.event("state")
        await asyncio.wait_for(running.close(), 2)
        with pytest.raises(AssertionError, match="stream ended"):
            await reader.event("state")
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{address}/healthz")
    assert source.waiting == 0
