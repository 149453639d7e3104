"""``potluck relay up``: a relay on a machine of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from ..protocol.own_address import advertised
from ..protocol.relay import Spot
from ..protocol.ticket import Ticket
from ..protocol.tls import Certificate, start_server
from .relay import Relay

REPORT_SECONDS = 60.0
STOP_SECONDS = 1.0


async def relaying(
    ticket: Ticket,
    folder: Path,
    stop: asyncio.Event,
    say: Callable[[str], None],
    *,
    host: str,
    port: int,
    advertise: str,
    peer_mbps: float,
) -> None:
    """Serves until ``stop``; says where it is, and every minute what it moves."""
    certificate = Certificate.load_or_create(folder)
    relay = Relay(ticket.run, ticket.secret, certificate.fingerprint, peer_mbps=peer_mbps)
    server, port = await start_server(host, port, relay.handlers(), certificate)
    try:
        say(f"Relay:   {Spot(advertised(advertise, host, port), certificate.fingerprint)}")
        say("Put that line into run.yaml, under coordinator: relays: [...], and start the coordinator again.")
        moved = -1
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await stop.wait()
            total = sum(usage.sent_nbytes for usage in relay.usage.values())
            if total != moved:
                moved = total
                say(f"{relay.attached} workers attached, {relay.calls} connections, {total / 1e6:.1f} MB moved")
    finally:
        await server.stop(STOP_SECONDS)
