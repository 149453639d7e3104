"""The seam of the data plane: something that listens, dials peers by name, and gives channels."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .channel import Channel
from .errors import PotluckError, UnreachableError, WireError
from .frames import Hello, Reason, Trouble, encode_message, parse_message
from .pipe import ChannelConfig, Pipe, PipeClosed

_log = logging.getLogger(__name__)

OnChannel = Callable[[Channel], None]
STRANGERS = "strangers"  # in the meter: dialled us and were turned away


def everyone(peer_id: str) -> bool:
    return True


def nowhere(peer_id: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """``admit`` says whether a peer that proved its name may open a channel (peers of the current plan), ``addresses``
    where such a peer is dialled that asks for it."""

    run: str
    admit: Callable[[str], bool] = everyone
    addresses: Callable[[str], Sequence[str]] = nowhere
    channel: ChannelConfig = field(default_factory=ChannelConfig)


class Transport(Protocol):
    """Every implementation passes the same contract tests."""

    async def listen(self, on_channel: OnChannel) -> list[str]:
        """Take channels from peers; the addresses they can dial."""
        ...

    async def dial(self, peer_id: str, addresses: Sequence[str]) -> Channel:
        """A new channel to that very peer, one try per address.

        ``UnreachableError`` with code ``identity`` if another peer answers, ``admission`` if it does not
        (yet) know us as part of its plan.
        """
        ...

    async def close(self) -> None:
        """Close every channel, each once its frames are acknowledged or patience is over; stop listening."""
        ...


class Channels:
    """The channels of one transport: those it dialled and those peers opened."""

    def __init__(self, config: TransportConfig) -> None:
        self._config = config
        self._channels: dict[tuple[str, bytes], Channel] = {}
        self._closed = False

    async def open(self, peer_id: str, connect: Callable[[], Awaitable[Pipe]]) -> Channel:
        """A channel that dials with ``connect``, now and whenever its pipe breaks."""
        channel = self._new(peer_id, None)
        try:
            await channel.open(connect)
        except BaseException as error:
            channel.abort(error if isinstance(error, PotluckError) else UnreachableError("not dialled"))
            await channel.join()
            raise
        return channel

    async def serve(self, peer_id: str, pipe: Pipe, on_channel: OnChannel, first: bytes | None = None) -> None:
        """Run a pipe that an authenticated peer dialled: a new channel, or a known one that goes on.

        ``first`` is its first message, if that was read already.
        """
        session: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._config.channel.dial_timeout.total_seconds()):
                hello = parse_message(await pipe.recv() if first is None else first)
                if not isinstance(hello, Hello):
                    raise WireError("the peer did not greet")
                session = await self._accept(peer_id, pipe, hello, on_channel)
            if session is not None:
                await asyncio.wait({session})
        except WireError as error:
            self._config.channel.on_error(peer_id, error)
        except (PipeClosed, TimeoutError):
            pass
        finally:
            if session is not None and not session.done():
                session.cancel()
                await asyncio.wait({session})
            await pipe.close()

    async def _accept(self, peer_id: str, pipe: Pipe, hello: Hello, on_channel: OnChannel) -> asyncio.Task[None] | None:
        channel = self._channels.get((peer_id, hello.channel))
        fresh = channel is None
        if channel is None:
            if hello.resume or self._closed:
                await pipe.send(encode_message(Trouble(Reason.RESET, "unknown channel")))
                return None
            channel = self._new(peer_id, hello.channel)
        try:
            session = await channel.accept(pipe, hello)
        except BaseException:
            if fresh:
                channel.abort(UnreachableError("the peer left before it had a channel"))
            raise
        if fresh:
            on_channel(channel)
        return session

    async def close(self) -> None:
        self._closed = True
        results = await asyncio.gather(
            *(channel.close() for channel in list(self._channels.values())), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                _log.warning("closing: %s", result)

    def _new(self, peer_id: str, channel_id: bytes | None) -> Channel:
        channel = Channel(peer_id, self._config.channel, channel_id, self._forget)
        self._channels[peer_id, channel.channel_id] = channel
        return channel

    def _forget(self, channel: Channel) -> None:
        self._channels.pop((channel.peer_id, channel.channel_id), None)
