"""What the benchmark of lossy lines makes of what it saw."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.lossy import MODES, Mode, send, share
from potluck.protocol.channel import Channel
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.tls import Certificate
from potluck.protocol.transport import TransportConfig


def test_a_share_is_of_the_lines_rate_between_two_moments() -> None:
    marks = [[float(t), 12.5e6 * max(0, t - 2)] for t in range(10)]  # a full line from the third second on
    assert share(marks, 2, 9) == 1.0
    assert share(marks, 0, 4) == 0.5
    assert share(marks, 0, 2) == 0.0


def test_modes_are_what_they_are_called() -> None:
    assert MODES["one"].connections == MODES["bbr"].connections == (1, 1)
    assert [name for name, mode in MODES.items() if mode.bbr] == ["bbr", "default"]
    assert all(MODES[f"fixed-{k}"].connections == (k, k) for k in (2, 4, 8, 16))


async def test_the_sender_sends_and_tells_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    got: asyncio.Queue[Channel] = asyncio.Queue()
    far = GrpcTransport(Identity.generate(), Certificate.generate(), TransportConfig(run="lossy"))
    (address,) = await far.listen(got.put_nowait)
    sending = asyncio.create_task(send(far.peer_id, address, Mode((2, 2), False, 0.2)))
    try:
        channel = await got.get()
        first = await channel.recv()
        assert len(first.payload) == first.header.nbytes == 1 << 20
        reading = asyncio.create_task(drain(channel))
        await sending
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    finally:
        await far.close()
    assert '"connections": 2' in capsys.readouterr().out


async def drain(channel: Channel) -> None:
    while True:
        await channel.recv()
