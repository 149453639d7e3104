"""A worker from its start to its end. Imports no torch, so that a wrong ticket is refused in a moment."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..protocol.errors import ConfigError
from ..protocol.identity import Identity, lock
from ..protocol.meter import Meter
from ..protocol.ticket import Ticket
from ..protocol.tls import dial_pinned, split_address
from .control import COORDINATOR, Offer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a volunteer decides about this machine; what is left empty is decided by it."""

    data_dir: Path
    name: str = ""  # from the key
    host: str = ""  # this machine alone if the coordinator runs on it, else all its addresses
    port: int = 0
    memory_gb: float = 0.0  # half of the machine's memory
    threads: int = 0  # half of the cores
    speed: float = 1.0
    device: str = "auto"  # a GPU if torch finds one

    def decided(self, ticket: Ticket, identity: Identity) -> WorkerConfig:
        """Everything filled in but ``device``."""
        return replace(
            self,
            name=self.name or f"worker-{identity.peer_id[:6]}",
            host=self.host or ("127.0.0.1" if is_loopback(split_address(ticket.url)[0]) else "0.0.0.0"),
            memory_gb=self.memory_gb or psutil.virtual_memory().total / 2e9,
            threads=self.threads or max(1, (os.cpu_count() or 2) // 2),
        )

    def offer(self, addresses: list[str]) -> Offer:
        return Offer(
            name=self.name,
            device=self.device,
            memory_gb=self.memory_gb,
            speed=self.speed,
            addresses=tuple(addresses),
        )


async def join(ticket: Ticket, config: WorkerConfig, leave: asyncio.Event, say: Say) -> str:
    """Works for a run until it is finished, stopped, or ``leave`` is set and the stage is handed over.

    Returns one line that says how it ended. Raises what a person must mend, as a ``PotluckError``.
    """
    key = config.data_dir / "identity.pem"
    identity = Identity.load_or_create(key)
    with lock(key):
        config = config.decided(ticket, identity)
        meter = Meter()
        probe = await dial_pinned(ticket.url, ticket.fingerprint)
        meter.record_connection(COORDINATOR, dialled=True)
        await probe.close()
        say("found the coordinator; loading torch")
        config = replace(config, device=await asyncio.to_thread(prepare_torch, config.threads, config.device))
        from .session import Session

        return await Session(ticket, config, identity, meter, say).run(leave)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare_torch(threads: int, device: str) -> str:
    """Loads torch and everything that uses it; the device to compute on."""
    import torch

    from . import session  # noqa: F401  (its import takes seconds: here it holds nothing up)

    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"this machine cannot compute on {device!r}", hint="Use --device cpu, or cuda where torch finds a GPU."
        ) from None
    return device
