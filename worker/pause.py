"""A pause that the owner asked for, in a file of its own: it outlives the process."""

from __future__ import annotations

import contextlib
import os
import re
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from ..protocol.errors import ConfigError, StateError

FILE = "pause.json"
SPAN = re.compile(r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?$")
MOST = timedelta(days=366)


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``until``: Unix time; None: until the owner resumes."""

    until: float | None = None


def span(text: str) -> timedelta:
    """``2h``, ``90m``, ``1h30m``, ``1d``."""
    found = SPAN.match(text.strip().lower().replace(" ", ""))
    days, hours, minutes = (min(int(part or 0), 10**6) for part in found.groups()) if found else (0, 0, 0)
    length = timedelta(days=days, hours=hours, minutes=minutes)
    if not timedelta() < length <= MOST:
        raise ConfigError(f"{text!r} is no time to pause for", hint="Write 2h, 90m, 1h30m or 1d.")
    return length


def moment(text: str, now: datetime) -> datetime:
    """``18:00``, today or else tomorrow, or ``2026-11-23 18:00``."""
    with contextlib.suppress(ValueError):
        clock = datetime.strptime(text.strip(), "%H:%M")
        at = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
        return at if at > now else at + timedelta(days=1)
    try:
        at = datetime.strptime(text.strip().replace("T", " "), "%Y-%m-%d %H:%M")
    except ValueError:
        raise ConfigError(f"{text!r} is no moment", hint="Write --until 18:00 or --until '2026-11-23 18:00'.") from None
    if not now < at <= now + MOST:
        raise ConfigError(f"{text!r} is not within the year to come", hint="Write --until 18:00.")
    return at


def load(folder: Path, now: float) -> Pause | None:
    """The pause that holds at ``now``. A damaged file is a pause without end: the owner did want one."""
    try:
        pause = msgspec.json.decode((folder / FILE).read_bytes(), type=Pause)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return Pause()
    return pause if pause.until is None or pause.until > now else None


def save(folder: Path, pause: Pause | None) -> None:
    """Keeps it, or that there is none. ``StateError`` if the disk refuses."""
    path = folder / FILE
    try:
        if pause is None:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(pause))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StateError(f"{path}: cannot be written ({error.strerror})", hint="Free some space there.") from None
