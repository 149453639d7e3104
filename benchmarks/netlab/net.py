"""The lines themselves, in virtual time: what enters when leaves when. No clock, no sockets; chance comes from a seed.

A packet waits for the bytes before it on its host's line up, then on the pair's way; is lost or not; travels; waits on
the other host's line down; is handed over. All moments follow from the moment it entered, so a forwarder that is late
does not add up: the rates hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from heapq import heappop, heappush

from .profiles import Line, Pair, Profile

LEAST_PACKETS = 16  # in any queue: above TCP's first window of 10, or no connection would start without a loss


class Queue:
    """One direction of a line: a rate, and room for so much. Drops what finds it full."""

    __slots__ = ("free", "rate", "room")

    def __init__(self, mbit: float, queue_ms: float, mtu: int) -> None:
        self.free = 0.0  # when the last byte will be out
        self.set(mbit, queue_ms, mtu)

    def set(self, mbit: float, queue_ms: float, mtu: int) -> None:
        self.rate = mbit * 1e6 / 8
        self.room = max(self.rate * queue_ms / 1000, LEAST_PACKETS * mtu)

    def take(self, now: float, nbytes: int) -> float | None:
        """When the packet's last byte is out; None: it is dropped. ``now`` never goes back."""
        free = self.free
        if free <= now:
            free = now
        elif (free - now) * self.rate > self.room:
            return None
        self.free = free = free + nbytes / self.rate
        return free


@dataclass(slots=True)
class Way:
    """From one host to another."""

    delay: float  # seconds
    jitters: tuple[float, ...]  # seconds, those above zero
    loss: float
    queue: Queue | None
    last: float = 0.0  # when the newest packet arrives: none overtakes it


@dataclass(slots=True)
class Host:
    line: Line
    up: Queue
    down: Queue
    cut: bool = False
    ways: list[Way] = field(default_factory=list)
    coming: list[tuple[float, int, int, bytes]] = field(default_factory=list)  # a heap: moment, order, bytes, packet

    def next(self) -> float:
        """When the first of those coming is through the line down, if it is not dropped."""
        at, _, nbytes, _ = self.coming[0]
        free = self.down.free
        return (at if at > free else free) + nbytes / self.down.rate


class Net:
    def __init__(self, profile: Profile, hosts: int, *, mtu: int, seed: int) -> None:
        self.mtu, self.random = mtu, random.Random(seed)
        self.order = 0
        self.hosts: list[Host] = []
        for i in range(hosts):
            line = profile.line(i)
            up, down = (Queue(mbit, line.queue_ms, mtu) for mbit in (line.up_mbit, line.down_mbit))
            self.hosts.append(Host(line, up, down))
        self.pairs: dict[tuple[int, int], Pair] = {}
        for i in range(hosts):
            for j in range(hosts):
                if (pair := profile.pair(i, j)) is not None:
                    self.pairs[i, j] = pair
                self.hosts[i].ways.append(self._way(i, j))

    def _way(self, i: int, j: int) -> Way:
        ends, pair = (self.hosts[i].line, self.hosts[j].line), self.pairs.get((i, j))
        delay_ms = sum(line.delay_ms for line in ends) + (pair.delay_ms if pair else 0.0)
        jitters = tuple(line.jitter_ms / 1000 for line in ends if line.jitter_ms)
        loss = 1 - (1 - ends[0].loss) * (1 - ends[1].loss)
        return Way(delay_ms / 1000, jitters, loss, Queue(pair.mbit, pair.queue_ms, self.mtu) if pair else None)

    def set(self, i: int, line: Line) -> None:
        """A new line for host ``i``; what is queued already leaves at the old rate."""
        host = self.hosts[i]
        host.line = line
        host.up.set(line.up_mbit, line.queue_ms, self.mtu)
        host.down.set(line.down_mbit, line.queue_ms, self.mtu)
        for j in range(len(self.hosts)):
            for a, b in ((i, j), (j, i)):
                old, new = self.hosts[a].ways[b], self._way(a, b)
                old.delay, old.jitters, old.loss = new.delay, new.jitters, new.loss

    def enter(self, now: float, i: int, j: int, nbytes: int, packet: bytes) -> None:
        """``packet`` of ``nbytes`` leaves host ``i`` for ``j``."""
        host = self.hosts[i]
        if host.cut or (at := host.up.take(now, nbytes)) is None:
            return
        way = host.ways[j]
        if way.queue is not None and (at := way.queue.take(at, nbytes)) is None:
            return
        if way.loss and self.random.random() < way.loss:
            return
        at += way.delay
        for jitter in way.jitters:
            at += jitter * self.random.random()
        if at < way.last:
            at = way.last
        way.last = at
        self.order += 1
        heappush(self.hosts[j].coming, (at, self.order, nbytes, packet))

    def next(self) -> float | None:
        """The next moment at which ``due`` may have something to hand over."""
        return min((host.next() for host in self.hosts if host.coming), default=None)

    def due(self, now: float) -> list[tuple[float, int, bytes]]:
        """What is to be handed over by ``now``: the exact moment, the host, the packet; in order for each host.

        A packet is looked at when it would be out of the line down; by then all that came before it are known.
        """
        out = []
        for j, host in enumerate(self.hosts):
            while host.coming and host.next() <= now:
                at, _, nbytes, packet = heappop(host.coming)
                if not host.cut and (moment := host.down.take(at, nbytes)) is not None:
                    out.append((moment, j, packet))
        return out
