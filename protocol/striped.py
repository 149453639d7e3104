"""One pipe made of several: on a line that loses packets, TCP gives each connection a small share of it.

Messages are numbered and go out on whichever connection can take one; the receiver puts them in order again. What is
ahead of its turn is held, so much and no more: then the connections that are ahead are not read. If one breaks, the
whole pipe breaks, and its channel goes on over the next one. ``close`` ends each connection with an empty message: a
connection that ends without is one that broke.

The dialler opens the connections one by one, each with its own proof, and says first on each which one of which pipe it
is (``Join``); the listener gathers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from .errors import PotluckError, WireError
from .grpc_pipes import CLOSE_SECONDS
from .pipe import PathKind, Pipe, PipeClosed
from .waiting import Waiting

MOST_CONNECTIONS = 16
MOST_AHEAD = 256  # messages that wait for an earlier one: 16 MiB
ID_NBYTES = 16

_JOIN = 7  # beside the kinds of messages of frames.py
_Join = struct.Struct("!B16sBB")
_Sequence = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Join:
    """First on a connection of a striped pipe: the pipe's id, which connection it is, and of how many."""

    pipe: bytes
    index: int
    count: int

    def encode(self) -> bytes:
        return _Join.pack(_JOIN, self.pipe, self.index, self.count)

    @classmethod
    def parse(cls, data: bytes) -> Join | None:
        """None if ``data`` is the first message of a pipe that is not striped; ``WireError`` if it makes no sense."""
        if data[:1] != bytes((_JOIN,)):
            return None
        if len(data) != _Join.size:
            raise WireError("a connection joins a pipe with a message of the wrong length")
        made = cls(*_Join.unpack(data)[1:])
        if not made.index < made.count <= MOST_CONNECTIONS:
            raise WireError(f"connection {made.index} of {made.count}")
        return made


class StripedPipe(Waiting):
    """A pipe over ``pipes``, which are the same on both sides and in use by nobody else."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        super().__init__()
        self.kind: PathKind = pipes[0].kind
        self.connections = len(pipes)
        self._pipes = tuple(pipes)
        self._outgoing: deque[bytes] = deque()  # one at most: that no connection has taken
        self._sending = 0  # connections that are taking one
        self._incoming: dict[int, bytes] = {}
        self._sent = self._taken = 0
        self._ends = 0  # connections on which the other side has said that nothing follows
        self._closing: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._run(job(p))) for p in pipes for job in (self._read, self._write)]

    @property
    def congestion(self) -> str:
        """Of all connections, told apart by ``+`` should they differ."""
        return "+".join(sorted({pipe.congestion for pipe in self._pipes} - {""}))

    @property
    def has_worked(self) -> bool:
        """Whether anything came from the other side."""
        return self._taken > 0

    async def send(self, message: bytes) -> None:
        """Returns once a connection may take it next; empty messages cannot be sent."""
        if not message:
            raise ValueError("an empty message is the end of a connection")
        self._raise()
        await self._until(lambda: not self._outgoing)
        self._outgoing.append(_Sequence.pack(self._sent) + message)
        self._sent += 1
        self._wake()

    async def recv(self) -> bytes:
        await self._until(lambda: self._taken in self._incoming)
        message = self._incoming.pop(self._taken)
        self._taken += 1
        self._wake()
        return message

    async def close(self) -> None:
        """Goes on to its end if who calls is cancelled."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        with contextlib.suppress(PotluckError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                self._raise()
                await self._until(lambda: not self._outgoing and not self._sending)
                await asyncio.gather(*(pipe.send(_Sequence.pack(self._sent)) for pipe in self._pipes))
        self.fail(PipeClosed("this side has closed it"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(pipe.close() for pipe in self._pipes), return_exceptions=True)

    def fail(self, error: PotluckError) -> None:
        """It is broken; what has come in order can still be read."""
        if self._ended is None:
            self._ended = error
            self._wake()

    def _raise(self) -> None:
        if self._ended is not None:
            raise PipeClosed(str(self._ended))

    async def _run(self, job: Awaitable[None]) -> None:
        try:
            await job
        except PotluckError as error:
            self.fail(error)
        except Exception as error:
            self.fail(PipeClosed(f"a connection failed here: {error!r}"))
            raise

    async def _write(self, pipe: Pipe) -> None:
        while True:
            await self._until(lambda: bool(self._outgoing))
            message = self._outgoing.popleft()
            self._sending += 1
            self._wake()
            try:
                await pipe.send(message)
            finally:
                self._sending -= 1
                self._wake()

    async def _read(self, pipe: Pipe) -> None:
        last = -1
        while True:
            data = await pipe.recv()
            if len(data) < _Sequence.size:
                raise WireError("a message of a striped pipe is cut short")
            (sequence,) = _Sequence.unpack_from(data)
            if len(data) == _Sequence.size:
                break
            if sequence <= last:
                raise WireError("a connection of a striped pipe is out of order")
            last = sequence
            # The message that is waited for is on a connection that is read: there, nothing is before it.
            await self._until(lambda number=sequence: number < self._taken + MOST_AHEAD)  # type: ignore[misc]
            if sequence < self._taken or sequence in self._incoming:
                raise WireError("a message of a striped pipe came twice")
            self._incoming[sequence] = data[_Sequence.size :]
            self._wake()
        self._ends += 1
        if self._ends == len(self._pipes):
            raise PipeClosed("the other side ended it")


@dataclass(eq=False)
class _Group:
    """Connections of a pipe that is not whole yet, or (``pipe``) goes."""

    count: int
    pipes: dict[int, Pipe] = field(default_factory=dict)
    whole: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    pipe: StripedPipe | None = None


Serve = Callable[[Pipe, bytes | None], Awaitable[None]]  # a pipe, and the first message if it was read already


class Gathering:
    """The listener's side: connections that peers dialled, put together. ``patience`` is for all of a pipe to come."""

    def __init__(self, patience: timedelta, on_error: Callable[[str, WireError], None]) -> None:
        self._patience, self._on_error = patience.total_seconds(), on_error
        self._groups: dict[tuple[str, bytes], _Group] = {}

    async def serve(self, peer_id: str, pipe: Pipe, serve: Serve) -> None:
        """Runs until the pipe is over that ``pipe`` is, or is a part of. ``serve`` gets each once, and closes it."""
        try:
            async with asyncio.timeout(self._patience):
                first = await pipe.recv()
            join = Join.parse(first)
            if join is None:
                await serve(pipe, first)
                return
            await self._join(peer_id, join, pipe, serve)
        except WireError as error:
            self._on_error(peer_id, error)
            await pipe.close()
        except (PipeClosed, TimeoutError):
            await pipe.close()

    async def _join(self, peer_id: str, join: Join, pipe: Pipe, serve: Serve) -> None:
        key = peer_id, join.pipe
        group = self._groups.setdefault(key, _Group(join.count))
        if group.count != join.count or join.index in group.pipes:
            raise WireError("a connection joins a pipe in a place that is taken")
        group.pipes[join.index] = pipe
        if len(group.pipes) == group.count:
            del self._groups[key]
            group.pipe = StripedPipe([group.pipes[index] for index in range(group.count)])
            group.whole.set()
            try:
                await serve(group.pipe, None)
            finally:
                group.over.set()
            return
        try:
            async with asyncio.timeout(self._patience):
                await group.whole.wait()
            await group.over.wait()
        finally:
            if group.pipe is None:
                group.pipes.pop(join.index, None)
                if not group.pipes:
                    self._groups.pop(key, None)
            elif not group.over.is_set():  # this connection's call has ended
                group.pipe.fail(PipeClosed("a connection broke"))
