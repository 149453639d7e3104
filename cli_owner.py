"""``potluck worker status``, ``top``, ``pause``, ``resume``, ``finish``: an owner and the worker that runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import CONTEXT, data_home
from .protocol.errors import ConfigError, UnreachableError

if TYPE_CHECKING:
    from .worker.status import Status

EVERY_SECONDS = 1.0


def of_a_worker(command: Callable[..., None]) -> Callable[..., None]:
    """The option that says which worker of this machine is meant."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=None,
        help="The worker's folder, if it was given one.  [default: your data folder]",
    )(command)


@click.command(context_settings=CONTEXT)
@of_a_worker
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(data_dir: Path | None, as_json: bool) -> None:
    """Say what the worker on this machine does: running, yielding, paused, waiting, or needs you.

    Exit code 1 if no worker runs; then how the last one ended is said.
    """
    import msgspec

    found = _ask(data_dir, "status")
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    from .screen_worker import show

    show(found)


@click.command(context_settings=CONTEXT)
@of_a_worker
def top(data_dir: Path | None) -> None:
    """Watch the worker on this machine; Ctrl-C ends the watching alone."""
    from .screen_live import watch
    from .screen_worker import block

    watch(lambda: block(_ask(data_dir, "status")), EVERY_SECONDS)


@click.command(context_settings=CONTEXT)
@click.argument("length", required=False)
@click.option("--until", default=None, metavar="TIME", help="18:00, or '2026-11-23 18:00'.")
@of_a_worker
def pause(length: str | None, until: str | None, data_dir: Path | None) -> None:
    """Take the machine back for LENGTH (2h, 90m, 1h30m, 1d), or until you resume.

    The worker leaves its run, in order if that is quick, and frees the GPU's memory; nothing of what counts is lost.
    It goes on by itself afterwards. A pause outlives a restart.
    """
    from .worker.pause import moment, span

    if length and until:
        raise ConfigError("a pause has a length or an end, not both", hint="Leave out one of them.")
    now = datetime.now()
    at = now + span(length) if length else moment(until, now) if until else None
    _said(_ask(data_dir, "pause", None if at is None else at.timestamp()))


@click.command(context_settings=CONTEXT)
@of_a_worker
def resume(data_dir: Path | None) -> None:
    """End a pause."""
    _said(_ask(data_dir, "resume"))


@click.command(context_settings=CONTEXT)
@of_a_worker
def finish(data_dir: Path | None) -> None:
    """Let the worker finish its step, hand over and end, as Ctrl-C in its terminal does."""
    found = _ask(data_dir, "finish")
    click.echo(f"{found.name} finishes its step, hands over and ends")


COMMANDS = (status, top, pause, resume, finish)


def _said(found: Status) -> None:
    click.echo(f"{found.name}: {found.text}")
    sys.stdout.flush()


def _ask(data_dir: Path | None, what: str, until: float | None = None) -> Any:
    """The worker's state after it was asked. Where none runs, how the last one ended is in the error."""
    from .worker.condition import clock
    from .worker.local_socket import ask, last_end
    from .worker.status import Ask

    folder = data_dir or data_home() / "worker"
    try:
        return ask(folder, Ask(what=what, until=until)).status
    except UnreachableError as error:
        if error.code != "absent" or (ended := last_end(folder)) is None:
            raise
        when = clock(datetime.fromtimestamp(ended.at), datetime.fromtimestamp(time.time()))
        word = "needs you" if ended.error else "ended"
        raise UnreachableError(
            f"no worker runs in {folder}. The last one {word} ({when}): {ended.text.rstrip('.')}", hint=error.hint
        ) from None
