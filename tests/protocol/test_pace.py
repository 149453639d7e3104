"""An owner's cap on what goes out, counted at the socket, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from potluck.protocol.meter import INTERNET, NO_OVERHEAD
from potluck.protocol.throttle import Bucket, Pace

from .conftest import Rig, frame_of

MBPS = 8.0
RATE = MBPS * 125_000
SOME = 40  # frames
NBYTES = 150_000


class Time:
    """Passes only while somebody sleeps in it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


async def test_messages_wait_until_what_went_before_is_paid_for() -> None:
    time = Time()
    pace = Pace(MBPS, NO_OVERHEAD, time, time.sleep)
    await pace.wait_for(int(RATE))  # one second's worth goes at once
    assert time.now == 0.0
    await pace.wait_for(1000)
    assert time.now == 0.0
    await pace.wait_for(0)
    assert time.now == pytest.approx(1000 / RATE)
    pace.charge(500_000)  # does not wait, the next one does
    await pace.wait_for(1)
    assert time.now == pytest.approx(501_000 / RATE)


async def test_many_at_once_keep_to_it_together() -> None:
    time = Time()
    pace = Pace(MBPS, INTERNET, time, time.sleep)

    async def send() -> None:
        for _ in range(20):
            await pace.wait_for(65_536)

    await asyncio.gather(*(send() for _ in range(5)))
    whole = 100 * (65_536 + INTERNET.of(65_536)[0])
    assert whole - 65_536 * 1.1 <= RATE * (time.now + 1.0) <= whole + RATE * 0.01


def test_no_limit() -> None:
    bucket = Bucket(0.0)
    assert bucket.take(10**12) == bucket.wait_seconds() == 0.0


@pytest.mark.parametrize("kind", ["grpc", "striped"])
async def test_bytes_at_the_socket_keep_to_the_cap(kind: str) -> None:
    """Over real connections: whatever gRPC and TLS add is within what is counted."""
    time, rig = Time(), Rig(kind)
    try:
        near, far = await rig.connect(a={"pace": Pace(MBPS, INTERNET, time, time.sleep)})
        assert rig.proxy is not None
        rig.proxy.budget = start = 10**9  # counts what the side that dialled says
        began = time.now
        for i in range(SOME):
            await near.send(frame_of(bytes(NBYTES), i))
        async with asyncio.timeout(60):
            for _ in range(SOME):
                await far.recv()
        sent, seconds = start - rig.proxy.budget, time.now - began
        segments = SOME * NBYTES / INTERNET.segment_payload * INTERNET.segment_header  # below the socket
        assert sent >= SOME * NBYTES
        assert sent + segments <= RATE * (seconds + 1.0) + 2 * 70_000  # one message is owed, another on its way
        assert seconds > (SOME * NBYTES / RATE - 1.0) * 0.95
    finally:
        await rig.close()
