"""TLS inside the messages of a pipe: what goes together, what ends it."""

from __future__ import annotations

import asyncio

import pytest

from potluck.protocol.frames import MESSAGE_NBYTES
from potluck.protocol.pipe import PathKind, PipeClosed
from potluck.protocol.tls import Certificate
from potluck.protocol.tunnel import MOST_NBYTES, TOGETHER_NBYTES, Tunnel

pytestmark = pytest.mark.timeout(30)


class Wire:
    """One end of a line in memory; it sends only while ``open`` is set, and breaks once ``broken`` is."""

    kind: PathKind = "memory"

    def __init__(self) -> None:
        self.far: asyncio.Queue[bytes] = asyncio.Queue()
        self.near: asyncio.Queue[bytes] = asyncio.Queue()
        self.open = asyncio.Event()
        self.open.set()
        self.broken = self.closed = False
        self.seconds = 0.0  # that 64 KiB take
        self.sizes: list[int] = []

    async def send(self, message: bytes) -> None:
        await self.open.wait()
        await asyncio.sleep(self.seconds * len(message) / MESSAGE_NBYTES)
        if self.broken:
            raise PipeClosed("cut")
        self.sizes.append(len(message))
        self.far.put_nowait(message)

    async def recv(self) -> bytes:
        return await self.near.get()

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
async def ends() -> tuple[Wire, Tunnel, Tunnel]:
    a, b = Wire(), Wire()
    a.far, b.far = b.near, a.near
    near, far = await asyncio.gather(Tunnel.dial(a), Tunnel.listen(b, Certificate.generate()))
    return a, near, far


async def test_small_messages_that_wait_for_another_go_as_one(ends: tuple[Wire, Tunnel, Tunnel]) -> None:
    wire, near, far = ends
    messages = [bytes([i]) * n for i, n in enumerate([10, 0, 3000, 20_000, 7])]
    before = len(wire.sizes)
    wire.open.clear()
    for message in messages:
        await near.send(message)
    wire.open.set()
    assert [await far.recv() for _ in messages] == messages
    assert len(wire.sizes) - before <= 2


@pytest.mark.parametrize(("seconds", "together"), [(0.0, True), (0.01, False)])
async def test_large_ones_go_together_only_where_the_line_is_fast(
    ends: tuple[Wire, Tunnel, Tunnel], seconds: float, together: bool
) -> None:
    wire, near, far = ends
    wire.seconds = seconds
    messages = [bytes([i]) * MESSAGE_NBYTES for i in range(100)]

    async def pour() -> None:
        for message in messages:
            await near.send(message)

    pouring = asyncio.create_task(pour())
    assert [await far.recv() for _ in messages] == messages
    await pouring
    assert (max(wire.sizes) > 2 * MESSAGE_NBYTES) is together
    assert max(wire.sizes) <= (MOST_NBYTES if together else 2 * MESSAGE_NBYTES)


async def test_as_much_waits_as_is_on_its_way_and_no_more_than_a_relay_takes(ends: tuple[Wire, Tunnel, Tunnel]) -> None:
    wire, near, far = ends
    wire.open.clear()
    accepted = 0

    async def pour() -> None:
        nonlocal accepted
        for i in range(40):
            await near.send(bytes([i]) * MESSAGE_NBYTES)
            accepted += 1

    pouring = asyncio.create_task(pour())
    for _ in range(1000):
        await asyncio.sleep(0)
    assert accepted <= 1 + 2 * TOGETHER_NBYTES // MESSAGE_NBYTES, "a slow line holds its sender back"
    wire.open.set()
    assert [await far.recv() for _ in range(40)] == [bytes([i]) * MESSAGE_NBYTES for i in range(40)]
    await pouring
    assert max(wire.sizes) <= MOST_NBYTES


async def test_what_was_sent_before_close_arrives_and_nothing_after(ends: tuple[Wire, Tunnel, Tunnel]) -> None:
    wire, near, far = ends
    await near.send(b"last words")
    await near.close()
    assert wire.closed and await far.recv() == b"last words"
    with pytest.raises(PipeClosed):
        await near.send(b"more")


async def test_a_line_that_breaks_is_told_to_who_sends_and_who_waits(ends: tuple[Wire, Tunnel, Tunnel]) -> None:
    wire, near, _ = ends
    wire.open.clear()

    async def pour() -> None:
        while True:
            await near.send(bytes(MESSAGE_NBYTES))

    pouring = asyncio.create_task(pour())
    await asyncio.sleep(0.01)
    wire.broken = True
    wire.open.set()
    with pytest.raises(PipeClosed):
        await pouring
    with pytest.raises(PipeClosed):
        await near.send(b"more")
