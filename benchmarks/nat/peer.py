"""A process with workers' transports, the real ones: they listen, dial, and send frames of noise."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import Any

from potluck.protocol.channel import Channel
from potluck.protocol.errors import PotluckError
from potluck.protocol.frames import Frame, Kind, TensorSpec, make_frame
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.pipe import ChannelConfig
from potluck.protocol.relay import Spot
from potluck.protocol.tls import Certificate
from potluck.protocol.transport import TransportConfig

from .hub import RUN, SECRET
from .talk import obey

FRAME_NBYTES, LAST_NBYTES = 256 << 10, 1000


def frame(nbytes: int) -> Frame:
    return make_frame(
        os.urandom(nbytes),
        kind=Kind.ACTIVATION,
        run=b"nat-nat.",
        generation=1,
        step=1,
        stage=1,
        microbatch=0,
        part=0,
        attempt=0,
        tensors=(TensorSpec(codec="noise", shape=(nbytes,), nbytes=nbytes),),
        targets=0,
        dense_nbytes=0,
    )


@dataclass
class Received:
    """From one peer; ``first_at`` and ``last_at`` are seconds of the machine's monotonic clock, frames whole."""

    first_at: float = 0.0
    last_at: float = 0.0
    nbytes: int = 0


@dataclass(eq=False)
class Peer:
    transport: GrpcTransport
    spots: list[Spot] = field(default_factory=list)
    told: dict[str, list[str]] = field(default_factory=dict)  # where others are
    received: dict[str, Received] = field(default_factory=dict)
    channels: dict[str, Channel] = field(default_factory=dict)
    streams: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    reading: set[asyncio.Task[None]] = field(default_factory=set)

    def accept(self, channel: Channel) -> None:
        task = asyncio.create_task(self._read(channel))
        self.reading.add(task)
        task.add_done_callback(self.reading.discard)

    async def _read(self, channel: Channel) -> None:
        mine = self.received[channel.peer_id] = Received()
        with contextlib.suppress(PotluckError):
            while True:
                nbytes = len((await channel.recv()).payload)
                mine.last_at = time.monotonic()
                mine.first_at = mine.first_at or mine.last_at
                mine.nbytes += nbytes


class Peers:
    """Several transports, by name."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}

    async def open(self, name: str, host: str, spot: str, window: int) -> dict[str, Any]:
        """``window``: bytes that may be sent and not yet acknowledged."""
        identity = Identity.generate()
        told: dict[str, list[str]] = {}
        channel = ChannelConfig(send_window_nbytes=window)
        config = TransportConfig(run=RUN, addresses=lambda peer: told.get(peer, ()), channel=channel)
        transport = GrpcTransport(identity, Certificate.generate(), config, host=host)
        peer = self._peers[name] = Peer(transport, [Spot.parse(spot)], told)
        addresses = await transport.listen(peer.accept)
        transport.use_relays(peer.spots, SECRET)
        return {"peer": identity.peer_id, "key": identity.public_bytes.hex(), "addresses": addresses}

    async def dialable(self, name: str) -> None:
        """Others know where it is."""
        self._peers[name].transport.use_relays(self._peers[name].spots, SECRET, dialable=True)

    async def tell(self, name: str, peer: str, addresses: list[str]) -> None:
        """Where another one is, as a plan does."""
        self._peers[name].told[peer] = addresses

    async def dial(self, name: str, peer: str, addresses: list[str]) -> dict[str, Any]:
        """Dials and sends a first frame: when that began, and over which path."""
        mine, began = self._peers[name], time.monotonic()
        try:
            channel = mine.channels[peer] = await mine.transport.dial(peer, addresses)
            await channel.send(frame(LAST_NBYTES))
            await channel.drain()
        except PotluckError as error:
            return {"failed": error.code, "why": str(error)}
        return {"began": began, "path": channel.path().kind}

    async def send(self, name: str, peer: str) -> dict[str, Any]:
        """One frame, acknowledged, and the path that it took."""
        channel = self._peers[name].channels[peer]
        try:
            await channel.send(frame(LAST_NBYTES))
            await channel.drain()
        except PotluckError as error:
            return {"failed": error.code, "why": str(error)}
        return {"path": channel.path().kind}

    async def stream(self, name: str, peer: str) -> None:
        """Sends frames from now on, as fast as they are taken."""
        channel, one = self._peers[name].channels[peer], frame(FRAME_NBYTES)

        async def pour() -> None:
            while True:
                await channel.send(one)

        self._peers[name].streams[peer] = asyncio.create_task(pour())

    async def rest(self, name: str, peer: str) -> None:
        """Ends a stream; what is on its way arrives."""
        task = self._peers[name].streams.pop(peer)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self._peers[name].channels[peer].drain()

    async def received(self) -> dict[str, Any]:
        """Of each name, by sender: when the first and the last frame came, bytes."""
        return {
            name: {sender: [r.first_at, r.last_at, r.nbytes] for sender, r in peer.received.items()}
            for name, peer in self._peers.items()
        }


async def main() -> None:
    peers = Peers()
    names = ("open", "dialable", "tell", "dial", "send", "stream", "rest", "received")
    await obey({name: getattr(peers, name) for name in names})


if __name__ == "__main__":
    asyncio.run(main())
    os._exit(0)  # whoever is connected is not waited for
