"""A worker announces the libp2p daemon that it has, and takes that back if there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from potluck.protocol import control_pb2 as pb
from potluck.protocol.hello import STREAM
from potluck.protocol.identity import Identity
from potluck.protocol.meter import Meter
from potluck.protocol.multiaddr import id_of
from potluck.protocol.p2pd import DaemonError
from potluck.protocol.ticket import Ticket
from potluck.protocol.tls import Certificate, start_server
from potluck.worker.control import Control
from potluck.worker.offer import Offer
from potluck.worker.session import Session

ID = id_of(bytes(range(32)))
RELAY = f"/ip4/192.0.2.1/tcp/4001/p2p/{id_of(bytes(32))}"
OFFER = Offer(name="anna", device="cpu", memory_gb=8.0, speed=1.0, addresses=())


class Listener:
    """A coordinator that only listens: what it was told, hello by hello."""

    def __init__(self) -> None:
        self.hellos: asyncio.Queue[pb.Hello] = asyncio.Queue()
        self.reports: list[int] = []

    async def start(self) -> Ticket:
        certificate = Certificate.generate()
        _, service, method = STREAM.split("/")
        handler = grpc.stream_stream_rpc_method_handler(self.serve, pb.Up.FromString, pb.Down.SerializeToString)
        handlers = [grpc.method_handlers_generic_handler(service, {method: handler})]
        self.server, port = await start_server("127.0.0.1", 0, handlers, certificate)
        return Ticket(url=f"127.0.0.1:{port}", fingerprint=certificate.fingerprint, run="r", secret="s", expires=2**31)

    async def serve(self, requests: AsyncIterator[pb.Up], context: Any) -> AsyncIterator[pb.Down]:
        yield pb.Down(challenge=pb.Challenge(nonce=bytes(32)))
        self.hellos.put_nowait((await anext(aiter(requests))).hello)
        yield pb.Down(welcome=pb.Welcome(config="{}", token=bytes(16), p2p_relays=[RELAY]))
        async for up in requests:
            if up.seq:
                self.reports.append(up.seq)
                yield pb.Down(ack=pb.Ack(seq=up.seq))


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    made = Listener()
    yield made
    await made.server.stop(None)


@pytest.mark.parametrize("works", [True, False])
async def test_a_daemon_that_does_not_start_is_announced_no_more(listener: Listener, works: bool) -> None:
    control = Control(await listener.start(), Identity.generate(), Meter(), list, lambda view: None)
    said: list[str] = []

    async def use_p2p(config: Any) -> list[str]:
        assert config.relays == (RELAY,)
        if works:
            return []
        raise DaemonError("no libp2p here")

    session: Any = SimpleNamespace(
        control=control, say=said.append, config=SimpleNamespace(host="127.0.0.1", map_port=False)
    )
    transport: Any = SimpleNamespace(use_p2p=use_p2p)
    control.start(replace(OFFER, p2p=ID))
    try:
        async with asyncio.timeout(20):
            welcome = await control.welcome
            assert (await listener.hellos.get()).p2p == ID
            await Session.use_p2p(session, transport, welcome)
            if not works:
                again = await listener.hellos.get()
                assert again.p2p == ""
                assert (again.name, len(said)) == ("anna", 1)
            control.report(leaving=pb.Leaving())
            while not listener.reports:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert listener.hellos.empty()
        assert not control.ended.done()
    finally:
        await control.close()


async def test_what_was_never_announced_is_not_taken_back(listener: Listener) -> None:
    control = Control(await listener.start(), Identity.generate(), Meter(), list, lambda view: None)
    control.start(OFFER)
    try:
        async with asyncio.timeout(20):
            await control.welcome
        control.withdraw_p2p()
        await asyncio.sleep(1)
        assert listener.hellos.qsize() == 1
    finally:
        await control.close()
