"""The operator's orders over HTTP: who may, what is refused, what a preview says; and that it changes nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from scripted_hub import CONFIG, Hand, a_hub, disk
from starlette.applications import Starlette

from potluck.coordinator.access import everybody, kept_token, place_of
from potluck.coordinator.dashboard import actions
from potluck.coordinator.dashboard.actions import ACTIONS, OPERATIONS, Desk, Guesses
from potluck.coordinator.hub import Hub
from potluck.coordinator.state import Member
from potluck.protocol.errors import StateError
from potluck.protocol.plan import Shape

ANNA, BEN = "a" * 26, "b" * 26
FULL = sqlite3.SQLITE_FULL
LONG = msgspec.structs.replace(CONFIG, steps=1000)


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20.0):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Client:
    """An operator, with the right token unless told otherwise."""

    def __init__(self, hub: Hub, desk: Desk) -> None:
        self.hub, self.desk = hub, desk
        transport = httpx.ASGITransport(Starlette(routes=desk.routes()), client=("10.0.0.1", 1234))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://page:7701")

    async def post(self, name: str, body: Any = None, *, token: str | None = None, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.desk.token if token is None else token}", **more.pop("headers", {})}
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        return await self.http.post(f"/api/actions/{name}", content=content, headers=headers, **more)


@asynccontextmanager
async def operated(folder: Path, config: Any = LONG, *peers: str) -> AsyncIterator[Client]:
    """A hub of idle members that takes orders."""
    hub = a_hub(config, folder)
    token, is_new = kept_token(hub.store)
    assert is_new
    await hub.start()

    async def known() -> dict[str, str]:
        found: dict[str, str] = await hub.read(everybody, hub.store)
        return found

    client = Client(hub, Desk(hub=hub, token=token, shape=Shape.of(config.model, 300), everybody=known))
    try:
        for peer in peers:
            hand = Hand(peer, hub, config, set())
            hub.connect(hand)
            name = {ANNA: "anna", BEN: "ben"}.get(peer, peer)
            await hub.enter(hand, Member(peer=peer, name=name, memory_gb=9.0, session=hand.session))
        await until(lambda: len(hub.state.members) == len(peers))
        yield client
    finally:
        await client.http.aclose()
        await hub.close()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with operated(tmp_path, LONG, ANNA, BEN) as made:
        yield made


async def test_an_answer_comes_once_the_order_is_on_the_disk(client: Client) -> None:
    answer = await client.post("pause", {"why": "power\ncut \x1b[31m"})
    assert answer.status_code == 200 and answer.json()["done"] is True
    assert answer.json()["text"].startswith("Paused by the operator after step 0: power cut [31m.")
    rows = await client.hub.read(client.hub.store.rows, "SELECT text FROM events WHERE kind = 'Paused'")
    assert rows == [("Paused by the operator after step 0: power cut [31m",)]
    assert client.hub.state.paused is not None
    again = await client.post("pause")
    assert again.status_code == 409 and "paused already" in again.json()["error"] and again.json()["hint"]
    assert (await client.post("resume", {"who": "maria"})).json()["text"].startswith("Resumed by maria after")


async def test_a_preview_changes_nothing(client: Client) -> None:
    for name in ACTIONS:
        if name == "resume":
            await client.post("pause")
        if name == "unban":
            await client.post("ban", {"peer": "c" * 26})
        store, before = client.hub.store, client.hub.state
        count = await client.hub.read(store.rows, "SELECT COUNT(*) FROM events")
        peer = {"drain": "anna", "ban": "ben", "unban": "c" * 26}.get(name)
        answer = await client.post(name, {"peer": peer} if peer else {}, params={"preview": "1"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["done"] is False and len(answer.json()["text"]) > 10
        assert await client.hub.read(store.rows, "SELECT COUNT(*) FROM events") == count
        after = client.hub.state
        assert (after.paused, after.bans, after.checkpoint) == (before.paused, before.bans, before.checkpoint)
        assert not any(m.leaving for m in after.members.values())


async def test_without_the_token_nothing_is_done_or_told(client: Client, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    bare = await client.http.post("/api/actions/pause", content=b"{}")
    assert bare.status_code == 401 and bare.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer wrong", "Bearer", client.desk.token, f"Basic {client.desk.token}", "Bearer \xff\xfe"):
        answer = await client.http.post("/api/actions/pause", headers={"Authorization": header.encode("latin-1")})
        assert answer.status_code == 401, header
    for name in ("pause", "nonsense"):  # who has no token does not learn what there is
        assert (await client.post(name, token="x", params={"preview": "1"})).status_code == 401
    assert client.hub.state.paused is None
    await client.post("pause")
    assert client.desk.token not in (await client.http.get("/api/actions/pause")).text
    events = await client.hub.read(client.hub.store.rows, "SELECT text, data FROM events")
    assert client.desk.token not in str(events) + caplog.text + repr(client.desk)


async def test_wrong_tokens_are_counted_and_the_right_one_still_works(client: Client) -> None:
    codes = [(await client.post("pause", token=f"guess {i}")).status_code for i in range(14)]
    assert codes[:10] == [401] * 10 and codes[10:] == [429] * 4
    assert (await client.post("pause")).status_code == 200


def test_guesses_are_forgotten_after_a_while_and_by_the_line() -> None:
    now = [0.0]
    guesses = Guesses(lambda: now[0])
    assert [guesses.wrong("2001:db8::1") for _ in range(10)] == [False] * 10
    assert guesses.wrong("2001:db8::2") and not guesses.wrong("2001:db9::2")
    now[0] = 61.0
    assert not guesses.wrong("2001:db8::1")
    for i in range(3000):
        guesses.wrong(f"10.0.{i // 256}.{i % 256}")
    assert len(guesses._seen) == actions.MOST_ADDRESSES


ORIGINS: list[tuple[dict[str, str], int]] = [
    ({"Origin": "http://page:7701"}, 200),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "http://page:7702"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://[::1"}, 403),
    ({"Origin": "file://page:7701"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-origin", "Origin": "http://page:7701"}, 200),
    ({"Host": "rebound.example", "Origin": "http://page:7701"}, 403),
    ({"Host": "run.example", "Origin": "https://run.example:443"}, 200),
]


async def test_a_page_of_another_origin_is_refused(client: Client) -> None:
    for headers, code in ORIGINS:
        assert (await client.post("pause", headers=headers)).status_code == code, headers
        assert (client.hub.state.paused is not None) == (code == 200)
        if code == 200:
            await client.post("resume")


BODIES: list[tuple[bytes, int]] = [
    (b"", 200),
    (b"  ", 200),
    (b"[]", 400),
    (b"null", 400),
    (b'{"why": 1}', 400),
    (b'{"why": "x", "reason": "y"}', 400),
    (b'{"force": "yes"}', 400),
    (b'{"peer": "anna"}', 400),
    (b'{"why": "' + b"x" * 300 + b'"}', 400),
    (b'{"why": "' + b"x" * 5000 + b'"}', 413),
    (b"x" * 100_000, 413),
    (b"\xff\xfe", 400),
    (b'{"why": "\xed\xa0\x80"}', 400),
    (b"[" * 4000, 400),
    (b'{"why": "a", "why": "b"}', 200),
]


async def test_hostile_bodies_change_nothing(client: Client) -> None:
    for body, code in BODIES:
        answer = await client.post("pause", body)
        assert answer.status_code == code, (body[:40], answer.text)
        assert (client.hub.state.paused is not None) == (code == 200)
        if code == 200:
            await client.post("resume")
        else:
            assert answer.json()["error"] and answer.json()["hint"] and answer.headers["cache-control"] == "no-store"


async def test_what_there_is_not(client: Client) -> None:
    assert (await client.post("reboot")).status_code == 404
    assert (await client.post("pause", params={"preview": "yes"})).status_code == 400
    assert (await client.http.get("/api/actions/pause")).status_code == 405
    assert (await client.post("drain")).status_code == 400
    nobody = await client.post("drain", {"peer": "zoe"})
    assert nobody.status_code == 409 and nobody.json()["error"] == "nobody of that name or id is here"
    assert (await client.post("unban", {"peer": "anna"})).json()["error"] == "nobody of that name or id is banned"


async def test_peers_are_named_by_name_or_the_beginning_of_their_id(client: Client) -> None:
    assert actions.matching("anna", {ANNA: "anna", BEN: "ben"}) == {ANNA: "anna"}
    assert actions.matching("aaaa", {ANNA: "anna"}) == {ANNA: "anna"} and not actions.matching("aaa", {ANNA: "anna"})
    assert actions.matching(BEN, {ANNA: BEN, BEN: "ben"}) == {BEN: "ben"}  # who calls itself as another's id is not it
    preview = await client.post("drain", {"peer": "bbbbbb"}, params={"preview": "1"})
    assert preview.status_code == 200 and "ben" in preview.json()["text"]


async def test_two_of_one_name_are_listed(tmp_path: Path, monkeypatch: Any) -> None:
    async with operated(tmp_path, LONG, ANNA, BEN) as client:
        twin = replace(client.hub.state.members[BEN], name="anna")
        client.hub.state = replace(client.hub.state, members={**client.hub.state.members, BEN: twin})
        answer = await client.post("drain", {"peer": "anna"})
        assert answer.status_code == 409 and ANNA in answer.json()["error"] and BEN in answer.json()["error"]


async def test_what_only_one_peer_has_needs_force(client: Client) -> None:
    preview = await client.post("drain", {"peer": "anna"}, params={"preview": "1"})
    assert preview.json()["needs_force"] is True and "the run would wait" in preview.json()["text"].lower()
    refused = await client.post("drain", {"peer": "anna"})
    assert refused.status_code == 409 and refused.json()["needs_force"] is True
    assert not client.hub.state.members[ANNA].leaving
    done = await client.post("drain", {"peer": "anna", "force": True})
    assert done.status_code == 200 and "anna is drained" in done.json()["text"]


async def test_who_was_here_once_is_banned_by_name(client: Client) -> None:
    hub = client.hub
    line = hub.lines[f"session-{ANNA}".encode()]
    done = await client.post("ban", {"peer": "anna", "why": "noise", "force": True})
    assert done.status_code == 200 and "anna is banned by the operator: noise" in done.json()["text"]
    assert ANNA not in hub.state.members and set(hub.state.bans) == {ANNA}
    async with asyncio.timeout(5.0):  # cut off, and told why
        while (down := await line.outbox.get()) is None or down.WhichOneof("body") != "refuse":
            pass
    assert (down.refuse.code, down.refuse.text) == ("banned", "this worker is banned from the run: noise")
    assert (await client.post("unban", {"peer": "anna"})).status_code == 200
    absent = await client.post("ban", {"peer": "anna"}, params={"preview": "1"})
    assert absent.json()["text"] == "The key of anna is not let in any more. It is not here."
    unknown = await client.post("ban", {"peer": "c" * 26})
    assert unknown.status_code == 200 and "cccccccc is banned" in unknown.json()["text"]


async def test_while_the_disk_refuses_nothing_is_ordered(client: Client) -> None:
    disk(client.hub).refuse = lambda number, tries: FULL
    pending = asyncio.create_task(client.post("pause"))
    await until(lambda: client.hub.standing is not None)
    second = await client.post("checkpoint")
    assert second.status_code == 409 and "disk is full" in second.json()["error"]
    assert client.hub.state.paused is None and not pending.done()
    disk(client.hub).refuse = lambda number, tries: None
    answer = await pending
    assert answer.status_code == 200 and client.hub.state.paused is not None


async def test_an_order_that_waits_for_the_disk_too_long_says_so(client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(actions, "DISK_SECONDS", 0.05)
    disk(client.hub).refuse = lambda number, tries: FULL
    answer = await client.post("pause")
    assert answer.status_code == 202 and answer.json()["done"] is False
    disk(client.hub).refuse = lambda number, tries: None
    await until(lambda: client.hub.state.paused is not None)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = a_hub(LONG, tmp_path)
    yield made
    made.store.close()


def test_the_token_is_made_once_and_only_its_owner_reads_it(hub: Hub, tmp_path: Path) -> None:
    hub.store.path.chmod(0o644)
    token, is_new = kept_token(hub.store)
    assert is_new and len(token) >= 43
    assert kept_token(hub.store) == (token, False)
    hub.store.set_meta(http_port=7701)
    for path in tmp_path.glob("run.sqlite*"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    place = place_of(tmp_path)
    assert (place.token, place.page, place.name) == (token, "http://127.0.0.1:7701/", LONG.name)


def test_a_folder_without_a_run_has_no_token(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="there is no run in it"):
        place_of(tmp_path)
    (tmp_path / "run.sqlite").write_text("nonsense " * 1000)
    with pytest.raises(StateError, match="cannot be read as a run's file"):
        place_of(tmp_path)


def test_the_description_of_the_api_names_every_answer() -> None:
    [operation] = OPERATIONS
    assert set(operation.responses) == {200, 202, 400, 401, 403, 404, 409, 413, 429}
    schemas, _ = msgspec.json.schema_components([operation.request, *(t for _, t in operation.responses.values())])
    assert len(schemas) == 1 + len(operation.responses)
