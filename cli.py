"""The ``potluck`` command. Imports nothing heavy: each command loads what it needs when it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_common import CONTEXT, Group, data_home, on_interrupt, ticket_text
from .cli_data import data as data_commands
from .cli_eval import eval_command
from .cli_model import model
from .cli_relay import relay
from .protocol.errors import ConfigError, PotluckError


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="potluck")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens, to stderr.")
def main(verbose: bool) -> None:
    """Train one language model together, over ordinary internet lines.

    \b
    Try it on this machine alone:      potluck demo
    Start a run for others to join:    potluck coordinator init run.yaml
                                       potluck coordinator up run.yaml
    Join a run with its ticket:        potluck worker join TICKET
    What it learns from:               potluck data build recipe.yaml
    What a run would send:             potluck estimate run.yaml
    Is every sample in it once:        potluck ledger verify RUN
    """
    if not verbose:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core writes to stderr beside our own line
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


main.add_command(eval_command)
main.add_command(model)


@main.command(context_settings=CONTEXT)
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes.")
@click.option("--stages", type=click.IntRange(1, 16), default=2, show_default=True, help="Pipeline stages.")
@click.option("--steps", type=click.IntRange(1), default=None, help="Training steps.  [default: 240]")
@click.option(
    "--preset",
    type=click.Choice(["potluck", "gptjt", "cocktail", "diloco", "sparseloco", "dense"]),
    default="potluck",
    show_default=True,
    help="How replicas exchange weights.",
)
@click.option("--data", default="builtin", show_default=True, help="Text to train on: FILE, DIR or hf:NAME.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for the run.  [default: a fixed one]",
)
@click.option("--resume", is_flag=True, help="Go on with the run that was stopped.")
@click.option("--plain", is_flag=True, help="Lines instead of a live display.")
@click.option("--chaos", is_flag=True, help="Kill and stop its processes at random, and prove that nothing is lost.")
@click.option("--seed", type=click.IntRange(0), default=None, help="Of the chaos.  [default: another each time]")
def demo(**options: Any) -> None:
    """Train a small GPT-J on this machine, with every part a process of its own.

    Prepares a corpus from text that Python carries, starts a coordinator and workers on loopback, trains for about
    two minutes and leaves a folder that transformers loads. No network, no GPU, no account. Ctrl-C stops it in
    order; `potluck demo --resume` goes on.
    """
    from .demo import DemoConfig, run

    sys.exit(run(DemoConfig(home=data_home() / "demo", **options)))


main.add_command(data_commands)


@main.group(context_settings=CONTEXT)
def coordinator() -> None:
    """Run a coordinator: it hands out work, keeps the ledger, shows the page."""


@coordinator.command("init", context_settings=CONTEXT)
@click.argument("path", type=click.Path(path_type=Path), default=Path("run.yaml"))
def coordinator_init(path: Path) -> None:
    """Write a run.yaml with every setting and its default."""
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
def coordinator_up(path: Path, data_dir: Path | None, ready_file: Path | None, **place: Any) -> None:
    """Start the coordinator of the run in PATH (run.yaml); it prints a ticket for workers and the page's address.

    Ctrl-C stops the run in order: workers save their state, and the same command goes on from there.
    """
    import msgspec

    from .protocol.config import load

    config = load(path)
    changes = {k: v for k, v in place.items() if v is not None}
    if changes:
        config = msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, **changes))
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


@main.group(context_settings=CONTEXT)
def worker() -> None:
    """Lend this machine to a run."""


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
def worker_join(ticket: str, data_dir: Path | None, **options: Any) -> None:
    """Join the run of TICKET (or @FILE that holds it) and work until it is finished.

    Ctrl-C finishes the step and hands over; a second Ctrl-C leaves at once.
    """
    from .protocol.ticket import Ticket

    decoded = Ticket.decode(ticket_text(ticket), time.time())
    options = {k: v for k, v in options.items() if v is not None}
    sys.exit(asyncio.run(_worker(decoded, data_dir or data_home() / "worker", options)))


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


@main.command(context_settings=CONTEXT)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--replicas", type=click.IntRange(1, 4096), default=2, show_default=True, help="Workers of every stage.")
@click.option(
    "--up", type=click.FloatRange(0, min_open=True), default=20.0, show_default=True, help="A line's Mbit/s up."
)
@click.option(
    "--down", type=click.FloatRange(0, min_open=True), default=100.0, show_default=True, help="A line's Mbit/s down."
)
@click.option("--stages", type=click.IntRange(1, 256), default=None, help="Instead of pipeline.stages.")
@click.option("--json", "as_json", is_flag=True, help="Numbers for programs.")
def estimate(path: Path, replicas: int, up: float, down: float, stages: int | None, as_json: bool) -> None:
    """Say what the run in PATH (run.yaml) will send, how long a line needs for it, and how much memory a stage takes,
    before anything starts.

    Bytes are those on the wire, headers and all, by purpose and beside the same run uncompressed; zstd takes some per
    cent off more. Starting and joining (the corpus, a newcomer's state) come on top, and control streams with about
    0.1 kB/s a worker.
    """
    from .protocol.config import load

    config = load(path)
    if stages is not None:
        import msgspec

        pipeline = msgspec.structs.replace(config.pipeline, stages=stages)
        config = msgspec.structs.replace(config, pipeline=pipeline)
    from .worker.estimate import Line, estimate

    found = estimate(config, config.data.vocab_size, replicas)
    if as_json:
        import msgspec

        from .protocol.footprint import footprints
        from .protocol.plan import Shape

        shape = Shape.of(config.model, config.data.vocab_size)
        layers = shape.split(len(found.machines))
        memory = {device: footprints(config, config.data.vocab_size, layers, device) for device in ("cuda", "cpu")}
        click.echo(msgspec.json.encode({**msgspec.to_builtins(found), "memory": memory}))
        return
    from .screen import show_estimate, show_memory

    show_estimate(config, found, Line(up_mbps=up, down_mbps=down))
    show_memory(config, config.data.vocab_size, len(found.machines))


@main.group(context_settings=CONTEXT)
def ledger() -> None:
    """Look into a run's ledger."""


@ledger.command("verify", context_settings=CONTEXT)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Numbers for programs.")
def ledger_verify(run: Path, as_json: bool) -> None:
    """Prove that every sample of RUN is committed exactly once, or show where not (exit code 1).

    RUN is the run's data folder, or its name. Nothing is written; a running coordinator is not disturbed.
    """
    import msgspec

    from .coordinator.verify import FILE, verify

    path = run if run.is_file() else run / FILE
    if not path.exists() and not run.is_dir() and len(run.parts) == 1:
        path = data_home() / "coordinator" / run / FILE
    report = verify(path)
    click.echo(msgspec.json.encode(report) if as_json else "\n".join(report.lines()))
    sys.exit(1 if report.problems else 0)


@main.command(context_settings=CONTEXT)
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt", default="The ", show_default=True, help="Text to go on from.")
@click.option("--tokens", type=click.IntRange(1, 2000), default=60, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def sample(model: Path, prompt: str, tokens: int, seed: int) -> None:
    """Let a published MODEL (a folder) write, with stock transformers."""
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{model} holds no published model: config.json is missing",
            hint="Name a step's folder in the run's checkpoints.",
        )
    from .worker.sampling import write

    click.echo(write(model, prompt, tokens, seed))


main.add_command(relay)
