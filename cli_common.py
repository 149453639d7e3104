"""What all ``potluck`` commands share: how errors are shown, where data is kept, what Ctrl-C does."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import click

from .protocol.errors import PotluckError, TicketError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
WORKER_PACKAGES = ("torch", "transformers", "safetensors", "filelock", "numba", "zstandard")


class Group(click.Group):
    """Turns our errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PotluckError as error:
            click.echo(f"potluck: {error.one_line()}", err=True)
            ctx.exit(1)
        except ModuleNotFoundError as error:
            if error.name not in WORKER_PACKAGES:
                raise
            click.echo(
                f"potluck: {error.name} is not installed. In potluck's checkout: pip install -e '.[worker]'", err=True
            )
            ctx.exit(1)


def ticket_text(ticket: str) -> str:
    """TICKET as given, or what the file holds that ``@FILE`` names: a secret that no list of processes shows."""
    if not ticket.startswith("@"):
        return ticket
    try:
        return Path(ticket[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "not text"
        raise TicketError(f"{ticket[1:]}: cannot be read ({what})", hint="Name the ticket's file.") from None


def data_home() -> Path:
    """The user's data folder for potluck."""
    import platformdirs

    return Path(platformdirs.user_data_dir("potluck", appauthor=False))


def run_file(run: Path) -> Path:
    """Where a run is kept, that is named by its file, its data folder or its name; it may not be there."""
    from .coordinator.snapshot import FILE

    path = run if run.is_file() else run / FILE
    if not path.exists() and not run.is_dir() and len(run.parts) == 1:
        path = data_home() / "coordinator" / run / FILE
    return path


def on_interrupt(first: asyncio.Event) -> asyncio.Event:
    """Sets ``first`` on the first Ctrl-C (or SIGTERM), the returned event on the second."""
    second = asyncio.Event()

    def interrupted() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, interrupted)
    return second
