"""hivemind's libp2p daemon as a child of ours: confined, asked with time-outs, and started again when it dies.

hivemind is imported in ``_hivemind`` alone, for it imports torch; what it lacks is set right here. The daemon has a key
of its own, derived from the peer's: it is an old program that listens to the network, so it never holds the peer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from . import confined
from .errors import PotluckError, UnreachableError
from .frames import one_line
from .identity import Identity
from .multiaddr import Places, encode, id_of, is_relayed
from .own_address import EVERYWHERE, EVERYWHERE_V4

log = logging.getLogger(__name__)
START_SECONDS = 20.0  # it takes 0.3-1.7 on a small machine
STOP_SECONDS = 3.0
FIRST_PAUSE, LAST_PAUSE = 0.5, 60.0  # seconds before it is started again
STEADY_SECONDS = 60.0  # one that lived for so long is started again at once

Handler = Callable[["Stream"], Awaitable[None]]


class DaemonError(PotluckError):
    """There is no daemon. Peers are reached over gRPC all the same."""

    code = "p2p"


@dataclass(frozen=True, kw_only=True)
class DaemonConfig:
    """Multiaddrs to listen at, those to tell others instead, if any, and those of relays, with their ids.

    ``serves``: it is a relay for others, itself. ``map_port`` asks the router at home to let peers in (UPnP, NAT-PMP).
    """

    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    serves: bool = False
    map_port: bool = False


class Stream(NamedTuple):
    """A raw byte stream with the daemon ``peer`` (a libp2p id); ``relayed`` as the connection is that it runs on."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    peer: str
    relayed: bool


class _Encoded(NamedTuple):
    """An address, as hivemind asks for its bytes."""

    data: bytes

    def to_bytes(self) -> bytes:
        return self.data


