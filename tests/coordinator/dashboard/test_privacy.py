"""Nobody's network address leaves the coordinator: not in an answer, a message, a table, a report or a line of its log.

A real hub runs a run whose peers are reached at known addresses, quote them when something fails, and name them where
an id belongs.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_hub import CONFIG, Hand, a_hub

from potluck.coordinator import doors
from potluck.coordinator.dashboard import server as web
from potluck.coordinator.dashboard.archive import Archive
from potluck.coordinator.dashboard.board import Board
from potluck.coordinator.dashboard.endpoints import TABLE
from potluck.coordinator.dashboard.report import report
from potluck.coordinator.hub import Hub, Line
from potluck.coordinator.state import Member
from potluck.protocol import control_pb2 as pb
from potluck.worker.plan import TakeSeat

HOSTS = ("127.0.0.1", "198.51.100.23", "2001:db8::77", "2001:db8:1:2:3:4:5:6", "10.0.0.7", "anna.dyn.example.org")
ADDRESSES = ["127.0.0.1:40001", "198.51.100.23:7701", "[2001:db8::77]:7702", "[2001:db8:1:2:3:4:5:6]:7703"]
QUOTES = (
    "no route to 198.51.100.23:7701",
    "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B2001:db8::77%5D:7702: tcp handshaker shutdown",
    "ipv4:127.0.0.1:40001: Connection refused",
    "dialled /ip4/10.0.0.7/tcp/4001/p2p/12D3KooWabc and [2001:db8:1:2:3:4:5:6]:7703",
    "nobody answers at anna.dyn.example.org:7704",
)
LEAKS = {
    "IPv4": re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\w)"),
    "IPv6": re.compile(r"[0-9a-f]{1,4}::|::[0-9a-f]{1,4}|(?:[0-9a-f]{1,4}:){5,}", re.IGNORECASE),
    "host and port": re.compile(r"[A-Za-z][\w-]*(?:\.[\w-]+)+:\d{2,5}\b|localhost:\d+"),
    "a known host": re.compile("|".join(map(re.escape, HOSTS)), re.IGNORECASE),
}


def check(what: str, text: str) -> None:
    for kind, pattern in LEAKS.items():
        found = pattern.search(text)
        assert found is None, f"{kind} in {what}: {text[max(0, found.start() - 80) : found.end() + 80]!r}"


class Talker(Hand):
    """Says where it is reached wherever it can say anything."""

    def do(self, action: Any) -> None:
        super().do(action)
        if isinstance(action, TakeSeat):
            self.since = 0  # what was done since a round that is taken back counts no more
        elif self.local.step == 2 and self.local.generation == 1 and self.peer == "a":
            fault = pb.Fault(generation=self.local.generation, text="; ".join(QUOTES))
            self.report(fault=fault)

    def traffic(self) -> pb.Traffic:
        return pb.Traffic(peer=ADDRESSES[0], direction="out", purpose="activation", nbytes=self.said, dense_nbytes=1)


def talking(hub: Hub) -> None:
    """Peers come with addresses and report links under them."""
    enter, heard = hub.enter, hub.report

    async def entering(line: Line, member: Member) -> None:
        name = doors.plain(f"{member.name}" if member.peer == "a" else ADDRESSES[1]) or f"worker-{member.peer}"
        await enter(line, replace(member, name=name, addresses=tuple(ADDRESSES)))

    async def reporting(line: Line, up: pb.Up) -> None:
        if up.HasField("heartbeat"):
            ends = [*ADDRESSES, "a", "b"]
            up.heartbeat.links.extend(pb.Link(peer=end, path=ADDRESSES[1], rtt_seconds=0.1) for end in ends)
        await heard(line, up)

    hub.enter, hub.report = entering, reporting  # type: ignore[method-assign]


async def listened(address: str, into: bytearray) -> None:
    """To the stream, until it says that the run is finished."""
    async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/api/stream") as response:
        async for piece in response.aiter_bytes():
            into += piece
            if b'"kind":"Finished"' in into:
                return


async def test_no_address_of_a_peer_comes_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hub = a_hub(CONFIG, tmp_path)
    talking(hub)
    running, port = await web.serve(web.app(hub.board), "127.0.0.1", 0)
    address, streamed = f"http://127.0.0.1:{port}", bytearray()
    listening = asyncio.create_task(listened(address, streamed))
    await hub.start()
    uploads: set[tuple[int, int]] = set()
    hands = [Talker(peer, hub, CONFIG, uploads) for peer in ("a", "b")]
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for hand in hands:
            group.create_task(hand.live())
        assert await hub.until_phase("finished", "stopped") == "finished"
    hub.board.publish("step-00000008")
    await asyncio.wait_for(listening, 10)
    check("the stream", streamed.decode())
    assert streamed.count(b"[address]") >= len(QUOTES)

    await everything(address, hub.board)
    await running.close()
    await hub.close()
    html = report(Archive(hub.store.path)).decode()
    assert not any(host in html for host in HOSTS)
    [packed] = re.findall(r'id="potluck-data">([^<]*)<', html)
    check("a report", gzip.decompress(base64.b64decode(packed)).decode())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("potluck")]
    assert any("[address]" in line for line in lines)
    check("the log", "\n".join(lines))


async def everything(address: str, source: Board) -> None:
    """Every address of the API, with what is in the run."""
    state = source.state()
    peers = [standing.peer for standing in source.leaderboard()] or ["a"]
    known = {"{id}": peers, "{sender}": peers, "{receiver}": peers}
    steps = {"/api/rounds/{step}": source.rounds(None, 50), "/api/steps/{step}": source.steps(50, "newest")}
    moments = [state.started + n / 50 for n in (0, 20, 50)]
    paths = ["/", "/healthz", "/readyz", "/api/openapi.json", *(f"/api/state?at={at!r}" for at in moments)]
    paths += ["/api/peers/a?at=1e9", "/api/nothing", "/api/state?at=198.51.100.23:1", f"/api/peers/{ADDRESSES[1]}"]
    for endpoint in TABLE:
        filled = [endpoint.path.replace("{step}", str(row.step)) for row in steps.get(endpoint.path, ())]
        filled = filled or [endpoint.path.replace("{step}", "1")]
        for name, values in known.items():
            filled = [
                path.replace(name, value) for path in filled for value in (values if name in path else values[:1])
            ]
        paths += [*dict.fromkeys(filled), *(f"{path}.csv" for path in dict.fromkeys(filled) if endpoint.columns)]
    async with httpx.AsyncClient(base_url=address) as client:
        for path in paths:
            answer = await client.get(path)
            assert answer.status_code < 500, path
            check(path, answer.text)
            check(f"{path}'s headers", "\n".join(f"{k}: {v}" for k, v in answer.headers.items()))
        assert "[address]" in (await client.get("/api/events?kind=Faulted")).text
