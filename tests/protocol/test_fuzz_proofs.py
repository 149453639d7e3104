"""Proofs, relays and tunnels with a message changed on its way: nothing is proven by it, and nothing false comes out.

Nothing but the declared errors is raised. The inputs come from seeds.
"""

from __future__ import annotations

import asyncio
import ssl
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from mutations import Mutator, outcome, traced

from potluck.protocol.errors import ConfigError, UnreachableError, WireError
from potluck.protocol.frames import MESSAGE_NBYTES
from potluck.protocol.handshake import prove_to_dialler, prove_to_listener
from potluck.protocol.identity import Identity
from potluck.protocol.memory import MemoryPipe
from potluck.protocol.pipe import Pipe, PipeClosed
from potluck.protocol.relay import CALL, Spot, admit, enter, ring, rung, verdict
from potluck.protocol.tls import Certificate
from potluck.protocol.transport import TransportConfig
from potluck.protocol.tunnel import Tunnel

pytestmark = pytest.mark.timeout(60)
SLACK = 32 * 1024  # bytes that a parser may need whatever comes, errors with their texts included


class Spoiling:
    """A pipe whose ``which``-th message on its way out is another one."""

    kind = "memory"
    connections = 1
    congestion = ""

    def __init__(self, pipe: Pipe, which: int, change: Callable[[bytes], bytes]) -> None:
        self._pipe, self._left, self._change = pipe, which, change
        self.before = self.after = b""
        self.recv, self.close = pipe.recv, pipe.close

    async def send(self, message: bytes) -> None:
        if self._left == 0:
            self.before, self.after = message, self._change(message)
            message = self.after
        self._left -= 1
        await self._pipe.send(message)


async def both(near: Awaitable[object], far: Awaitable[object], pipe: Pipe) -> list[object]:
    """What two ends come to; the pipe is closed when one is done with an error, or both wait (a channel's patience)."""

    async def end(part: Awaitable[object]) -> object:
        try:
            return await part
        except Exception as error:
            await pipe.close()
            return error

    ends = asyncio.gather(end(near), end(far))
    for _ in range(200):
        if not ends.done():
            await asyncio.sleep(0)
    await pipe.close()
    return await ends


def same(a: bytes, b: bytes) -> bool:
    """Whether they mean the same, in MessagePack."""
    try:
        return bool(msgspec.msgpack.decode(a) == msgspec.msgpack.decode(b))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


@pytest.mark.parametrize(("listener", "which"), [(True, 0), (False, 0), (True, 1)])
async def test_a_handshake_with_one_message_changed_proves_nothing(listener: bool, which: int) -> None:
    mutate, config = Mutator(6 + 2 * listener + which), TransportConfig(run="r")
    a, b = Identity.generate(), Identity.generate()
    seen = Counter[str]()
    for _ in range(220):
        near, far = MemoryPipe.pair()
        bad = Spoiling(far if listener else near, which, lambda data: mutate([data]))
        mine, theirs = (near, bad) if listener else (bad, far)
        found = await both(
            prove_to_listener(mine, a, b.peer_id, "ab" * 32, "r"), prove_to_dialler(theirs, b, "ab" * 32, config), near
        )
        for each in found:
            assert each in (None, a.peer_id) or isinstance(each, WireError | UnreachableError), repr(each)
        spoiled = found[0] if listener and which else found[1]
        if not same(bad.before, bad.after):
            assert spoiled != a.peer_id
            assert isinstance(found[0], WireError | UnreachableError)
        seen[type(found[0]).__name__] += 1
    assert seen["WireError"] + seen["PipeClosed"] > 50
    assert seen["UnreachableError"] > 10 or which == 0


@pytest.mark.parametrize(("relay", "which"), [(True, 0), (False, 0), (True, 1)])
async def test_an_entry_at_a_relay_with_one_message_changed(relay: bool, which: int) -> None:
    mutate, peer = Mutator(10 + 2 * relay + which), Identity.generate()
    spot = Spot("127.0.0.1:7000", "cd" * 32)

    async def admitted(pipe: Pipe) -> object:
        if (asked := await admit(pipe, "secret", spot.fingerprint, "r", CALL)) is not None:
            await verdict(pipe)
        return asked

    for _ in range(220):
        near, far = MemoryPipe.pair()
        bad = Spoiling(far if relay else near, which, lambda data: mutate([data]))
        mine, theirs = (near, bad) if relay else (bad, far)
        found = await both(enter(mine, peer, "secret", spot, "r", CALL, "x"), admitted(theirs), near)
        for each in found:
            fine = each is None or isinstance(each, WireError | UnreachableError)
            assert fine or getattr(each, "peer", "") == peer.peer_id, repr(each)
        if which == 0 and not same(bad.before, bad.after):
            assert found[1] is None or isinstance(found[1], WireError | PipeClosed)


