"""Messages on a raw stream: lengths that are checked, reads that are cancelled, a close that the reader does first."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from potluck.protocol.frames import MESSAGE_NBYTES
from potluck.protocol.p2p import StreamPipe
from potluck.protocol.pipe import PipeClosed

pytestmark = pytest.mark.timeout(30)


async def joined() -> tuple[StreamPipe, asyncio.StreamReader, asyncio.StreamWriter]:
    """A pipe, and what is at its other end."""
    taken: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *ends: taken.set_result(ends), "127.0.0.1", 0)
    ends = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    server.close()
    return StreamPipe(*ends, "punched"), *await taken


async def test_a_message_cut_off_in_the_middle_goes_on_after_a_cancelled_read() -> None:
    pipe, _, writer = await joined()
    writer.write((5).to_bytes(4, "big") + b"pl")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await pipe.recv()
    writer.write(b"ums" + (0).to_bytes(4, "big"))
    assert [await pipe.recv(), await pipe.recv()] == [b"plums", b""]
    writer.close()
    with pytest.raises(PipeClosed, match="broke"):
        await pipe.recv()
    await pipe.close()


async def test_a_message_that_is_too_long_is_not_read() -> None:
    pipe, reader, writer = await joined()
    writer.write((MESSAGE_NBYTES + 1).to_bytes(4, "big"))
    with pytest.raises(PipeClosed, match="too long"):
        async with asyncio.timeout(5):
            await pipe.recv()
    with pytest.raises(ValueError, match="65537 bytes"):
        await pipe.send(bytes(MESSAGE_NBYTES + 1))
    await pipe.close()
    assert await reader.read() == b""


async def test_closing_waits_for_the_reader_but_not_for_ever() -> None:
    pipe, reader, writer = await joined()
    await pipe.send(b"last")
    closing = asyncio.create_task(pipe.close())
    await asyncio.sleep(0.1)
    assert not closing.done()
    assert await reader.readexactly(12) == b"\0\0\0\4last\xff\xff\xff\xff"
    writer.close()
    await closing
    pipe, _, writer = await joined()
    began = time.monotonic()
    await pipe.close()
    assert 0.5 < time.monotonic() - began < 3
    writer.close()
