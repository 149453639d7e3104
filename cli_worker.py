"""``potluck worker``: what a volunteer does."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from .cli_common import CONTEXT, data_home, on_interrupt, ticket_text
from .cli_owner import COMMANDS


@click.group(context_settings=CONTEXT)
def worker() -> None:
    """Lend this machine to a run, and take it back whenever you want it."""


for command in COMMANDS:
    worker.add_command(command)


@worker.command("join", context_settings=CONTEXT)
@click.argument("ticket")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=None,
    help="Key and saved state.  [default: your data folder]",
)
@click.option("--name", default="", help="Name shown to others.  [default: from the key]")
@click.option(
    "--host", default=None, help="Address other workers can dial.  [default: all, or loopback beside the coordinator]"
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port other workers dial.  [default: any]")
@click.option(
    "--memory-gb",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Most memory to use.  [default: half]",
)
@click.option("--threads", type=click.IntRange(1), default=None, help="Cores to use.  [default: half]")
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Speed against an ordinary machine.",
)
@click.option(
    "--patience-minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="How long to go on dialling a coordinator that does not answer.",
)
@click.option(
    "--map-port",
    is_flag=True,
    help="Ask the router (UPnP, NAT-PMP) to open a port for libp2p; without, it is not spoken to. Needs the extra p2p.",
)
@click.option("--device", default="auto", show_default=True, help="Where to compute: auto, cpu or cuda.")
@click.option(
    "--state-mbps",
    type=click.FloatRange(0),
    default=50.0,
    show_default=True,
    help="Most of the line, each way, for handing over stages; 0: no limit.",
)
@click.option(
    "--upload-mbps",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Most of the line, upwards, for everything that goes to other workers; 0: no limit.",
)
@click.option("--region", default="", help="Where this machine is, for the run's page: any word.  [default: not said]")
@click.option(
    "--hours",
    multiple=True,
    metavar="[DAYS] FROM-TO",
    help="When it may work: 22:00-08:00, or 'sat,sun 00:00-24:00'; may be given often.  [default: always]",
)
@click.option("--on-battery", is_flag=True, help="Work on battery, too.")
@click.option(
    "--yield-to",
    multiple=True,
    metavar="PROGRAM",
    help="Make room while a program of this name runs, a game say; may be given often.",
)
def worker_join(ticket: str, data_dir: Path | None, **options: Any) -> None:
    """Join the run of TICKET (or @FILE that holds it) and work until it is finished.

    Ctrl-C finishes the step and hands over; a second Ctrl-C leaves at once. From another terminal: potluck worker
    status, top, pause, resume and finish.
    """
    from .protocol.ticket import Ticket
    from .worker.gate import Rules, Window

    decoded = Ticket.decode(ticket_text(ticket), time.time())
    hours, on_battery, yield_to = (options.pop(name) for name in ("hours", "on_battery", "yield_to"))
    rules = Rules(hours=tuple(Window.parse(text) for text in hours), on_battery=on_battery, yield_to=tuple(yield_to))
    options = {k: v for k, v in options.items() if v is not None}
    sys.exit(asyncio.run(_worker(decoded, data_dir or data_home() / "worker", {**options, "rules": rules})))


async def _worker(ticket: Any, folder: Path, options: dict[str, Any]) -> int:
    from .worker import daemon
    from .worker.offer import WorkerConfig

    leave = asyncio.Event()
    again = on_interrupt(leave)
    config = WorkerConfig(data_dir=folder, **options)

    def say(line: str) -> None:
        click.echo(f"{time.strftime('%H:%M:%S')} {line}")
        sys.stdout.flush()

    working = asyncio.create_task(daemon.join(ticket, config, leave, say))
    await asyncio.wait({working, asyncio.create_task(again.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        say("left at once; what was not committed is done by others")
        sys.stdout.flush()
        os._exit(130)
    say(working.result())
    return 0
