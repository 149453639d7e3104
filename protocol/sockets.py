"""What the operating system tells of our own TCP connections, and lets us choose: Linux only, nothing elsewhere.

gRPC keeps its sockets to itself, so they are found among this process's descriptors by the address at their other end.
Never anybody else's: what is read is ``/proc/self/fd``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_LINUX = sys.platform == "linux"
_TCP_CONGESTION, _TCP_INFO = 13, 11
_NAME_NBYTES = 16
# struct tcp_info of include/uapi/linux/tcp.h: it only ever grows at its end.
_RTT = struct.Struct("=68xI")
_TOTAL_RETRANS = struct.Struct("=100xI")
_MIN_RTT = struct.Struct("=148xI")
_DATA_SEGS_OUT = struct.Struct("=156xI")
BBR = "bbr"


class Sent(NamedTuple):
    """Segments with data that connections have sent, repeated ones included, and how many were repeated.

    ``wait``: the round trip now over the shortest of the last minutes. Where a line is full, its queue is in it.
    """

    segments: int = 0
    repeated: int = 0
    wait: float = 1.0

    @property
    def loss(self) -> float:
        """The share that was repeated."""
        return self.repeated / max(1, self.segments)


def connections(address: tuple[str, int]) -> Iterator[tuple[int, socket.socket]]:
    """Our TCP connections to the host and port ``address`` (a literal IP), each with a number of its own. Each socket
    is a copy that is closed when the next one is asked for."""
    if not _LINUX:
        return
    try:
        wanted = ipaddress.ip_address(address[0]), address[1]
        names = os.listdir("/proc/self/fd")
    except (ValueError, OSError):
        return
    for name in names:
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if not link.startswith("socket:["):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    host, port = found.getpeername()[:2]
                    ip = ipaddress.ip_address(host.partition("%")[0])
                    if (getattr(ip, "ipv4_mapped", None) or ip, port) == wanted:
                        yield int(link[8:-1]), found


def congestion_of(found: socket.socket) -> str:
    """The congestion control of a connection, as the kernel names it; empty if it does not say."""
    with contextlib.suppress(OSError):
        return found.getsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, _NAME_NBYTES).split(b"\0")[0].decode()
    return ""


def in_use(address: tuple[str, int]) -> str:
    """The congestion control of our connections to ``address``, joined by ``+`` if they differ; empty if unknown."""
    return "+".join(sorted({congestion_of(found) for _, found in connections(address)} - {""}))


def prefer(name: str, address: tuple[str, int]) -> str:
    """Asks for a congestion control on all connections to ``address``; which one they have then, empty if unknown.

    A kernel that lacks it, or does not allow it to users (``net.ipv4.tcp_allowed_congestion_control``), keeps its own.
    """
    for _, found in connections(address):
        if congestion_of(found) not in ("", name):
            with contextlib.suppress(OSError):
                found.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, name.encode())
    return in_use(address)


def sent(found: socket.socket) -> Sent | None:
    """From ``TCP_INFO``; None if this kernel does not tell."""
    with contextlib.suppress(OSError, struct.error):
        info = found.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        segments, repeated, trip, least = (
            field.unpack_from(info)[0] for field in (_DATA_SEGS_OUT, _TOTAL_RETRANS, _RTT, _MIN_RTT)
        )
        return Sent(segments, repeated, trip / max(1, min(trip, least)))
    return None


@dataclass
class Losses:
    """What was sent to ``address`` since it was asked last, over all our connections there."""

    address: tuple[str, int]
    _known: dict[int, Sent] = field(default_factory=dict)

    def since(self) -> Sent | None:
        """None where the system does not tell, or there is no connection."""
        now = {number: told for number, found in connections(self.address) if (told := sent(found)) is not None}
        before, self._known = self._known, now
        if not now:
            return None
        grown = [(told, before.get(number, Sent())) for number, told in now.items()]
        segments = sum(a.segments - b.segments for a, b in grown)
        waits = sum((a.segments - b.segments) * a.wait for a, b in grown)
        return Sent(segments, sum(a.repeated - b.repeated for a, b in grown), waits / segments if segments else 1.0)
