"""``potluck coordinator pause``, ``drain`` and the like: an operator's orders to a coordinator, over its page."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click

from .cli_common import CONTEXT, data_home
from .cli_coordinator import coordinator
from .protocol.errors import ConfigError, PotluckError, RefusedError, UnreachableError

SECONDS = 30.0  # that an answer may take: an order waits for the coordinator's disk
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOOK_SECONDS = 3.0  # that a page may take to say which run it shows
MOST_ANSWER_NBYTES = 1 << 20


class Target(NamedTuple):
    """A coordinator's page, ending in a slash, and the operator's token."""

    page: str
    token: str


def operator_options(function: Any) -> Any:
    """What all orders take: which run, and whether to ask."""
    for option in (
        click.argument("run", required=False),
        click.option("--url", default=None, help="The page of a coordinator elsewhere (with --token)."),
        click.option("--token", default=None, help="Its operator's token; @FILE reads it from a file."),
        click.option("--why", default="", help="The reason; everybody sees it."),
        click.option("--yes", is_flag=True, help="Do it without asking."),
    ):
        function = option(function)
    return function


@coordinator.command("pause", context_settings=CONTEXT)
@operator_options
def pause(**options: Any) -> None:
    """Let the leased steps be done and lease no new ones. RUN: its name or its data folder."""
    order("pause", **options)


@coordinator.command("resume", context_settings=CONTEXT)
@operator_options
def resume(**options: Any) -> None:
    """Let a paused run go on."""
    order("resume", **options)


@coordinator.command("checkpoint", context_settings=CONTEXT)
@operator_options
def checkpoint(**options: Any) -> None:
    """Publish the model now: of the next round, which is closed early if none is near."""
    order("checkpoint", **options)


@coordinator.command("drain", context_settings=CONTEXT)
@click.argument("peer")
@click.option("--force", is_flag=True, help="Even if the run then lacks what only this worker has.")
@operator_options
def drain(**options: Any) -> None:
    """Let PEER (name, or beginning of its id) finish its step, hand over and go."""
    order("drain", **options)


@coordinator.command("ban", context_settings=CONTEXT)
@click.argument("peer")
@click.option("--force", is_flag=True, help="Even if the run then lacks what only this worker has.")
@operator_options
def ban(**options: Any) -> None:
    """Cut PEER (name, or beginning of its id) off at once and keep its key out."""
    order("ban", **options)


@coordinator.command("unban", context_settings=CONTEXT)
@click.argument("peer")
@operator_options
def unban(**options: Any) -> None:
    """Let PEER join again."""
    order("unban", **options)


@coordinator.command("token", context_settings=CONTEXT)
@click.argument("run", required=False)
def token(run: str | None) -> None:
    """Show the operator's token of a run on this machine: who has it can pause the run and send workers away."""
    from .coordinator.access import place_of

    folder = folder_of(run) if run else running_folder()
    click.echo(place_of(folder).token)


def order(
    action: str,
    *,
    run: str | None,
    url: str | None,
    token: str | None,
    why: str,
    yes: bool,
    peer: str = "",
    force: bool = False,
) -> None:
    """Says what the action would do, asks, does it, says what happened."""
    target = target_of(run, url, token)
    body = {"why": why, **({"peer": peer} if peer else {})}
    said = ask(target, action, {**body, "force": force}, is_preview=True)
    click.echo(said["text"])
    if said["needs_force"] and not force:
        raise RefusedError("not done: the run would lack what only this worker has", hint="Insist with --force.")
    if not yes:
        if not is_asked():
            raise ConfigError("nobody is there to be asked", hint="Say --yes to do it.")
        click.confirm(f"{action}?", abort=True)
    done = ask(target, action, {**body, "force": force})
    click.echo(done["text"])


def is_asked() -> bool:
    """Whether a person is there to answer."""
    return sys.stdin.isatty()


def target_of(run: str | None, url: str | None, token: str | None) -> Target:
    """Which coordinator is meant. A token is only sent to a page that shows the run it is of."""
    from .coordinator.access import place_of

    if url or token:
        if not (url and token) or run:
            raise ConfigError("a coordinator elsewhere needs --url and --token, and no RUN", hint="Give both, or none.")
        where = urlsplit(url)
        if where.scheme not in ("http", "https"):
            raise ConfigError(f"{url} is not the address of a page", hint="It begins with http:// or https://.")
        if where.scheme == "http" and where.hostname not in LOOPBACK:
            click.echo("The line to that page is not encrypted: who listens learns the token.", err=True)
        return Target(url.rstrip("/") + "/", token_text(token))
    folder = folder_of(run) if run else running_folder()
    place = place_of(folder)
    shown = shown_run(place.page) if place.page else ""
    if shown != place.run:
        raise UnreachableError(
            f"run {place.name} is not up on this machine", hint="Start it: potluck coordinator up run.yaml."
        )
    return Target(place.page, place.token)


def token_text(token: str) -> str:
    """As given, or what the file holds that ``@FILE`` names."""
    if not token.startswith("@"):
        return token
    try:
        return Path(token[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"{token[1:]}: cannot be read ({what})", hint="Name the token's file.") from None


def folder_of(run: str) -> Path:
    """A run's data folder, by its name or its path."""
    named = data_home() / "coordinator" / run
    if "/" not in run and named.is_dir():
        return named
    return Path(run)


def running_folder() -> Path:
    """The data folder of the only run that is up on this machine, of those in the user's data folder."""
    from .coordinator.access import FILE, place_of

    home, found = data_home() / "coordinator", []
    for path in sorted(home.glob(f"*/{FILE}")):
        try:
            place = place_of(path.parent)
        except PotluckError:
            continue
        if place.page and shown_run(place.page) == place.run:
            found.append(path.parent)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(folder.name for folder in found)
        raise ConfigError(f"{len(found)} runs are up on this machine: {names}", hint="Name one of them.")
    raise ConfigError(
        f"no run is up in {home}", hint="Name the run's data folder, or a coordinator elsewhere: --url and --token."
    )


def shown_run(page: str) -> str:
    """The id of the run that a page shows; empty if none answers there."""
    try:
        with opener().open(f"{page}api/state", timeout=LOOK_SECONDS) as answer:
            return str(json.loads(answer.read(MOST_ANSWER_NBYTES * 8))["run"]["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def opener() -> urllib.request.OpenerDirector:
    """Follows no redirection: the token goes to the page that was meant, and nowhere else."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any, **__: Any) -> None:
            return None

    return urllib.request.build_opener(Stay)


def ask(target: Target, action: str, body: dict[str, Any], *, is_preview: bool = False) -> dict[str, Any]:
    """One request; its answer. ``RefusedError`` with the coordinator's own words, ``UnreachableError`` if there is
    none."""
    request = urllib.request.Request(
        f"{target.page}api/actions/{action}{'?preview=1' if is_preview else ''}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {target.token}", "Content-Type": "application/json"},
    )
    try:
        try:
            with opener().open(request, timeout=SECONDS) as answer:
                said = json.loads(answer.read(MOST_ANSWER_NBYTES))
            return {"text": str(said["text"]), "needs_force": bool(said.get("needs_force"))}
        except urllib.error.HTTPError as error:
            said = json.loads(error.read(MOST_ANSWER_NBYTES))
            raise RefusedError(str(said["error"]), hint=str(said.get("hint", ""))) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = getattr(error, "reason", None) or error
        raise UnreachableError(
            f"{target.page} does not answer as a coordinator ({why})", hint="Look whether it is up, and at its address."
        ) from None