def test_rings_and_spots() -> None:
    mutate, seen = Mutator(20), Counter[str]()
    spots = [str(Spot("[2001:db8::1]:7000", "ab" * 32)).encode(), str(Spot("host.example:7000", "0" * 64)).encode()]
    with traced():
        for _ in range(1000):
            call = mutate([ring(b"c" * 16), ring(b"c" * 16, Identity.generate().peer_id)])
            found = outcome(lambda call=call: rung(call), (WireError,), SLACK, seen)
            assert found is None or (len(found.call) == 16 and isinstance(found.caller, str))
            text = mutate(spots).decode(errors="replace")
            spot = outcome(lambda text=text: Spot.parse(text), (ConfigError,), SLACK, seen)
            assert spot is None or str(spot) == text
    assert min(seen["taken"], seen["refused"]) > 100


CERTIFICATE = Certificate.generate()


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return client, CERTIFICATE.server_context()


async def test_what_is_changed_in_a_tunnel_breaks_it() -> None:
    """In its handshake or behind it, in either direction: what comes through at all is what was sent."""
    mutate, seen = Mutator(30), Counter[str]()
    client, server = contexts()
    said = [b"", b"soup" * 5000, b"x"]
    for number in range(300):
        near, far = MemoryPipe.pair()
        bad = Spoiling(near if number % 2 else far, number // 2 % 5, lambda data: mutate([data]))
        ends = (bad, far) if number % 2 else (near, bad)

        async def talk(end: Pipe, context: ssl.SSLContext, listens: bool) -> list[bytes]:
            tunnel = await Tunnel(end, context, listens=listens)._open()
            for each in said:
                await tunnel.send(each)
            return [await tunnel.recv() for _ in said]

        found = await both(talk(ends[0], client, False), talk(ends[1], server, True), near)
        for each in found:
            assert each == said or isinstance(each, PipeClosed), repr(each)
            seen["taken" if each == said else "refused"] += 1
    assert seen["refused"] > 200


async def test_what_the_other_end_of_a_tunnel_may_say() -> None:
    """It has the keys, so any bytes may come out of TLS: lengths that are not true, or no end at all."""
    mutate, seen = Mutator(31), Counter[str]()
    client, server = contexts()
    lengths = [n.to_bytes(4, "big") for n in (0, 1, 60_000, MESSAGE_NBYTES, MESSAGE_NBYTES + 1, 1 << 31)]
    for _ in range(150):
        near, far = MemoryPipe.pair()
        dialled, listened = await asyncio.gather(
            Tunnel(near, client, listens=False)._open(), Tunnel(far, server, listens=True)._open()
        )
        with traced():
            reading = asyncio.create_task(listened.recv())
            for _ in range(4):
                dialled._tls.write(mutate(lengths) + mutate.random.randbytes(mutate.random.choice((0, 9, 16_000))))
                await dialled._flush()
                await asyncio.sleep(0)
                if reading.done() and not reading.exception():
                    assert len(reading.result()) <= MESSAGE_NBYTES
                    seen["taken"] += 1
                    reading = asyncio.create_task(listened.recv())
                    await asyncio.sleep(0)
            assert tracemalloc.get_traced_memory()[0] < 8 * MESSAGE_NBYTES
        await near.close()
        with pytest.raises(PipeClosed):
            await reading
        seen["closed"] += 1
    assert min(seen["taken"], seen["closed"]) > 20


async def test_no_tls_at_all() -> None:
    mutate = Mutator(32)
    client, server = contexts()
    hello = []
    near, far = MemoryPipe.pair()
    opening = asyncio.create_task(Tunnel(near, client, listens=False)._open())
    hello.append(await far.recv())
    opening.cancel()
    for number in range(300):
        near, far = MemoryPipe.pair()
        await far.send(mutate(hello, most_nbytes=100_000) or b"\0")
        await far.close()
        with pytest.raises(PipeClosed):
            await Tunnel(near, server if number % 2 else client, listens=bool(number % 2))._open()
