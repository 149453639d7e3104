"""Addresses of libp2p: what the daemon is given, and what is refused before it gets there."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from potluck.protocol.errors import UnreachableError
from potluck.protocol.multiaddr import Places, decode_id, encode, encode_id, id_of

ID = id_of(bytes(range(32)))
OTHER = id_of(bytes(32))


def test_bytes_are_those_of_the_specification() -> None:
    """Lengths and codes by hand, from the table of multiformats; an id is its 38 bytes as they are."""
    assert encode("/ip4/127.0.0.1/tcp/4001").hex() == "047f000001060fa1"
    assert encode("/ip6/::1/udp/9/quic-v1").hex() == "29" + "00" * 15 + "0191020009cd03"
    assert encode("/dns4/a.example/tcp/80").hex() == "3609" + b"a.example".hex() + "060050"
    with_relay = encode(f"/ip4/1.2.3.4/tcp/5/p2p/{ID}/p2p-circuit").hex()
    assert with_relay == "0401020304060005a50326002408011220" + bytes(range(32)).hex() + "a202"


def test_ids_are_read_back_and_look_like_those_of_libp2p() -> None:
    for _ in range(20):
        public = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        peer = id_of(public)
        assert peer.startswith("12D3KooW")
        assert encode_id(peer)[-32:] == public
        assert decode_id(encode_id(peer)) == peer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "ip4/1.2.3.4/tcp/5",
        "/ip4/1.2.3/tcp/5",
        "/ip4/::1/tcp/5",
        "/ip6/fe80::1%eth0/tcp/5",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/-1",
        "/ip4/1.2.3.4/tcp/٣",
        "/ip4/1.2.3.4/tcp",
        "/unix/tmp/socket",
        "/ip4/1.2.3.4/tcp/5/p2p/",
        f"/ip4/1.2.3.4/tcp/5/p2p/1{ID}",
        f"/ip4/1.2.3.4/tcp/5/p2p/{ID[:-1]}",
        f"/ip4/1.2.3.4/tcp/5/p2p/{'z' * 60}",
        "/ip4/1.2.3.4/tcp/5/p2p/" + "1" * 100_000,
        "/dns4/" + "a" * 300,
        "/ip4/1.2.3.4" * 100,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UnreachableError, match="is not where"):
        encode(text)


def test_addresses_lead_to_one_daemon() -> None:
    through = f"/ip4/1.2.3.4/tcp/5/p2p/{OTHER}/p2p-circuit"
    assert Places.of([f"/ip4/1.2.3.4/tcp/5/p2p/{ID}", f"{through}/p2p/{ID}"]) == (ID, ("/ip4/1.2.3.4/tcp/5", through))
    relays = [f"/ip4/1.2.3.4/tcp/5/p2p/{OTHER}", f"/dns4/a.example/tcp/6/p2p/{OTHER}"]
    assert Places.of([f"/p2p/{ID}"], relays) == (ID, tuple(relay + "/p2p-circuit" for relay in relays))
    for wrong in (
        [f"/p2p/{ID}"],
        [],
        [f"/ip4/1.2.3.4/tcp/5/p2p/{ID}", f"/ip4/1.2.3.4/tcp/5/p2p/{OTHER}"],
        ["/ip4/1.2.3.4/tcp/5"],
    ):
        with pytest.raises(UnreachableError):
            Places.of(wrong)
