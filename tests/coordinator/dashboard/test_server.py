"""The dashboard's server: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from fake_source import HOSTILE, START, FakeSource, peer_id
from stream_reader import Reader

from potluck.coordinator.dashboard import answers
from potluck.coordinator.dashboard import server as web
from potluck.coordinator.dashboard.endpoints import TABLE
from potluck.protocol.errors import StateError

NAMES = {"{step}": "8", "{id}": peer_id(0), "{sender}": peer_id(0), "{receiver}": peer_id(1)}


def address(path: str) -> str:
    """An endpoint's path with something of the fake run in it."""
    path = "/api/steps/2" if path == "/api/steps/{step}" else path
    for name, value in NAMES.items():
        path = path.replace(name, value)
    return path


ENDPOINTS = {address(endpoint.path): endpoint for endpoint in TABLE}
LISTS = {path: endpoint for path, endpoint in ENDPOINTS.items() if endpoint.columns}
OTHERS = ["/", "/static/app.js", "/static/style.css", "/api/openapi.json", "/healthz", "/readyz"]
PATHS = [*ENDPOINTS, *(f"{path}.csv" for path in LISTS), *OTHERS]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def client_of(source: FakeSource, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(web.app(source, **options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
async def client(source: FakeSource) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(source) as client:
        yield client


def strict(response: httpx.Response) -> bool:
    return all(response.headers.get(name) == value for name, value in web.HEADERS.items())


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_every_answer_is_strict(client: httpx.AsyncClient, method: str) -> None:
    for path in [*PATHS, "/nothing", "/static/nothing", "/static/../web.py", "/api/points?after=x"]:
        response = await client.request(method, path)
        assert strict(response), (path, response.headers)
        assert response.status_code < 500
        assert "unsafe" not in response.headers["content-security-policy"]


async def test_only_reading_is_allowed(client: httpx.AsyncClient) -> None:
    for path in [*PATHS, "/api/stream"]:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            response = await client.request(method, path)
            assert response.status_code == 405, (method, path)
            assert set(response.json()) == {"error", "hint"} and "GET" in response.json()["hint"]
        head = await client.head(path)
        assert head.status_code == 200, path
        assert head.content == b""


async def test_every_answer_is_of_its_type(client: httpx.AsyncClient) -> None:
    for path, endpoint in ENDPOINTS.items():
        response = await client.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == "application/json"
        assert msgspec.json.decode(response.content, type=endpoint.answer), path


async def test_every_list_is_a_table_too(client: httpx.AsyncClient) -> None:
    for path, endpoint in LISTS.items():
        response = await client.get(f"{path}.csv")
        assert response.headers["content-type"].startswith("text/csv"), path
        name = response.headers["content-disposition"]
        assert name.startswith('attachment; filename="') and name.endswith('.csv"')
        columns, *rows = csv.reader(response.text.splitlines())
        assert tuple(columns) == endpoint.columns and rows
        assert {len(row) for row in rows} == {len(columns)}


async def test_a_table_has_the_same_numbers(client: httpx.AsyncClient, source: FakeSource) -> None:
    rows = list(csv.DictReader((await client.get("/api/points.csv")).text.splitlines()))
    assert [row["heldout"] for row in rows] == ["4.2", "", "4.2"]
    assert [int(row["tokens"]) for row in rows] == [point.tokens for point in source.curve_points]
    rows = list(csv.DictReader((await client.get("/api/evaluations.csv")).text.splitlines()))
    assert [(row["task"], row["value"], row["n"]) for row in rows] == [
        ("mean macro-f1", "0.5", "60"),
        ("a", "0.5", "60"),
    ]


async def test_no_cell_is_a_formula() -> None:
    for name in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1", HOSTILE):
        async with client_of(FakeSource(name=name)) as client:
            [row, *_] = csv.DictReader((await client.get("/api/leaderboard.csv")).text.splitlines())
        assert row["name"] == (f"{name} 0" if name == HOSTILE else f"'{name} 0")
        assert row["work"] == "16.0"


async def test_parameters_reach_the_source(client: httpx.AsyncClient, source: FakeSource) -> None:
    async def ids(path: str) -> list[int]:
        return [row.get("id", row.get("step")) for row in (await client.get(path)).json()]

    assert await ids("/api/points?after=2") == [3] and await ids("/api/points?after=99") == []
    assert await ids(f"/api/curve?most=2&until={START + 2.5}") == [1, 2]
    assert await ids(f"/api/curve?until={START + 1.5!r}") == [1]
    assert await ids("/api/events?after=1&limit=1") == [2]
    assert await ids("/api/events?kind=Finished") == []
    assert await ids("/api/rounds?before=24&limit=1") == [16]
    assert await ids("/api/steps?limit=1") == [2]
    assert (await client.get(f"/api/state?at={START}")).json()["at"] == START
    assert (await client.get("/api/state")).json()["at"] is None


WHOLE = ["x", "", "-1", "1.5", "9" * 30, "１", "1;2", "1 ", "0x1", "1_0", "1&after=2"]
BAD = {
    **{f"/api/points?after={value}": "whole number" for value in WHOLE},
    **{f"/api/points.csv?after={value}": "whole number" for value in WHOLE[:3]},
    **{
        f"/api/state?at={value}": "moment" for value in ("nan", "inf", "1e400", "-1", "1e12", "", "now", "1e-5000", "٣")
    },
    **{f"/api/curve?most={value}": "whole number" for value in ("0", "20001")},
    **{f"/api/events?limit={value}": "whole number" for value in ("0", "1001")},
    **{f"/api/events?kind={value}": "letters" for value in ("", "a-b", "a" * 65, "a%0A", "%C3%A9", "%FF", "a%00")},
    **{f"/api/peers/{value}": "letters" for value in ("a.b", "a" * 65, "a%0A", "%C3%A9", "a%20b", "' OR 1=1 --")},
    **{f"/api/rounds/{value}": "whole number" for value in ("x", "-1", "1.0", "9" * 17)},
    "/api/links/a/b-c": "letters",
    "/api/links/a/b.c.csv": "letters",
    "/api/steps?order=fastest": "newest, slowest",
    "/api/steps?untill=1": "no parameter",
    "/api/leaderboard?limit=1": "no parameter",
    "/api/rounds/8?step=8": "no parameter",
    **{f"/api/stream?after={value}": "two whole numbers" for value in ("1", "1.", "a.b", "1.2.3", "9" * 17 + ".1", "")},
}


async def test_bad_value_says_what_is_expected(client: httpx.AsyncClient) -> None:
    for path, expected in BAD.items():
        response = await client.get(path)
        assert response.status_code == 400, (path, response.text)
        said = response.json()
        assert set(said) == {"error", "hint"} and said["hint"]
        assert expected in said["error"] or "twice" in said["error"], path


async def test_unknown_things_are_404(client: httpx.AsyncClient) -> None:
    for path in ("/api/rounds/9", "/api/steps/9", "/api/peers/nobody", "/api/nothing", "/api/state/"):
        response = await client.get(path)
        assert response.status_code == 404, path
        assert set(response.json()) == {"error", "hint"}


async def test_diverged_loss_is_still_json(client: httpx.AsyncClient, source: FakeSource) -> None:
    [round_, *_] = source.rounds(None, 1)
    source.changes(train_loss=math.nan, rounds=(msgspec.structs.replace(round_, seconds=math.inf),))
    state = (await client.get("/api/state")).json()
    assert state["train_loss"] is None
    assert state["rounds"][0]["seconds"] is None


async def test_broken_source_says_so_without_detail(client: httpx.AsyncClient, source: FakeSource) -> None:
    source.changes(published=object())
    response = await client.get("/api/state")
    assert response.status_code == 500
    assert strict(response)
    assert "object" not in response.text


async def test_a_file_that_cannot_be_read_is_no_fault_of_ours(client: httpx.AsyncClient, source: FakeSource) -> None:
    def refuse(question: str) -> None:
        raise StateError("/home/anna/run.sqlite: disk I/O error", hint="Look after the disk")

    source.before_answer = refuse
    response = await client.get("/api/leaderboard")
    assert response.status_code == 503 and "anna" not in response.text
    source.before_answer = lambda question: None
    assert (await client.get("/api/leaderboard")).status_code == 200


# Many ask at once.


async def test_an_answer_is_made_once_for_each_version(client: httpx.AsyncClient, source: FakeSource) -> None:
    await asyncio.gather(*(client.get("/api/leaderboard") for _ in range(20)))
    await client.get("/api/leaderboard")
    assert source.asked["leaderboard"] == 1
    await asyncio.gather(*(client.get(f"/api/curve?most={n}") for n in (10, 10, 20)))
    assert source.asked["curve"] == 2
    source.add()
    assert len((await client.get("/api/curve")).json()) == 4
    await client.get("/api/leaderboard")
    assert source.asked["leaderboard"] == 2


async def test_an_answer_under_way_is_not_given_to_who_asks_after_a_change(
    client: httpx.AsyncClient, source: FakeSource
) -> None:
    """Whoever heard of something on the stream and asks for it gets it."""
    began, go_on = threading.Event(), threading.Event()

    def wait(question: str) -> None:
        began.set()
        go_on.wait(10)

    source.before_answer = wait
    early = asyncio.create_task(client.get("/api/leaderboard"))
    await asyncio.to_thread(began.wait, 10)
    source.before_answer = lambda question: None
    source.moves(0, name="renamed")
    late = await client.get("/api/leaderboard")
    go_on.set()
    await early
    assert late.json()[0]["name"] == "renamed"
    assert (await client.get("/api/leaderboard")).json()[0]["name"] == "renamed"


async def test_the_disk_is_asked_a_few_things_at_once_and_the_loop_goes_on(
    client: httpx.AsyncClient, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_WAITING", 10)
    go_on, lock, inside = threading.Event(), threading.Lock(), [0, 0]

    def wait(question: str) -> None:
        if question == "curve":
            with lock:
                inside[0] += 1
                inside[1] = max(inside)
            go_on.wait(10)
            with lock:
                inside[0] -= 1

    source.before_answer = wait
    asked = [asyncio.create_task(client.get(f"/api/curve?most={n}")) for n in range(10, 22)]
    done, _ = await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert {task.result().status_code for task in done} == {429}
    assert (await client.get("/api/state")).status_code == 200
    go_on.set()
    codes = [response.status_code for response in await asyncio.gather(*asked)]
    assert (codes.count(200), codes.count(429)) == (10, 2)
    assert inside[1] == answers.AT_ONCE
    refused = next(task.result() for task in asked if task.result().status_code == 429)
    assert refused.headers["retry-after"] == "1" and refused.json()["hint"]


async def test_what_is_kept_is_bounded(
    client: httpx.AsyncClient, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_KEPT_NBYTES", 2000)
    for most in range(10, 30):
        await client.get(f"/api/curve?most={most}")
    await client.get("/api/curve?most=29")
    assert source.asked["curve"] == 20
    await client.get("/api/curve?most=10")
    assert source.asked["curve"] == 21


async def test_long_answers_are_packed_for_who_can_unpack(client: httpx.AsyncClient, source: FakeSource) -> None:
    for _ in range(300):
        source.add()
    for path in ("/api/points", "/api/points.csv", "/api/state", "/static/app.js", "/"):
        packed = await client.get(path, headers={"accept-encoding": "gzip"})
        plain = await client.get(path, headers={"accept-encoding": "identity"})
        assert packed.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
        assert path == "/api/state" or packed.content == plain.content
        assert int(packed.headers.get("content-length", 0)) < len(plain.content) / 2
        assert "Accept-Encoding" in plain.headers["vary"]


async def test_files_are_asked_for_again_but_not_sent_again(client: httpx.AsyncClient) -> None:
    for path in ("/", "/static/style.css"):
        first = await client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = await client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"") and strict(again)


# Health.


async def test_ready_says_why_not(source: FakeSource) -> None:
    why: list[str | None] = ["the coordinator's disk is full"]
    async with client_of(source, ready=lambda: why[0]) as client:
        assert (await client.get("/healthz")).json() == {"ok": True, "why": None}
        refused = await client.get("/readyz")
        assert (refused.status_code, refused.json()) == (503, {"ok": False, "why": why[0]})
        why[0] = None
        assert (await client.get("/readyz")).json() == {"ok": True, "why": None}


# The port.


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
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient() as client, client.stream("GET", f"{base}/api/stream") as response:
        reader = Reader(response)
        await reader.event("state")
        await asyncio.wait_for(running.close(), 2)
        with pytest.raises(AssertionError, match="stream ended"):
            await reader.event("nothing")
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{base}/healthz")
    assert source.waiting == 0


async def test_the_description_is_of_this_server(client: httpx.AsyncClient) -> None:
    said = json.loads((await client.get("/api/openapi.json")).content)
    assert set(said["paths"]) >= {endpoint.path for endpoint in TABLE}
    assert said["openapi"].startswith("3.1")
