"""``potluck report``: a run's page without its coordinator, as one file or over HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_common import CONTEXT, on_interrupt, run_file
from .protocol.errors import ConfigError

if TYPE_CHECKING:
    from .coordinator.dashboard.source import Source


@click.command(context_settings=CONTEXT)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="The file to write.  [default: potluck-NAME.html, here]",
)
@click.option("--serve", is_flag=True, help="Instead of a file, show the page on this machine until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Port of the page.  [default: a free one]")
def report(run: Path, output: Path | None, serve: bool, port: int | None) -> None:
    """Write the page of RUN as one HTML file, with all its numbers in it: it opens from disk, without a network.

    RUN is the run's data folder, its file, or its name. Nothing of it is changed; a running coordinator is not
    disturbed. Peers' names and regions are in the file, their addresses are not.
    """
    from .coordinator.dashboard.archive import Archive

    if serve and output:
        raise ConfigError("--output and --serve exclude each other", hint="Leave one of them out.")
    if port is not None and not serve:
        raise ConfigError("--port is of no use without --serve", hint="Add --serve, or leave --port out.")
    source = Archive(run_file(run))
    name = source.state().run.name
    if serve:
        asyncio.run(_serve(source, name, port or 0))
    else:
        _write(source, output or Path(f"potluck-{name}.html"))


def _write(source: Source, path: Path) -> None:
    from .coordinator.dashboard import bundle
    from .coordinator.dashboard.report import report as made

    try:
        if path.exists() and bundle.MARK.encode() not in path.read_bytes()[: 64 << 10]:
            raise ConfigError(f"{path} is there already, and is no report", hint="Name another file with -o.")
        html = made(source)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(html)
        part.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror})", hint="Name a file in a writable folder with -o."
        ) from None
    click.echo(f"Wrote {path} ({len(html) / 1e6:.1f} MB). Open it in a browser.")


async def _serve(source: Source, name: str, port: int) -> None:
    from .coordinator.dashboard import server

    stop = asyncio.Event()
    on_interrupt(stop)
    page, port = await server.serve(server.app(source), "127.0.0.1", port)
    click.echo(f"The page of {name}: http://127.0.0.1:{port}/ (Ctrl-C ends it)")
    await stop.wait()
    await page.close()
