"""Paths through relays: what a relay may not do, who may use it, and that changing paths loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from potluck.coordinator.relay import Relay
from potluck.protocol import route
from potluck.protocol.channel import Channel
from potluck.protocol.errors import ConfigError, UnreachableError
from potluck.protocol.frames import Frame
from potluck.protocol.grpc_pipes import DiallerPipe
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.handshake import prove_to_dialler
from potluck.protocol.identity import Identity
from potluck.protocol.pipe import Pipe
from potluck.protocol.relay import CALL, Spot, enter
from potluck.protocol.relayed import Relays
from potluck.protocol.tls import Certificate, dial_pinned, start_server
from potluck.protocol.tunnel import Tunnel

from .conftest import SECRET, Rig, frame_of, until

pytestmark = pytest.mark.timeout(60)
MARKER = b"a plum and nothing but a plum; "


def frame(index: int, nbytes: int = 400_000) -> Frame:
    payload = (MARKER * (nbytes // len(MARKER) + 1))[:nbytes]
    return frame_of(payload, index)


async def pass_frames(near: Channel, far: Channel, count: int) -> None:
    async def send() -> None:
        for i in range(count):
            await near.send(frame(i))

    sending = asyncio.create_task(send())
    for i in range(count):
        assert await far.recv() == frame(i)
    await sending
    await near.drain()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig("relayed")
    yield made
    await made.close()


async def test_a_relay_cannot_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    pump = Relay._pump

    class Spy:
        def __init__(self, pipe: Pipe) -> None:
            self.kind, self.send, self.close, self._recv = pipe.kind, pipe.send, pipe.close, pipe.recv

        async def recv(self) -> bytes:
            seen.append(await self._recv())
            return seen[-1]

    monkeypatch.setattr(Relay, "_pump", lambda self, source, *rest: pump(self, Spy(source), *rest))
    near, far = await rig.connect()
    await pass_frames(near, far, 2)
    assert sum(map(len, seen)) > 800_000
    assert not any(MARKER in message for message in seen)
    assert rig.relay
    assert rig.relay.usage[rig.a.peer_id].sent_nbytes > 800_000
    assert rig.relay.usage[rig.b.peer_id].received_nbytes == rig.relay.usage[rig.a.peer_id].sent_nbytes


async def test_what_a_relay_changes_is_not_taken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3]  # messages from now on that are spoiled
    pump = Relay._pump

    class Forger:
        def __init__(self, pipe: Pipe) -> None:
            self.kind, self.send, self.close, self._recv = pipe.kind, pipe.send, pipe.close, pipe.recv

        async def recv(self) -> bytes:
            message = await self._recv()
            if len(message) > 60_000 and left[0]:
                left[0] -= 1
                return message[:30_000] + bytes([message[30_000] ^ 1]) + message[30_001:]
            return message

    monkeypatch.setattr(Relay, "_pump", lambda self, source, *rest: pump(self, Forger(source), *rest))
    near, far = await rig.connect()
    await pass_frames(near, far, 4)
    assert left == [0]
    assert rig.errors == []  # the path broke; nothing that is false got as far as a frame


async def test_a_relay_cannot_answer_for_a_peer(rig: Rig) -> None:
    await rig.start()
    liar, certificate = Identity.generate(), Certificate.generate()

    async def answer_itself(self: Relay, pipe: Pipe) -> None:
        asked = await self._enter(pipe, CALL)
        assert asked is not None
        await pipe.send(b"\x91\xa0")  # "connected"
        tunnel = await Tunnel.listen(pipe, certificate)
        await prove_to_dialler(tunnel, liar, certificate.fingerprint, rig.config_b)
        await tunnel.close()

    assert rig.relay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Relay, "_call", answer_itself)
        spoilt = Relay("r", SECRET, certificate.fingerprint)
        server, port = await start_server("127.0.0.1", 0, spoilt.handlers(), certificate)
        try:
            rig.a._relays._spots.clear()
            rig.a.use_relays([Spot(f"127.0.0.1:{port}", certificate.fingerprint)], SECRET)
            with pytest.raises(UnreachableError) as caught:
                await rig.a.dial(rig.b.peer_id, [])
            assert caught.value.code == "identity"
        finally:
            await server.stop(None)


async def test_who_lacks_the_secret_stays_out(rig: Rig) -> None:
    spot = await rig.start_relay()
    stranger = rig.transport("c", rig.config())
    stranger.use_relays([spot], "another secret")
    with pytest.raises(UnreachableError) as caught:
        await stranger.dial(Identity.generate().peer_id, [])
    assert caught.value.code == "admission"
    assert rig.relay is not None and rig.relay.attached == 0


async def test_who_is_banned_stays_out(rig: Rig) -> None:
    await rig.start()
    assert rig.relay
    outcast = rig.transport("c", rig.config())
    rig.relay._is_banned = lambda peer: peer == outcast.peer_id
    outcast.use_relays(rig.a._relays.spots, SECRET)
    with pytest.raises(UnreachableError):
        await outcast.dial(rig.b.peer_id, [])
    assert outcast.peer_id not in rig.relay._attached
    near = await rig.a.dial(rig.b.peer_id, [])
    await pass_frames(near, await rig.accepted.get(), 1)


async def test_another_server_at_the_relays_address_is_not_asked(rig: Rig) -> None:
    spot = await rig.start_relay()
    made = rig.transport("c", rig.config())
    made.use_relays([Spot(spot.address, "0" * 64)], SECRET)
    with pytest.raises(UnreachableError) as caught:
        await made.dial(Identity.generate().peer_id, [])
    assert caught.value.code == "certificate"


async def test_a_peer_has_so_many_calls_and_no_more(rig: Rig) -> None:
    spot = await rig.start_relay(most_calls=2)
    a, b = rig.transport("a", rig.config()), rig.transport("b", rig.config())
    await b.listen(rig.accepted.put_nowait)
    for made in (a, b):
        made.use_relays([spot], SECRET)
    relay = rig.relay
    assert relay
    await until(lambda: relay.attached == 2)
    first = await a.dial(b.peer_id, [])
    await a.dial(b.peer_id, [])
    with pytest.raises(UnreachableError) as caught:
        await a.dial(b.peer_id, [])
    assert caught.value.code == "busy"
    await first.close()
    await until(lambda: relay.calls == 1)
    await a.dial(b.peer_id, [])


async def test_a_call_that_nobody_answers_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.coordinator.relay.ANSWER_SECONDS", 0.2)
    await rig.start()

    async def deaf(self: Relays, spot: Spot, call: bytes) -> None:
        pass

    monkeypatch.setattr(Relays, "_answer", deaf)
    with pytest.raises(UnreachableError) as caught:
        await rig.a.dial(rig.b.peer_id, [])
    assert caught.value.code == "silent"
    assert rig.relay is not None and rig.relay.calls == 0


async def attach_anew(rig: Rig) -> None:
    """``b`` comes back on a new line while the relay believes in the old one, as after a restart of its router."""
    assert rig.b._relays
    (spot,) = rig.b._relays.spots

    async def left_open(self: DiallerPipe) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiallerPipe, "close", left_open)
        staying = rig.b._relays._spots.pop(spot)
        staying.cancel()
        await asyncio.wait({staying})
    assert rig.relay
    before = rig.relay._attached[rig.b.peer_id]
    rig.b.use_relays([spot], SECRET)
    await until(lambda: rig.relay is not None and rig.relay._attached.get(rig.b.peer_id) not in (None, before))


async def test_calls_to_a_peer_that_attaches_anew_are_called_again(rig: Rig) -> None:
    """The relay's own line to it may be dead without a word, for as long as TCP is patient."""
    near, far = await rig.connect()
    await pass_frames(near, far, 2)
    assert rig.relay and rig.relay.usage[rig.a.peer_id].calls == 1
    await attach_anew(rig)
    await until(lambda: rig.relay is not None and rig.relay.usage[rig.a.peer_id].calls == 2)
    await pass_frames(near, far, 4)
    assert rig.relay.calls == 1 and rig.errors == []


