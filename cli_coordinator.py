"""``potluck coordinator``: what an operator does."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from .cli_common import CONTEXT, data_home, on_interrupt
from .protocol.errors import ConfigError, PotluckError


@click.group(context_settings=CONTEXT)
def coordinator() -> None:
    """Run a coordinator: it hands out work, keeps the ledger, shows the page."""


@coordinator.command("init", context_settings=CONTEXT)
@click.argument("path", type=click.Path(path_type=Path), default=Path("run.yaml"))
def coordinator_init(path: Path) -> None:
    """Write a run.yaml with every setting and its default.

    To go on from a checkpoint, name it in model.init. On machines that cannot hold its training, set model.train: lora
    beside it: then only adapters are trained and exchanged, and the checkpoint's matrices are held in 4 bits
    (model.lora: rank, alpha, targets, base).
    """
    from .protocol.config import CoordinatorConfig, RunConfig, dump

    if path.exists():
        raise ConfigError(f"{path} is there already", hint="Name another file.")
    text = dump(RunConfig(coordinator=CoordinatorConfig(port=7700, http_port=7701)))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error})", hint="Name a file in a writable folder.") from None
    click.echo(f"Wrote {path}. Next: potluck coordinator up {path}")


@coordinator.command("up", context_settings=CONTEXT)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=None,
    help="Where the run is kept.  [default: by its name, in your data folder]",
)
@click.option("--host", default=None, help="Address to listen on; 0.0.0.0 for others to reach it.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Port for workers.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=None, help="Port of the page.")
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    default=None,
    help="Write ticket and addresses there, as JSON, once up.",
)
@click.option(
    "--log-json",
    type=click.Path(path_type=Path),
    default=None,
    help="Write one JSON object for each event and warning there (run.yaml: observe.log).",
)
def coordinator_up(
    path: Path, data_dir: Path | None, ready_file: Path | None, log_json: Path | None, **place: Any
) -> None:
    """Start the coordinator of the run in PATH (run.yaml); it prints a ticket for workers and the page's address.

    Ctrl-C stops the run in order: workers save their state, and the same command goes on from there.
    """
    import msgspec

    from .protocol.config import load

    config = load(path)
    changes = {k: v for k, v in place.items() if v is not None}
    if changes:
        config = msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, **changes))
    if log_json:
        config = msgspec.structs.replace(
            config, observe=msgspec.structs.replace(config.observe, log=str(log_json.absolute()))
        )
    folder = data_dir or data_home() / "coordinator" / config.name
    sys.exit(asyncio.run(_coordinator(config, folder, ready_file)))


async def _coordinator(config: Any, folder: Path, ready_file: Path | None) -> int:
    import json

    from .coordinator import service

    stop = asyncio.Event()
    again = on_interrupt(stop)
    shown = -1.0

    def progress(what: str, share: float) -> None:
        nonlocal shown
        if stop.is_set():  # what is prepared so far is prepared again, or reused if it is whole
            raise PotluckError("stopped while the corpus was prepared", hint="The same command starts again.")
        if share >= 1.0 or share - shown >= 0.25 or share < shown:
            shown = share
            click.echo(f"{what}: {share:.0%}", err=True)

    async with service.running(config, folder, progress) as up:
        click.echo(f"Run:     {config.name} in {folder}")
        click.echo(f"Page:    {up.page}")
        click.echo(f"Ticket:  {up.ticket}")
        click.echo(f"Join:    potluck worker join {up.ticket}")
        if (paused := up.hub.state.paused) is not None:
            click.echo(f"Paused:  by {paused.who}; to go on: potluck coordinator resume {folder}")
        if up.is_new_token:
            click.echo(f"Token:   {up.token}")
            click.echo(
                "         Keep it: who has it can pause this run and send workers away (coordinator pause, ban ...)."
            )
        sys.stdout.flush()
        if ready_file:
            data = json.dumps({"ticket": up.ticket, "page": up.page, "address": up.address})
            temporary = ready_file.with_suffix(".tmp")
            try:
                temporary.touch(mode=0o600)
                temporary.write_text(data, encoding="utf-8")
                temporary.replace(ready_file)
            except OSError as error:
                raise ConfigError(
                    f"{ready_file}: cannot be written ({error.strerror})",
                    hint="Name a file in a writable folder with --ready-file.",
                ) from None
        done = asyncio.create_task(up.hub.until_phase("finished", "stopped"))
        asked = asyncio.create_task(stop.wait())
        await asyncio.wait({done, asked}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            done.result()
            await up.hub.until_alone(service.FAREWELL_SECONDS)
            await asyncio.wait({asked}, timeout=service.LAST_LOOK_SECONDS)
            where = up.board.published
            click.echo("The run is finished." + (f" Model: {folder / 'checkpoints' / where}" if where else ""))
            return 0
        click.echo("Stopping: workers save their state (Ctrl-C again to stop at once).", err=True)
        stopping = asyncio.create_task(service.stop(up))
        await asyncio.wait({stopping, asyncio.create_task(again.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            click.echo("Stopped at once. The same command goes on from the last committed round.", err=True)
            os._exit(130)
        phase = "stopped" if stopping.result() == "stopped" else "not stopped in order: some worker did not answer"
        click.echo(f"The run is {phase}. The same command goes on.")
        return 0
