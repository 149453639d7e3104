"""A peer with an address and one without, at either end of a stage's boundary: both lanes are direct."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from potluck.coordinator.relay import Relay
from potluck.protocol import route
from potluck.protocol.frames import Kind
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.plan import Plan, Replica
from potluck.protocol.relay import Spot
from potluck.protocol.tls import Certificate, join_address, start_server
from potluck.protocol.transport import TransportConfig
from potluck.worker.links import Links
from potluck.worker.mailbox import Address, Mailbox

from .test_links import PLAN, activation

SECRET = "a secret of the run"


@pytest.fixture
async def relay() -> AsyncIterator[tuple[Relay, Spot]]:
    certificate = Certificate.generate()
    made = Relay("r", SECRET, certificate.fingerprint)
    server, port = await start_server("127.0.0.1", 0, made.handlers(), certificate)
    yield made, Spot(join_address("127.0.0.1", port), certificate.fingerprint)
    await server.stop(None)


class Hidden:
    """Two peers' links over gRPC: everybody can dial the one, nobody the other."""

    def __init__(self, spot: Spot) -> None:
        self.spot, self.faults = spot, []
        self.seats = {}
        self.transports = {}

    async def __aenter__(self):
        self.links = {
            name: Links(Mailbox(), lambda peer, frame: None, lambda *fault: self.faults.append(fault))
            for name in ("public", "hidden")
        }
        for name, links in self.links.items():
            config = TransportConfig(run="r", admit=links.admit, addresses=links.addresses)
            self.transports[name] = GrpcTransport(Identity.generate(), Certificate.generate(), config)
            addresses = await links.start(self.transports[name])
            told = tuple(addresses) if name == "public" else ()
            self.transports[name].use_relays([self.spot], SECRET, dialable=bool(told))
            self.seats[name] = Replica(peer=self.transports[name].peer_id, addresses=told)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(links.close() for links in self.links.values()))

    def plan(self, first: str, generation: int = 1) -> Plan:
        last = next(name for name in self.seats if name != first)
        seats = (self.seats[first], self.seats[last])
        stages = tuple(replace(stage, replicas=(seat,)) for stage, seat in zip(PLAN.stages, seats, strict=True))
        return replace(PLAN, generation=generation, stages=stages)

    async def crosses(self, sender: str, receiver: str, step: int, generation: int = 1) -> None:
        peer = self.transports[sender].peer_id
        self.links[sender].post(self.transports[receiver].peer_id, activation(step, generation=generation))
        address = Address(generation, Kind.ACTIVATION, step, 0, 0, peer)
        _, frame = await asyncio.to_thread(self.links[receiver].mailbox.take, [address], 0, 10.0)
        assert frame.header.step == step


@pytest.mark.parametrize("first", ["public", "hidden"])
async def test_both_lanes_are_direct_whoever_has_the_lower_stage(relay, first):
    the_relay, spot = relay
    async with Hidden(spot) as pair:
        for name in ("public", "hidden"):
            pair.links[name].follow(pair.plan(first))
        for _ in range(200):
            if the_relay.attached == 2:
                break
            await asyncio.sleep(0.05)
        for step in range(3):
            await asyncio.gather(pair.crosses("public", "hidden", step), pair.crosses("hidden", "public", step))
        for name, links in pair.links.items():
            assert [path.kind for path in links.paths().values()] == ["direct"], name
        assert sum(usage.sent_nbytes for usage in the_relay.usage.values()) == 0
        assert pair.faults == []


async def test_a_plan_that_the_other_does_not_know_yet_is_waited_for(relay, monkeypatch):
    """It may hear of it between two tries; then it is called through the relay, and dials a moment later."""
    monkeypatch.setattr(route, "LOOKS_SECONDS", (0.2,))
    _, spot = relay
    async with Hidden(spot) as pair:
        pair.links["public"].follow(pair.plan("public"))
        sending = asyncio.create_task(pair.crosses("public", "hidden", 1))
        await asyncio.sleep(1)
        assert not sending.done()
        pair.links["hidden"].follow(pair.plan("public"))
        await sending
        for name in ("public", "hidden"):
            pair.links[name].follow(pair.plan("hidden", generation=2))
        await pair.crosses("public", "hidden", 2, generation=2)
        async with asyncio.timeout(10):
            while {path.kind for path in pair.links["public"].paths().values()} != {"direct"}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await pair.crosses("public", "hidden", 3, generation=2)
        assert pair.faults == []
