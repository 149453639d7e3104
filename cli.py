"""The ``potluck`` command. Imports nothing heavy: each command loads what it needs when it runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_common import CONTEXT, Group, data_home, run_file
from .cli_data import data as data_commands
from .cli_eval import eval_command
from .cli_model import model
from .cli_operate import coordinator
from .cli_relay import relay
from .cli_report import report
from .cli_status import status, top
from .cli_worker import worker
from .protocol.errors import ConfigError


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
    Take the machine back for a while: potluck worker pause 2h
    How a run is going:                potluck status
    What it learns from:               potluck data build recipe.yaml
    What a run would send:             potluck estimate run.yaml
    Is every sample in it once:        potluck ledger verify RUN
    Its page as one file:              potluck report RUN
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
main.add_command(coordinator)
main.add_command(worker)


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
    from .coordinator.weights import with_shape
    from .protocol.config import load

    config, vocab_size = with_shape(load(path))
    if stages is not None:
        import msgspec

        pipeline = msgspec.structs.replace(config.pipeline, stages=stages)
        config = msgspec.structs.replace(config, pipeline=pipeline)
    from .worker.estimate import Line, estimate

    found = estimate(config, vocab_size, replicas)
    if as_json:
        import msgspec

        from .protocol.footprint import footprints
        from .protocol.plan import Shape

        shape = Shape.of(config.model, vocab_size)
        layers = shape.split(len(found.machines))
        memory = {device: footprints(config, vocab_size, layers, device) for device in ("cuda", "cpu")}
        click.echo(msgspec.json.encode({**msgspec.to_builtins(found), "memory": memory}))
        return
    from .screen import show_estimate, show_memory

    show_estimate(config, found, Line(up_mbps=up, down_mbps=down))
    show_memory(config, vocab_size, len(found.machines))


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

    from .coordinator.verify import verify

    found = verify(run_file(run))
    click.echo(msgspec.json.encode(found) if as_json else "\n".join(found.lines()))
    sys.exit(1 if found.problems else 0)


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
main.add_command(status)
main.add_command(top)
main.add_command(report)
