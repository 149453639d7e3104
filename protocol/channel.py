"""Frames in order and exactly once over pipes that may break: the layer every transport shares.

A **pipe** carries messages until it breaks. A **channel** outlives its pipes: the side that dialled dials
again, both sides say how far they got (``Hello``), and sending goes on from there, in mid-frame if need be.

``send`` admits a frame while unacknowledged bytes fit the send window and keeps it until acknowledged; one
writer per pipe puts messages on it. The receiver acknowledges a frame once it is complete and its checksum
is right (``received``), and says how many the program has taken (``consumed``). A frame is started only
while what is not yet consumed fits the receive window the other side announced, so the reader never has to
stop reading: a slow program holds back the frames towards it, never the acknowledgements for its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

from .errors import PotluckError, UnreachableError, WireError
from .flow import Carried, Inbox, Outbox
from .frames import (
    Ack,
    Bye,
    Frame,
    Hello,
    Message,
    More,
    Purpose,
    Reason,
    Start,
    Trouble,
    encode_header,
    encode_message,
    parse_message,
)
from .pipe import FINAL_CODES, ChannelConfig, PathInfo, Pipe, PipeClosed, lost, told
from .waiting import Waiting

_log = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
_FAREWELL_SECONDS = 1.0


class Channel(Waiting):
    """One ordered, reliable stream of frames each way with one peer. Made by transports."""

    def __init__(
        self,
        peer_id: str,
        config: ChannelConfig,
        channel_id: bytes | None = None,
        on_end: Callable[[Channel], None] | None = None,
    ) -> None:
        super().__init__()
        self.peer_id = peer_id
        self.channel_id = channel_id or secrets.token_bytes(16)
        self.gate: Callable[[], Awaitable[None]] | None = None  # waited for before each message of what we send
        self._config = config
        self._on_end = on_end
        self._session: asyncio.Task[None] | None = None
        self._redial: asyncio.Task[None] | None = None
        self._pipe: Pipe | None = None  # the newest
        self._farewell: Bye | Trouble | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._attached = self._ack_due = False
        self._wire_errors, self._progress_at = 0, _now()
        self._outbox = Outbox(config.send_window_nbytes)
        self._inbox = Inbox(config.receive_window_nbytes, config.max_frame_nbytes, config.check)

    # What programs call.

    async def send(self, frame: Frame) -> None:
        """Queue a frame, once the send window has room. ``UnreachableError`` when the channel is over."""
        header = encode_header(frame.header)
        if len(frame.payload) > self._config.max_frame_nbytes:
            raise WireError(f"a frame of {len(frame.payload)} bytes is over the limit", hint="send it in parts")
        await self._until(lambda: self._ended is None and self._outbox.fits(frame))
        self._outbox.admit(frame, header)
        self._wake()

    async def recv(self) -> Frame:
        """The next frame. What arrived is delivered before the end of the channel is raised."""
        if not self._inbox:
            await self._until(lambda: len(self._inbox) > 0)
        frame = self._inbox.take()
        if self._inbox.credit_due:
            self._ack_due = True
            self._wake()
        return frame

    async def drain(self) -> None:
        """Wait until the peer has acknowledged everything sent."""
        await self._until(lambda: not self._outbox)

    async def close(self) -> None:
        """End the channel once everything is acknowledged; ``UnreachableError`` if that takes too long."""
        unacked = 0
        if self._ended is None:
            try:
                async with asyncio.timeout(self._config.close_timeout.total_seconds()):
                    await self.drain()
            except (TimeoutError, PotluckError):
                unacked = len(self._outbox)
            # A goodbye counts once answered: else the peer may not know what arrived, so let it come back.
            with contextlib.suppress(TimeoutError, PotluckError):
                async with asyncio.timeout(min(LINGER_SECONDS, self._config.close_timeout.total_seconds())):
                    await self._say_goodbye()
        self.abort(UnreachableError("this side has closed the channel", code="closed"))
        await self.join()
        if unacked:
            raise UnreachableError(
                f"{unacked} frames to {self.peer_id} were not acknowledged",
                hint="send them to another replica",
                code="unacknowledged",
            )

    async def hang_up(self) -> None:
        """End the channel, whatever is not acknowledged; a peer that can be told right now is told."""
        if self._ended is None and self._session is not None and not self._session.done():
            self._part(Bye())
            await asyncio.wait({self._session}, timeout=LINGER_SECONDS)
        self.abort(UnreachableError("this side has closed the channel", code="closed"))

    async def _say_goodbye(self) -> None:
        while True:
            await self._until(lambda: self._session is not None and not self._session.done())
            assert self._session is not None
            self._part(Bye())
            await asyncio.wait({self._session})

    def tell(self, on_whole: Callable[[Frame], None]) -> None:
        """Has ``on_whole`` called with each frame from now on, when the peer has acknowledged it."""
        self._outbox.on_whole = on_whole

    @property
    def in_flight_nbytes(self) -> int:
        """Payload bytes that were sent and have not arrived, as far as we have heard."""
        return self._outbox.in_flight_nbytes

    async def progress(self) -> None:
        """Wait until some of what is in flight has arrived."""
        before = self._outbox.in_flight_nbytes
        await self._until(lambda: self._outbox.in_flight_nbytes < before or not before)

    def path(self) -> PathInfo:
        rate, pipe = self._outbox.rate, self._pipe
        if pipe is None:
            return PathInfo("direct", rate.rtt_seconds, rate.bytes_per_second)
        return PathInfo(pipe.kind, rate.rtt_seconds, rate.bytes_per_second, pipe.connections, pipe.congestion)

    @property
    def carried(self) -> Carried:
        """What this side's sending came to since the channel was made."""
        return self._outbox.rate.carried

    @property
    def closed(self) -> bool:
        return self._ended is not None

    # What transports call.

    async def join(self) -> None:
        """Wait until nothing of an ended channel runs any more."""
        current = asyncio.current_task()
        tasks = [task for task in (self._session, self._redial) if task is not None and task is not current]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def open(self, connect: Callable[[], Awaitable[Pipe]]) -> None:
        """Start on a pipe from ``connect``, which is called again whenever the pipe breaks."""
        await self._open(connect, self._config.dial_timeout)
        self._redial = asyncio.create_task(self._keep_open(connect))

    def redial(self) -> None:
        """Drop the pipe of a channel that dials, and go on with what it now gets: a better path is known."""
        if self._redial is not None and self._session is not None:
            self._session.cancel()

    async def accept(self, pipe: Pipe, hello: Hello) -> asyncio.Task[None]:
        """Go on with a pipe the peer dialled; an older one is dropped first. The task ends with the pipe."""
        if self._session is not None:
            self._session.cancel()
            await asyncio.wait({self._session})
        if self._ended is not None:
            raise PipeClosed("the channel has ended")
        await self._put(pipe, self._hello())
        return self._attach(pipe, hello)

    def abort(self, error: PotluckError) -> None:
        """End the channel at once; ``error`` is what both ``send`` and ``recv`` raise from then on."""
        if self._ended is not None:
            return
        self._ended = error
        if self._expiry is not None:
            self._expiry.cancel()
        current = asyncio.current_task()
        for task in (self._session, self._redial):
            if task is not None and task is not current:
                task.cancel()
        self._wake()
        if self._on_end is not None:
            self._on_end(self)

    # One pipe after the other.

    async def _open(self, connect: Callable[[], Awaitable[Pipe]], timeout: timedelta) -> None:
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                pipe = await connect()
                try:
                    await self._greet(pipe)
                except BaseException:
                    await pipe.close()
                    raise
        except TimeoutError:
            raise UnreachableError(
                f"{self.peer_id} did not answer within {timeout.total_seconds():g} s",
                hint="check that it is running",
                code="silent",
            ) from None

    async def _greet(self, pipe: Pipe) -> None:
        asked_at = _now()
        await self._put(pipe, self._hello())
        match await self._get(pipe):
            case Hello() as hello if hello.channel == self.channel_id:
                self._outbox.rate.round_trip(_now() - asked_at)
                self._attach(pipe, hello)
                await asyncio.sleep(0)  # the session runs from here on, so that it closes the pipe
            case Trouble(reason, text):
                raise told(self.peer_id, reason, text)
            case _:
                raise WireError("the peer did not greet")

    async def _keep_open(self, connect: Callable[[], Awaitable[Pipe]]) -> None:
        """Watch the pipe; when it breaks, dial again until nothing has moved for ``give_up``."""
        config = self._config
        attempt, down_at = 0, _now()
        while self._session is not None:
            opened_at = _now()
            await asyncio.wait({self._session})
            lasted = self._progress_at >= opened_at or _now() - opened_at > config.last_backoff.total_seconds()
            attempt = 0 if lasted else attempt
            if lasted or not self._outbox:
                down_at = _now()
            while self._ended is None and self._session.done():
                backoff = min(config.first_backoff * 2**attempt, config.last_backoff).total_seconds()
                attempt = min(attempt + 1, 16)
                left = down_at + config.give_up.total_seconds() - _now()
                if left <= 0:
                    self.abort(lost(self.peer_id, self._config.give_up))
                    return
                await asyncio.sleep(min(backoff * random.uniform(0.5, 1.0), left))
                try:
                    await self._open(connect, min(config.dial_timeout, timedelta(seconds=max(left, 0.05))))
                except PotluckError as error:
                    if error.code in FINAL_CODES:
                        self.abort(error)
            if self._ended is not None:
                return

    def _hello(self) -> Hello:
        inbox = self._inbox
        window, ack = self._config.receive_window_nbytes, inbox.ack()
        return Hello(self.channel_id, self._attached, ack.received, inbox.partial_nbytes, ack.consumed, window)

    def _attach(self, pipe: Pipe, hello: Hello) -> asyncio.Task[None]:
        self._outbox.resume(hello, _now())
        self._farewell = None
        self._ack_due = False
        self._pipe = pipe
        self._attached = True
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._session = asyncio.create_task(self._serve(pipe))
        self._wake()
        return self._session

    async def _serve(self, pipe: Pipe) -> None:
        """Read and write one pipe until it breaks or one side says goodbye."""
        reader, writer = asyncio.create_task(self._read(pipe)), asyncio.create_task(self._write(pipe))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if self._farewell is not None:
                await asyncio.wait({reader, writer}, timeout=_FAREWELL_SECONDS)
        finally:
            reader.cancel()
            writer.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
            try:
                await pipe.close()
            finally:  # also if this is cancelled meanwhile
                self._finish_session(results)

    def _finish_session(self, results: Sequence[object]) -> None:
        for result in results:
            if isinstance(result, PotluckError) and not isinstance(result, PipeClosed):
                self.abort(result)
            elif isinstance(result, Exception) and not isinstance(result, PipeClosed):
                _log.error("channel with %s failed", self.peer_id, exc_info=result)
                self.abort(UnreachableError(f"the channel with {self.peer_id} failed here", hint="see the log"))
        if self._ended is None and self._redial is None:
            self._expiry = asyncio.get_running_loop().call_later(
                self._config.give_up.total_seconds(),
                lambda: self.abort(lost(self.peer_id, self._config.give_up)),
            )

    # Messages.

    async def _read(self, pipe: Pipe) -> None:
        try:
            while True:
                self._handle(await self._get(pipe))
        except WireError as error:
            self._wire_errors += 1
            self._config.on_error(self.peer_id, error)
            last = self._wire_errors >= self._config.max_wire_errors
            self._part(Trouble(Reason.FAILED if last else Reason.REFUSED, str(error)))
            if last:
                raise
            raise PipeClosed(str(error)) from None

    def _handle(self, message: Message) -> None:
        match message:
            case Start() | More():
                self._ack_due |= self._inbox.add(message)
            case Ack():
                if not self._outbox.acknowledge(message, _now()):
                    self._wake()
                    return
            case Bye():
                self._part(Bye())
                raise UnreachableError(f"{self.peer_id} has closed the channel", code="closed")
            case Trouble(reason, text):
                raise told(self.peer_id, reason, text)
            case Hello():
                raise WireError("the peer greets twice")
        self._progress_at = _now()
        self._wake()

    def _part(self, farewell: Bye | Trouble) -> None:
        if self._farewell is None:
            self._farewell = farewell
            self._wake()

    async def _write(self, pipe: Pipe) -> None:
        while True:
            await self._until(lambda: self._farewell is not None or self._ack_due or self._outbox.ready())
            if self._farewell is not None:
                await self._put(pipe, self._farewell)
                return
            if self._ack_due:
                await self._put_ack(pipe)
            elif self._outbox.ready():
                await self._put_frame(pipe)

    async def _put_frame(self, pipe: Pipe) -> None:
        for message, spent_on, dense, nbytes in self._outbox.messages(_now()):
            if self.gate is not None:
                await self.gate()
            if self._config.pace is not None:
                await self._config.pace.wait_for(len(message))
            if self._farewell is not None:
                return
            if self._ack_due:
                await self._put_ack(pipe)
            self._config.meter.record(self.peer_id, "out", spent_on, len(message), dense)
            self._outbox.sent(nbytes)
            await pipe.send(message)

    async def _put_ack(self, pipe: Pipe) -> None:
        self._ack_due = False
        await self._put(pipe, self._inbox.ack())

    async def _put(self, pipe: Pipe, message: Hello | Ack | Bye | Trouble) -> None:
        data = encode_message(message)
        if self._config.pace is not None:
            self._config.pace.charge(len(data))
        self._config.meter.record(self.peer_id, "out", Purpose.CONTROL, len(data))
        await pipe.send(data)

    async def _get(self, pipe: Pipe) -> Message:
        data = await pipe.recv()
        try:
            message = parse_message(data)
        except WireError:
            self._config.meter.record(self.peer_id, "in", Purpose.CONTROL, len(data))
            raise
        spent_on, dense = self._inbox.worth(message)
        self._config.meter.record(self.peer_id, "in", spent_on, len(data), dense)
        return message


def _now() -> float:
    return asyncio.get_running_loop().time()
