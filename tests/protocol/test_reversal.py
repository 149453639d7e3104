"""Who has no address is asked to dial: nothing passes through the relay, and if that fails it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from potluck.protocol import route
from potluck.protocol.errors import UnreachableError
from potluck.protocol.grpc_pipes import DiallerPipe
from potluck.protocol.grpc_transport import BACK, SERVICE
from potluck.protocol.handshake import prove_to_listener
from potluck.protocol.identity import Identity
from potluck.protocol.relay import RETURN, enter
from potluck.protocol.tls import dial_pinned, fetch_certificate, fingerprint_of, pinned_channel, split_address

from .conftest import SECOND, SECRET, Rig, until
from .test_relay import pass_frames

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig("returned")
    yield made
    await made.close()


def relayed_nbytes(rig: Rig) -> int:
    assert rig.relay
    return sum(usage.sent_nbytes for usage in rig.relay.usage.values())


async def test_nothing_passes_through_the_relay(rig: Rig) -> None:
    near, far = await rig.connect()
    await asyncio.gather(pass_frames(near, far, 4), pass_frames(far, near, 4))
    rig.cut()
    await asyncio.gather(pass_frames(near, far, 4), pass_frames(far, near, 4))
    assert near.path().kind == far.path().kind == "direct"
    assert relayed_nbytes(rig) == 0
    await until(lambda: rig.relay is not None and rig.relay.calls == 0)  # who has its pipe has left
    assert rig.errors == []


async def test_both_dial_the_one_that_has_an_address(rig: Rig) -> None:
    """Each sends on a channel of its own: one over the connection that it dialled, one over that it asked for."""
    await rig.start()
    back: asyncio.Queue[object] = asyncio.Queue()
    rig.a._on_channel = back.put_nowait
    forth, channel = await asyncio.gather(
        rig.a.dial(rig.b.peer_id, []), rig.b.dial(rig.a.peer_id, rig.told[rig.a.peer_id])
    )
    await pass_frames(forth, await rig.accepted.get(), 2)
    await pass_frames(channel, await back.get(), 2)  # type: ignore[arg-type]
    assert relayed_nbytes(rig) == 0
    assert rig.a._returns._awaited == {}


async def test_many_lanes_at_once_each_get_a_pipe(rig: Rig) -> None:
    await rig.start()
    channels = await asyncio.gather(*(rig.a.dial(rig.b.peer_id, []) for _ in range(12)))
    far = {channel.channel_id: channel for channel in [await rig.accepted.get() for _ in channels]}
    await asyncio.gather(*(pass_frames(channel, far[channel.channel_id], 1) for channel in channels))
    assert {channel.path().kind for channel in channels} == {"direct"}
    assert relayed_nbytes(rig) == 0


async def test_who_cannot_dial_says_so_and_the_relay_is_next(rig: Rig) -> None:
    await rig.start()
    rig.told = {rig.a.peer_id: ["127.0.0.1:9"]}  # nobody listens there
    began = asyncio.get_running_loop().time()
    near = await rig.a.dial(rig.b.peer_id, [])
    assert near.path().kind == "relayed"
    assert asyncio.get_running_loop().time() - began < 5  # nothing ran into a time-out of 10 s
    await pass_frames(near, await rig.accepted.get(), 2)


async def test_a_relayed_channel_moves_once_the_other_can_dial(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "LOOKS_SECONDS", (0.2,))
    await rig.start()
    told, rig.told = rig.told, {}
    near = await rig.a.dial(rig.b.peer_id, [])
    far = await rig.accepted.get()
    assert near.path().kind == "relayed"
    moving = asyncio.create_task(pass_frames(near, far, 20))
    rig.told = told
    await moving
    await until(lambda: near.path().kind == "direct")
    before = relayed_nbytes(rig)
    await pass_frames(near, far, 4)
    assert relayed_nbytes(rig) == before
    assert rig.errors == []


async def test_who_has_no_part_in_the_plan_has_nobody_dial(rig: Rig) -> None:
    """Nor does one whose plan is not known yet: it hears so at once, and tries again."""
    await rig.start(b={"admit": lambda peer: False})
    with pytest.raises(UnreachableError) as caught:
        await rig.a.dial(rig.b.peer_id, [])
    assert caught.value.code == "admission"
    assert rig.b._config.channel.meter.snapshot() == []


async def test_without_an_address_of_ours_nobody_is_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()
    rig.a._returns = None
    near = await rig.a.dial(rig.b.peer_id, [])
    assert near.path().kind == "relayed"


async def test_who_dials_unasked_gets_nothing(rig: Rig) -> None:
    await rig.start()
    host, port = split_address(rig.told[rig.a.peer_id][0])
    der = await fetch_certificate(host, port, SECOND)
    pipe = DiallerPipe(pinned_channel(f"{host}:{port}", der), f"/{SERVICE}/{BACK}")
    await prove_to_listener(pipe, Identity.generate(), rig.a.peer_id, fingerprint_of(der), "r")
    with pytest.raises(UnreachableError):
        await pipe.recv()
    await pipe.close()


async def test_a_stranger_cannot_have_others_dial(rig: Rig) -> None:
    await rig.start()
    spot = rig.a._relays.spots[0]
    for identity, secret, code in (
        (Identity.generate(), "another secret", "admission"),
        (Identity.generate(), SECRET, "oneway"),  # of the run, but the plan has no address for it
    ):
        pipe = DiallerPipe(await dial_pinned(spot.address, spot.fingerprint), RETURN)
        with pytest.raises(UnreachableError) as caught:
            await enter(pipe, identity, secret, spot, "r", RETURN, rig.b.peer_id)
        assert caught.value.code == code
        await pipe.close()


async def test_who_gives_up_waiting_leaves_nothing_behind(rig: Rig) -> None:
    await rig.start()

    async def never(peer: str) -> None:
        await asyncio.sleep(60)

    rig.b._relays._dial_back = never
    with pytest.raises(UnreachableError) as caught:
        await rig.a._returns.ask(rig.a._relays, rig.b.peer_id, SECOND / 2)
    assert caught.value.code == "silent"
    assert rig.a._returns._awaited == {}
    await until(lambda: rig.relay is not None and rig.relay.calls == 0)
