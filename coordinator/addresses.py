"""What peers say of where they can be dialled is hostile input: others are told only what was tried.

An address must be a literal one of the internet (or of the network at home, where the run is for it), at a port that no
system service has, and whoever answers there must sign a nonce with the key of the peer that named it. So nobody can
point a swarm at somebody else's machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Iterable
from datetime import timedelta
from urllib.parse import unquote

import grpc

from ..protocol.errors import PotluckError, UnreachableError
from ..protocol.grpc_transport import confirm
from ..protocol.tls import join_address, split_address

LEAST_PORT = 1024
PATIENCE = timedelta(seconds=3)


def is_local(host: str) -> bool:
    """Whether ``host`` is no address of the internet, but one of this machine or its network."""
    if host == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (ip.is_private or ip.is_loopback) and not ip.is_unspecified


def is_acceptable(address: str, *, lan: bool) -> bool:
    """Whether a peer may name this address at all."""
    try:
        host, port = split_address(address)
        ip = ipaddress.ip_address(host)
    except (UnreachableError, ValueError):
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip
    reserved = ip.version == 4 and ip.is_reserved  # of IPv6, ::1 counts as reserved, too
    if ip.is_multicast or ip.is_unspecified or reserved or port < LEAST_PORT:
        return False
    return ip.is_global or (lan and (ip.is_private or ip.is_loopback))


def seen_from(source: str, addresses: Iterable[str]) -> tuple[str, ...]:
    """Where a peer may be that names ``addresses`` and whose stream comes from ``source`` (gRPC's ``ipv4:HOST:PORT``):
    behind a router that passes one of its ports on, it does not know its own address."""
    kind, _, place = unquote(source).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ()
    try:
        host, _ = split_address(place)
        return tuple(join_address(host, split_address(address)[1]) for address in addresses)
    except UnreachableError:
        return ()


async def confirmed(addresses: Iterable[str], public_key: bytes, run: str, *, lan: bool) -> tuple[str, ...]:
    """Those of ``addresses`` at which the holder of ``public_key`` answers, all tried at the same time."""

    async def answers(address: str) -> bool:
        nonce = os.urandom(32)
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                return await confirm(address, public_key, nonce, run, PATIENCE)
        except (PotluckError, TimeoutError, grpc.RpcError, grpc.aio.BaseError):
            return False

    tried = [address for address in dict.fromkeys(addresses) if is_acceptable(address, lan=lan)]
    answered = await asyncio.gather(*map(answers, tried))
    return tuple(address for address, yes in zip(tried, answered, strict=True) if yes)
