"""Evaluations of published models, found in their folders: whoever makes them need not be on this machine.

``potluck eval`` leaves a file in a checkpoint's folder, or it is copied there. Each is read once when it has stopped
changing, again whenever its content differs, and becomes an event of the run. A file that is no evaluation becomes a
warning and changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..protocol.errors import StateError
from ..protocol.evaluation import FILE, MOST_NBYTES, STEP, file_name, parse
from .dashboard.scores import told
from .events import Evaluated, EvaluationIgnored, Published
from .state import Noted
from .store import Store

LOOK_SECONDS = 3.0
SETTLED_SECONDS = 10.0  # since a file was last written, then it is whole at first sight
MOST_FILES = 32  # of one checkpoint that are looked at
CLIP = 200  # characters of why a file is left out

Key = tuple[int, str]  # step and file name
Signature = tuple[int, ...]  # of a file's state: its number, size and times


class Evaluations:
    """Looks into a run's checkpoints. ``known``: the digest of each file as it was last recorded."""

    def __init__(self, folder: Path, known: dict[Key, str]) -> None:
        self.folder, self.known = folder, known
        self._seen: dict[Key, Signature] = {}  # at the last look
        self._read: dict[Key, Signature] = {}

    def look(self) -> list[Evaluated | EvaluationIgnored]:
        """What is new since the last look, by step and name. Touches the disk; never raises for what it finds."""
        found: list[Evaluated | EvaluationIgnored] = []
        seen: dict[Key, Signature] = {}
        for key, path in self._files():
            try:
                about = path.lstat()
            except OSError:
                continue  # gone again: its checkpoint was published anew
            seen[key] = signature = (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            if self._read.get(key) == signature:
                continue
            newest = max(about.st_mtime, about.st_ctime)
            if self._seen.get(key) != signature and newest > time.time() - SETTLED_SECONDS:
                continue  # it may still be being copied
            self._read[key] = signature
            event = _event(path, *key)
            if self.known.get(key) != event.digest:
                self.known[key] = event.digest
                found.append(event)
        self._seen = seen
        self._read = {key: signature for key, signature in self._read.items() if key in seen}
        return found

    def _files(self) -> Iterator[tuple[Key, Path]]:
        for name in _names(self.folder):
            if step := STEP.fullmatch(name):
                files = [file for file in _names(self.folder / name) if FILE.fullmatch(file)]
                for file in files[:MOST_FILES]:
                    yield (int(step[1]), file), self.folder / name / file

    async def follow(self, put: Callable[[Noted], None]) -> None:
        """Looks again and again."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for event in await asyncio.to_thread(self.look):
                put(Noted(event))


def recorded(store: Store) -> dict[Key, str]:
    """What a run's events say of files, for :class:`Evaluations`."""
    known: dict[Key, str] = {}
    for _, _, event in told(store):
        match event:
            case Evaluated():
                known[event.step, file_name(event.suite)] = event.digest
            case EvaluationIgnored():
                known[event.step, event.file] = event.digest
            case Published():  # anew, perhaps: what is in its folder from then on counts
                known = {key: digest for key, digest in known.items() if key[0] != event.step}
    return known


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # there is none yet, or it was published anew
        return []


def _event(path: Path, step: int, file: str) -> Evaluated | EvaluationIgnored:
    digest = ""
    try:
        data = _content(path)
        digest = hashlib.sha256(data).hexdigest()
        found = parse(data, file, step)
    except StateError as error:
        why = "".join(c if c.isprintable() else "?" for c in str(error))[:CLIP]
        return EvaluationIgnored(step=step, file=file, why=why, digest=digest or why)
    return Evaluated(step=step, suite=found.suite, mean=found.mean, tasks=found.tasks, digest=digest)


def _content(path: Path) -> bytes:
    """Of a plain file: no link is followed, no pipe waited for."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StateError("it is not a plain file")
            data = file.read(MOST_NBYTES + 1)
    except OSError as error:
        raise StateError(f"it cannot be read: {error.strerror}") from None
    if len(data) > MOST_NBYTES:
        raise StateError(f"it is over {MOST_NBYTES >> 20} MiB")
    return data
