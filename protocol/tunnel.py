"""TLS inside the messages of another pipe: what carries them can neither read nor forge them.

A pipe through a relay ends at the relay. So the two peers do TLS once more with each other, each with its own
self-signed certificate (``handshake.py`` then proves the keys, bound to that certificate), and the relay moves records.
What a relay has to do goes by the number of messages, so on a fast line what is sent while another message is on its
way goes as one. On a slow one that would cost time: a message is passed on when all of it has come.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from .frames import MESSAGE_NBYTES
from .pipe import PathKind, Pipe, PipeClosed
from .tls import SERVER_NAME, Certificate

_LENGTH_NBYTES = 4
TOGETHER_NBYTES = 448 * 1024  # that may wait for the message before them, and at most go as one
TOGETHER_SECONDS = 0.01  # of the line, that what goes together takes at most
SURE_NBYTES = 1 << 20  # sent without a pause, after which the line's rate is known: sockets take some at once
PAUSE_SECONDS = 0.005
MOST_NBYTES = TOGETHER_NBYTES + MESSAGE_NBYTES + 8192  # of a message, with what TLS adds
_READ_NBYTES = 64 * 1024
CLOSE_SECONDS = 1.0  # for what was sent before


class Tunnel:
    """A pipe inside ``pipe``; ``certificate`` (DER) is the listener's, as the dialler sees it."""

    kind: PathKind = "relayed"
    connections = 1
    congestion = ""

    def __init__(self, pipe: Pipe, context: ssl.SSLContext, *, listens: bool) -> None:
        self._pipe = pipe
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=listens, server_hostname=None if listens else SERVER_NAME
        )
        self._plain = bytearray()
        self._sending: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._pace = _Pace(asyncio.get_running_loop().time)
        self._broken: PipeClosed | None = None

    @classmethod
    async def listen(cls, pipe: Pipe, certificate: Certificate) -> Tunnel:
        """The side that shows its certificate."""
        return await cls(pipe, certificate.server_context(), listens=True)._open()

    @classmethod
    async def dial(cls, pipe: Pipe) -> Tunnel:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # known by its fingerprint, see handshake.py
        return await cls(pipe, context, listens=False)._open()

    @property
    def certificate(self) -> bytes:
        return self._tls.getpeercert(binary_form=True) or b""

    async def _open(self) -> Tunnel:
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._flush()
                    self._feed(await self._pipe.recv())
        except ssl.SSLError as error:
            raise PipeClosed(f"what comes through the relay is not TLS ({error.reason})") from None
        await self._flush()
        return self

    async def send(self, message: bytes) -> None:
        try:
            self._tls.write(len(message).to_bytes(_LENGTH_NBYTES, "big") + message)
        except ssl.SSLError as error:
            raise PipeClosed(f"the tunnel broke ({error.reason})") from None
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        while self._broken is None and self._outgoing.pending > TOGETHER_NBYTES:
            self._room.clear()
            await self._room.wait()
        if self._broken is not None:
            raise self._broken

    async def _send(self) -> None:
        """All there is, in as few messages as the line's rate allows."""
        try:
            while self._outgoing.pending:
                data = self._outgoing.read(self._pace.most_nbytes())
                self._room.set()
                await self._pipe.send(data)
                self._pace.sent(len(data))
        except PipeClosed as error:
            self._broken = error
        finally:
            self._room.set()

    async def recv(self) -> bytes:
        while (message := self._next()) is None:
            self._feed(await self._pipe.recv())
        return message

    async def close(self) -> None:
        try:
            if self._sending is not None and not self._sending.done():
                await asyncio.wait({self._sending}, timeout=CLOSE_SECONDS)
        finally:
            self._broken = self._broken or PipeClosed("the tunnel was closed here")
            if self._sending is not None:
                self._sending.cancel()
            await self._pipe.close()

    def _next(self) -> bytes | None:
        """The next whole message of what has been decrypted."""
        try:
            while True:
                if len(self._plain) >= _LENGTH_NBYTES:
                    end = _LENGTH_NBYTES + int.from_bytes(self._plain[:_LENGTH_NBYTES], "big")
                    if end > _LENGTH_NBYTES + MESSAGE_NBYTES:
                        raise PipeClosed("a message through the relay is too long")
                    if len(self._plain) >= end:
                        message = bytes(self._plain[_LENGTH_NBYTES:end])
                        del self._plain[:end]
                        return message
                if not (data := self._tls.read(_READ_NBYTES)):
                    raise PipeClosed("the other side ended the tunnel")
                self._plain += data
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            raise PipeClosed(f"what came through the relay was changed on its way ({error.reason})") from None

    def _feed(self, data: bytes) -> None:
        if len(data) > MOST_NBYTES:
            raise PipeClosed("a message through the relay is too long")
        self._incoming.write(data)

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._pipe.send(self._outgoing.read())


class _Pace:
    """How fast the line is while it is used, and so how much may go as one message."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._sent = 0.0

    def sent(self, nbytes: int) -> None:
        self._last = self._clock()
        self._sent += nbytes
        if self._sent > 4 * SURE_NBYTES:  # the newer half is what counts
            self._began, self._sent = (self._began + self._last) / 2, self._sent / 2

    def most_nbytes(self) -> int:
        """Of the next message."""
        now, alone = self._clock(), MESSAGE_NBYTES + 1024  # one message, in TLS
        if now - self._last > PAUSE_SECONDS:
            self._began, self._sent = now, 0.0
        if self._sent < SURE_NBYTES:
            return alone
        rate = self._sent / max(now - self._began, 1e-6)
        return max(alone, min(TOGETHER_NBYTES, round(rate * TOGETHER_SECONDS)))
