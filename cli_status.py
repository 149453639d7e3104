"""``potluck status`` and ``potluck top``: a run as its page tells of it, in a terminal."""

from __future__ import annotations

import click

from .cli_common import CONTEXT, data_home

EVERY_SECONDS = 1.0


@click.command(context_settings=CONTEXT)
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Everything the page knows, for programs.")
def status(run: str | None, as_json: bool) -> None:
    """Say how RUN is going: step, loss, speed, peers and where their time goes.

    RUN is a run's name or folder on this machine, or the address of its page; without it, the one that runs here.
    """
    from .page_client import fetch, page_of, understood

    page = page_of(run, data_home())
    data = fetch(page)
    seen = understood(page, data)
    if as_json:
        click.echo(data)
        return
    from .screen_run import show

    show(seen, page)


@click.command(context_settings=CONTEXT)
@click.argument("run", required=False)
def top(run: str | None) -> None:
    """Watch RUN (a name, a folder, or its page's address); Ctrl-C ends the watching."""
    from .page_client import fetch, page_of, understood
    from .screen_live import watch
    from .screen_run import block

    page = page_of(run, data_home())
    watch(lambda: block(understood(page, fetch(page)), page), EVERY_SECONDS)
