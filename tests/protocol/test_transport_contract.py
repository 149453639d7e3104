"""What every transport must do, in memory and over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest

from potluck.protocol.channel import Channel
from potluck.protocol.errors import PotluckError, UnreachableError, WireError
from potluck.protocol.frames import Frame, Header, Kind, Purpose, TensorSpec, make_frame
from potluck.protocol.grpc_transport import METHOD, SERVICE, GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.memory import MemoryNetwork
from potluck.protocol.meter import Meter
from potluck.protocol.pipe import ChannelConfig
from potluck.protocol.tls import Certificate, fetch_certificate, pinned_channel, split_address, start_server
from potluck.protocol.transport import Transport, TransportConfig

pytestmark = pytest.mark.timeout(30)

SECOND = timedelta(seconds=1)
MIB = 1 << 20


def frame(index: int, nbytes: int = 100) -> Frame:
    payload = index.to_bytes(4, "big") * (nbytes // 4) + b"." * (nbytes % 4)
    return make_frame(
        payload,
        kind=Kind.ACTIVATION,
        run=b"testrun.",
        generation=1,
        step=2,
        stage=1,
        microbatch=index,
        part=0,
        attempt=0,
        tensors=(TensorSpec(codec="tile4", shape=(nbytes,), nbytes=nbytes),),
        targets=0,
        dense_nbytes=4 * nbytes,
    )


class Proxy:
    """A line between two peers that can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.budget: int | None = None
        self.refusing = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        for source, sink, counted in ((reader, far_writer, True), (far_reader, writer, False)):
            task = asyncio.create_task(self._pump(source, sink, counted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if counted and self.budget is not None:
                    self.budget -= len(data)
                    if self.budget < 0:
                        self.budget = None
                        self.cut()
                        return
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Rig:
    """Two transports, ``a`` dialling ``b`` over a line that can be cut."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.accepted: asyncio.Queue[Channel] = asyncio.Queue()
        self.errors: list[WireError] = []
        self.network = MemoryNetwork()
        self.proxy: Proxy | None = None
        self._closing: list[Transport] = []

    def config(self, admit: Callable[[str], bool] | None = None, **fields: Any) -> TransportConfig:
        channel = {"give_up": 10 * SECOND, "close_timeout": 10 * SECOND, "first_backoff": SECOND / 50}
        channel |= {"meter": Meter(), "on_error": lambda _, error: self.errors.append(error)} | fields
        return TransportConfig(run="r", admit=admit or (lambda _: True), channel=ChannelConfig(**channel))

    def transport(self, name: str, config: TransportConfig) -> Any:
        if self.kind == "memory":
            made: Any = self.network.join(name, config)
        else:
            made = GrpcTransport(Identity.generate(), Certificate.generate(), config)
        self._closing.append(made)
        return made

    async def start(self, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> None:
        self.config_a, self.config_b = self.config(**a or {}), self.config(**b or {})
        self.a, self.b = self.transport("a", self.config_a), self.transport("b", self.config_b)
        self.addresses = await self.b.listen(self.accepted.put_nowait)
        if self.kind == "grpc":
            self.proxy = Proxy(*split_address(self.addresses[0]))
            self.addresses = [await self.proxy.start()]

    async def connect(self, **sides: dict[str, Any]) -> tuple[Channel, Channel]:
        await self.start(**sides)
        near = await self.a.dial(self.b.peer_id, self.addresses)
        return near, await self.accepted.get()

    def cut(self) -> None:
        self.network.cut("a", "b")
        if self.proxy:
            self.proxy.cut()

    def cut_after(self, nbytes: int) -> None:
        self.network.cut_after("a", "b", nbytes)
        if self.proxy:
            self.proxy.budget = nbytes

    def refuse(self) -> None:
        self.network.refuse("a", "b")
        if self.proxy:
            self.proxy.refusing = True
            self.proxy.cut()

    async def close(self) -> None:
        await asyncio.gather(*(transport.close() for transport in self._closing))
        if self.proxy:
            await self.proxy.close()


@pytest.fixture(params=["memory", "grpc"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    made = Rig(request.param)
    yield made
    await made.close()


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


async def test_many_small_frames_both_ways_in_order(rig: Rig) -> None:
    near, far = await rig.connect()
    frames = [frame(i) for i in range(1500)]
    _, _, forth, back = await asyncio.gather(
        send(near, frames), send(far, frames), receive(far, 1500), receive(near, 1500)
    )
    assert forth == back == list(range(1500))
    assert near.peer_id == rig.b.peer_id
    assert far.peer_id == rig.a.peer_id


@pytest.mark.parametrize("nbytes", [0, 1, 5 * MIB + 3])
async def test_frames_of_any_size_arrive_whole(rig: Rig, nbytes: int) -> None:
    near, far = await rig.connect()
    await near.send(frame(7, nbytes))
    assert await far.recv() == frame(7, nbytes)
    await near.drain()


async def test_a_slow_reader_holds_the_sender_back(rig: Rig) -> None:
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


async def test_an_unread_inbox_does_not_stop_the_other_direction(rig: Rig) -> None:
    windows = {"send_window_nbytes": MIB, "receive_window_nbytes": MIB}
    near, far = await rig.connect(a=windows, b=windows)
    stuffing = asyncio.create_task(send(far, [frame(i, MIB // 4) for i in range(12)]))
    _, got = await asyncio.gather(send(near, [frame(i, MIB // 4) for i in range(20)]), receive(far, 20))
    assert got == list(range(20))
    assert not stuffing.done()
    assert await receive(near, 12) == list(range(12))
    await stuffing


async def test_a_cut_in_mid_frame_resumes_without_loss_or_duplicate(rig: Rig) -> None:
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


async def test_many_cuts_under_traffic_both_ways(rig: Rig) -> None:
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


async def test_close_waits_for_acknowledgements(rig: Rig) -> None:
    near, far = await rig.connect()
    await send(near, [frame(i, MIB) for i in range(5)])
    await near.close()
    assert await receive(far, 5) == list(range(5))
    with pytest.raises(UnreachableError) as caught:
        await far.recv()
    assert caught.value.code == "closed"
    with pytest.raises(UnreachableError):
        await near.send(frame(0))


async def test_close_says_when_frames_were_not_acknowledged(rig: Rig) -> None:
    near, _ = await rig.connect(a={"close_timeout": SECOND / 5}, b={"close_timeout": SECOND / 5})
    rig.refuse()
    await near.send(frame(1))
    began = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        await near.close()
    assert caught.value.code == "unacknowledged"
    assert time.monotonic() - began < 5


async def test_a_peer_that_is_gone_ends_both_sides_in_bounded_time(rig: Rig) -> None:
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


async def test_another_peer_at_the_address_is_refused(rig: Rig) -> None:
    await rig.start()
    with pytest.raises(UnreachableError) as caught:
        await rig.a.dial(Identity.generate().peer_id, rig.addresses)
    assert caught.value.code == "identity"
    assert rig.accepted.empty()


async def test_a_peer_outside_the_plan_is_refused(rig: Rig) -> None:
    await rig.start(b={"admit": lambda peer_id: False})
    with pytest.raises(UnreachableError) as caught:
        await rig.a.dial(rig.b.peer_id, rig.addresses)
    assert caught.value.code == "admission"
    assert rig.accepted.empty()


async def test_nobody_at_the_address(rig: Rig) -> None:
    await rig.start()
    rig.refuse()
    with pytest.raises(UnreachableError):
        await rig.a.dial(rig.b.peer_id, rig.addresses)
    with pytest.raises(UnreachableError):
        await rig.a.dial(rig.b.peer_id, [])


async def test_a_header_that_is_not_expected_is_refused_before_its_payload(rig: Rig) -> None:
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


async def test_an_oversized_frame_is_refused_on_both_ends(rig: Rig) -> None:
    near, far = await rig.connect(a={"max_frame_nbytes": 2 * MIB}, b={"max_frame_nbytes": MIB})
    with pytest.raises(WireError):
        await near.send(frame(0, 2 * MIB + 1))
    await near.send(frame(0, MIB + 1))
    with pytest.raises(WireError, match="over the limit"):
        await far.recv()


async def test_both_ends_count_the_same_bytes(rig: Rig) -> None:
    near, far = await rig.connect()
    await asyncio.gather(send(near, [frame(i, 300_000) for i in range(10)]), receive(far, 10))
    await near.drain()
    sent, got = (
        spent(config, way, Purpose.ACTIVATION)
        for config, way in ((rig.config_a, "out"), (rig.config_b, "in"))
    )
    assert sent == got
    assert 3_000_000 < sent < 3_000_000 * 1.06


async def test_path_tells_round_trip_and_rate(rig: Rig) -> None:
    near, far = await rig.connect()
    await asyncio.gather(send(near, [frame(i, MIB) for i in range(8)]), receive(far, 8))
    await near.drain()
    path = near.path()
    assert path.kind == ("memory" if rig.kind == "memory" else "direct")
    assert path.rtt_seconds is not None
    assert 0 < path.rtt_seconds < 5
    assert path.bytes_per_second is not None
    assert path.bytes_per_second > 1000


async def test_two_channels_between_the_same_peers_are_apart(rig: Rig) -> None:
    near, far = await rig.connect()
    second = await rig.a.dial(rig.b.peer_id, rig.addresses)
    far_second = await rig.accepted.get()
    await near.send(frame(1))
    await second.send(frame(2))
    assert (await receive(far_second, 1), await receive(far, 1)) == ([2], [1])


async def test_a_restarted_listener_ends_the_channel() -> None:
    rig = Rig("memory")
    near, far = await rig.connect()
    restarted = rig.transport("b", rig.config_b)
    await restarted.listen(rig.accepted.put_nowait)
    rig.cut()
    with pytest.raises(UnreachableError) as caught:
        await near.recv()
    assert caught.value.code == "reset"
    far.abort(UnreachableError("killed"))
    await rig.close()


async def test_a_man_in_the_middle_is_refused_by_both_ends() -> None:
    rig = Rig("grpc")
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

    handler = grpc.method_handlers_generic_handler(
        SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(relay)}
    )
    server, port = await start_server("127.0.0.1", 0, [handler], Certificate.generate())
    with pytest.raises(PotluckError) as caught:
        await rig.a.dial(rig.b.peer_id, [f"127.0.0.1:{port}"])
    assert caught.value.code == "identity"
    assert rig.accepted.empty()
    await server.stop(None)
    await rig.close()
