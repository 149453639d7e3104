"""A worker from its start to its end. Imports no torch, so that a wrong ticket is refused in a moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ..protocol.errors import ConfigError
from ..protocol.footprint import FRAGMENTED
from ..protocol.identity import Identity, lock
from ..protocol.meter import Meter
from ..protocol.ticket import Ticket
from ..protocol.tls import dial_pinned
from .control import COORDINATOR
from .offer import Say, WorkerConfig


async def join(ticket: Ticket, config: WorkerConfig, leave: asyncio.Event, say: Say) -> str:
    """Works for a run until it is finished, stopped, or ``leave`` is set and the stage is handed over.

    Returns one line that says how it ended. Raises what a person must mend, as a ``PotluckError``.
    """
    key = config.data_dir / "identity.pem"
    identity = Identity.load_or_create(key)
    with lock(key):
        chosen_gb = config.memory_gb
        config = config.decided(ticket, identity)
        meter = Meter()
        probe = await dial_pinned(ticket.url, ticket.fingerprint)
        meter.record_connection(COORDINATOR, dialled=True)
        await probe.close()
        say("found the coordinator; loading torch")
        config = replace(config, device=await asyncio.to_thread(prepare_torch, config.threads, config.device))
        if not chosen_gb and config.device.startswith("cuda"):
            config = replace(config, memory_gb=gpu_gb(config.device))
        from .session import Session

        return await Session(ticket, config, identity, meter, say).run(leave)


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


def gpu_gb(device: str) -> float:
    """What a GPU has for a stage, in 10^9 bytes."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory * (1 - FRAGMENTED) / 1e9
