"""The relays of a run from a peer's side: it stays attached so that others can call it, and calls others through them.

What goes through is TLS between the two peers (``tunnel.py``) and then the same proof as on a direct path: a relay sees
who talks to whom, when and how much, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta

import grpc

from .errors import PotluckError, UnreachableError, WireError
from .grpc_pipes import DiallerPipe
from .handshake import prove_to_dialler, prove_to_listener
from .identity import Identity
from .pipe import Pipe
from .relay import ANSWER, ATTACH, BEAT, BEAT_SECONDS, CALL, REFUSALS, RETURN, Ring, Spot, enter, rung, verdict
from .tls import Certificate, fetch_certificate, fingerprint_of, pinned_channel, split_address
from .transport import TransportConfig
from .tunnel import Tunnel

log = logging.getLogger(__name__)
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0  # seconds between two tries to attach
MOST_ANSWERS = 256  # calls that are being answered at a time

Serve = Callable[[str, Pipe], Awaitable[None]]
DialBack = Callable[[str], Awaitable[Pipe]]


class Relays:
    """``serve`` gets every peer that calls and has proven who it is, with its pipe; it closes the pipe. ``dial_back``
    makes a pipe straight to a peer that asks for it."""

    def __init__(
        self,
        identity: Identity,
        certificate: Certificate,
        config: TransportConfig,
        secret: str,
        serve: Serve,
        dial_back: DialBack,
    ) -> None:
        self._identity, self._certificate, self._config = identity, certificate, config
        self._secret, self._serve, self._dial_back = secret, serve, dial_back
        self._spots: dict[Spot, asyncio.Task[None]] = {}
        self._attached: set[Spot] = set()
        self._certificates: dict[Spot, bytes] = {}  # DER, once its fingerprint was seen to be right
        self._answers: set[asyncio.Task[None]] = set()

    @property
    def spots(self) -> list[Spot]:
        """Where others are called: relays that we are attached to ourselves first."""
        return sorted(self._spots, key=lambda spot: spot not in self._attached)

    def use(self, spots: Iterable[Spot]) -> None:
        """Stays attached to these from now on."""
        for spot in spots:
            if spot not in self._spots:
                self._spots[spot] = asyncio.create_task(self._stay(spot))

    async def call(self, peer_id: str, spot: Spot, timeout: timedelta) -> Pipe:
        """A pipe to that very peer. ``UnreachableError`` as from dialling it, or with a code of ``relay.REFUSALS``."""
        identity, run = self._identity, self._config.run
        pipe: Pipe | None = None
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                pipe = await self._dial(spot, CALL, timeout)
                await enter(pipe, identity, self._secret, spot, run, CALL, peer_id)
                pipe = tunnel = await Tunnel.dial(pipe)
                await prove_to_listener(tunnel, identity, peer_id, fingerprint_of(tunnel.certificate), run)
            self._config.channel.meter.record_connection(peer_id, dialled=True, proof=True)
            return tunnel
        except BaseException as error:
            if pipe is not None:
                await pipe.close()
            if isinstance(error, TimeoutError):
                raise UnreachableError(
                    f"{peer_id} does not answer through the relay at {spot.address}",
                    hint="check that it is running",
                    code="silent",
                ) from None
            if isinstance(error, WireError):
                raise UnreachableError(
                    f"what answers through the relay at {spot.address} is not a peer", code="identity"
                ) from None
            raise

    async def ask_to_dial(self, peer_id: str, timeout: timedelta) -> None:
        """Has a peer told, at one relay after the other, to dial us. It ends only badly, if that does not come about:
        ``UnreachableError`` with a code of ``relay.REFUSALS``. Cancel it once the peer is there."""
        failed = UnreachableError(f"there is no relay at which {peer_id} could be asked to dial")
        for spot in self.spots:
            raw: DiallerPipe | None = None
            try:
                raw = await self._dial(spot, RETURN, timeout)
                await enter(raw, self._identity, self._secret, spot, self._config.run, RETURN, peer_id)
            except WireError as error:
                failed = UnreachableError(f"what answers at {spot.address} is no relay: {error}")
            except UnreachableError as error:
                failed = error
            finally:
                if raw is not None:
                    await raw.close()
            if failed.code in ("admission", "oneway"):
                break  # the peer itself has answered
        raise failed

    async def close(self) -> None:
        tasks = [*self._spots.values(), *self._answers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _stay(self, spot: Spot) -> None:
        pause, told = FIRST_PAUSE, ""
        while True:
            try:
                raw = await self._dial(spot, ATTACH, self._config.channel.dial_timeout)
                beating: asyncio.Task[None] | None = None
                try:
                    await enter(raw, self._identity, self._secret, spot, self._config.run, ATTACH)
                    self._attached.add(spot)
                    pause, told = FIRST_PAUSE, ""
                    beating = asyncio.create_task(self._beat(raw))
                    while True:
                        self._ring(spot, rung(await raw.recv()))
                finally:
                    self._attached.discard(spot)
                    if beating is not None:
                        beating.cancel()
                    await raw.close()
            except PotluckError as error:
                if told != error.code:
                    told = error.code
                    log.info("relay %s: %s", spot.address, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_PAUSE)

    async def _beat(self, raw: DiallerPipe) -> None:
        with contextlib.suppress(PotluckError):  # who receives hears of it
            while True:
                await asyncio.sleep(BEAT_SECONDS)
                await raw.send(BEAT)

    def _ring(self, spot: Spot, ring: Ring) -> None:
        if len(self._answers) < MOST_ANSWERS:
            job = self._return(spot, ring) if ring.caller else self._answer(spot, ring.call)
            task = asyncio.create_task(job)
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def _answer(self, spot: Spot, call: bytes) -> None:
        patience = self._config.channel.dial_timeout
        with contextlib.suppress(PotluckError, TimeoutError):
            pipe: Pipe = await self._dial(spot, ANSWER, patience)
            try:
                async with asyncio.timeout(patience.total_seconds()):
                    await pipe.send(call)
                    pipe = await Tunnel.listen(pipe, self._certificate)
                    peer = await prove_to_dialler(pipe, self._identity, self._certificate.fingerprint, self._config)
                if peer is not None:
                    self._config.channel.meter.record_connection(peer, dialled=False, proof=True)
                    await self._serve(peer, pipe)
            finally:
                await pipe.close()

    async def _return(self, spot: Spot, ring: Ring) -> None:
        """Dials who asks for it; if that leads nowhere, the relay is told why."""
        with contextlib.suppress(PotluckError, TimeoutError):
            try:
                pipe = await self._dial_back(ring.caller)
            except UnreachableError as error:
                raw = await self._dial(spot, ANSWER, self._config.channel.dial_timeout)
                try:
                    await raw.send(ring.call)
                    await verdict(raw, error.code if error.code in REFUSALS else "oneway")
                finally:
                    await raw.close()
                return
            try:
                await self._serve(ring.caller, pipe)
            finally:
                await pipe.close()

    async def _dial(self, spot: Spot, method: str, timeout: timedelta) -> DiallerPipe:
        """A stream to the relay, on a connection of its own: one that is slow holds no other up."""
        channel: grpc.aio.Channel | None = None
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                if (der := self._certificates.get(spot)) is None:
                    der = await fetch_certificate(*split_address(spot.address), timeout)
                    if fingerprint_of(der) != spot.fingerprint:
                        raise UnreachableError(
                            f"another server answers at the relay's address {spot.address}",
                            hint="tell the operator",
                            code="certificate",
                        )
                    self._certificates[spot] = der
                channel = pinned_channel(spot.address, der)
                await channel.channel_ready()
        except BaseException as error:
            if channel is not None:
                await channel.close(None)
            if isinstance(error, TimeoutError):
                raise UnreachableError(
                    f"no answer from the relay at {spot.address}", hint="check that it is running", code="silent"
                ) from None
            raise
        return DiallerPipe(channel, method)
