"""What a hello says of libp2p: checked, passed on where the run has relays for it, and never as an address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from potluck.coordinator.doors import Doors
from potluck.coordinator.state import Ban, Member, RunState
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import ConfigError
from potluck.protocol.hello import PROTOCOL, secret_proof, signed_part
from potluck.protocol.identity import Identity
from potluck.protocol.multiaddr import check_relay, id_of

ID = id_of(bytes(range(32)))
RELAY = f"/ip4/192.0.2.1/tcp/4001/p2p/{id_of(bytes(32))}"


async def enter(p2p: str, relays: list[str], *, ban: Ban | None = None) -> tuple[pb.Down, Member | None]:
    """What a worker hears that says ``p2p`` of itself, and as whom the run knows it. ``ban``: of its key."""
    identity = Identity.generate()
    entered: asyncio.Queue[Member] = asyncio.Queue()
    hub: Any = SimpleNamespace(lines={}, acked={}, connect=lambda line: None, hang_up=lambda line: None)
    hub.state = RunState(bans={identity.peer_id: ban} if ban else {})

    async def taken(line: Any, member: Member) -> None:
        entered.put_nowait(member)

    hub.enter = taken
    none: Any = None
    doors = Doors(
        hub,
        run_id="r",
        secret="s",
        fingerprint="ab" * 32,
        welcome=pb.Welcome(p2p_relays=relays),
        blobs={},
        publisher=none,
    )
    said: asyncio.Queue[pb.Up] = asyncio.Queue()

    async def requests() -> AsyncIterator[pb.Up]:
        while True:
            yield await said.get()

    context: Any = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:40000")
    stream = doors.control(requests(), context)
    nonce = (await anext(stream)).challenge.nonce
    hello = pb.Hello(
        protocol=PROTOCOL,
        run="r",
        public_key=identity.public_bytes,
        signature=identity.sign(signed_part(nonce, "ab" * 32, "r")),
        secret_proof=secret_proof("s", nonce, identity.public_bytes),
        memory_gb=1.0,
        speed=1.0,
        session=os.urandom(16),
        p2p=p2p,
    )
    said.put_nowait(pb.Up(hello=hello))
    answer = await anext(stream)
    member = None
    if answer.WhichOneof("body") == "welcome":
        async with asyncio.timeout(5):
            leave = asyncio.ensure_future(anext(stream))
            member = await entered.get()
            leave.cancel()
            await asyncio.gather(leave, return_exceptions=True)
    await stream.aclose()
    return answer, member


async def test_others_are_told_the_id_and_the_worker_the_relays() -> None:
    answer, member = await enter(ID, [RELAY])
    assert list(answer.welcome.p2p_relays) == [RELAY]
    assert list(answer.welcome.addresses) == []  # it was reached nowhere
    assert member is not None
    assert member.addresses == (f"/p2p/{ID}",)


@pytest.mark.parametrize(("p2p", "relays"), [(ID, []), ("", [RELAY])])
async def test_nobody_is_told_an_id_that_leads_nowhere(p2p: str, relays: list[str]) -> None:
    _, member = await enter(p2p, relays)
    assert member is not None
    assert member.addresses == ()


@pytest.mark.parametrize("p2p", ["x", "/ip4/198.51.100.7/tcp/22", f"{ID}/p2p-circuit", ID[:-1], "1" * 5000])
async def test_an_id_that_is_none_is_refused(p2p: str) -> None:
    answer, member = await enter(p2p, [RELAY])
    assert answer.refuse.code == "wire"
    assert answer.refuse.text == "the hello names a libp2p daemon that is none"
    assert member is None


async def test_a_banned_key_is_refused_at_hello_and_told_why() -> None:
    answer, member = await enter("", [], ban=Ban(name="anna", who="the operator", why="noise"))
    assert (answer.refuse.code, answer.refuse.text) == ("banned", "this worker is banned from the run: noise")
    assert "Ask the operator" in answer.refuse.hint and member is None


@pytest.mark.parametrize("text", ["", "relay.example:4001", "/ip4/192.0.2.1/tcp/4001", f"/p2p/{ID}", f"{RELAY}/x"])
def test_what_is_no_relay_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a libp2p relay"):
        check_relay(text)


def test_relays_are_known_by_their_ids() -> None:
    check_relay(RELAY)
    check_relay(RELAY.replace("ip4/192.0.2.1", "dns4/relay.example"))
