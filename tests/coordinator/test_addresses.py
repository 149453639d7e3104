"""Addresses that peers name: which may be named, and who must answer there."""

from __future__ import annotations

import pytest

from potluck.coordinator.addresses import confirmed, is_acceptable, is_local, seen_from
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.tls import Certificate
from potluck.protocol.transport import TransportConfig


@pytest.mark.parametrize("address", ["8.8.8.8:1024", "[2606:4700::1111]:65535"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_acceptable(address, lan=False)
    assert is_acceptable(address, lan=True)


@pytest.mark.parametrize(
    "address",
    ["192.168.1.5:5000", "10.0.0.1:5000", "127.0.0.1:5000", "[::1]:5000", "[fd00::1]:5000", "169.254.1.1:5000"],
)
def test_addresses_of_a_home(address: str) -> None:
    assert not is_acceptable(address, lan=False)
    assert is_acceptable(address, lan=True)


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8:1023", "8.8.8.8:22", "8.8.8.8:0", "8.8.8.8:65536", "8.8.8.8", "8.8.8.8:", ":5000", ""),
        *("example.org:5000", "localhost:5000", "0x7f000001:5000", "2130706433:5000", "127.1:5000", "08.8.8.8:5000"),
        *("0.0.0.0:5000", "[::]:5000", "224.0.0.1:5000", "[ff02::1]:5000", "255.255.255.255:5000", "240.0.0.1:5000"),
        *("8.8.8.8:5000/x", "user@8.8.8.8:5000", "8.8.8.8:5000\n", " 8.8.8.8:5000", "[::ffff:0.0.0.0]:5000"),
        *("[::ffff:224.0.0.1]:5000", "[8.8.8.8]:5000x"),
    ],
)
def test_addresses_that_nobody_may_name(address: str) -> None:
    assert not is_acceptable(address, lan=True)


def test_a_mapped_address_is_what_it_maps_to() -> None:
    assert not is_acceptable("[::ffff:127.0.0.1]:5000", lan=False)
    assert is_acceptable("[::ffff:127.0.0.1]:5000", lan=True)


def test_what_is_local() -> None:
    assert all(map(is_local, ("127.0.0.1", "192.168.0.3", "localhost", "::1")))
    assert not any(map(is_local, ("8.8.8.8", "potluck.example.org", "0.0.0.0")))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("ipv4:203.0.113.9:40000", ("203.0.113.9:7001", "203.0.113.9:7002")),
        ("ipv6:%5B2001:db8::9%5D:40000", ("[2001:db8::9]:7001", "[2001:db8::9]:7002")),
        ("ipv6:[2001:db8::9]:40000", ("[2001:db8::9]:7001", "[2001:db8::9]:7002")),
        *((source, ()) for source in ("unix:/tmp/x", "ipv4:", "ipv4:nonsense", "", "ipv4:1.2.3.4:0")),
    ],
)
def test_who_comes_through_a_router_may_be_reached_at_it(source: str, found: tuple[str, ...]) -> None:
    assert seen_from(source, ("192.168.1.2:7001", "10.0.0.2:7002")) == found


async def test_a_port_that_a_router_passes_on_is_found() -> None:
    """The worker names an address at home; the router, here loopback itself, passes its port on."""
    here = Identity.generate()
    transport = GrpcTransport(here, Certificate.generate(), TransportConfig(run="r"))
    try:
        (address,) = await transport.listen(lambda channel: None)
        named = ("192.0.2.7:" + address.rpartition(":")[2],)
        assert await confirmed(named, here.public_bytes, "r", lan=True) == ()
        wider = (*named, *seen_from("ipv4:127.0.0.1:50000", named))
        assert await confirmed(wider, here.public_bytes, "r", lan=True) == (address,)
    finally:
        await transport.close()


async def test_others_are_told_only_where_the_peer_itself_answers() -> None:
    here, other = Identity.generate(), Identity.generate()
    transport = GrpcTransport(here, Certificate.generate(), TransportConfig(run="r"))
    try:
        (address,) = await transport.listen(lambda channel: None)
        named = (address, "127.0.0.1:1", "example.org:5000", address)
        assert await confirmed(named, here.public_bytes, "r", lan=True) == (address,)
        assert await confirmed(named, here.public_bytes, "r", lan=False) == ()
        assert await confirmed(named, other.public_bytes, "r", lan=True) == ()
        assert await confirmed(named, here.public_bytes, "another run", lan=True) == ()
    finally:
        await transport.close()
