"""The network: who reaches whom, how late; connections keep order, may stall, and end on each side by itself."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from .kernel import Kernel, Queue

COORDINATOR = "coordinator"
KEEPALIVE_SECONDS = (10.0, 25.0)  # until a dead line is noticed: see protocol/tls.py
Pair = tuple[str, str]


def pair(one: str, other: str) -> Pair:
    return (one, other) if one < other else (other, one)


class Network:
    """Delays and cuts. While two machines are cut off from one another, what is on its way between them waits."""

    def __init__(self, kernel: Kernel, rng: random.Random) -> None:
        self.kernel, self.rng = kernel, rng
        self.latency: dict[str, float] = {}  # of a machine's line, one way
        self.slow: dict[str, float] = {}  # times as slow
        self.cut_since: dict[Pair, float] = {}
        self.connections: dict[Connection, None] = {}
        self.on_heal: list[Callable[[], None]] = []

    def delay(self, one: str, other: str) -> float:
        base = self.latency.get(one, 0.01) * self.slow.get(one, 1.0)
        base += self.latency.get(other, 0.01) * self.slow.get(other, 1.0)
        return base * (0.8 + 0.4 * self.rng.random())

    def cut(self, one: str, other: str) -> None:
        """Nothing gets through any more. Each end of a connection notices by itself, or not at all."""
        between = pair(one, other)
        if between in self.cut_since:
            return
        self.cut_since[between] = since = self.kernel.now
        for connection in list(self.connections):
            if connection.between == between:
                for end in (connection.client, connection.server):
                    end.unanswered(lambda: self.cut_since.get(between) == since)

    def is_cut(self, one: str, other: str) -> bool:
        return bool(self.cut_since) and pair(one, other) in self.cut_since

    def heal(self, one: str, other: str) -> None:
        if self.cut_since.pop(pair(one, other), None) is not None:
            for connection in list(self.connections):
                if connection.between == pair(one, other):
                    connection.client.release()
                    connection.server.release()
            for healed in self.on_heal:
                healed()

    def heal_all(self) -> None:
        self.slow.clear()
        for one, other in list(self.cut_since):
            self.heal(one, other)


class End:
    """One side of a connection. ``None`` in ``inbox`` is its end."""

    def __init__(self, connection: Connection, here: str, there: str) -> None:
        self.connection, self.here, self.there = connection, here, there
        self.inbox: Queue[Any] = Queue(connection.net.kernel)
        self.open, self.half_open = True, False
        self.stalled = 0.0  # seconds that what is sent from now on takes longer
        self._last = 0.0
        self._held: deque[Any] = deque()
        self.peer: End

    def send(self, item: Any) -> None:
        """To the other side."""
        if not self.open:
            return
        net = self.connection.net
        self._last = max(self._last, net.kernel.now + self.stalled + net.delay(self.here, self.there))
        net.kernel.at(self._last, lambda: self.peer.arrive(item))

    def arrive(self, item: Any) -> None:
        if self._held or self.connection.between in self.connection.net.cut_since:
            self._held.append(item)
        elif self.open:
            self.inbox.put_nowait(item)

    def release(self) -> None:
        """What waited for the cut to be healed."""
        while self._held:
            item = self._held.popleft()
            if self.open:
                self.inbox.put_nowait(item)

    def unanswered(self, still: Callable[[], bool] = lambda: True) -> None:
        """The other side answers no keepalive from now on: if that is so later ``still``, this side hangs up."""

        def noticed() -> None:
            if still():
                self.broken()

        net = self.connection.net
        net.kernel.later(net.rng.uniform(*KEEPALIVE_SECONDS), noticed)

    def broken(self, *, half_open: bool = False) -> None:
        """This side learns that the line is dead; ``half_open``: the other side does not, for a while."""
        self.half_open |= half_open
        if self.open:
            self.inbox.put_nowait(None)

    def close(self, *, silent: bool = False) -> None:
        """``silent``: the other side is not told, as when the power fails."""
        if self.open:
            if silent or self.half_open:
                self.peer.unanswered()
            else:
                self.send(None)
            self.open = False
            if not self.peer.open:
                self.connection.net.connections.pop(self.connection, None)


class Connection:
    """Between a worker (``client``) and the coordinator (``server``)."""

    def __init__(self, net: Network, peer: str) -> None:
        self.net, self.between = net, pair(peer, COORDINATOR)
        self.client, self.server = End(self, peer, COORDINATOR), End(self, COORDINATOR, peer)
        self.client.peer, self.server.peer = self.server, self.client
        net.connections[self] = None

    def refused(self) -> None:
        """What the client sends comes to a machine that was started anew, which resets the connection."""
        if not self.server.open and self.between not in self.net.cut_since:
            self.client.broken()
