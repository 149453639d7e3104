"""Peers over gRPC and TLS: straight to one that can be dialled, or that can dial us, else over libp2p, else through a
relay, all proven by their keys.

A channel that goes through a relay looks for a straight path from time to time and moves to it; one whose path breaks
dials again, whichever way then leads there. Frames are kept until acknowledged, so nothing is lost by either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import grpc

from .channel import Channel
from .errors import UnreachableError, WireError
from .grpc_pipes import CLOSE_SECONDS, DiallerPipe, ListenerPipe, ReturnedPipe
from .handshake import prove_to_dialler, prove_to_listener, proving, transcript
from .identity import Identity, verify
from .multiaddr import is_multiaddr
from .own_address import EVERYWHERE, EVERYWHERE_V4, dialable
from .p2p import Libp2p
from .p2pd import DaemonConfig
from .paths import HEAD_START_SECONDS, STAGGER_SECONDS, Way, first_of
from .pipe import Pipe, PipeClosed
from .relay import Spot
from .relayed import Relays
from .reversal import Returns
from .route import Known, Route, watch
from .striped import MOST_CONNECTIONS, Gathering
from .stripes import Choice
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
SERVICE, METHOD, BACK, CONFIRM = "potluck.Peer", "Pipe", "Back", "Confirm"
LOOK_TIMEOUT = timedelta(seconds=5)


class GrpcTransport:
    """A ``Transport``. ``port`` 0 takes any free one. Without ``use_relays`` peers must be dialled directly.

    ``connections``: of a direct path at first, and at most where its line loses packets; ``bbr``: whether it asks for
    BBR there (``route.py``).
    """

    def __init__(
        self,
        identity: Identity,
        certificate: Certificate,
        config: TransportConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        connections: tuple[int, int] = (1, MOST_CONNECTIONS),
        bbr: bool = True,
    ) -> None:
        self.peer_id = identity.peer_id
        self._identity = identity
        self._certificate = certificate
        self._config = config
        self._host, self._port = host, port
        self._channels = Channels(config)
        self._server: grpc.aio.Server | None = None
        self._relays: Relays | None = None
        self._returns: Returns | None = None
        self._p2p: Libp2p | None = None
        self._on_channel: OnChannel | None = None
        self._looking: set[asyncio.Task[None]] = set()
        least, most = connections
        self._choice, self._bbr = Choice(connections=least, least=least, most=most), bbr
        self._known: dict[str, Known] = {}
        self._advised = False
        self._gathering = Gathering(config.channel.dial_timeout, config.channel.on_error)

    async def listen(self, on_channel: OnChannel) -> list[str]:
        self._on_channel = on_channel

        async def proven(pipe: Pipe) -> str | None:
            try:
                async with asyncio.timeout(self._config.channel.dial_timeout.total_seconds()):
                    peer_id = await prove_to_dialler(pipe, self._identity, self._certificate.fingerprint, self._config)
            except (WireError, PipeClosed, TimeoutError):
                return None
            self._config.channel.meter.record_connection(peer_id or STRANGERS, dialled=False, proof=True)
            return peer_id

        async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
            pipe = ListenerPipe(context)
            if (peer_id := await proven(pipe)) is not None:
                await self._called(peer_id, pipe)

        async def returned(requests: AsyncIterator[bytes], context: Any) -> None:
            pipe = ReturnedPipe(context)
            if (peer_id := await proven(pipe)) is not None and self._returns is not None:
                await self._returns.take(peer_id, pipe)

        async def answer(nonce: bytes, context: Any) -> bytes:
            return self._identity.sign(_confirmation(nonce, self._certificate.fingerprint, self._config.run))

        methods = {
            METHOD: grpc.stream_stream_rpc_method_handler(serve),
            BACK: grpc.stream_stream_rpc_method_handler(returned),
            CONFIRM: grpc.unary_unary_rpc_method_handler(answer),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, methods)
        try:
            self._server, port = await start_server(self._host, self._port, [handler], self._certificate)
        except UnreachableError:
            if self._host != EVERYWHERE:
                raise
            self._host = EVERYWHERE_V4  # IPv6 is switched off here
            self._server, port = await start_server(self._host, self._port, [handler], self._certificate)
        return [join_address(host, port) for host in dialable(self._host)]

    def use_relays(self, spots: Iterable[Spot], secret: str, *, dialable: bool = False) -> None:
        """From now on peers can call through these relays, and are called through them where nothing else leads.

        ``dialable``: others know an address of ours; so who has none is asked to dial it (``reversal.py``).
        """
        if self._relays is None:
            one = self._identity, self._certificate, self._config
            self._relays = Relays(*one, secret, self._called, self._dial_back)
        self._relays.use(spots)
        if dialable and self._returns is None:
            self._returns = Returns()

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

    async def _dial_back(self, peer_id: str) -> Pipe:
        """A pipe on which a peer that asked for it calls us: to where the plan says that it is."""
        if not self._config.admit(peer_id):
            raise UnreachableError(f"{peer_id} asks to be dialled, and has no part in the plan", code="admission")
        hosts, _ = _apart(self._config.addresses(peer_id))
        if not hosts:
            raise UnreachableError(f"{peer_id} asks to be dialled, and has no address", code="oneway")
        patience = self._config.channel.dial_timeout / len(hosts)

        def way(address: str) -> Way:
            return Way(lambda: self.reach(peer_id, address, patience, method=BACK), STAGGER_SECONDS)

        return await first_of([way(address) for address in hosts])

    async def _called(self, peer_id: str, pipe: Pipe) -> None:
        async def serve(whole: Pipe, first: bytes | None) -> None:
            assert self._on_channel is not None, "listen first"
            await self._channels.serve(peer_id, whole, self._on_channel, first)

        await self._gathering.serve(peer_id, pipe, serve)

    async def dial(self, peer_id: str, addresses: Sequence[str]) -> Channel:
        known = self._known.setdefault(peer_id, Known())
        tried = known.connections
        try:
            return await self._dial(peer_id, addresses, known)
        except UnreachableError:
            if tried == 1:
                raise
            known.connections = 1  # maybe more are the reason
            return await self._dial(peer_id, addresses, known)

    async def _dial(self, peer_id: str, addresses: Sequence[str], known: Known) -> Channel:
        route = Route(self, peer_id, tuple(addresses), self._choice, known, bbr=self._bbr)
        channel = await self._channels.open(peer_id, route.connect)
        if addresses or self.straight(peer_id, addresses):
            roundabout = self._relays is not None or self._p2p is not None
            watches = [route.tend, *([route.look] if roundabout else [])]
            looking = asyncio.create_task(watch(route, channel, watches))
            self._looking.add(looking)
            looking.add_done_callback(self._looking.discard)
        return channel

    def advise(self, text: str) -> None:
        """Tells the owner of this machine what would help, the first time only."""
        if not self._advised:
            self._advised = True
            log.warning("%s", text)

    def ways(self, peer_id: str, addresses: Sequence[str]) -> list[Way]:
        """Directly first, either way round, then over libp2p, then through relays."""
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
        if (ask := self._asking(peer_id, hosts, self._config.channel.dial_timeout)) is not None:
            ways.append(Way(ask, HEAD_START_SECONDS))
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
        if (ask := self._asking(peer_id, hosts, LOOK_TIMEOUT)) is not None:
            found.append(ask)
        if self._p2p is not None and places:
            found.append(partial(self._p2p.reach, peer_id, places, LOOK_TIMEOUT, direct=True))
        return found

    def _asking(self, peer_id: str, hosts: list[str], timeout: timedelta) -> Callable[[], Awaitable[Pipe]] | None:
        """How a peer is asked to dial us: if it has no address, and we have."""
        if self._relays is None or self._returns is None or hosts:
            return None
        return partial(self._returns.ask, self._relays, peer_id, timeout)

    async def reach(
        self, peer_id: str, address: str, timeout: timedelta, der: bytes | None = None, method: str = METHOD
    ) -> DiallerPipe:
        """A pipe straight to ``address``; ``der`` is the certificate that was seen there, if one was."""
        host, port = split_address(address)
        der = der or await fetch_certificate(host, port, timeout)
        # Here, for one that is turned away costs as much.
        self._config.channel.meter.record_connection(peer_id, dialled=True, proof=True)
        pipe = DiallerPipe(pinned_channel(join_address(host, port), der), f"/{SERVICE}/{method}", address, der)
        async with proving(pipe, f"at {address}", timeout):
            await prove_to_listener(pipe, self._identity, peer_id, fingerprint_of(der), self._config.run)
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
