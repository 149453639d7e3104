"""Peers over gRPC and TLS: straight to one that can be dialled, else over libp2p, else through a relay, all proven by
their keys.

A channel that goes through a relay looks for a straight path from time to time and moves to it; one whose path breaks
dials again, whichever way then leads there. Frames are kept until acknowledged, so nothing is lost by either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import grpc

from .channel import Channel
from .errors import UnreachableError, WireError
from .grpc_pipes import CLOSE_SECONDS, DiallerPipe, ListenerPipe
from .handshake import prove_to_dialler, prove_to_listener, transcript
from .identity import Identity, verify
from .multiaddr import is_multiaddr
from .p2p import Libp2p
from .p2pd import DaemonConfig
from .paths import HEAD_START_SECONDS, STAGGER_SECONDS, Way, first_of
from .pipe import Pipe, PipeClosed
from .relay import Spot
from .relayed import Relays
from .tls import (
    Certificate,
    fetch_certificate,
    fingerprint_of,
    join_address,
    pinned_channel,
    split_address,
    start_server,
)
from .transport import STRANGERS, Channels, OnChannel, TransportConfig

log = logging.getLogger(__name__)
SERVICE, METHOD, CONFIRM = "potluck.Peer", "Pipe", "Confirm"
LOOKS_SECONDS = (10.0, 50.0, 240.0)  # between looks for a direct path, the last one again and again
LOOK_TIMEOUT = timedelta(seconds=5)


class GrpcTransport:
    """A ``Transport``. ``port`` 0 takes any free one. Without ``use_relays`` peers must be dialled directly."""

    def __init__(
        self,
        identity: Identity,
        certificate: Certificate,
        config: TransportConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.peer_id = identity.peer_id
        self._identity = identity
        self._certificate = certificate
        self._config = config
        self._host, self._port = host, port
        self._channels = Channels(config)
        self._server: grpc.aio.Server | None = None
        self._relays: Relays | None = None
        self._p2p: Libp2p | None = None
        self._on_channel: OnChannel | None = None
        self._looking: set[asyncio.Task[None]] = set()

    async def listen(self, on_channel: OnChannel) -> list[str]:
        self._on_channel = on_channel

        async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
            pipe = ListenerPipe(context)
            try:
                async with asyncio.timeout(self._config.channel.dial_timeout.total_seconds()):
                    peer_id = await prove_to_dialler(pipe, self._identity, self._certificate.fingerprint, self._config)
            except (WireError, PipeClosed, TimeoutError):
                return
            self._config.channel.meter.record_connection(peer_id or STRANGERS, dialled=False, proof=True)
            if peer_id is not None:
                await self._channels.serve(peer_id, pipe, on_channel)

        async def answer(nonce: bytes, context: Any) -> bytes:
            return self._identity.sign(_confirmation(nonce, self._certificate.fingerprint, self._config.run))

        methods = {
            METHOD: grpc.stream_stream_rpc_method_handler(serve),
            CONFIRM: grpc.unary_unary_rpc_method_handler(answer),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, methods)
        self._server, port = await start_server(self._host, self._port, [handler], self._certificate)
        return [join_address(_dialable(self._host), port)]

    def use_relays(self, spots: Iterable[Spot], secret: str) -> None:
        """From now on peers can call through these relays, and are called through them where nothing else leads."""
        if self._relays is None:
            self._relays = Relays(self._identity, self._certificate, self._config, secret, self._called)
        self._relays.use(spots)

    async def use_p2p(self, daemon: DaemonConfig) -> list[str]:
        """From now on peers are also dialled at multiaddrs; those at which they can dial this one.

        ``DaemonError`` if that needs more than is installed here.
        """
        p2p = Libp2p(self._identity, self._config, self._called, daemon)
        addresses = await p2p.start()
        self._p2p = p2p
        return addresses

    @property
    def p2p_id(self) -> str:
        """The id of our libp2p daemon; empty without one."""
        return "" if self._p2p is None else self._p2p.daemon.peer

    async def _called(self, peer_id: str, pipe: Pipe) -> None:
        assert self._on_channel is not None, "listen first"
        await self._channels.serve(peer_id, pipe, self._on_channel)

    async def dial(self, peer_id: str, addresses: Sequence[str]) -> Channel:
        route = _Route(self, peer_id, tuple(addresses))
        channel = await self._channels.open(peer_id, route.connect)
        if (self._relays is not None or self._p2p is not None) and addresses:
            looking = asyncio.create_task(route.look(channel))
            self._looking.add(looking)
            looking.add_done_callback(self._looking.discard)
        return channel

    def ways(self, peer_id: str, addresses: Sequence[str]) -> list[Way]:
        """Directly first, then over libp2p, then through relays."""
        hosts, places = _apart(addresses)
        # A dead address must not use up the time of the next.
        each = self._config.channel.dial_timeout / max(1, len(hosts))

        def direct(address: str) -> Way:
            return Way(lambda: self.reach(peer_id, address, each), STAGGER_SECONDS)

        def relayed(spot: Spot, relays: Relays) -> Way:
            return Way(lambda: relays.call(peer_id, spot, self._config.channel.dial_timeout), HEAD_START_SECONDS)

        def libp2p(p2p: Libp2p) -> Way:
            return Way(lambda: p2p.reach(peer_id, places, self._config.channel.dial_timeout), HEAD_START_SECONDS)

        ways = [direct(address) for address in hosts]
        if self._p2p is not None and places:
            ways.append(libp2p(self._p2p))
        if self._relays is not None:
            ways += [relayed(spot, self._relays) for spot in self._relays.spots]
        return ways

    def straight(self, peer_id: str, addresses: Sequence[str]) -> list[Callable[[], Awaitable[Pipe]]]:
        """What leads to a peer without a relay, if anything does."""
        hosts, places = _apart(addresses)
        found: list[Callable[[], Awaitable[Pipe]]] = [
            partial(self.reach, peer_id, address, LOOK_TIMEOUT) for address in hosts
        ]
        if self._p2p is not None and places:
            found.append(partial(self._p2p.reach, peer_id, places, LOOK_TIMEOUT, direct=True))
        return found

    async def reach(self, peer_id: str, address: str, timeout: timedelta) -> Pipe:
        """A pipe straight to ``address``."""
        host, port = split_address(address)
        der = await fetch_certificate(host, port, timeout)
        # Here, for one that is turned away costs as much.
        self._config.channel.meter.record_connection(peer_id, dialled=True, proof=True)
        pipe = DiallerPipe(pinned_channel(join_address(host, port), der), f"/{SERVICE}/{METHOD}")
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await prove_to_listener(pipe, self._identity, peer_id, fingerprint_of(der), self._config.run)
        except (WireError, TimeoutError):
            await pipe.close()
            raise UnreachableError(
                f"what answers at {address} is not a peer", hint="check the address", code="identity"
            ) from None
        except BaseException:
            await pipe.close()
            raise
        return pipe

    async def close(self) -> None:
        for looking in self._looking:
            looking.cancel()
        await self._channels.close()
        if self._relays is not None:
            await self._relays.close()
        if self._p2p is not None:
            await self._p2p.close()
        if self._server is not None:
            await self._server.stop(CLOSE_SECONDS)
            self._server = None


class _Route:
    """How one channel gets to its peer, each time that it dials."""

    def __init__(self, transport: GrpcTransport, peer_id: str, addresses: tuple[str, ...]) -> None:
        self._transport, self._peer_id, self._addresses = transport, peer_id, addresses
        self._ready: Pipe | None = None  # a better path, to be moved to

    async def connect(self) -> Pipe:
        if (ready := self._ready) is not None:
            self._ready = None
            return ready
        if not (ways := self._transport.ways(self._peer_id, self._addresses)):
            raise UnreachableError(f"peer {self._peer_id} has no address", hint="wait until it is reachable")
        return await first_of(ways)

    async def look(self, channel: Channel) -> None:
        """While the channel lives: whether there is a direct path by now, and if so, moves it there."""
        pauses = iter(LOOKS_SECONDS)
        try:
            while not channel.closed:
                await asyncio.sleep(next(pauses, LOOKS_SECONDS[-1]))
                if channel.path().kind != "relayed":
                    continue
                for way in self._transport.straight(self._peer_id, self._addresses):
                    with contextlib.suppress(UnreachableError):
                        self._ready = await way()
                        log.info("%s can be reached directly now", self._peer_id[:8])
                        channel.redial()
                        break
        finally:
            if self._ready is not None:
                await self._ready.close()


def _apart(addresses: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those to be dialled over TCP, and libp2p's."""
    places = [address for address in addresses if is_multiaddr(address)]
    return [address for address in addresses if address not in places], places


async def confirm(address: str, public_key: bytes, nonce: bytes, run: str, timeout: timedelta) -> bool:
    """Whether the peer with this key answers at ``address``: it signs the nonce and the certificate seen there."""
    host, port = split_address(address)
    der = await fetch_certificate(host, port, timeout)
    channel = pinned_channel(join_address(host, port), der)
    try:
        signature = await channel.unary_unary(f"/{SERVICE}/{CONFIRM}")(nonce, timeout=timeout.total_seconds())
    finally:
        await channel.close(None)
    return verify(public_key, signature, _confirmation(nonce, fingerprint_of(der), run))


def _confirmation(nonce: bytes, fingerprint: str, run: str) -> bytes:
    return transcript(b"potluck address 1", nonce, fingerprint.encode(), run.encode())


def _dialable(host: str) -> str:
    """The address to dial for a server bound to ``host``: for a wildcard, that of the way out."""
    if host not in ("0.0.0.0", "::"):
        return host
    v6 = host == "::"
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; the addresses are reserved for documentation.
            probe.connect(("2001:db8::1" if v6 else "192.0.2.1", 9))
        except OSError:
            return "::1" if v6 else "127.0.0.1"
        return str(probe.getsockname()[0])
