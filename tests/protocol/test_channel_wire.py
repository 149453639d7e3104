"""A channel against a peer played by hand: duplicates, damage, garbage."""

from __future__ import annotations

import asyncio
import zlib
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.protocol.channel import Channel
from potluck.protocol.errors import UnreachableError, WireError
from potluck.protocol.flow import Inbox, Outbox
from potluck.protocol.frames import (
    MESSAGE_NBYTES,
    Ack,
    Check,
    Frame,
    Header,
    Hello,
    Kind,
    More,
    Reason,
    Start,
    TensorSpec,
    Trouble,
    encode_header,
    encode_message,
    frame_messages,
    parse_message,
)
from potluck.protocol.memory import MemoryPipe
from potluck.protocol.pipe import ChannelConfig, Pipe

from .conftest import frame_of

pytestmark = pytest.mark.timeout(30)


def frame(index: int, payload: bytes = b"soup") -> Frame:
    return frame_of(payload, index, kind=Kind.SHARD)


def messages(sequence: int, of: Frame, header: Header | None = None) -> list[bytes]:
    return [m for _, m in frame_messages(sequence, encode_header(header or of.header), of.payload, 0)]


class Peer:
    """The listening end, by hand; every dial gives a new pipe."""

    def __init__(self) -> None:
        self.pipes: asyncio.Queue[MemoryPipe] = asyncio.Queue()
        self.errors: list[WireError] = []
        self.config = ChannelConfig(
            on_error=lambda _, error: self.errors.append(error), first_backoff=timedelta(milliseconds=1)
        )
        self.channel = Channel("peer", self.config)

    async def _connect(self) -> Pipe:
        near, far = MemoryPipe.pair()
        self.pipes.put_nowait(far)
        return near

    async def open(self) -> MemoryPipe:
        _, pipe = await asyncio.gather(self.channel.open(self._connect), self.greet())
        return pipe

    async def greet(self, received: int = 0, consumed: int = 0) -> MemoryPipe:
        pipe = await self.pipes.get()
        self.hello = parse_message(await pipe.recv())
        assert isinstance(self.hello, Hello)
        await pipe.send(encode_message(Hello(self.hello.channel, True, received, 0, consumed, 1 << 20)))
        return pipe

    async def stop(self) -> None:
        self.channel.abort(UnreachableError("the test is over"))
        await self.channel.join()


async def test_duplicates_are_dropped_and_acknowledged_again() -> None:
    peer = Peer()
    pipe = await peer.open()
    first, second = messages(0, frame(0)), messages(1, frame(1))
    for message in [*first, *first, *second, *first]:
        await pipe.send(message)
    assert [(await peer.channel.recv()).header.microbatch for _ in range(2)] == [0, 1]
    acks: list[int] = []
    while acks[-1:] != [2]:
        ack = parse_message(await pipe.recv())
        assert isinstance(ack, Ack)
        acks.append(ack.received)
    assert acks == sorted(acks)
    await peer.stop()


async def test_the_sender_of_a_long_frame_hears_how_far_it_is() -> None:
    peer = Peer()
    pipe = await peer.open()
    long = frame(0, b"x" * (3 * MESSAGE_NBYTES))
    parts = messages(0, long)
    await pipe.send(parts[0])
    assert parse_message(await pipe.recv()) == Ack(0, 0, len(parse_message(parts[0]).chunk))  # type: ignore[union-attr]
    for part in parts[1:]:
        await pipe.send(part)
    while (ack := parse_message(await pipe.recv())) != Ack(1, 0):
        assert isinstance(ack, Ack) and ack.received == 0 < ack.partial < len(long.payload)
    await peer.stop()


async def test_what_is_in_flight_is_what_the_peer_has_not_told_of() -> None:
    peer = Peer()
    pipe = await peer.open()
    payload = b"x" * (3 * MESSAGE_NBYTES)
    await peer.channel.send(frame(0, payload))
    while peer.channel.in_flight_nbytes < len(payload):
        await pipe.recv()
    await pipe.send(encode_message(Ack(0, 0, MESSAGE_NBYTES)))
    await peer.channel.progress()
    assert peer.channel.in_flight_nbytes == 2 * MESSAGE_NBYTES
    await pipe.send(encode_message(Ack(1, 0)))
    await peer.channel.progress()
    assert peer.channel.in_flight_nbytes == 0
    await peer.stop()


async def test_a_damaged_frame_is_not_delivered_and_the_channel_recovers() -> None:
    peer = Peer()
    pipe = await peer.open()
    good = frame(0)
    await pipe.send(messages(0, Frame(good.header, b"soap"))[0])
    trouble = parse_message(await pipe.recv())
    assert isinstance(trouble, Trouble)
    assert trouble.reason is Reason.REFUSED
    pipe = await peer.greet()
    assert isinstance(peer.hello, Hello)
    assert (peer.hello.resume, peer.hello.received) == (True, 0)
    await pipe.send(messages(0, good)[0])
    assert await peer.channel.recv() == good
    assert [str(error) for error in peer.errors] == ["a frame arrived damaged: its checksum is wrong"]
    await peer.stop()


