"""The stream: everything once, then what changes, to every reader from where it stands."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fake_source import FakeSource, peer_id
from stream_reader import Reader, ids

from potluck.coordinator.dashboard import server as web
from potluck.coordinator.dashboard import stream
from potluck.coordinator.dashboard.shapes import State
from potluck.coordinator.dashboard.stream import Feed, Place


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
async def address(source: FakeSource) -> AsyncIterator[str]:
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}/api/stream"
    await asyncio.wait_for(running.close(), 5)


@asynccontextmanager
async def reading(address: str, **options: Any) -> AsyncIterator[Reader]:
    async with httpx.AsyncClient() as client, client.stream("GET", address, **options) as response:
        assert response.status_code == 200
        yield Reader(response)


async def test_it_starts_with_everything_then_tells_what_changes(address: str, source: FakeSource) -> None:
    async with reading(address) as reader:
        assert reader.response.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in reader.response.headers
        assert all(reader.response.headers.get(name) == value for name, value in web.HEADERS.items())
        state = await reader.next()
        assert (state["event"], state["id"], state["retry"]) == ("state", "0.0", "1000")
        assert set(state["data"]) == set(State.__struct_fields__) - {"peers", "events"}
        peers = await reader.next()
        assert [row["id"] for row in peers["data"]["rows"]] == [peer_id(0), peer_id(1)]
        assert peers["data"]["gone"] == [] and peers["data"]["all"] is True
        points = await reader.next()
        assert (points["event"], ids(points), points["id"]) == ("points", [1, 2, 3], "3.0")
        events = await reader.next()
        assert (events["event"], ids(events), events["id"]) == ("events", [1, 2, 3], "3.3")
        source.add()
        source.add()
        state = await reader.next()
        assert set(state["data"]) == {"version", "now", "step", "tokens"}
        assert state["data"]["version"] == source.version
        points, events = await reader.next(), await reader.next()
        assert (points["event"], ids(points), ids(events), events["id"]) == ("points", [4, 5], [4, 5], "5.5")


async def test_only_rows_that_changed_are_told_and_those_that_are_gone(address: str, source: FakeSource) -> None:
    async with reading(address) as reader:
        await reader.event("events")
        source.moves(1, samples=40)
        state, peers = await reader.next(), await reader.next()
        assert set(state["data"]) == {"version", "now"}
        assert [(row["id"], row["samples"]) for row in peers["data"]["rows"]] == [(peer_id(1), 40)]
        assert peers["data"]["gone"] == [] and "all" not in peers["data"]
        gone = source.peers.pop(0)
        source.changes(phase="waiting")
        state, peers = await reader.next(), await reader.next()
        assert state["data"]["phase"] == "waiting"
        assert peers["data"] == {"rows": [], "gone": [gone.id]}
        source.peers.append(gone)
        source.changes()
        assert [row["id"] for row in (await reader.event("peers"))["data"]["rows"]] == [gone.id]
        async with reading(address) as late:
            assert len((await late.event("peers"))["data"]["rows"]) == 2


async def test_what_goes_back_within_one_distance_is_still_right(address: str, source: FakeSource) -> None:
    """A reader ends with what is so, whatever it was in between."""
    async with reading(address) as one, reading(address) as other:
        await one.event("events")
        await other.event("events")
        for n in range(5):
            source.moves(0, samples=n)
            source.changes(round=n)
            await asyncio.sleep(0.01)
        for reader in (one, other):
            rows: dict[str, Any] = {}
            while rows.get("samples") != 4:
                [rows] = (await reader.event("peers"))["data"]["rows"]


async def test_states_keep_their_distance(address: str, source: FakeSource) -> None:
    loop = asyncio.get_running_loop()
    async with reading(address) as reader:
        await reader.event("state")
        began = loop.time()
        for _ in range(3):
            source.add()
            await reader.event("state")
        assert loop.time() - began > 3 * 0.8 * stream.SHOT_SECONDS


async def test_one_who_comes_between_two_shots_keeps_the_distance_too(address: str, source: FakeSource) -> None:
    loop = asyncio.get_running_loop()
    async with reading(address) as first:
        await first.event("state")
        await asyncio.sleep(0.8 * stream.SHOT_SECONDS)
        async with reading(address) as second:
            await second.event("state")
            began = loop.time()
            source.changes(round=7)
            assert (await second.event("state"))["data"]["round"] == 7
            assert loop.time() - began > 0.8 * stream.SHOT_SECONDS


async def test_many_readers_are_told_less_often() -> None:
    feed = Feed(FakeSource())
    seconds = []
    for feed.readers in (1, stream.EASY_READERS, 2 * stream.EASY_READERS, 100_000):
        seconds.append(feed.seconds)
    assert seconds == [stream.SHOT_SECONDS, stream.SHOT_SECONDS, 2 * stream.SHOT_SECONDS, stream.SLOWEST_SECONDS]


async def test_what_is_sent_in_a_second_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(peers=50)
    feed = Feed(source)
    feed._shot = first = stream.taken(source.state(), None)
    feed.readers = 10
    assert first.nbytes == 0 and feed.seconds == stream.SHOT_SECONDS
    for number in range(50):
        source.moves(number, samples=99)
    feed._shot = stream.taken(source.state(), first)
    assert 50 * 300 < feed._shot.nbytes < 50 * 2000
    monkeypatch.setattr(stream, "EASY_NBYTES", 10 * feed._shot.nbytes / 2.0)
    assert feed.seconds == 2.0
    feed.readers = 100
    assert feed.seconds == stream.SLOWEST_SECONDS


async def test_reconnecting_misses_and_repeats_nothing(address: str, source: FakeSource) -> None:
    points, events = [], []
    async with reading(f"{address}?after=1.2") as reader:
        points += ids(await reader.event("points"))
        said = await reader.event("events")
        events += ids(said)
    source.add()
    # The browser repeats the old address; the header is the newer word.
    async with reading(f"{address}?after=1.2", headers={"Last-Event-ID": said["id"]}) as reader:
        first = await reader.event("state")
        assert first["id"] == said["id"] == "3.3"
        points += ids(await reader.event("points"))
        events += ids(await reader.event("events"))
        source.add()
        points += ids(await reader.event("points"))
        events += ids(await reader.event("events"))
    assert points == [2, 3, 4, 5] and events == [3, 4, 5]


async def test_every_message_s_id_says_what_was_received_up_to_it(address: str, source: FakeSource) -> None:
    """Cut after any message, the next connection goes on exactly there."""
    for cut in range(1, 5):
        async with reading(address) as reader:
            got = [await reader.next() for _ in range(cut)]
        seen = {kind: [n for said in got if said["event"] == kind for n in ids(said)] for kind in ("points", "events")}
        source.add()
        wanted = list(range(1, len(source.curve_points) + 1))
        async with reading(address, headers={"Last-Event-ID": got[-1]["id"]}) as reader:
            assert seen["points"] + ids(await reader.event("points")) == wanted
            assert seen["events"] + ids(await reader.event("events")) == wanted


async def test_it_goes_on_with_another_coordinator_on_the_same_file(source: FakeSource) -> None:
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    async with reading(f"http://127.0.0.1:{port}/api/stream") as reader:
        last = (await reader.event("events"))["id"]
    await running.close()
    restarted = FakeSource(points=5)  # the same rows, and two more
    restarted.version = 1
    running, port = await web.serve(web.app(restarted), "127.0.0.1", 0)
    async with reading(f"http://127.0.0.1:{port}/api/stream", headers={"Last-Event-ID": last}) as reader:
        assert ids(await reader.event("points")) == [4, 5] and ids(await reader.event("events")) == [4, 5]
    await running.close()


async def test_events_of_long_ago_come_from_the_file_in_pieces(
    monkeypatch: pytest.MonkeyPatch, address: str, source: FakeSource
) -> None:
    monkeypatch.setattr(stream, "MOST_OLD_EVENTS", 25)
    for _ in range(97):
        source.add()
    async with reading(f"{address}?after=90.3") as reader:
        got = ids(await reader.event("events"))
        while got[-1] < 100:
            got += ids(await reader.event("events"))
    assert got == list(range(4, 101)) and source.asked["events"] == 3
    async with reading(address) as reader:  # a new one gets those that the state shows
        assert ids(await reader.event("events")) == list(range(61, 101))


async def test_long_curve_comes_in_pieces(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(stream, "MOST_ROWS", 2)
    async with reading(address) as reader:
        assert ids(await reader.event("points")) == [1, 2]
        assert ids(await reader.event("points")) == [3]


async def test_the_source_is_asked_once_for_all_readers(source: FakeSource, address: str) -> None:
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
        readers, contexts = [], []
        for _ in range(20):
            contexts.append(client.stream("GET", address))
            readers.append(Reader(await contexts[-1].__aenter__()))
        for reader in readers:
            await reader.event("events")
        before = source.asked["state"]
        source.moves(0, samples=41)
        for reader in readers:
            assert (await reader.event("peers"))["data"]["rows"][0]["samples"] == 41
        assert source.asked["state"] == before + 1
        for context in contexts:
            await context.__aexit__(None, None, None)


async def test_nobody_reads_nothing_is_asked(source: FakeSource, address: str) -> None:
    async with reading(address) as reader:
        await reader.event("events")
        assert source.waiting == 1
    for _ in range(100):
        source.add()
        await asyncio.sleep(0.05)
        if not source.waiting:
            break
    before = source.asked["state"]
    source.add()
    await asyncio.sleep(0.1)
    assert source.asked["state"] == before


async def test_a_slow_reader_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(stream, "SHOT_SECONDS", 0.01)
    monkeypatch.setattr(stream, "EASY_NBYTES", 1e12)
    running, port = await web.serve(web.app(source), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET /api/stream HTTP/1.1\r\nHost: test\r\n\r\n")
    await reader.readuntil(b"event: state")
    for n in range(40):  # more than all buffers on the way hold; it reads none of it
        source.changes(note=f"{n}" + "x" * 1_000_000)
        await asyncio.sleep(0.03)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(5):
            while piece := await reader.read(1 << 20):
                received += len(piece)
    assert received < 30_000_000
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    writer.close()
    await asyncio.wait_for(running.close(), 5)


async def test_there_is_an_end_to_readers(monkeypatch: pytest.MonkeyPatch, address: str, source: FakeSource) -> None:
    monkeypatch.setattr(stream, "MOST_READERS", 1)
    async with reading(address) as reader:
        await reader.event("events")
        async with httpx.AsyncClient() as client:
            refused = await client.get(address)
    assert refused.status_code == 429 and "Too many" in refused.json()["error"]


async def test_a_source_that_breaks_ends_the_streams_and_the_next_one_begins_anew(
    address: str, source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    async with reading(address) as reader:
        await reader.event("events")

        def broken(question: str) -> None:
            raise RuntimeError("no state")

        source.before_answer = broken
        source.add()
        with pytest.raises(AssertionError, match="stream ended"):
            await reader.event("nothing")
        assert "stream has failed" in caplog.text
        source.before_answer = lambda question: None
    async with reading(address) as reader:
        assert ids(await reader.event("points")) == [1, 2, 3, 4]


async def test_peers_gone_are_forgotten_and_who_lags_further_begins_anew(
    monkeypatch: pytest.MonkeyPatch, source: FakeSource
) -> None:
    monkeypatch.setattr(stream, "MOST_GONE", 1)
    source.peers = [source._peer(n) for n in range(4)]
    shot = stream.taken(source.state(), None)
    assert shot.forgotten == 0
    del source.peers[:3]
    after = stream.taken(source.state(), shot)
    assert len(after.gone) == 1 and after.forgotten == after.number == shot.number + 1


@pytest.mark.parametrize("value", ["x", "3", "3.x", "-1.0", "1" * 40 + ".1"])
async def test_a_header_that_is_no_id_is_refused(address: str, value: str) -> None:
    async with httpx.AsyncClient() as client:
        refused = await client.get(address, headers={"Last-Event-ID": value})
    assert refused.status_code == 400 and "two whole numbers" in refused.json()["error"]


async def test_messages_have_no_line_breaks_of_strangers(source: FakeSource) -> None:
    source.peers[0] = source._peer(0)
    source.moves(0, name="a\nevent: state\r\ndata: {}\u2028\n\n")
    messages = Feed(source).read(Place(0, 0), asyncio.Event())
    said = (await anext(messages)).decode()
    await messages.aclose()  # type: ignore[attr-defined]
    assert [line.split(":")[0] for line in said.split("\n") if line] == ["event", "id", "retry", "data"] + [
        "event",
        "id",
        "data",
    ]
    [*_, peers] = said.strip().split("\n\n")
    assert json.loads(peers.split("data: ", 1)[1])["rows"][0]["name"].startswith("a\nevent")