class Daemon:
    """``handler`` gets every stream that a peer opens with ``protocol``, and closes it."""

    def __init__(self, identity: Identity, config: DaemonConfig, protocol: str, handler: Handler) -> None:
        self._key = key_of(identity)
        self.peer = name_of(identity)
        self.addresses: tuple[str, ...] = ()
        self.config, self._protocol, self._handler = config, protocol, handler
        self._listen = config.listen
        self._p2p: Any = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._p2p is None else self._p2p._child.pid

    async def start(self) -> None:
        """``DaemonError`` if it does not run. From then on it does, until ``close``, but for moments."""
        await self._launch()
        self._keeping = asyncio.create_task(self._keep())

    async def open(self, places: Places, timeout: timedelta) -> Stream:
        """A new stream to a daemon: on a connection that there is, the best, else dialled at its addresses.

        They are given even if it should be known: the daemon's own search fails for one in twenty that has just come.
        """
        p2p = self._p2p
        if p2p is None:
            raise UnreachableError("the libp2p daemon is not running", hint="see the log", code="p2p")
        tools = _hivemind()
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                peer = tools.PeerID.from_base58(places.peer)
                await p2p._client.connect(peer, [_Encoded(encode(address)) for address in places.addresses])
                info, reader, writer = await p2p.call_binary_stream_handler(peer, self._protocol)
        except TimeoutError:
            why = f"no answer within {timeout.total_seconds():g} s"
        except (OSError, EOFError, ValueError, tools.P2PDaemonError) as error:
            why = one_line(str(error))
        else:
            return Stream(reader, writer, places.peer, is_relayed(str(info.addr)))
        raise UnreachableError(f"{places.peer[-8:]} is not reached over libp2p: {why}", hint="check that it is running")

    async def identify(self) -> tuple[str, ...]:
        """The multiaddrs at which the daemon believes it can be dialled by now, those through relays among them."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STOP_SECONDS):
                name, found = await self._p2p._client.identify()
                self.addresses = tuple(f"{address}/p2p/{name.to_base58()}" for address in found)
        return self.addresses

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        await self._stop()

    async def _keep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            since = time.monotonic()
            code = await self._p2p._child.wait()
            log.warning("the libp2p daemon has ended (%s); it is started again, peers stay reachable over gRPC", code)
            await self._stop()
            if time.monotonic() - since > STEADY_SECONDS:
                pause = FIRST_PAUSE
            told = False
            while self._p2p is None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE)
                try:
                    await self._launch()
                except DaemonError as error:
                    if not told:
                        told = True
                        log.warning("%s", error)

    async def _launch(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="potluck-p2p-"))  # of ours alone: the key, and sockets to the daemon
        made: list[Any] = []
        try:
            tools = await asyncio.to_thread(_hivemind)
            async with asyncio.timeout(START_SECONDS):
                identity = folder / "key"
                self._write_key(identity)
                p2p = await self._class(tools, folder, made).create(
                    host_maddrs=self._listen,
                    announce_maddrs=self.config.announce or None,
                    identity_path=str(identity),
                    check_if_identity_free=False,  # it reads RSA keys alone, and asks the network
                    dht_mode="client",
                    nat_port_map=self.config.map_port,
                    auto_nat=True,  # hole punching is off without
                    force_reachability="public" if self.config.serves else "private" if self.config.relays else None,
                    use_auto_relay=bool(self.config.relays),
                    trusted_relays=self.config.relays or None,
                    startup_timeout=START_SECONDS / 2,
                )
                await p2p.add_binary_stream_handler(self._protocol, self._handle)
                assert p2p.peer_id.to_base58() == self.peer
                await _share(Path(p2p._client_listen_maddr["unix"]))
        except BaseException as error:
            for p2p in made:
                await _end(p2p)
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, Exception):
                why = one_line(str(error)) or type(error).__name__
                raise DaemonError(
                    f"no libp2p here, peers are reached over gRPC alone: {why}",
                    hint='pip install -e ".[p2p]" (Linux, macOS)',
                ) from None
            raise
        finally:
            (folder / "key").unlink(missing_ok=True)
        self._p2p, self._folder = p2p, folder
        await self.identify()
        # The next one listens at the same ports: others were told of them.
        self._listen = tuple(with_port(address, self.addresses) for address in self._listen)

    def _class(self, tools: Any, folder: Path, made: list[Any]) -> Any:
        """hivemind's ``P2P`` with what it has no argument for. ``made`` gets the instance before anything runs."""
        one_core = "1" if self.config.serves else "0"
        launcher = [sys.executable, "-I", "-S", confined.__file__, str(os.getpid()), one_core]

        class Confined(tools.P2P):
            _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

            def __init__(self) -> None:
                super().__init__()
                self._daemon_listen_maddr = self._client_listen_maddr = None  # it is ended before it has them, too
                made.append(self)

            @staticmethod
            def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
                # Else it waits for three minutes before it asks fewer than four relays.
                return [*launcher, *tools.P2P._make_process_args(*args, **kwargs, relayDiscovery=False)]

        return Confined

    def _write_key(self, path: Path) -> None:
        """In libp2p's own coding: a protobuf of the kind of key (Ed25519 is 1) and of both halves."""
        public = self._key.public_key().public_bytes_raw()
        path.touch(mode=0o600)
        path.write_bytes(b"\x08\x01\x12\x40" + self._key.private_bytes_raw() + public)
        if os.geteuid() == 0:
            for each in (path.parent, path):
                os.chown(each, confined.NOBODY, confined.NOBODY)

    async def _handle(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._handler(Stream(reader, writer, info.peer_id.to_base58(), is_relayed(str(info.addr))))

    async def _stop(self) -> None:
        if self._p2p is not None:
            p2p, self._p2p = self._p2p, None
            await _end(p2p)
            shutil.rmtree(self._folder, ignore_errors=True)


def key_of(identity: Identity) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(identity.derive(b"potluck libp2p key 1"))


def name_of(identity: Identity) -> str:
    """The id of a peer's daemon, whether it runs or not."""
    return id_of(key_of(identity).public_key().public_bytes_raw())


def is_installed() -> bool:
    return importlib.util.find_spec("hivemind") is not None


def preload() -> None:
    """Imports what is slow to import. What is wrong with it is told of when it is used."""
    with contextlib.suppress(Exception):
        _hivemind()


def listen_at(host: str) -> tuple[str, ...]:
    """Any free ports of an address of this machine, over TCP and over QUIC. To the daemon, ``::`` is IPv6 alone."""
    hosts = (EVERYWHERE_V4, EVERYWHERE) if host == EVERYWHERE else (host,)
    places = [f"/ip{6 if ':' in each else 4}/{each}" for each in hosts]
    return tuple(f"{place}/{way}" for place in places for way in ("tcp/0", "udp/0/quic-v1"))


def with_port(address: str, found: Sequence[str]) -> str:
    """A multiaddr to listen at, with the port that was found for its 0."""
    for way in ("tcp", "udp"):
        if f"/{way}/0" in address:
            tail = "/quic-v1" if way == "udp" else "/p2p/"
            ports = (re.fullmatch(rf"/ip[46]/[^/]+/{way}/(\d+){tail}.*", each) for each in found)
            if port := next((match[1] for match in ports if match), None):
                return address.replace(f"/{way}/0", f"/{way}/{port}")
    return address


async def _share(socket: Path) -> None:
    """Lets the daemon, which is nobody, call this socket of ours, once it is there."""
    while not os.path.exists(socket):  # noqa: ASYNC110, ASYNC240  (hivemind says nothing when it listens)
        await asyncio.sleep(0.01)
    if os.geteuid() == 0:
        os.chown(socket, confined.NOBODY, confined.NOBODY)


async def _end(p2p: Any) -> None:
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await p2p.shutdown()
    except TimeoutError:
        p2p._child.kill()
        await p2p._child.wait()


class _Tools(NamedTuple):
    P2P: Any
    PeerID: Any
    Multiaddr: Any
    P2PDaemonError: Any


_tools: _Tools | None = None


def _hivemind() -> _Tools:
    """What is used of it; whatever its import raises."""
    global _tools
    if _tools is None:
        from hivemind.p2p import P2P, P2PDaemonError, PeerID
        from hivemind.utils.logging import use_hivemind_log_handler
        from hivemind.utils.multiaddr import Multiaddr

        use_hivemind_log_handler("nowhere")
        logging.getLogger("hivemind").setLevel(logging.ERROR)
        logging.addLevelName(logging.WARNING, "WARNING")  # it renames it for everybody
        _tools = _Tools(P2P, PeerID, Multiaddr, P2PDaemonError)
    return _tools
