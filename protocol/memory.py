"""The transport's in-memory twin: the same channels, on pipes inside one process that break on command."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from .channel import Channel
from .errors import UnreachableError
from .pipe import PathKind, Pipe, PipeClosed
from .transport import Channels, OnChannel, TransportConfig

_PIPE_MESSAGES = 8
_SCHEME = "memory:"


class MemoryPipe:
    """One end of a pipe; ``pair`` makes both."""

    kind: PathKind = "memory"
    connections = 1
    congestion = ""

    def __init__(self, passes: Callable[[int], bool]) -> None:
        self._passes = passes
        self._inbox: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._broken = False
        self._other = self

    @classmethod
    def pair(
        cls, forth: Callable[[int], bool] = lambda _: True, back: Callable[[int], bool] = lambda _: True
    ) -> tuple[MemoryPipe, MemoryPipe]:
        """Both ends; ``forth`` and ``back`` see each message's size and cut the pipe by returning False."""
        near, far = cls(forth), cls(back)
        near._other, far._other = far, near
        return near, far

    async def send(self, message: bytes) -> None:
        other = self._other
        while len(other._inbox) >= _PIPE_MESSAGES and not self._broken:
            other._changed.clear()
            await other._changed.wait()
        if not self._broken and not self._passes(len(message)):
            self.cut()
        if self._broken:
            raise PipeClosed("the pipe is cut")
        other._inbox.append(message)
        other._changed.set()

    async def recv(self) -> bytes:
        while not self._inbox:
            if self._broken:
                raise PipeClosed("the pipe is cut")
            self._changed.clear()
            await self._changed.wait()
        self._changed.set()
        return self._inbox.popleft()

    async def close(self) -> None:
        for end in (self, self._other):
            end._broken = True
            end._changed.set()

    def cut(self) -> None:
        """Break it and lose what is under way."""
        for end in (self, self._other):
            end._inbox.clear()
            end._broken = True
            end._changed.set()


class MemoryNetwork:
    """Joins transports by peer id; faults are named by the pair of peers they hit."""

    def __init__(self) -> None:
        self._transports: dict[str, MemoryTransport] = {}
        self._pipes: dict[frozenset[str], list[MemoryPipe]] = {}
        self._refused: set[frozenset[str]] = set()
        self._budget: dict[tuple[str, str], int] = {}

    def join(self, peer_id: str, config: TransportConfig) -> MemoryTransport:
        transport = MemoryTransport(self, peer_id, config)
        self._transports[peer_id] = transport
        return transport

    def cut(self, a: str, b: str) -> None:
        """Break every pipe between two peers; they may dial again."""
        for pipe in self._pipes.pop(frozenset((a, b)), []):
            pipe.cut()

    def cut_after(self, sender: str, receiver: str, nbytes: int) -> None:
        """Break the pipe, once, with the message that takes the bytes sent over ``nbytes``."""
        self._budget[sender, receiver] = nbytes

    def refuse(self, a: str, b: str) -> None:
        """Cut, and let neither dial the other until ``allow``."""
        self._refused.add(frozenset((a, b)))
        self.cut(a, b)

    def allow(self, a: str, b: str) -> None:
        self._refused.discard(frozenset((a, b)))

    def _connect(self, dialler: str, listener: MemoryTransport) -> MemoryPipe:
        pair = frozenset((dialler, listener.peer_id))
        if pair in self._refused:
            raise UnreachableError(f"nobody listens at {_SCHEME}{listener.peer_id}")
        near, far = MemoryPipe.pair(
            lambda nbytes: self._spend(dialler, listener.peer_id, nbytes),
            lambda nbytes: self._spend(listener.peer_id, dialler, nbytes),
        )
        self._pipes[pair] = [pipe for pipe in self._pipes.get(pair, []) if not pipe._broken] + [near]
        listener._take(dialler, far)
        return near

    def _spend(self, sender: str, receiver: str, nbytes: int) -> bool:
        left = self._budget.get((sender, receiver))
        if left is None:
            return True
        if nbytes > left:
            del self._budget[sender, receiver]
            return False
        self._budget[sender, receiver] = left - nbytes
        return True


class MemoryTransport:
    """A ``Transport`` in a ``MemoryNetwork``. Names are taken on trust."""

    def __init__(self, network: MemoryNetwork, peer_id: str, config: TransportConfig) -> None:
        self.peer_id = peer_id
        self._network = network
        self._config = config
        self._channels = Channels(config)
        self._on_channel: OnChannel | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def listen(self, on_channel: OnChannel) -> list[str]:
        self._on_channel = on_channel
        return [_SCHEME + self.peer_id]

    async def dial(self, peer_id: str, addresses: Sequence[str]) -> Channel:
        async def connect() -> Pipe:
            for address in addresses:
                listener = self._network._transports.get(address.removeprefix(_SCHEME))
                if listener is None or listener._on_channel is None:
                    continue
                if listener.peer_id != peer_id:
                    raise UnreachableError(f"another peer answers at {address}", code="identity")
                if not listener._config.admit(self.peer_id):
                    raise UnreachableError(f"{peer_id} does not admit this peer", code="admission")
                return self._network._connect(self.peer_id, listener)
            raise UnreachableError(f"nobody listens at {', '.join(addresses) or 'no address'}")

        return await self._channels.open(peer_id, connect)

    async def close(self) -> None:
        await self._channels.close()
        self._on_channel = None
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _take(self, peer_id: str, pipe: Pipe) -> None:
        assert self._on_channel is not None
        task = asyncio.create_task(self._channels.serve(peer_id, pipe, self._on_channel))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
