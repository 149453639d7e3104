"""What every transport must do: in memory, over gRPC, over four connections, through a relay, over libp2p."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import timedelta
from typing import Any

import grpc
import pytest

from potluck.protocol.channel import Channel
from potluck.protocol.errors import PotluckError, UnreachableError, WireError
from potluck.protocol.frames import MESSAGE_NBYTES, Frame, Header, Purpose
from potluck.protocol.grpc_transport import METHOD, SERVICE
from potluck.protocol.identity import Identity
from potluck.protocol.tls import Certificate, fetch_certificate, pinned_channel, split_address, start_server
from potluck.protocol.transport import TransportConfig

from .conftest import frame_of

pytestmark = pytest.mark.timeout(30)

SECOND = timedelta(seconds=1)
MIB = 1 << 20


def frame(index: int, nbytes: int = 100) -> Frame:
    payload = index.to_bytes(4, "big") * (nbytes // 4) + b"." * (nbytes % 4)
    return frame_of(payload, index, dense_nbytes=4 * nbytes)


async def receive(channel: Channel, count: int) -> list[int]:
    got = []
    for _ in range(count):
        arrived = await channel.recv()
        assert arrived == frame(arrived.header.microbatch, len(arrived.payload))
        got.append(arrived.header.microbatch)
    return got


async def send(channel: Channel, frames: list[Frame]) -> None:
    for each in frames:
        await channel.send(each)


def spent(config: TransportConfig, direction: str, purpose: Purpose) -> int:
    traffic = config.channel.meter.snapshot()
    return sum(t.nbytes for t in traffic if (t.direction, t.purpose) == (direction, purpose))


async def test_many_small_frames_both_ways_in_order(rig: Any) -> None:
    near, far = await rig.connect()
    frames = [frame(i) for i in range(1500)]
    _, _, forth, back = await asyncio.gather(
        send(near, frames), send(far, frames), receive(far, 1500), receive(near, 1500)
    )
    assert forth == back == list(range(1500))
    assert near.peer_id == rig.b.peer_id
    assert far.peer_id == rig.a.peer_id


@pytest.mark.parametrize("nbytes", [0, 1, 5 * MIB + 3])
async def test_frames_of_any_size_arrive_whole(rig: Any, nbytes: int) -> None:
    near, far = await rig.connect()
    await near.send(frame(7, nbytes))
    assert await far.recv() == frame(7, nbytes)
    await near.drain()


async def test_a_slow_reader_holds_the_sender_back(rig: Any) -> None:
    windows = {"send_window_nbytes": MIB, "receive_window_nbytes": MIB}
    near, far = await rig.connect(a=windows, b=windows)
    size, count = MIB // 4, 40
    sent = 0

    async def sender() -> None:
        nonlocal sent
        for i in range(count):
            await near.send(frame(i, size))
            sent += 1

    task = asyncio.create_task(sender())
    for i in range(count):
        assert (await far.recv()).header.microbatch == i
        assert sent - i <= 2 * MIB // size + 1, "more frames are held than both windows allow"
    await task


async def test_an_unread_inbox_does_not_stop_the_other_direction(rig: Any) -> None:
    windows = {"send_window_nbytes": MIB, "receive_window_nbytes": MIB}
    near, far = await rig.connect(a=windows, b=windows)
    stuffing = asyncio.create_task(send(far, [frame(i, MIB // 4) for i in range(12)]))
    _, got = await asyncio.gather(send(near, [frame(i, MIB // 4) for i in range(20)]), receive(far, 20))
    assert got == list(range(20))
    assert not stuffing.done()
    assert await receive(near, 12) == list(range(12))
    await stuffing


async def test_a_cut_in_mid_frame_resumes_without_loss_or_duplicate(rig: Any) -> None:
    near, far = await rig.connect()
    rig.cut_after(2_700_000)
    _, got = await asyncio.gather(send(near, [frame(i, MIB) for i in range(8)]), receive(far, 8))
    assert got == list(range(8))
    await near.drain()
    again = spent(rig.config_a, "out", Purpose.RETRANSMIT)
    assert 0 < again < 8 * MIB
    assert spent(rig.config_a, "out", Purpose.ACTIVATION) < 1.1 * 8 * MIB
    dense = sum(t.dense_nbytes for t in rig.config_a.channel.meter.snapshot())
    assert dense == 4 * 8 * MIB


async def test_many_cuts_under_traffic_both_ways(rig: Any) -> None:
    near, far = await rig.connect()

    async def receive_and_cut() -> list[int]:
        got = []
        for i in range(30):
            got += await receive(far, 1)
            if i % 6 == 5:
                rig.cut()
        return got

    frames = [frame(i, 50_000 + i) for i in range(30)]
    _, _, forth, back = await asyncio.gather(
        send(near, frames), send(far, frames), receive_and_cut(), receive(near, 30)
    )
    assert forth == back == list(range(30))
    assert rig.errors == []


async def test_a_sender_that_lets_few_bytes_fly_gets_on(rig: Any) -> None:
    """As rounds do beside microbatches: the next message goes when enough of those before it is known to be there."""
    near, far = await rig.connect()
    most, seen = 3 * MESSAGE_NBYTES, []

    async def gate() -> None:
        while near.in_flight_nbytes > most:
            await near.progress()
        seen.append(near.in_flight_nbytes)

    near.gate = gate
    _, got = await asyncio.gather(send(near, [frame(i, MIB) for i in range(4)]), receive(far, 4))
    assert got == list(range(4))
    await near.drain()
    assert near.in_flight_nbytes == 0
    assert len(seen) > 4 * 16
    assert max(seen) <= most


async def test_close_waits_for_acknowledgements(rig: Any) -> None:
    near, far = await rig.connect()
    await send(near, [frame(i, MIB) for i in range(5)])
    await near.close()
    assert await receive(far, 5) == list(range(5))
    with pytest.raises(UnreachableError) as caught:
        await far.recv()
    assert caught.value.code == "closed"
    with pytest.raises(UnreachableError):
        await near.send(frame(0))


async def test_close_says_when_frames_were_not_acknowledged(rig: Any) -> None:
    near, _ = await rig.connect(a={"close_timeout": SECOND / 5}, b={"close_timeout": SECOND / 5})
    rig.refuse()
    await near.send(frame(1))
    began = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        await near.close()
    assert caught.value.code == "unacknowledged"
    assert time.monotonic() - began < 5


async def test_a_peer_that_is_gone_ends_both_sides_in_bounded_time(rig: Any) -> None:
    near, far = await rig.connect(a={"give_up": SECOND / 2}, b={"give_up": SECOND / 2})
    rig.refuse()
    for channel in (near, far):
        with pytest.raises(UnreachableError) as caught:
            async with asyncio.timeout(10):
                await channel.recv()
        assert caught.value.code == "lost"
        with pytest.raises(UnreachableError):
            await channel.send(frame(1))
        await channel.close()


async def test_another_peer_at_the_address_is_refused(rig: Any) -> None:
    await rig.start()
    with pytest.raises(UnreachableError) as caught:
        await rig.a.dial(Identity.generate().peer_id, rig.addresses)
    assert caught.value.code == ("absent" if rig.kind in ("relayed", "returned") else "identity")
    assert rig.accepted.empty()


async def test_a_peer_outside_the_plan_is_refused(rig: Any) -> None:
    await rig.start(b={"admit": lambda peer_id: False})
    with pytest.raises(UnreachableError) as caught:
        await rig.a.dial(rig.b.peer_id, rig.addresses)
    assert caught.value.code == "admission"
    assert rig.accepted.empty()


async def test_nobody_at_the_address(rig: Any) -> None:
    await rig.start()
    rig.refuse()
    with pytest.raises(UnreachableError):
        await rig.a.dial(rig.b.peer_id, rig.addresses)
    with pytest.raises(UnreachableError):
        await rig.a.dial(rig.b.peer_id, [])


async def test_a_dead_address_does_not_hide_a_live_one(rig: Any, unused_tcp_port: int) -> None:
    await rig.start()
    near = await rig.a.dial(rig.b.peer_id, [f"127.0.0.1:{unused_tcp_port}", *rig.addresses])
    await near.send(frame(1))
    assert await receive(await rig.accepted.get(), 1) == [1]


async def test_a_header_that_is_not_expected_is_refused_before_its_payload(rig: Any) -> None:
    def check(header: Header) -> None:
        if header.nbytes > 1000:
            raise WireError("only 1000 bytes are due")

    near, far = await rig.connect(b={"check": check})
    await near.send(frame(0, 1000))
    assert await receive(far, 1) == [0]
    await near.send(frame(1, 5 * MIB))
    with pytest.raises(WireError, match="only 1000 bytes"):
        await far.recv()
    with pytest.raises(UnreachableError, match="only 1000 bytes") as caught:
        await near.recv()
    assert caught.value.code == "refused"
    assert [str(error) for error in rig.errors] == ["only 1000 bytes are due"] * 3
    assert spent(rig.config_b, "in", Purpose.ACTIVATION) < 3.2 * 256 * 1024, "read on after the header"


async def test_an_oversized_frame_is_refused_on_both_ends(rig: Any) -> None:
    near, far = await rig.connect(a={"max_frame_nbytes": 2 * MIB}, b={"max_frame_nbytes": MIB})
    with pytest.raises(WireError):
        await near.send(frame(0, 2 * MIB + 1))
    await near.send(frame(0, MIB + 1))
    with pytest.raises(WireError, match="over the limit"):
        await far.recv()


async def test_both_ends_count_the_same_bytes(rig: Any) -> None:
    near, far = await rig.connect()
    await asyncio.gather(send(near, [frame(i, 300_000) for i in range(10)]), receive(far, 10))
    await near.drain()
    sent, got = (
        spent(config, way, Purpose.ACTIVATION) for config, way in ((rig.config_a, "out"), (rig.config_b, "in"))
    )
    assert sent == got
    assert 3_000_000 < sent < 3_000_000 * 1.06


async def test_path_tells_round_trip_and_rate(rig: Any) -> None:
    near, far = await rig.connect()
    await asyncio.gather(send(near, [frame(i, MIB) for i in range(8)]), receive(far, 8))
    await near.drain()
    path = near.path()
    assert path.kind == {"memory": "memory", "relayed": "relayed", "p2p": "punched"}.get(rig.kind, "direct")
    assert path.connections == (4 if rig.kind == "striped" else 1)
    assert path.rtt_seconds is not None
    assert 0 < path.rtt_seconds < 5
    assert path.bytes_per_second is not None
    assert path.bytes_per_second > 1000


async def test_two_channels_between_the_same_peers_are_apart(rig: Any) -> None:
    near, far = await rig.connect()
    second = await rig.a.dial(rig.b.peer_id, rig.addresses)
    far_second = await rig.accepted.get()
    await near.send(frame(1))
    await second.send(frame(2))
    assert (await receive(far_second, 1), await receive(far, 1)) == ([2], [1])


@pytest.mark.parametrize("rig", ["memory"], indirect=True)
async def test_a_restarted_listener_ends_the_channel(rig: Any) -> None:
    near, far = await rig.connect()
    restarted = rig.transport("b", rig.config_b)
    await restarted.listen(rig.accepted.put_nowait)
    rig.cut()
    with pytest.raises(UnreachableError) as caught:
        await near.recv()
    assert caught.value.code == "reset"
    far.abort(UnreachableError("killed"))


@pytest.mark.parametrize("rig", ["grpc"], indirect=True)
async def test_a_man_in_the_middle_is_refused_by_both_ends(rig: Any) -> None:
    await rig.start()
    host, port = split_address(rig.addresses[0])
    der = await fetch_certificate(host, port, SECOND * 5)

    async def relay(requests: Any, context: Any) -> None:
        channel = pinned_channel(rig.addresses[0], der)
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)(None)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await context.write(await call.read())
            await call.write(await context.read())
            await context.write(await call.read())
        call.cancel()
        await channel.close(None)

    handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(relay)})
    server, port = await start_server("127.0.0.1", 0, [handler], Certificate.generate())
    with pytest.raises(PotluckError) as caught:
        await rig.a.dial(rig.b.peer_id, [f"127.0.0.1:{port}"])
    assert caught.value.code == "identity"
    assert rig.accepted.empty()
    await server.stop(None)