async def test_the_third_refused_message_ends_the_channel() -> None:
    peer = Peer()
    pipe = await peer.open()
    for last in (False, False, True):
        await pipe.send(b"\xffgarbage")
        trouble = parse_message(await pipe.recv())
        assert isinstance(trouble, Trouble)
        assert trouble.reason is (Reason.FAILED if last else Reason.REFUSED)
        if not last:
            pipe = await peer.greet()
    with pytest.raises(WireError):
        await peer.channel.recv()
    assert len(peer.errors) == 3
    await peer.stop()


@pytest.mark.parametrize(
    "message",
    [
        *(messages(1, frame(1))[:1]),  # a gap
        encode_message(Ack(1, 0)),  # for what was never sent
        encode_message(Ack(0, 0, 1)),
        encode_message(Hello(b"c" * 16, False, 0, 0, 0, 1)),  # twice
    ],
)
async def test_what_makes_no_sense_is_refused(message: bytes) -> None:
    peer = Peer()
    pipe = await peer.open()
    await pipe.send(message)
    assert isinstance(parse_message(await pipe.recv()), Trouble)
    assert len(peer.errors) == 1
    await peer.stop()


async def test_a_new_pipe_goes_on_after_the_last_acknowledged_frame() -> None:
    peer = Peer()
    pipe = await peer.open()
    for index in range(3):
        await peer.channel.send(frame(index))
    for index in range(3):
        start = parse_message(await pipe.recv())
        assert isinstance(start, Start)
        assert start.sequence == index
    pipe.cut()
    pipe = await peer.greet(received=2)
    start = parse_message(await pipe.recv())
    assert isinstance(start, Start)
    assert start.sequence == 2
    await pipe.send(encode_message(Ack(3, 3)))
    await peer.channel.drain()
    await peer.stop()


def inbox(check: Check = lambda header: None) -> Inbox:
    return Inbox(1000, 10_000, check)


def test_a_frame_larger_than_its_header_is_refused() -> None:
    box, big = inbox(), frame(0, bytes(300_000))
    small = Header(
        **{name: getattr(big.header, name) for name in Header.__struct_fields__ if name != "tensors"},
        tensors=(TensorSpec(codec="x", shape=(9,), nbytes=9),),
    )
    with pytest.raises(WireError, match="more bytes"):
        parse_message(messages(0, big, small)[0])
    assert not box.add(Start(0, small, memoryview(b"12345678")))
    with pytest.raises(WireError, match="more bytes"):
        box.add(More(0, 8, memoryview(b"12")))


def test_a_sender_that_ignores_the_window_is_refused() -> None:
    box = inbox()
    for index in range(3):  # 452 bytes each, of 1000 that may be exceeded once
        box.add(Start(index, frame(0).header, memoryview(b"soup")))
    with pytest.raises(WireError, match="window"):
        box.add(Start(3, frame(0).header, memoryview(b"soup")))


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 1000, 600_000]), min_size=1, max_size=6),
    cuts=st.sets(st.integers(0, 25), max_size=8),
    lost=st.sets(st.integers(0, 25), max_size=8),
    idle=st.sets(st.integers(0, 25), max_size=8),
)
def test_any_pattern_of_cuts_delivers_each_frame_once(
    sizes: list[int], cuts: set[int], lost: set[int], idle: set[int]
) -> None:
    """Messages are counted: some are lost with their pipe, some not acknowledged, some frames taken late."""
    frames = [frame(i, bytes([i]) * size) for i, size in enumerate(sizes)]
    out, box = Outbox(1 << 30), Inbox(1 << 20, 1 << 30, lambda header: None)
    for each in frames:
        out.admit(each, encode_header(each.header))
    got: list[Frame] = []
    count = 0
    while len(got) < len(frames):
        ack = box.ack()
        out.resume(Hello(b"c" * 16, True, ack.received, box.partial_nbytes, ack.consumed, 1 << 20), 0.0)
        cut = False
        while out.ready() and not cut:
            for message, *_ in out.messages(0.0):
                count += 1
                cut = count in cuts
                if cut:
                    break
                parsed = parse_message(message)
                assert isinstance(parsed, Start | More)
                box.add(parsed)
            while box and count not in idle:
                got.append(box.take())
            if count not in lost and not cut:
                out.acknowledge(box.ack(), 1.0)
        while box:
            got.append(box.take())
    assert got == frames
    out.acknowledge(box.ack(), 2.0)
    assert len(out) == 0
    assert out.unacked_nbytes == 0


def test_the_checksum_is_that_of_the_payload() -> None:
    assert frame(0, b"abc").header.checksum == zlib.crc32(b"abc")
