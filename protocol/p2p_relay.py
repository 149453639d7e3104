"""``python -m potluck.protocol.p2p_relay``: a libp2p relay for runs, where workers behind routers meet.

It moves encrypted streams and knows nothing of runs. A relay takes 128 peers that wait to be called, and 16 calls of
each; so a run has several, at different addresses: from fewer than four, libp2p does not learn where a peer is seen
from outside, and punches no hole.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import click

from .errors import PotluckError, UnreachableError
from .identity import Identity, lock
from .multiaddr import Places
from .p2p import StreamPipe
from .p2pd import Daemon, DaemonConfig, DaemonError, Stream, with_port
from .pipe import PipeClosed

log = logging.getLogger(__name__)
PORT = 4001
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


async def serve(key: Path, config: DaemonConfig) -> None:
    """Until it is interrupted."""
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    with lock(key):
        relay = await start(Identity.load_or_create(key), config)
        try:
            for address in relay.addresses:
                click.echo(address)
            await ended.wait()
        finally:
            await relay.close()


@click.command()
@click.option("--key", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Its key; made if missing.")
@click.option(
    "--listen",
    multiple=True,
    default=[f"/ip4/0.0.0.0/tcp/{PORT}", f"/ip4/0.0.0.0/udp/{PORT}/quic-v1"],
    show_default=True,
    help="Multiaddr to listen at; several times for several.",
)
@click.option("--announce", multiple=True, help="Multiaddr to be told of instead: of a forwarded port, or a name.")
def main(key: Path, listen: tuple[str, ...], announce: tuple[str, ...]) -> None:
    """A libp2p relay. Prints the lines for a run's coordinator.p2p_relays."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        asyncio.run(serve(key, DaemonConfig(listen=listen, announce=announce, serves=True)))
    except PotluckError as error:
        sys.exit(f"p2p_relay: {error.one_line()}")


if __name__ == "__main__":
    main()
