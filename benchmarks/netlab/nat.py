"""Routers that translate addresses, as data, and what they do to packets; no clock, no sockets, chance from a seed.

A home has one public address, its router's. What a host behind it sends gets that address and a port of the router's,
the *mapping*; what comes to a mapped port goes to the host, if the *filter* lets it. The kinds are RFC 4787's, for UDP
and for TCP; packets of anything else, and fragments, do not pass. A router here knows no TCP states: a mapping lives
until nothing has used it for its time, and whatever the host sends makes one.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from .profiles import positive

INSIDE, BETWEEN = "192.168.1.2", "100.64.0.2"  # of every host behind a router; of a router behind another
TCP, UDP = 6, 17
_CHECKSUMS = {TCP: 16, UDP: 6}  # where in the header
_LEAST_NBYTES = {TCP: 20, UDP: 8}
FIRST_PORT, LAST_PORT = 1024, 65535


@dataclass(frozen=True, kw_only=True)
class Nat:
    """``per_destination``: each destination sees another port, at random; else all see one, the host's if it is free.

    ``filters``: only who was sent to from a mapped port can send to it; else everybody can. A mapping ends after so
    many seconds without a packet either way.
    """

    per_destination: bool = False
    filters: bool = True
    udp_seconds: float = 30.0
    tcp_seconds: float = 300.0

    def __post_init__(self) -> None:
        positive(udp_seconds=self.udp_seconds, tcp_seconds=self.tcp_seconds)


# What a host can be behind, the router next to it first.
NATS: dict[str, tuple[Nat, ...]] = {
    "none": (),
    "port-keeping": (Nat(filters=False),),
    "port-restricted": (Nat(),),
    "symmetric": (Nat(per_destination=True),),
    "double": (Nat(), Nat()),
}


@dataclass(slots=True)
class _Mapping:
    key: tuple[object, ...]
    inside: int  # port
    outside: int  # port
    used: float  # when
    spoken_to: dict[bytes, float] = field(default_factory=dict)  # address and port, and when


class Router:
    """One router: ``out`` is for what its host sends, ``into`` for what comes to ``outside``. None: dropped."""

    def __init__(self, nat: Nat, *, inside: str, outside: str, chance: random.Random) -> None:
        self.nat, self._chance = nat, chance
        self._inside, self._outside = socket.inet_aton(inside), socket.inet_aton(outside)
        self._by_inside: dict[tuple[object, ...], _Mapping] = {}
        self._by_outside: dict[tuple[int, int], _Mapping] = {}

    def out(self, now: float, packet: bytes) -> bytes | None:
        if (at := _ports_at(packet)) is None or packet[12:16] != self._inside:
            return None
        protocol, port = packet[9], int.from_bytes(packet[at : at + 2])
        far = packet[16:20] + packet[at + 2 : at + 4]
        key = (protocol, port, far) if self.nat.per_destination else (protocol, port)
        mapping = self._by_inside.get(key)
        if mapping is None or self._is_over(protocol, mapping.used, now):
            mapping = self._map(protocol, key, port, now)
        mapping.used = mapping.spoken_to[far] = now
        return _with(packet, 12, self._outside, at, mapping.outside)

    def into(self, now: float, packet: bytes) -> bytes | None:
        if (at := _ports_at(packet)) is None:
            return None
        protocol, port = packet[9], int.from_bytes(packet[at + 2 : at + 4])
        mapping = self._by_outside.get((protocol, port))
        if mapping is None or self._is_over(protocol, mapping.used, now):
            return None
        far = packet[12:16] + packet[at : at + 2]
        spoken = mapping.spoken_to.get(far)
        if spoken is not None and not self._is_over(protocol, spoken, now):
            mapping.spoken_to[far] = now
        elif self.nat.filters:
            return None
        mapping.used = now
        return _with(packet, 16, self._inside, at + 2, mapping.inside)

    def forget(self) -> None:
        """As if it had been switched off and on."""
        self._by_inside.clear()
        self._by_outside.clear()

    def _is_over(self, protocol: int, used: float, now: float) -> bool:
        return now - used > (self.nat.tcp_seconds if protocol == TCP else self.nat.udp_seconds)

    def _map(self, protocol: int, key: tuple[object, ...], port: int, now: float) -> _Mapping:
        for (kind, outside), old in list(self._by_outside.items()):
            if self._is_over(kind, old.used, now):
                del self._by_outside[kind, outside], self._by_inside[old.key]
        outside = port
        while self.nat.per_destination or (protocol, outside) in self._by_outside:
            outside = self._chance.randint(FIRST_PORT, LAST_PORT)
            if (protocol, outside) not in self._by_outside:
                break
        made = _Mapping(key, port, outside, now)
        self._by_inside[key] = self._by_outside[protocol, outside] = made
        return made


class Chain:
    """The routers between a host and the internet, the host's own first."""

    def __init__(self, nats: Sequence[Nat], *, outside: str, seed: int) -> None:
        chance = random.Random(seed)
        ends = [INSIDE, *([BETWEEN] * (len(nats) - 1)), outside]
        self._routers = [Router(nat, inside=ends[k], outside=ends[k + 1], chance=chance) for k, nat in enumerate(nats)]

    def out(self, now: float, packet: bytes) -> bytes | None:
        for router in self._routers:
            if (translated := router.out(now, packet)) is None:
                return None
            packet = translated
        return packet

    def into(self, now: float, packet: bytes) -> bytes | None:
        for router in reversed(self._routers):
            if (translated := router.into(now, packet)) is None:
                return None
            packet = translated
        return packet

    def forget(self) -> None:
        for router in self._routers:
            router.forget()


def _ports_at(packet: bytes) -> int | None:
    """Where the ports of a whole IPv4 packet of TCP or UDP are."""
    if len(packet) < 28 or packet[0] >> 4 != 4 or packet[6] & 0x3F or packet[7]:
        return None
    at = (packet[0] & 0x0F) * 4
    return at if packet[9] in _CHECKSUMS and len(packet) >= at + _LEAST_NBYTES[packet[9]] else None


def _with(packet: bytes, address_at: int, address: bytes, port_at: int, port: int) -> bytes:
    """The packet with another address and port, and checksums that are right if they were (RFC 1624)."""
    changed = bytearray(packet)
    header = (packet[0] & 0x0F) * 4
    more = _sum(address) - _sum(packet[address_at : address_at + 4])
    _mend(changed, 10, more)
    checksum_at = header + _CHECKSUMS[packet[9]]
    if packet[9] == TCP or packet[checksum_at : checksum_at + 2] != b"\0\0":  # UDP may go without
        _mend(changed, checksum_at, more + port - int.from_bytes(packet[port_at : port_at + 2]))
    changed[address_at : address_at + 4] = address
    changed[port_at : port_at + 2] = port.to_bytes(2)
    return bytes(changed)


def _sum(address: bytes) -> int:
    return int.from_bytes(address[:2]) + int.from_bytes(address[2:])


def _mend(packet: bytearray, at: int, more: int) -> None:
    left = (0xFFFF - int.from_bytes(packet[at : at + 2]) + more) % 0xFFFF
    packet[at : at + 2] = (0xFFFF - left).to_bytes(2)
