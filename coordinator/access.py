"""The operator's token: made with the run, kept in its file, which only its owner can read. Where the run's page is."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..protocol.errors import StateError
from ..protocol.tls import join_address
from .store import Store

log = logging.getLogger(__name__)
TOKEN_NBYTES = 32
OWNER_ONLY = 0o600
FILE = "run.sqlite"


def kept_token(store: Store) -> tuple[str, bool]:
    """The run's token, and whether it was made just now. Its file is its owner's alone from here on."""
    owner_only(store.path)
    if isinstance(known := store.meta("operator_token"), str) and known:
        return known, False
    token = secrets.token_urlsafe(TOKEN_NBYTES)
    store.set_meta(operator_token=token)
    return token, True


def owner_only(path: Path) -> None:
    """Takes the rights of others from a database; files beside it that are made later have its rights."""
    for beside in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        try:
            beside.chmod(OWNER_ONLY)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning(
                "%s may be read by others (%s): the operator's token and the ticket's secret are in it", beside, error
            )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run on this machine is operated. ``page`` is empty while it was never up."""

    name: str
    run: str
    page: str
    token: str


def place_of(folder: Path) -> Place:
    """Of the run in a data folder, beside its coordinator. ``StateError`` if there is none, or it cannot be read."""
    path = folder / FILE
    hint = "Name the run's data folder, or start it first: potluck coordinator up run.yaml."
    if not os.path.isfile(path):
        raise StateError(f"{folder}: there is no run in it", hint=hint, code="missing")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            wanted = ("config", "run_id", "http_port", "operator_token")
            marks = ",".join("?" * len(wanted))
            rows = db.execute(f"SELECT key, value FROM meta WHERE key IN ({marks})", wanted).fetchall()
            meta = {key: json.loads(value) for key, value in rows}
        found = msgspec.convert(meta, _Meta)
    except (sqlite3.Error, ValueError, msgspec.ValidationError) as error:
        raise StateError(f"{path}: cannot be read as a run's file ({error})", hint=hint) from None
    host = found.config.coordinator.host
    at = join_address("127.0.0.1" if host in ("0.0.0.0", "::", "") else host, found.http_port)
    page = f"http://{at}/" if found.http_port else ""
    return Place(name=found.config.name, run=found.run_id, page=page, token=found.operator_token)


class _Listens(msgspec.Struct):
    host: str


class _Config(msgspec.Struct):
    name: str
    coordinator: _Listens


class _Meta(msgspec.Struct):
    config: _Config
    run_id: str
    http_port: int = 0
    operator_token: str = ""


def everybody(store: Store) -> dict[str, str]:
    """The newest name of every peer that ever joined, by its id."""
    names: dict[str, str] = {}
    for (data,) in store.rows("SELECT data FROM events WHERE kind = 'PeerJoined' ORDER BY id"):
        event: dict[str, Any] = json.loads(data)
        names[event["peer"]] = event["name"]
    return names
