"""Peers over libp2p: raw streams of hivemind's daemon (``p2pd.py``) as pipes, proven by our own keys.

libp2p encrypts from peer to peer, through relays too, and knows both daemons by their keys. So the proof of
``handshake.py`` is bound to both their ids, as each side's own daemon names them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

from .errors import PotluckError, UnreachableError
from .frames import MESSAGE_NBYTES
from .handshake import prove_to_dialler, prove_to_listener, proving
from .identity import Identity
from .multiaddr import Places
from .p2pd import Daemon, DaemonConfig, Stream
from .pipe import PathKind, Pipe, PipeClosed
from .transport import STRANGERS, TransportConfig

PROTOCOL = "/potluck/pipe/1"
CLOSE_SECONDS = 1.0
MOST_PROOFS = 256  # streams whose opener has not yet proven itself
_LENGTH_NBYTES = 4
_END = 0xFFFFFFFF  # in place of a length: nothing follows
_BREAKS = (OSError, EOFError, RuntimeError)

Serve = Callable[[str, Pipe], Awaitable[None]]


class StreamPipe:
    """Messages behind their lengths on a raw stream.

    Over QUIC the daemon drops what was written just before a stream is closed. So who closes says so last, and waits
    until the other side, which has read all of it by then, closes first.
    """

    connections = 1
    congestion = ""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: PathKind) -> None:
        self.kind = kind
        self._reader, self._writer = reader, writer
        self._due: int | None = None  # bytes of the message under way
        self._over = False  # the other side has said all, or nothing comes through any more

    async def send(self, message: bytes) -> None:
        if len(message) > MESSAGE_NBYTES:
            raise ValueError(f"a message of {len(message)} bytes")
        try:
            self._writer.write(len(message).to_bytes(_LENGTH_NBYTES, "big") + message)
            await self._writer.drain()
        except _BREAKS:
            raise self._broken("the stream broke") from None

    async def recv(self) -> bytes:
        try:
            if self._due is None:
                self._due = int.from_bytes(await self._reader.readexactly(_LENGTH_NBYTES), "big")
            if self._due > MESSAGE_NBYTES:
                raise self._broken("the peer ended it" if self._due == _END else "a message is too long")
            message = await self._reader.readexactly(self._due)
        except _BREAKS:
            raise self._broken("the stream broke") from None
        self._due = None
        return message

    async def close(self) -> None:
        try:
            if not self._over:
                with contextlib.suppress(PipeClosed, TimeoutError, *_BREAKS):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        self._writer.write(_END.to_bytes(_LENGTH_NBYTES, "big"))
                        await self._writer.drain()
                        while True:
                            await self.recv()
        finally:
            self._writer.transport.abort()

    def _broken(self, why: str) -> PipeClosed:
        self._over = True
        return PipeClosed(why)


class Libp2p:
    """``serve`` gets every peer that opens a stream and has proven who it is, with its pipe; it closes the pipe."""

    def __init__(self, identity: Identity, config: TransportConfig, serve: Serve, daemon: DaemonConfig) -> None:
        self._identity, self._config, self._serve = identity, config, serve
        self._answers: set[asyncio.Task[None]] = set()
        self._unproven = 0
        self.daemon = Daemon(identity, daemon, PROTOCOL, self._take)

    async def start(self) -> list[str]:
        """The multiaddrs to dial, with the daemon's id. ``DaemonError`` if there is none."""
        await self.daemon.start()
        return list(self.daemon.addresses)

    async def reach(self, peer_id: str, addresses: Sequence[str], timeout: timedelta, *, direct: bool = False) -> Pipe:
        """A pipe to that very peer, whose daemon is at these multiaddrs; ``direct``: not through a relay.

        ``UnreachableError`` as from every other way.
        """
        places = Places.of(addresses, self.daemon.config.relays)
        stream = await self.daemon.open(places, timeout)
        pipe = StreamPipe(stream.reader, stream.writer, kind_of(stream))
        async with proving(pipe, f"as {places.peer[-8:]} over libp2p", timeout):
            if direct and stream.relayed:
                raise UnreachableError(f"there is no direct path to {peer_id} yet")
            self._config.channel.meter.record_connection(peer_id, dialled=True, proof=True)
            bound = binding(self.daemon.peer, places.peer)
            await prove_to_listener(pipe, self._identity, peer_id, bound, self._config.run)
        return pipe

    async def close(self) -> None:
        for task in self._answers:
            task.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)
        await self.daemon.close()

    async def _take(self, stream: Stream) -> None:
        if self._unproven >= MOST_PROOFS:
            stream.writer.transport.abort()
            return
        task = asyncio.create_task(self._answer(stream))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, stream: Stream) -> None:
        pipe = StreamPipe(stream.reader, stream.writer, kind_of(stream))
        try:
            self._unproven += 1
            try:
                async with asyncio.timeout(self._config.channel.dial_timeout.total_seconds()):
                    bound = binding(stream.peer, self.daemon.peer)
                    peer_id = await prove_to_dialler(pipe, self._identity, bound, self._config)
            finally:
                self._unproven -= 1
            self._config.channel.meter.record_connection(peer_id or STRANGERS, dialled=False, proof=True)
            if peer_id is not None:
                await self._serve(peer_id, pipe)
        except (PotluckError, TimeoutError):
            pass
        finally:
            await pipe.close()


def binding(dialler: str, listener: str) -> str:
    """What stands for a certificate's fingerprint (64 hexadecimal digits) where there is none: both daemons."""
    return f"libp2p {dialler} {listener}"


def kind_of(stream: Stream) -> PathKind:
    return "relayed" if stream.relayed else "punched"
