"""A gRPC byte stream as a pipe, from the side that dialled it and from the side that listens."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from .frames import one_line
from .pipe import PathKind, PipeClosed
from .tls import split_address

CLOSE_SECONDS = 1.0
_GRPC_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


class DiallerPipe:
    """A call of ``method`` (``/service/name``) on a connection of its own, which it closes.

    ``address`` and ``certificate`` (DER) are those of the other end, for who wants another connection there.
    """

    kind: PathKind = "direct"
    connections = 1

    def __init__(self, channel: grpc.aio.Channel, method: str, address: str = "", certificate: bytes = b"") -> None:
        self.address, self.certificate = address, certificate
        self.congestion = ""
        self._channel = channel
        self._call = channel.stream_stream(method, None, None)(None)
        self._broken = False
        self._reading: asyncio.Future[Any] | None = None  # of the next message: goes on if who waits for it does not

    @property
    def remote(self) -> tuple[str, int]:
        """Host and port of the other end."""
        return split_address(self.address)

    async def send(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except _GRPC_ERRORS as error:
            raise self._closed(error) from None

    async def recv(self) -> bytes:
        try:
            message = await self._read()
        except _GRPC_ERRORS as error:
            raise self._closed(error) from None
        if not isinstance(message, bytes):  # EOF
            raise self._closed(None)
        return message

    async def _read(self) -> Any:
        """Cancelling gRPC's own read would cancel the call, and what is under way with it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        message = await asyncio.shield(self._reading)
        self._reading = None
        return message

    async def close(self) -> None:
        """Orderly while the stream lives: what was written arrives, then the other side ends it."""
        try:
            if not self._broken and not self._call.done():
                with contextlib.suppress(*_GRPC_ERRORS, TimeoutError):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await self._call.done_writing()
                        while isinstance(await self._read(), bytes):
                            pass
        finally:
            self._call.cancel()
            if self._reading is not None:
                await asyncio.gather(self._reading, return_exceptions=True)
            await self._channel.close(None)

    def _closed(self, error: Exception | None) -> PipeClosed:
        self._broken = True
        detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else ""
        return PipeClosed(f"the connection broke: {one_line(detail or 'the stream ended')}")


class ListenerPipe:
    """A stream that somebody called here."""

    kind: PathKind = "direct"
    connections = 1
    congestion = ""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def send(self, message: bytes) -> None:
        try:
            await self._context.write(message)
        except _GRPC_ERRORS:
            raise PipeClosed("the connection broke") from None

    async def recv(self) -> bytes:
        try:
            message = await self._context.read()
        except _GRPC_ERRORS:
            raise PipeClosed("the connection broke") from None
        if not isinstance(message, bytes):  # EOF
            raise PipeClosed("the dialler ended the stream")
        return message

    async def close(self) -> None:
        """The stream ends when its handler returns."""


class ReturnedPipe(ListenerPipe):
    """A stream that somebody called here because we asked for it; its handler waits until ``over``."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.over = asyncio.Event()

    async def close(self) -> None:
        self.over.set()
