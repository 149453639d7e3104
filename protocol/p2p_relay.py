"""``potluck relay p2p``: a libp2p relay for runs, where workers behind routers meet.

It moves encrypted streams and knows nothing of runs. A relay takes 128 peers that wait to be called, and 16 calls of
each; so a run has several, at different addresses: from fewer than four, libp2p does not learn where a peer is seen
from outside, and punches no hole.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from .errors import ConfigError, UnreachableError
from .identity import Identity, lock
from .multiaddr import Places, encode
from .own_address import advertised
from .p2p import StreamPipe
from .p2pd import Daemon, DaemonConfig, DaemonError, Stream, with_port
from .pipe import PipeClosed
from .tls import join_address, split_address

log = logging.getLogger(__name__)
PORT = 4001
KEY = "p2p.pem"
LOOPBACK = re.compile(r"/ip4/127\.|/ip6/::1/")
MOST_STARTS = 5
TRIAL = "/potluck/trial/1"
TRIAL_NBYTES = 256 * 1024  # two starts in ten end with a limit of 128 KiB for each call, if Go has more than one core
TRIAL_PATIENCE = timedelta(seconds=20)


async def start(identity: Identity, config: DaemonConfig) -> Daemon:
    """A relay through which as much was sent as must pass. ``DaemonError`` if none can be had."""
    for _ in range(MOST_STARTS):
        relay = Daemon(identity, config, TRIAL, _refuse)
        await relay.start()
        try:
            if await passes(f"{local(relay)}/p2p/{relay.peer}"):
                return relay
        except BaseException:
            await relay.close()
            raise
        await relay.close()
        log.warning("the relay does not let enough through; it is started again")
    raise DaemonError("no libp2p relay here: it does not let enough through", hint="see the log, then try again")


def local(relay: Daemon) -> str:
    """Where this machine itself dials it."""
    address = with_port(relay.config.listen[0], relay.addresses)
    return address.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/").replace("/ip6/::/", "/ip6/::1/")


async def passes(relay: str) -> bool:
    """Whether more than the small limit goes through a relay, between two daemons that are started for it."""
    got: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def count(stream: Stream) -> None:
        pipe, nbytes = _pipe(stream), 0
        with suppress(PipeClosed):
            while nbytes < TRIAL_NBYTES:
                nbytes += len(await pipe.recv())
            if not got.done():
                got.set_result(nbytes)
        await pipe.close()

    host = DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",), relays=(relay,))
    listener, caller = (Daemon(Identity.generate(), host, TRIAL, handler) for handler in (count, _refuse))
    try:
        await listener.start()
        await caller.start()
        async with asyncio.timeout(TRIAL_PATIENCE.total_seconds()):
            pipe = await _call(caller, Places(listener.peer, (f"{relay}/p2p-circuit",)))
            try:
                for _ in range(TRIAL_NBYTES // 32768):
                    await pipe.send(bytes(32768))
                return await got >= TRIAL_NBYTES
            finally:
                await pipe.close()
    except (TimeoutError, PipeClosed):
        return False
    finally:
        await asyncio.gather(listener.close(), caller.close())


async def _call(caller: Daemon, places: Places) -> StreamPipe:
    """Once the listener has its place at the relay, which takes it a second or two."""
    while True:
        with suppress(UnreachableError):
            return _pipe(await caller.open(places, TRIAL_PATIENCE))
        await asyncio.sleep(0.2)


def _pipe(stream: Stream) -> StreamPipe:
    return StreamPipe(stream.reader, stream.writer, "relayed" if stream.relayed else "punched")


async def _refuse(stream: Stream) -> None:
    stream.writer.transport.abort()


async def serving(
    folder: Path, stop: asyncio.Event, say: Callable[[str], None], *, host: str, port: int, advertise: str
) -> None:
    """Serves until ``stop``, with the key in ``folder``, by which others know it; says where it is.

    ``port`` of TCP and of UDP, 0 any; ``advertise``: HOST or HOST:PORT that others dial, if it is not that.
    ``DaemonError`` if it cannot be, ``ConfigError`` for a place that makes no sense.
    """
    config = placed(host, port, advertise)
    key = folder / KEY
    with lock(key):
        check_free(host, port)
        starting = asyncio.ensure_future(start(Identity.load_or_create(key), config))
        asked = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            for address in best(starting.result().addresses):
                say(f"Relay:   {address}")
            say("Put one of these lines into run.yaml, under coordinator: p2p_relays: [...], beside those of other")
            say("relays (four at different addresses, for holes to be punched), and start the coordinator again.")
            await asked
        finally:
            asked.cancel()
            starting.cancel()
            await asyncio.wait({starting})
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().close()


def placed(host: str, port: int, advertise: str) -> DaemonConfig:
    """A relay's daemon at ``host``, an address of this machine, that others dial at ``advertise``."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"--host {host[:100]}: not an address", hint="Give one of this machine, or 0.0.0.0 for all."
        ) from None
    announce: tuple[str, ...] = ()
    if advertise:
        try:
            name, own_port = split_address(advertised(advertise, host, port))
            announce = at(name, own_port)
            if not port or not all(map(encode, announce)):
                raise UnreachableError("which port is passed on to it is not known")
        except UnreachableError:
            raise ConfigError(
                f"--advertise {advertise[:100]}: not where others can dial",
                hint="Give HOST or HOST:PORT, and a --port that is not 0.",
            ) from None
    return DaemonConfig(listen=at(host, port), announce=announce, serves=True)


def check_free(host: str, port: int) -> None:
    """``UnreachableError`` if the port is taken: the daemon goes on with one of its two, and says nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM and os.name == "posix":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are over are none
                probe.bind((host, port))
        except OSError as error:
            raise UnreachableError(
                f"cannot listen on {join_address(host, port)} ({'TCP' if kind == socket.SOCK_STREAM else 'UDP'}):"
                f" {os.strerror(error.errno or 0)}",
                hint="choose another --port (0 takes any free one), or check --host",
                code="port",
            ) from None


def at(host: str, port: int) -> tuple[str, ...]:
    """The multiaddrs of both ways, TCP and QUIC."""
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{port}", f"/{kind}/{host}/udp/{port}/quic-v1"


def best(addresses: Sequence[str]) -> list[str]:
    """Those that workers elsewhere can dial, if there are any: no loopback beside others."""
    return [each for each in addresses if not LOOPBACK.match(each)] or list(addresses)
