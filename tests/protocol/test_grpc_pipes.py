"""A pipe over gRPC that is closed while somebody waits for its next message: the other side has heard all, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc

from potluck.protocol.grpc_pipes import DiallerPipe, ListenerPipe
from potluck.protocol.pipe import PipeClosed
from potluck.protocol.tls import Certificate, fetch_certificate, pinned_channel, start_server

COUNT, NBYTES = 40, 60_000


async def test_what_was_sent_before_the_close_arrives_and_then_its_end() -> None:
    """Cancelling gRPC's read cancels the call: what is under way is lost, and so is the end of the stream."""
    heard: list[int] = []
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
        pipe = ListenerPipe(context)
        try:
            while True:
                heard.append(len(await pipe.recv()))
                await asyncio.sleep(0.005)
        except PipeClosed as error:
            ended.set_result(str(error))
        finally:
            if not ended.done():
                ended.set_result("the handler was cancelled")

    handler = grpc.method_handlers_generic_handler("p", {"m": grpc.stream_stream_rpc_method_handler(serve)})
    server, port = await start_server("127.0.0.1", 0, [handler], Certificate.generate())
    der = await fetch_certificate("127.0.0.1", port, timedelta(seconds=5))
    pipe = DiallerPipe(pinned_channel(f"127.0.0.1:{port}", der), "/p/m")
    waiting = asyncio.ensure_future(pipe.recv())
    for _ in range(COUNT):
        await pipe.send(bytes(NBYTES))
    waiting.cancel()
    await asyncio.wait({waiting})
    await pipe.close()
    async with asyncio.timeout(10):
        assert await ended == "the dialler ended the stream"
    assert heard == [NBYTES] * COUNT
    await server.stop(None)
