"""How one channel gets to its peer, each time that it dials, and what is looked after while it lives.

A channel that goes through a relay looks for a direct path from time to time. One whose direct path loses packets gets
BBR where this host allows it (a congestion control that does not take losses for a full line), else more connections
(``stripes.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from . import sockets
from .channel import Channel
from .errors import PotluckError, UnreachableError
from .flow import Carried
from .grpc_pipes import DiallerPipe
from .paths import Way, first_of
from .pipe import Pipe
from .sockets import Losses
from .striped import ID_NBYTES, Join, StripedPipe
from .stripes import Choice, Seen

log = logging.getLogger(__name__)
LOOKS_SECONDS = (10.0, 50.0, 240.0)  # between looks for a direct path, the last one again and again
LOOK_SECONDS = 4.0  # between looks at what a direct path does
BUSY_SECONDS = 3.0  # of sending, below which a look says nothing
DIRECT_SECONDS = 5.0


class Dialling(Protocol):
    """What a route needs of its transport."""

    def ways(self, peer_id: str, addresses: Sequence[str]) -> list[Way]: ...

    def straight(self, peer_id: str, addresses: Sequence[str]) -> list[Callable[[], Awaitable[Pipe]]]: ...

    async def reach(self, peer_id: str, address: str, timeout: timedelta, der: bytes | None = None) -> DiallerPipe: ...

    def advise(self, text: str) -> None: ...


@dataclass
class Known:
    """What was found out of the way to a peer: the next channel there begins with it."""

    lossy: bool = False
    connections: int = 1


class Route:
    """``choice`` says over how many connections to go. Without ``bbr`` the host's congestion control stays as it is."""

    def __init__(
        self,
        transport: Dialling,
        peer_id: str,
        addresses: tuple[str, ...],
        choice: Choice,
        known: Known,
        *,
        bbr: bool = True,
    ) -> None:
        self._transport, self._peer_id, self._addresses = transport, peer_id, addresses
        self._bbr, self._known = bbr, known
        self._ready: Pipe | None = None  # a better path, to be moved to
        self._direct: list[DiallerPipe] = []  # connections of the newest direct path
        self._newest: StripedPipe | None = None
        self.choice = replace(choice, connections=max(choice.connections, min(known.connections, choice.most)))

    async def connect(self) -> Pipe:
        if (ready := self._ready) is not None:
            self._ready = None
            return ready
        if self._newest is not None and not self._newest.has_worked:
            log.info("%s: %d connections do not work", self._peer_id[:8], self.choice.connections)
            self.choice = self.choice.failed(1)
        if not (ways := self._transport.ways(self._peer_id, self._addresses)):
            raise UnreachableError(f"peer {self._peer_id} has no address", hint="wait until it is reachable")
        first = await first_of(ways)
        try:
            return await self._striped(first)
        except BaseException:
            await first.close()
            raise

    async def _striped(self, first: Pipe) -> Pipe:
        """``first``, or a pipe of it and others like it; ``first`` alone if those cannot be had."""
        self._direct = [first] if isinstance(first, DiallerPipe) else []
        count = self.choice.connections
        if isinstance(first, DiallerPipe) and count > 1:
            try:
                others = await self._more(first, count - 1)
                try:
                    name = secrets.token_bytes(ID_NBYTES)
                    for index, pipe in enumerate([first, *others]):
                        await pipe.send(Join(name, index, count).encode())
                except BaseException:
                    await close_all([first, *others])
                    raise
                self._direct = [first, *others]
            except PotluckError as error:
                log.info("%s: not over %d connections: %s", self._peer_id[:8], count, error)
                self.choice = self.choice.failed(1)
        self._ask_for_bbr()
        self._newest = StripedPipe(self._direct) if len(self._direct) > 1 else None
        return self._newest or first

    async def _more(self, first: DiallerPipe, count: int) -> list[DiallerPipe]:
        """To where ``first`` goes, all of them or none."""
        reaching = [asyncio.create_task(self._another(first)) for _ in range(count)]
        try:
            return await asyncio.gather(*reaching)
        except BaseException:
            for task in reaching:
                task.cancel()
            done = await asyncio.gather(*reaching, return_exceptions=True)
            await close_all([pipe for pipe in done if isinstance(pipe, DiallerPipe)])
            raise

    async def _another(self, first: DiallerPipe) -> DiallerPipe:
        patience = timedelta(seconds=DIRECT_SECONDS)
        return await self._transport.reach(self._peer_id, first.address, patience, first.certificate)

    def _ask_for_bbr(self) -> None:
        """On a path that loses packets; either way the pipes know what they have."""
        for address in {pipe.remote for pipe in self._direct}:
            if self._bbr and self._known.lossy:
                congestion = sockets.prefer(sockets.BBR, address)
            else:
                congestion = sockets.in_use(address)
            for pipe in self._direct:
                if pipe.remote == address:
                    pipe.congestion = congestion

    async def look(self, channel: Channel) -> None:
        """While the channel lives: whether there is a direct path by now, and if so, moves it there."""
        pauses = iter(LOOKS_SECONDS)
        while not channel.closed:
            await asyncio.sleep(next(pauses, LOOKS_SECONDS[-1]))
            if channel.path().kind != "relayed":
                continue
            for way in self._transport.straight(self._peer_id, self._addresses):
                with contextlib.suppress(UnreachableError):
                    pipe = await way()
                    log.info("%s can be reached directly now", self._peer_id[:8])
                    await self._move(channel, pipe)
                    break

    async def tend(self, channel: Channel) -> None:
        """While the channel lives: what its direct path loses, and what to do about that."""
        carried, losses, paths = channel.carried, None, self._direct
        while not channel.closed:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._direct or channel.path().kind != "direct":
                continue
            if losses is None or self._direct is not paths:  # what moving there cost does not count
                carried, paths, losses = channel.carried, self._direct, Losses(self._direct[0].remote)
                losses.since()
                continue
            now = channel.carried
            done = Carried(now.nbytes - carried.nbytes, now.seconds - carried.seconds)
            if done.seconds < BUSY_SECONDS:
                continue
            carried, told = now, losses.since()
            rate = done.nbytes / done.seconds
            await self.judge(channel, Seen(rate, None) if told is None else Seen(rate, told.loss, told.wait))

    async def judge(self, channel: Channel, seen: Seen) -> None:
        """What follows from a look at a channel that sent all the time."""
        if seen.by_chance and not self._known.lossy:
            self._known.lossy = True
            self._ask_for_bbr()
            self._advise(seen)
        if self._has_bbr():
            return
        before = self.choice
        self.choice = before.after(seen)
        if self.choice.before is None:  # nothing is on trial
            self._known.connections = self.choice.connections
        if self.choice.connections == before.connections:
            return
        log.info(
            "%s: %.2f MB/s over %d connections, %s of the segments sent twice: now over %d",
            self._peer_id[:8],
            seen.bytes_per_second / 1e6,
            before.connections,
            "an unknown share" if seen.loss is None else f"{seen.loss:.2%}",
            self.choice.connections,
        )
        try:
            fresh = await self._another(self._direct[0])
        except UnreachableError as error:
            log.info("%s: it stays with %d: %s", self._peer_id[:8], before.connections, error)
            self.choice = self.choice.failed(before.connections)
            return
        await self._move(channel, fresh)

    async def _move(self, channel: Channel, pipe: Pipe) -> None:
        self._ready, stale = await self._striped(pipe), self._ready
        if stale is not None:
            await stale.close()
        channel.redial()

    def _has_bbr(self) -> bool:
        return bool(self._direct) and all(pipe.congestion == sockets.BBR for pipe in self._direct)

    def _advise(self, seen: Seen) -> None:
        used = self._direct[0].congestion
        if not self._has_bbr() and used:
            self._transport.advise(
                f"the line to {self._peer_id[:8]} loses packets ({seen.loss or 0.0:.2%}), which this machine's TCP"
                f" ({used}) takes for a full line. BBR does not: sudo sysctl -w net.core.default_qdisc=fq"
                " net.ipv4.tcp_congestion_control=bbr"
            )

    async def close(self) -> None:
        if self._ready is not None:
            await self._ready.close()
            self._ready = None


async def close_all(pipes: Sequence[Pipe]) -> None:
    await asyncio.gather(*(pipe.close() for pipe in pipes), return_exceptions=True)


Watch = Callable[[Channel], Awaitable[None]]


async def watch(route: Route, channel: Channel, watches: Sequence[Watch]) -> None:
    """Runs all of a route's watches until the channel is over."""
    tasks = [asyncio.ensure_future(each(channel)) for each in watches]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await route.close()
