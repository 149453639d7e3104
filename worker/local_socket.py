"""The way from ``potluck worker status`` to a worker of the same machine: one line of JSON there, one back.

A Unix socket that only its owner may open (0600), in the worker's data folder. Where there are none (Windows), or the
folder's name is too long for one, a port on loopback: a file that only the owner may read has it, and a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from ..protocol.errors import PotluckError, StateError, UnreachableError
from .status import Answer, Ask

SOCKET, PORT_FILE, ENDED_FILE = "control.sock", "control.json", "ended.json"
MOST_NBYTES = 256 * 1024  # of a line
MOST_PATH = 100  # bytes of a Unix socket's name, less than any system allows
SECONDS = 15.0  # that an answer may take: a worker that loads torch on a busy machine takes some
MOST_SECONDS = 60.0  # that the worker keeps a line open
HINT = "Start one: potluck worker join TICKET. If it was given a folder, name the same: --data-dir"
Serve = Callable[[Ask], Answer]
log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def listening(folder: Path, serve: Serve) -> AsyncIterator[None]:
    """Answers with ``serve`` meanwhile. Only one process may do this in a folder: it holds the key's lock."""
    path, token = folder / SOCKET, ""
    _remove(folder)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            async with asyncio.timeout(MOST_SECONDS):
                line = await reader.readuntil(b"\n")
                writer.write(msgspec.json.encode(_answer(line, token, serve)) + b"\n")
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    try:
        if is_unix(path):
            mask = os.umask(0o177)
            try:
                server = await asyncio.start_unix_server(converse, path, limit=MOST_NBYTES)
            finally:
                os.umask(mask)
        else:
            token = secrets.token_hex(16)
            server = await asyncio.start_server(converse, "127.0.0.1", 0, limit=MOST_NBYTES)
            port = server.sockets[0].getsockname()[1]
            _write_private(folder / PORT_FILE, json.dumps({"port": port, "token": token}))
    except OSError as error:
        raise StateError(
            f"{folder}: no control socket can be made there ({error.strerror or error})",
            hint="Choose a writable folder: --data-dir",
        ) from None
    try:
        yield
    finally:
        server.close()
        _remove(folder)


def ask(folder: Path, what: Ask) -> Answer:
    """What the worker of ``folder`` answers. ``UnreachableError`` if none runs there."""
    path = folder / SOCKET
    try:
        if is_unix(path):
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(SECONDS)
                line.connect(str(path))
                said = _converse(line, what)
        else:
            place = json.loads((folder / PORT_FILE).read_text(encoding="utf-8"))
            with socket.create_connection(("127.0.0.1", int(place["port"])), SECONDS) as line:
                said = _converse(line, msgspec.structs.replace(what, token=str(place["token"])))
        answer = msgspec.json.decode(said, type=Answer)
    except (FileNotFoundError, ConnectionRefusedError):
        raise UnreachableError(f"no worker runs in {folder}", hint=HINT, code="absent") from None
    except TimeoutError:
        raise UnreachableError(
            f"the worker of {folder} does not answer within {SECONDS:g} s", hint="Look at its log, or end it."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise UnreachableError(
            f"the worker of {folder} cannot be asked ({error})", hint="Ask as the user that it runs as."
        ) from None
    if answer.error:
        raise UnreachableError(answer.error, hint=answer.hint, code="refused")
    return answer


def is_unix(path: Path) -> bool:
    return sys.platform != "win32" and hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) <= MOST_PATH


def _converse(line: socket.socket, what: Ask) -> bytes:
    line.sendall(msgspec.json.encode(what) + b"\n")
    said = b""
    while not said.endswith(b"\n") and (piece := line.recv(65536)):
        said += piece
        if len(said) > MOST_NBYTES:
            raise ValueError("it answers with too much")
    return said


def _answer(line: bytes, token: str, serve: Serve) -> Answer:
    try:
        what = msgspec.json.decode(line, type=Ask)
    except msgspec.MsgspecError:
        return Answer(error="the worker does not understand what it is asked", hint="Is it of the same version?")
    if not hmac.compare_digest(what.token.encode(), token.encode()):
        return Answer(error="the worker's owner is somebody else", hint="Ask as the user that it runs as.")
    try:
        return serve(what)
    except PotluckError as error:
        return Answer(error=str(error), hint=error.hint)
    except Exception:
        log.exception("the owner's question failed")
        return Answer(error="the worker failed to answer", hint="Its log says why.")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _remove(folder: Path) -> None:
    for name in (SOCKET, PORT_FILE):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


# How the last worker of a folder ended, for who looks when none runs.


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """``error``: what a person must mend, empty if all was well."""

    at: float
    text: str
    error: bool


def note_end(folder: Path, ended: Ended | None) -> None:
    """Keeps it, as well as the disk allows; None: a worker runs."""
    with contextlib.suppress(OSError):
        if ended is None:
            (folder / ENDED_FILE).unlink(missing_ok=True)
        else:
            _write_private(folder / ENDED_FILE, msgspec.json.encode(ended).decode())


def last_end(folder: Path) -> Ended | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((folder / ENDED_FILE).read_bytes(), type=Ended)
    return None
