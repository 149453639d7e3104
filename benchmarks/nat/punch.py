"""Two peers behind routers that meet at relays of libp2p: is a hole punched, and what does it carry?

Real transports and real daemons; each daemon lives in a network namespace of its own (``benchmarks/netlab``), with
addresses that look like the internet's, for libp2p tries no others. All transports are in this process, so what is
measured is not their start; there is no other way between them than libp2p's.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from benchmarks.netlab.lab import Lab
from benchmarks.netlab.nat import NATS
from benchmarks.netlab.profiles import PROFILES, UNLIMITED
from potluck.protocol import confined
from potluck.protocol.channel import Channel
from potluck.protocol.errors import PotluckError
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.multiaddr import is_relayed
from potluck.protocol.p2pd import Daemon, DaemonConfig, Stream
from potluck.protocol.pipe import ChannelConfig
from potluck.protocol.tls import Certificate
from potluck.protocol.transport import TransportConfig

from .hub import RUN
from .pairs import WARM_SECONDS, WINDOW_NBYTES, Pair
from .peer import FRAME_NBYTES, LAST_NBYTES, Peer, frame
from .talk import Failed

RELAYS = 4  # as many must see a peer from outside before libp2p believes that address
NETWORK = "45.10.0"
PORT = 4001
RESERVE_SECONDS = 60.0
PAIRS = (
    ("port-keeping", "port-keeping"),
    ("port-keeping", "symmetric"),
    ("port-restricted", "port-restricted"),
    ("port-restricted", "symmetric"),
    ("symmetric", "symmetric"),
    ("double", "port-restricted"),
    ("double", "double"),
)


@dataclass(eq=False)
class End:
    name: str
    peer: Peer
    transport: GrpcTransport


def at(host: str) -> tuple[str, ...]:
    return f"/ip4/{host}/tcp/{PORT}", f"/ip4/{host}/udp/{PORT}/quic-v1"


@contextmanager
def daemons_in(lab: Lab, host: int, folder: Path) -> Iterator[None]:
    """Daemons that start meanwhile do so in a host."""
    starter, own = folder / f"start-{host}.py", confined.__file__
    command = [*lab.enter(host), sys.executable, "-I", "-S", own]
    starter.write_text(f"import os, sys\nos.execvp({command[0]!r}, [*{command!r}, *sys.argv[1:]])\n")
    confined.__file__ = str(starter)
    try:
        yield
    finally:
        confined.__file__ = own


async def refuse(stream: Stream) -> None:
    stream.writer.transport.abort()


def measure(
    line: str, *, seconds: float, hold: float, folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS
) -> list[Pair]:
    """``path`` is the first, ``later`` that after ``hold`` seconds; ``rate`` and ``share`` are of the later."""
    kinds = dict.fromkeys(kind for pair in pairs for kind in pair)
    names = [f"{role} {kind}" for role in ("from", "to") for kind in kinds]
    hosts = {name: RELAYS + k for k, name in enumerate(names)}
    nats = {host: NATS[name.split()[1]] for name, host in hosts.items()}
    profile = PROFILES[line]
    with Lab(profile.after(*[UNLIMITED] * RELAYS), hosts=RELAYS + len(hosts), nats=nats, network=NETWORK) as lab:
        return asyncio.run(_measure(lab, hosts, folder, pairs, seconds, hold, profile.line(0).up_mbit / 8))


async def _measure(
    lab: Lab,
    hosts: dict[str, int],
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    seconds: float,
    hold: float,
    up: float,
) -> list[Pair]:
    relays: list[Daemon] = []
    ends: dict[str, End] = {}
    try:
        for host in range(RELAYS):
            config = DaemonConfig(listen=at(lab.address(host)), serves=True)
            relays.append(Daemon(Identity.generate(), config, "/x", refuse))
            with daemons_in(lab, host, folder):
                await relays[-1].start()
        meet = tuple(relay.addresses[0] for relay in relays)
        for name, host in hosts.items():
            about = TransportConfig(run=RUN, channel=ChannelConfig(send_window_nbytes=WINDOW_NBYTES))
            transport = GrpcTransport(Identity.generate(), Certificate.generate(), about)
            ends[name] = End(name, Peer(transport), transport)
            await transport.listen(ends[name].peer.accept)
            with daemons_in(lab, host, folder):
                await transport.use_p2p(DaemonConfig(listen=at(lab.inside(host)), relays=meet))
        await asyncio.gather(*(reserved(end) for end in ends.values()))
        found = [Pair(dialler=a, listener=b) for a, b in pairs]
        going: list[tuple[float, Pair, Channel]] = []
        for pair in found:
            near, far = ends[f"from {pair.dialler}"], ends[f"to {pair.listener}"]
            began = time.monotonic()
            try:
                channel = await near.transport.dial(far.transport.peer_id, [f"/p2p/{far.transport.p2p_id}"])
                await channel.send(frame(LAST_NBYTES))
                await channel.drain()
            except PotluckError as error:
                pair.failed = f"{error.code}: {error}"
                continue
            pair.path = channel.path().kind
            pair.first_seconds = far.peer.received[near.transport.peer_id].first_at - began
            going.append((began, pair, channel))
        for began, pair, channel in going:
            await asyncio.sleep(max(0.0, began + hold - time.monotonic()))
            near, far = ends[f"from {pair.dialler}"], ends[f"to {pair.listener}"]
            try:
                pair.rate = await rate(channel, far, near.transport.peer_id, seconds)
            except PotluckError as error:
                pair.later = f"broken ({error.code})"
                continue
            pair.later, pair.share = channel.path().kind, pair.rate / up
        return found
    finally:
        await asyncio.gather(*(end.transport.close() for end in ends.values()), return_exceptions=True)
        await asyncio.gather(*(relay.close() for relay in relays), return_exceptions=True)


async def reserved(end: End) -> None:
    """Once relays keep a place for it: before, nobody reaches it."""
    assert end.transport._p2p is not None
    deadline = time.monotonic() + RESERVE_SECONDS
    while not any(is_relayed(address) for address in await end.transport._p2p.daemon.identify()):
        if time.monotonic() > deadline:
            raise Failed(f"{end.name} has no place at a relay after {RESERVE_SECONDS:g} s")
        await asyncio.sleep(0.5)


async def rate(channel: Channel, far: End, sender: str, seconds: float) -> float:
    """MB/s (10^6 bytes) of frames that arrive, while as many are sent as the path takes."""
    one = frame(FRAME_NBYTES)

    async def pour() -> None:
        while True:
            await channel.send(one)

    pouring = asyncio.create_task(pour())
    try:
        await asyncio.wait({pouring}, timeout=WARM_SECONDS)
        got = far.peer.received[sender]
        nbytes, since = got.nbytes, got.last_at
        await asyncio.wait({pouring}, timeout=seconds)
        if pouring.done():
            await pouring
        carried = (got.nbytes - nbytes) / max(got.last_at - since, 1e-9) / 1e6
    finally:
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)
    async with asyncio.timeout(timedelta(minutes=1).total_seconds()):
        await channel.drain()
    return carried
