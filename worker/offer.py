"""What a volunteer decides about a machine, and what of it the coordinator is told."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from ..protocol.errors import ConfigError
from ..protocol.identity import Identity
from ..protocol.own_address import everywhere
from ..protocol.p2pd import is_installed
from ..protocol.ticket import Ticket
from ..protocol.tls import split_address
from .gate import Rules


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this machine brings."""

    name: str
    device: str
    memory_gb: float
    speed: float
    addresses: tuple[str, ...]
    p2p: str = ""  # the id of its libp2p daemon, if it can have one
    region: str = ""
    upload_mbps: float = 0.0  # 0: no limit
    state_mbps: float = 0.0
    threads: int = 0


Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a volunteer decides about this machine; what is left empty is decided by it."""

    data_dir: Path
    name: str = ""  # from the key
    host: str = ""  # this machine alone if the coordinator runs on it, else all its addresses
    port: int = 0
    memory_gb: float = 0.0  # the GPU's, or half of the machine's
    threads: int = 0  # half of the cores
    speed: float = 1.0
    device: str = "auto"  # a GPU if torch finds one
    patience_minutes: float = 10.0  # without the coordinator, before it gives up
    map_port: bool = False  # whether the router at home is asked to open a port for libp2p
    state_mbps: float = 50.0  # of the line, each way, for states of stages that peers take over; 0: no limit
    upload_mbps: float = 0.0  # of the line, for all that goes to peers and for publishing; 0: no limit
    region: str = ""  # where the owner says it is: shown to others, and nothing else
    rules: Rules = field(default_factory=Rules)  # when it may work

    def decided(self, ticket: Ticket, identity: Identity) -> WorkerConfig:
        """Everything filled in but ``device``. ``ConfigError`` for what cannot be done here."""
        if self.map_port and not is_installed():
            raise ConfigError(
                "--map-port needs libp2p, which is not installed",
                hint='In potluck\'s checkout: pip install -e ".[p2p]" (Linux, macOS), or leave it out.',
            )
        return replace(
            self,
            name=self.name or f"worker-{identity.peer_id[:6]}",
            host=self.host or ("127.0.0.1" if is_loopback(split_address(ticket.url)[0]) else everywhere()),
            memory_gb=self.memory_gb or psutil.virtual_memory().total / 2e9,
            threads=self.threads or max(1, (os.cpu_count() or 2) // 2),
        )

    def offer(self, addresses: list[str], p2p: str = "") -> Offer:
        return Offer(
            name=self.name,
            device=self.device,
            memory_gb=self.memory_gb,
            speed=self.speed,
            addresses=tuple(addresses),
            p2p=p2p,
            region=self.region,
            upload_mbps=self.upload_mbps,
            state_mbps=self.state_mbps,
            threads=self.threads,
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
