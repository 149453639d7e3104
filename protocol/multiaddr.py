"""Where a libp2p daemon is, as libp2p writes it: ``/ip4/192.0.2.1/tcp/4001/p2p/12D3Koo...``, in text and in bytes.

Codes are those of multiformats' table (multicodec). hivemind has a coder of its own, but it takes the id of an Ed25519
key for something else, so that the daemon refuses every address through a relay.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from .errors import ConfigError, UnreachableError

MOST_PARTS = 16
ID_NBYTES = 38  # of an Ed25519 key: it holds the key itself
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # base58
_ID_HEAD = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))  # "as it is", 36 bytes: a protobuf with an Ed25519 key in it
_CODES = {"ip4": 4, "tcp": 6, "ip6": 41, "dns": 53, "dns4": 54, "dns6": 55, "udp": 273, "p2p-circuit": 290}
_CODES |= {"p2p": 421, "quic-v1": 461}
_ALONE = frozenset({"p2p-circuit", "quic-v1"})  # no value follows


ANYWHERE = "/p2p/"  # an address that is only an id: the daemon can be called at the relays of the run


class Places(NamedTuple):
    """A daemon, and where it can be dialled: addresses without its id."""

    peer: str
    addresses: tuple[str, ...]

    @classmethod
    def of(cls, addresses: Sequence[str], relays: Sequence[str] = ()) -> Places:
        """``UnreachableError`` unless all lead to one daemon. An id alone stands for a place at each of ``relays``."""
        ends = [
            place.rpartition("/p2p/")
            for address in addresses
            for place in ([r + "/p2p-circuit" + address for r in relays] if is_only_id(address) else [address])
        ]
        peers = {peer for _, _, peer in ends}
        if len(peers) != 1 or not all(place for place, _, _ in ends):
            raise UnreachableError("these are not the addresses of one libp2p daemon", hint="tell the operator")
        for place, _, peer in ends:
            encode(f"{place}/p2p/{peer}")
        return cls(peers.pop(), tuple(place for place, _, _ in ends))


def check_relay(text: str) -> None:
    """``ConfigError`` unless it is a daemon's address, with its id."""
    try:
        Places.of([text])
    except UnreachableError:
        raise ConfigError(
            f"{text[:200]!r} is not a libp2p relay",
            hint="Copy a line that `potluck relay p2p` prints: /ip4/.../tcp/.../p2p/...",
        ) from None


def is_multiaddr(address: str) -> bool:
    """Rather than ``host:port``."""
    return address.startswith("/")


def is_only_id(address: str) -> bool:
    return address.startswith(ANYWHERE) and address.count("/") == 2


def is_relayed(address: str) -> bool:
    """Whether a connection with this far end runs through a relay."""
    return "/p2p-circuit" in address


def encode(address: str) -> bytes:
    """As the daemon wants it. ``UnreachableError`` for anything that is no address of ours."""
    try:
        start, *words = address.split("/")
        if start or not words or len(words) > 2 * MOST_PARTS:
            raise ValueError
        parts, left = [], iter(words)
        for name in left:
            value = b"" if name in _ALONE else _value(name, next(left, ""))
            parts.append(_varint(_CODES[name]) + value)
    except (ValueError, KeyError):
        raise UnreachableError(f"{address[:100]!r} is not where a libp2p daemon is", hint="tell the operator") from None
    return b"".join(parts)


def encode_id(peer: str) -> bytes:
    """The bytes of a daemon's id. ``ValueError`` unless it is that of an Ed25519 key."""
    number = 0
    for letter in peer if len(peer) <= 60 else "":
        number = 58 * number + _ALPHABET.index(letter)
    # Its first byte is 0, for which base58 has a letter of its own.
    data = number.to_bytes(ID_NBYTES, "big") if number < 256**ID_NBYTES else b""
    if not data.startswith(_ID_HEAD) or decode_id(data) != peer:
        raise ValueError(f"{peer[:60]!r} is no Ed25519 key's id")
    return data


def decode_id(data: bytes) -> str:
    text, number = "", int.from_bytes(data, "big")
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return _ALPHABET[0] * (len(data) - len(data.lstrip(b"\0"))) + text


def id_of(public: bytes) -> str:
    """The id of the daemon with this Ed25519 key (32 bytes)."""
    return decode_id(_ID_HEAD + public)


def _value(name: str, text: str) -> bytes:
    if name in ("ip4", "ip6"):
        ip = ipaddress.ip_address(text)
        if ip.version != int(name[2]) or "%" in text:
            raise ValueError
        return ip.packed
    if name in ("tcp", "udp"):
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536):
            raise ValueError
        return int(text).to_bytes(2, "big")
    data = encode_id(text) if name == "p2p" else text.encode("ascii")
    if not 0 < len(data) < 254:
        raise ValueError
    return _varint(len(data)) + data


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])
