"""Where this machine can be dialled, as far as it knows itself."""

from __future__ import annotations

import ipaddress
import socket

from .tls import join_address

EVERYWHERE, EVERYWHERE_V4 = "::", "0.0.0.0"  # wildcards to listen on: of both kinds of address, of IPv4 alone


def everywhere() -> str:
    """The wildcard that takes most: both kinds where one socket can do that."""
    return EVERYWHERE if socket.has_dualstack_ipv6() else EVERYWHERE_V4


def dialable(host: str) -> list[str]:
    """The addresses to dial for a server bound to ``host``: for a wildcard, those of the ways out, IPv6 first."""
    if host not in (EVERYWHERE, EVERYWHERE_V4):
        return [host]
    found = [way_out(socket.AF_INET6, "2001:db8::1")] if host == EVERYWHERE else []
    found.append(way_out(socket.AF_INET, "192.0.2.1"))
    return [address for address in found if address] or ["::1" if host == EVERYWHERE else "127.0.0.1"]


def advertised(advertise: str, host: str, port: int) -> str:
    """What is printed for others to dial: the configured name, or this machine's address (of IPv4) on its network."""
    if advertise:
        name, _, own_port = advertise.rpartition(":")
        return advertise if name and own_port.isdigit() else f"{advertise}:{port}"
    return join_address(host if host not in ("", EVERYWHERE, EVERYWHERE_V4) else dialable(EVERYWHERE_V4)[0], port)


def way_out(family: socket.AddressFamily, target: str) -> str:
    """This machine's address on the way to ``target``; empty if there is none that others can dial."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing; the addresses are reserved for documentation.
            probe.connect((target, 9))
            address = str(probe.getsockname()[0])
    except OSError:
        return ""
    return "" if ipaddress.ip_address(address).is_link_local else address
