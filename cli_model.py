"""``potluck model``: checkpoints that runs begin from."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_common import CONTEXT


@click.group(context_settings=CONTEXT)
def model() -> None:
    """Make checkpoints ready for a run to begin from (`model.init` in run.yaml)."""


@model.command(context_settings=CONTEXT)
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def convert(source: Path, target: Path) -> None:
    """Rewrite a checkpoint of .bin files (SOURCE, a folder) as safetensors in the new folder TARGET.

    Runs open safetensors only: a .bin file is a pickle. torch's restricted reader is used here, which runs no code of
    the file; still, convert only what comes from somebody you trust. Needs memory for one file at a time.
    """
    from .worker.convert import convert

    count = convert(source, target, lambda what, share: click.echo(f"{share:4.0%} {what}", err=True))
    click.echo(f"Wrote {count} tensors to {target}. In run.yaml: model: {{init: {target}}}")
