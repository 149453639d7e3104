"""``potluck relay``: places where workers meet whose routers let nobody in."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click

from .cli_common import CONTEXT, data_home, on_interrupt, ticket_text


@click.group(context_settings=CONTEXT)
def relay() -> None:
    """Help workers to meet whose routers let nobody in."""


@relay.command("up", context_settings=CONTEXT)
@click.argument("ticket")
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where its certificate is kept.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on.  [default: any]")
@click.option("--advertise", default="", help="What workers dial, if it is not that: HOST or HOST:PORT.")
@click.option("--peer-mbps", type=click.FloatRange(0), default=0.0, help="Most that one worker may send; 0: no limit.")
def relay_up(ticket: str, data_dir: Path | None, **options: Any) -> None:
    """Relay for the run of TICKET (or @FILE that holds it), beside the coordinator, which is a relay itself.

    It prints a line for `coordinator.relays` of run.yaml; workers use it from then on. It moves what workers send to
    each other, encrypted from one to the other, and keeps nothing. Ctrl-C stops it: workers go on over another relay.
    """
    from .coordinator.relay_service import relaying
    from .protocol.ticket import Ticket

    decoded = Ticket.decode(ticket_text(ticket), time.time())

    async def run() -> None:
        stop = asyncio.Event()
        on_interrupt(stop)
        await relaying(decoded, data_dir or data_home() / "relay", stop, click.echo, **options)

    asyncio.run(run())


@relay.command("p2p", context_settings=CONTEXT)
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where its key is kept.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=4001, show_default=True, help="Port of TCP and of UDP; 0: any."
)
@click.option("--advertise", default="", help="What workers dial, if it is not that: HOST or HOST:PORT.")
def relay_p2p(data_dir: Path | None, **options: Any) -> None:
    """Relay of libp2p, where workers with the extra p2p meet, and often find a straight way to each other.

    It prints lines for `coordinator.p2p_relays` of run.yaml. It belongs to no run and asks for no ticket: everybody who
    finds it may meet there, 128 at a time. It moves encrypted streams, so it sees who talks to whom and how much, and
    nothing of what is said; and it lets nobody into a run: that workers prove to each other. A run needs four at
    different addresses for holes to be punched. Ctrl-C stops it: workers go on elsewhere.
    """
    from .protocol.p2p_relay import serving

    async def run() -> None:
        stop = asyncio.Event()
        on_interrupt(stop)
        await serving(data_dir or data_home() / "relay", stop, click.echo, **options)

    asyncio.run(run())
