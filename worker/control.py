"""The control stream: one long-lived connection to the coordinator, dialled again whenever it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc

from .. import __version__
from ..protocol import control_pb2 as pb
from ..protocol.errors import RefusedError, UnreachableError, WireError
from ..protocol.failpoints import failpoint_async
from ..protocol.frames import Purpose
from ..protocol.hello import PROTOCOL, STREAM, secret_proof, signed_part
from ..protocol.identity import Identity
from ..protocol.meter import Meter
from ..protocol.pipe import PathInfo
from ..protocol.plan import Plan, Replica, SavePoint
from ..protocol.ticket import Ticket
from ..protocol.tls import dial_pinned
from .offer import Offer
from .plan import View
from .reports import Reports

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 2.0
COORDINATOR = "coordinator"
FIRST_SECONDS, SOON_SECONDS, MOST_SECONDS = 0.5, 3.0, 10.0  # between two dials: the first, of a minute, of many
MINUTE_SECONDS = 60.0
CLOSE_SECONDS = 2.0
STREAM_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)  # what grpc raises when a call is over


def view_from(message: pb.View) -> View:
    """A view with its plan unpacked. ``WireError`` if it makes no sense."""
    return View(
        phase=message.phase,
        note=message.note,
        plan=Plan.from_proto(message.plan) if message.HasField("plan") else None,
        until=message.until,
        end=message.end,
        closing=message.closing,
        committed=message.committed,
        publish=message.publish if message.publishing else None,
        released=message.released,
        kept=tuple((k.stage, tuple(SavePoint.from_proto(p) for p in k.rounds)) for k in message.keep),
        prospect=(message.prospect.stage, SavePoint.from_proto(message.prospect.point))
        if message.HasField("prospect")
        else None,
        guests=tuple(Replica(peer=r.peer, addresses=tuple(r.addresses)) for r in message.guests),
    )


def reason(error: BaseException) -> str:
    """Why a call broke, in a word."""
    return error.code().name.lower() if isinstance(error, grpc.RpcError) else type(error).__name__


def pause_seconds(tries: int, broken_seconds: float) -> float:
    """How long to wait at most before dialling again, after ``tries`` in vain and so much time without a line."""
    most = SOON_SECONDS if broken_seconds < MINUTE_SECONDS else MOST_SECONDS
    return min(most, FIRST_SECONDS * 2.0 ** min(tries, 10))


def essence(welcome: pb.Welcome) -> dict[str, Any]:
    """What a worker does its work by: the run's settings without the coordinator's own."""
    settings: dict[str, Any] = json.loads(welcome.config)
    return {**settings, "coordinator": None}


class Control:
    """``welcome`` has the first welcome; ``ended`` gets the error that cannot be mended by dialling again."""

    def __init__(
        self,
        ticket: Ticket,
        identity: Identity,
        meter: Meter,
        savepoints: Callable[[], list[SavePoint]],
        on_view: Callable[[View], None],
        patience_minutes: float = 10.0,
    ) -> None:
        self.ticket, self.identity, self.meter = ticket, identity, meter
        self.savepoints, self.on_view = savepoints, on_view
        self.patience_minutes = patience_minutes
        self.welcome: asyncio.Future[pb.Welcome] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.state = "loading"
        self.connected = False
        self.idle: Callable[[], bool] = lambda: True  # whether the computing thread waits for somebody
        self.paths: Callable[[], dict[str, PathInfo]] = dict  # to the peers that it sends to
        self._loop = asyncio.get_running_loop()
        self._session = os.urandom(16)
        self._reports = Reports()
        self._unsent, self._acked = asyncio.Event(), asyncio.Event()
        self._closing = self._leaving = False
        self._again = False  # whether what the stream began with is not true any more
        self._welcomed = 0.0  # when the stream in use, or the last one, began
        self._sent = 0  # seq of the newest report written to the stream in use
        self._token = b""
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None

    def line(self) -> tuple[grpc.aio.Channel, bytes]:
        """The connection in use, and the token by which the coordinator knows this session."""
        assert self._channel is not None
        return self._channel, self._token

    def start(self, offer: Offer) -> None:
        self._offer = offer
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended_badly)

    async def close(self) -> None:
        """Ends the stream in order: first the reports that are not acknowledged yet, then the meter's last totals."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._reports and not self.ended.done():
                    self._acked.clear()
                    await self._acked.wait()
        self._closing = True
        self._unsent.set()
        if self._task:
            await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._channel:
            await self._channel.close()

    @property
    def is_gone(self) -> bool:
        """Whether the coordinator was given up."""
        error = self.ended.exception() if self.ended.done() else None
        return isinstance(error, UnreachableError) and error.code == "gone"

    def report(self, **body: object) -> None:
        """Queues a report, from any thread; it is repeated until the coordinator has it on disk."""

        def queue() -> None:
            self._reports.add(**body)
            self._unsent.set()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(queue)

    def leave(self, *, at_once: bool = False) -> None:
        """Asks to go; said again on every new connection until we are released. ``at_once``: says that we are gone."""
        self._leaving = True
        self.report(leaving=pb.Leaving(at_once=at_once))

    def withdraw_p2p(self) -> None:
        """There is no libp2p daemon, though the hello named one: says hello again without."""
        if self._offer.p2p:
            self._offer = replace(self._offer, p2p="")
            self._again = True
            self._unsent.set()

    async def _run(self) -> None:
        tries, broken = 0, self._loop.time()
        while True:
            began = self._loop.time()
            try:
                await self._connect()
            except (RefusedError, WireError) as error:
                if error.code != "silent":
                    self._end(error)
                    return
            except UnreachableError as error:
                if not self.welcome.done() or error.code == "certificate":
                    self._end(error)
                    return
                log.warning("the coordinator does not answer; dialling again: %s", error)
            if self._closing:
                return
            now = self._loop.time()
            if self._welcomed >= began:
                broken = now
                tries = 0 if now - self._welcomed > HEARTBEAT_SECONDS else tries
            if self.welcome.done() and now - broken > self.patience_minutes * 60.0:
                self._end(
                    UnreachableError(
                        f"the coordinator has not answered for {self.patience_minutes:g} minutes",
                        hint="This worker's part is saved: ask whether the run goes on, and run the same command.",
                        code="gone",
                    )
                )
                return
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_seconds(tries, now - broken))
            tries += 1

    def _ended_badly(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            log.error("the control stream failed", exc_info=error)
            self._end(error)

    def _end(self, error: Exception) -> None:
        if not self.welcome.done():
            self.welcome.set_exception(error)
            self.welcome.exception()
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()

    async def _connect(self) -> None:
        """One connection, until it breaks."""
        await failpoint_async("worker.control.dial", UnreachableError)
        channel = await dial_pinned(self.ticket.url, self.ticket.fingerprint)
        self.meter.record_connection(COORDINATOR, dialled=True)
        old, self._channel = self._channel, channel
        if old is not None:
            await old.close()
        method = channel.stream_stream(
            STREAM, request_serializer=pb.Up.SerializeToString, response_deserializer=pb.Down.FromString
        )
        stream = method()
        sender: asyncio.Task[None] | None = None
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                self._count("in", message.ByteSize())
                body = message.WhichOneof("body")
                if body == "challenge":
                    self._again = False
                    await self._write(stream, pb.Up(hello=self._hello(message.challenge.nonce)))
                elif body == "welcome":
                    self._token = message.welcome.token
                    self._reports.welcomed(message.welcome.acked)
                    self._acked.set()
                    self._welcomed, self._sent, self.connected = self._loop.time(), 0, True
                    if sender is None:
                        sender = asyncio.create_task(self._send(stream))
                    if not self.welcome.done():
                        self.welcome.set_result(message.welcome)
                    elif essence(message.welcome) != essence(self.welcome.result()):
                        raise RefusedError(
                            "the operator has changed the run's settings",
                            hint="Run the same command again.",
                            code="changed",
                        )
                    elif self._leaving:
                        self.report(leaving=pb.Leaving())
                elif body == "refuse":
                    refuse = message.refuse
                    raise RefusedError(refuse.text, hint=refuse.hint, code=refuse.code)
                elif body == "ack":
                    self._reports.acknowledged(message.ack.seq)
                    self._acked.set()
                elif body == "view":
                    await failpoint_async("worker.control.view", UnreachableError)
                    self.on_view(view_from(message.view))
            if not self.welcome.done():
                raise UnreachableError(
                    "the coordinator hung up without a word", hint="Look at its log, then join again."
                )
        except STREAM_ERRORS as error:
            raise UnreachableError(f"the stream broke ({reason(error)})") from None
        finally:
            self.connected = False
            if sender:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
            stream.cancel()

    async def _send(self, stream: grpc.aio.StreamStreamCall) -> None:
        """Reports as they come, a heartbeat now and then and one at the very end."""
        beat = self._loop.time()
        with contextlib.suppress(*STREAM_ERRORS):
            while True:
                self._unsent.clear()
                for up in self._reports.after(self._sent):
                    await self._write(stream, up)
                    self._sent = up.seq
                now = self._loop.time()
                if now >= beat or self._closing:
                    # Counted before it is written: the last totals include their own message.
                    self._count("out", pb.Up(heartbeat=self._heartbeat()).ByteSize())
                    await stream.write(pb.Up(heartbeat=self._heartbeat()))
                    beat = now + HEARTBEAT_SECONDS
                if self._closing or self._again:
                    await stream.done_writing()  # the coordinator has read it all when it ends the stream
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, beat - now)):
                        await self._unsent.wait()

    async def _write(self, stream: grpc.aio.StreamStreamCall, up: pb.Up) -> None:
        self._count("out", up.ByteSize())
        await stream.write(up)

    def _count(self, direction: str, nbytes: int) -> None:
        self.meter.record(COORDINATOR, "in" if direction == "in" else "out", Purpose.CONTROL, nbytes)

    def _hello(self, nonce: bytes) -> pb.Hello:
        ticket, identity, offer = self.ticket, self.identity, self._offer
        return pb.Hello(
            protocol=PROTOCOL,
            version=__version__,
            run=ticket.run,
            public_key=identity.public_bytes,
            signature=identity.sign(signed_part(nonce, ticket.fingerprint, ticket.run)),
            secret_proof=secret_proof(ticket.secret, nonce, identity.public_bytes),
            name=offer.name,
            device=offer.device,
            memory_gb=offer.memory_gb,
            speed=offer.speed,
            addresses=offer.addresses,
            p2p=offer.p2p,
            region=offer.region,
            upload_mbps=offer.upload_mbps,
            state_mbps=offer.state_mbps,
            threads=offer.threads,
            savepoints=[p.to_proto() for p in self.savepoints()],
            session=self._session,
        )

    def _heartbeat(self) -> pb.Heartbeat:
        return pb.Heartbeat(
            state=self.state,
            idle=self.idle(),
            traffic=[
                pb.Traffic(
                    peer=t.peer,
                    direction=t.direction,
                    purpose=t.purpose.value,
                    nbytes=t.nbytes,
                    dense_nbytes=t.dense_nbytes,
                )
                for t in self.meter.snapshot()
            ],
            links=[
                pb.Link(
                    peer=peer, path=p.kind, rtt_seconds=p.rtt_seconds or 0, bytes_per_second=p.bytes_per_second or 0
                )
                for peer, p in self.paths().items()
            ],
        )
