"""A run as its page tells of it (``/api/state``): which page, what it says. Everything in it may be another's words."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from .protocol.errors import ConfigError, StateError, UnreachableError

FILE = "run.sqlite"
MOST_NBYTES = 32 * 1024 * 1024
SECONDS = 5.0
HINT = "Name it as it was started, its folder, or its page: potluck status http://HOST:PORT/"


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    peer: str = ""
    seconds: float = 0.0


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    compute: float = 0.0
    codec: float = 0.0
    update: float = 0.0
    wire: float = 0.0
    waits: tuple[Wait, ...] = ()
    other: float = 0.0


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    id: str = ""
    name: str = ""
    region: str = ""
    stage: int | None = None
    state: str = ""
    samples: int = 0
    work: float = 0.0
    sent: int = 0
    received: int = 0
    seconds_per_step: float | None = None
    device: str = ""
    time: StepTime | None = None


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    stage: int = 0
    replicas: tuple[str, ...] = ()
    is_thin: bool = False


class Event(msgspec.Struct, frozen=True, kw_only=True):
    time: float = 0.0
    kind: str = ""
    text: str = ""


class Eta(msgspec.Struct, frozen=True, kw_only=True):
    low: float = 0.0
    high: float = 0.0


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    committed: float = 0.0
    computed: float = 0.0


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    text: str = ""
    since: float = 0.0


class Run(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    model: str = ""
    preset: str = ""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What of the page's state is shown in a terminal; what an older or newer page lacks has its default."""

    run: Run
    phase: str
    now: float = 0.0
    note: str = ""
    is_paused: bool = False
    started: float = 0.0
    step: int = 0
    steps: int = 0
    generation: int = 0
    train_loss: float | None = None
    heldout_loss: float | None = None
    heldout_first: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    eta: Eta | None = None
    goodput: Goodput | None = None
    round: int = 0
    bytes_per_token: float | None = None
    dense_bytes_per_token: float | None = None
    stages: tuple[Stage, ...] = ()
    peers: tuple[Peer, ...] = ()
    events: tuple[Event, ...] = ()
    alerts: tuple[Alert, ...] = ()


def fetch(page: str) -> bytes:
    """The page's state as it came: JSON."""
    try:
        with urllib.request.urlopen(urllib.parse.urljoin(page, "api/state"), timeout=SECONDS) as answer:
            data: bytes = answer.read(MOST_NBYTES + 1)
    except urllib.error.HTTPError as error:
        raise UnreachableError(f"{page} answers {error.code}, not with a run", hint=HINT) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise UnreachableError(f"nobody answers at {page} ({why})", hint="Is the coordinator up?") from None
    if len(data) > MOST_NBYTES:
        raise UnreachableError(f"{page} answers with too much to be a run", hint=HINT)
    return data


def understood(page: str, data: bytes) -> Seen:
    try:
        return msgspec.json.decode(data, type=Seen)
    except msgspec.MsgspecError as error:
        raise UnreachableError(f"{page} does not answer with a run ({error})", hint=HINT) from None


def page_of(run: str | None, home: Path) -> str:
    """The address of the page of RUN: an address, a folder, a name; None: the only one that answers on this machine.

    ``home``: the user's data folder. ``ConfigError`` if nothing of that kind is known.
    """
    if run is None:
        return _only(home)
    if "://" in run:
        if urllib.parse.urlsplit(run).scheme not in ("http", "https"):
            raise ConfigError(f"{run} is no page's address", hint=HINT)
        return run.split("#")[0].rstrip("/") + "/"
    path = Path(run)
    places = [path, path / FILE, path / "coordinator" / FILE]
    if len(path.parts) == 1:
        places += [
            home / "coordinator" / run / FILE,
            *([home / "demo" / "coordinator" / FILE] if run == "demo" else []),
        ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = ", ".join(sorted(local(home))) or "none"
        raise ConfigError(f"no run {run} is known here (known: {known})", hint=HINT)
    if (page := _noted(found)) is None:
        raise StateError(f"{found} does not say where its page is", hint=HINT)
    return page


def local(home: Path) -> dict[str, str]:
    """Pages of the runs that were coordinated on this machine, by name, whether they answer or not."""
    files = {p.parent.name: p for p in sorted((home / "coordinator").glob(f"*/{FILE}"))}
    if (demo := home / "demo" / "coordinator" / FILE).is_file():
        files.setdefault("demo", demo)
    return {name: page for name, path in files.items() if (page := _noted(path)) is not None}


def _only(home: Path) -> str:
    answering = {}
    for name, page in local(home).items():
        with contextlib.suppress(UnreachableError):
            understood(page, fetch(page))
            answering[name] = page
    if not answering:
        raise ConfigError("no run answers on this machine", hint=HINT)
    if len(answering) > 1:
        raise ConfigError(f"several runs answer here: {', '.join(sorted(answering))}", hint="Name one of them.")
    return next(iter(answering.values()))


def _noted(path: Path) -> str | None:
    """The page's address that a coordinator noted in its run's file."""
    values: dict[str, Any] = {}
    with contextlib.suppress(sqlite3.Error, ValueError, OSError):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=SECONDS)
        with contextlib.closing(db):
            rows = db.execute("SELECT key, value FROM meta WHERE key IN ('page', 'http_port')").fetchall()
            values = {key: json.loads(value) for key, value in rows}
    if isinstance(values.get("page"), str):
        return str(values["page"])
    return f"http://127.0.0.1:{port}/" if isinstance(port := values.get("http_port"), int) else None