async def test_a_call_that_fell_on_a_dead_line_is_made_again_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()
    answer, heard = Relays._answer, asyncio.Event()

    async def deaf(self: Relays, spot: Spot, call: bytes) -> None:
        heard.set()

    monkeypatch.setattr(Relays, "_answer", deaf)
    dialling = asyncio.create_task(rig.a.dial(rig.b.peer_id, []))
    await heard.wait()
    monkeypatch.setattr(Relays, "_answer", answer)
    await attach_anew(rig)
    with pytest.raises(UnreachableError) as caught:
        async with asyncio.timeout(5):  # not the ten seconds that a call waits
            await dialling
    assert caught.value.code == "absent"
    near = await rig.a.dial(rig.b.peer_id, [])
    await pass_frames(near, await rig.accepted.get(), 2)


async def test_who_does_not_say_that_it_is_there_is_not(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.protocol.relayed.BEAT_SECONDS", 0.02)
    monkeypatch.setattr("potluck.coordinator.relay.SILENT_SECONDS", 0.3)
    spot = await rig.start_relay()
    relay = rig.relay
    assert relay
    lively, mute = rig.transport("a", rig.config()), rig.transport("b", rig.config())
    lively.use_relays([spot], SECRET)
    await until(lambda: relay.attached == 1)
    attached = relay._attached[lively.peer_id]

    async def nothing(self: Relays, raw: DiallerPipe) -> None:
        pass

    monkeypatch.setattr(Relays, "_beat", nothing)
    mute.use_relays([spot], SECRET)
    await until(lambda: mute.peer_id in relay._attached)
    await until(lambda: mute.peer_id not in relay._attached)
    assert relay._attached[lively.peer_id] is attached


async def test_a_call_that_was_not_made_is_not_answered(rig: Rig) -> None:
    await rig.start()
    spot = rig.a._relays.spots[0]
    channel = await dial_pinned(spot.address, spot.fingerprint)
    pipe = DiallerPipe(channel, "/potluck.Relay/Answer")
    await pipe.send(bytes(16))
    with pytest.raises(UnreachableError):
        await pipe.recv()
    await pipe.close()


async def test_a_second_relay_takes_over_in_mid_stream(rig: Rig) -> None:
    near, far = await rig.connect()
    certificate = Certificate.generate()
    second = Relay("r", SECRET, certificate.fingerprint)
    server, port = await start_server("127.0.0.1", 0, second.handlers(), certificate)
    for made in (rig.a, rig.b):
        made.use_relays([Spot(f"127.0.0.1:{port}", certificate.fingerprint)], SECRET)
    await until(lambda: second.attached == 2)
    assert rig.proxy
    rig.proxy.budget = 1_500_000
    rig.proxy.refusing = True  # the first relay is gone for good, in the middle of a frame
    await pass_frames(near, far, 10)
    assert second.calls == 1
    await near.close()
    await server.stop(None)


async def test_a_direct_path_comes_first_and_is_moved_to_when_it_comes_late(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "LOOKS_SECONDS", (0.1,))
    await rig.start()
    (address,) = rig_addresses = await rig.b.listen(rig.accepted.put_nowait)
    direct = await rig.a.dial(rig.b.peer_id, rig_addresses)
    assert direct.path().kind == "direct"
    await rig.accepted.get()
    reach, is_open = GrpcTransport.reach, False

    async def blocked(self: GrpcTransport, peer_id: str, to: str, timeout: Any) -> Pipe:
        if not is_open:
            raise UnreachableError(f"nobody listens at {to}")
        return await reach(self, peer_id, to, timeout)

    monkeypatch.setattr(GrpcTransport, "reach", blocked)
    near = await rig.a.dial(rig.b.peer_id, [address])
    far = await rig.accepted.get()
    assert near.path().kind == "relayed"
    moving = asyncio.create_task(pass_frames(near, far, 40))
    is_open = True
    await moving
    await until(lambda: near.path().kind == "direct")
    await pass_frames(near, far, 2)
    assert rig.errors == []


async def test_the_relays_own_words_are_checked(rig: Rig) -> None:
    spot = await rig.start_relay()
    channel = await dial_pinned(spot.address, spot.fingerprint)
    pipe = DiallerPipe(channel, CALL)
    await pipe.recv()
    await pipe.send(b"\xff" * 100)  # no admission
    with pytest.raises(UnreachableError):
        await pipe.recv()
    await pipe.close()
    channel = await dial_pinned(spot.address, spot.fingerprint)
    pipe = DiallerPipe(channel, CALL)
    with pytest.raises(UnreachableError):  # a relay's number for another run: signed for another run
        await enter(pipe, Identity.generate(), SECRET, spot, "another run", CALL, "x")
    await pipe.close()


@pytest.mark.parametrize("text", ["", "host:1", "host/" + "0" * 64, "host:1/" + "0" * 63, "host:99999/" + "0" * 64])
def test_what_is_no_relay_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a relay"):
        Spot.parse(text)


def test_a_relay_as_text() -> None:
    spot = Spot("[2001:db8::1]:7000", "ab" * 32)
    assert Spot.parse(str(spot)) == spot
