"""Where a listener says that it can be dialled."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import pytest

from potluck.protocol import grpc_transport, own_address
from potluck.protocol.channel import Channel
from potluck.protocol.errors import UnreachableError
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.own_address import advertised, dialable
from potluck.protocol.p2pd import listen_at
from potluck.protocol.tls import Certificate, split_address
from potluck.protocol.transport import TransportConfig

pytestmark = pytest.mark.timeout(30)
WAYS = {socket.AF_INET6: "2001:db8::7", socket.AF_INET: "198.51.100.7"}


def made(host: str) -> GrpcTransport:
    return GrpcTransport(Identity.generate(), Certificate.generate(), TransportConfig(run="r"), host=host)


def test_a_wildcard_is_the_addresses_of_the_ways_out_ipv6_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_address, "way_out", lambda family, target: WAYS[family])
    assert dialable("::") == ["2001:db8::7", "198.51.100.7"]
    assert dialable("0.0.0.0") == ["198.51.100.7"]
    assert dialable("192.0.2.9") == ["192.0.2.9"]
    assert [advertised("", host, 7) for host in ("", "::", "0.0.0.0")] == ["198.51.100.7:7"] * 3
    assert advertised("", "::1", 7) == "[::1]:7"
    assert [advertised(name, "::", 7) for name in ("a.example", "a.example:9")] == ["a.example:7", "a.example:9"]
    monkeypatch.setattr(own_address, "way_out", lambda family, target: "")
    assert (dialable("::"), dialable("0.0.0.0")) == (["::1"], ["127.0.0.1"])


def test_the_wildcard_of_both_kinds_is_two_to_the_daemon() -> None:
    both = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1", "/ip6/::/tcp/0", "/ip6/::/udp/0/quic-v1")
    assert listen_at("::") == both
    assert listen_at("0.0.0.0") == both[:2]
    assert listen_at("::1") == ("/ip6/::1/tcp/0", "/ip6/::1/udp/0/quic-v1")


def test_an_address_that_leads_to_the_next_machine_only_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        def __init__(self, *kind: object) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *error: object) -> None: ...
        def connect(self, place: object) -> None: ...
        def getsockname(self) -> tuple[str, int]:
            return "fe80::1", 9

    monkeypatch.setattr(socket, "socket", Probe)
    assert own_address.way_out(socket.AF_INET6, "2001:db8::1") == ""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_one_listener_takes_both_kinds() -> None:
    here, there = made("::"), made("127.0.0.1")
    taken: asyncio.Queue[Channel] = asyncio.Queue()
    try:
        addresses = await here.listen(taken.put_nowait)
        assert all(ipaddress.ip_address(split_address(address)[0]) for address in addresses)
        port = split_address(addresses[0])[1]
        for host in ("[::1]", "127.0.0.1"):
            await there.dial(here.peer_id, [f"{host}:{port}"])
            assert (await taken.get()).peer_id == there.peer_id
    finally:
        await there.close()
        await here.close()


async def test_where_ipv6_is_switched_off_it_listens_without(monkeypatch: pytest.MonkeyPatch) -> None:
    start, tried = grpc_transport.start_server, []

    async def without(host: str, *rest: object) -> object:
        tried.append(host)
        if host == "::":
            raise UnreachableError("cannot listen", code="port")
        return await start(host, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(grpc_transport, "start_server", without)
    here = made("::")
    try:
        addresses = await here.listen(lambda channel: None)
        assert tried == ["::", "0.0.0.0"]
        assert ipaddress.ip_address(split_address(addresses[0])[0]).version == 4
    finally:
        await here.close()
