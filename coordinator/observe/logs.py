"""A structured log: one JSON object a line for each event of the run, and for each warning.

The objects are ``{"time": Unix seconds, "kind": ..., "step": ..., "peer": ... or null, "text": ..., "fields": {...}}``;
for an event, kind is its type and the fields are its own, for a warning ``Log`` with level and logger, for alerts
``AlertRaised`` and ``AlertResolved``. Network addresses are masked everywhere. The file is written by a thread of its
own: a disk that hangs holds nobody up, and what does not fit in the queue is counted and left out.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from ...protocol.errors import ConfigError
from ..dashboard.shapes import Alert, EventRow
from ..event import Event
from ..masking import masked

MOST_WAITING = 10_000  # lines
OLDER_FILES = 3
MOST_TEXT = 8000  # characters of a text in it
CLOSE_SECONDS = 5.0
BREAKS = "\u0085\u2028\u2029"


class JsonLog:
    """Writes to ``path`` until :meth:`close`. ``ConfigError`` if the file cannot be opened."""

    def __init__(self, path: Path, most_nbytes: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = Rotating(path, most_nbytes)
        except OSError as error:
            raise ConfigError(
                f"observe.log: {path} cannot be written ({error.strerror})", hint="Name a file in a writable folder."
            ) from None
        self._queue: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self.left_out = 0
        self.step = 0  # of the newest event
        self._thread = threading.Thread(target=self._write, name="json log", daemon=True)
        self._thread.start()
        self._handler = _Warnings(self)
        logging.getLogger("potluck").addHandler(self._handler)

    def event(self, row: EventRow, event: Event) -> None:
        self.step = row.step
        fields = {key: value for key, value in msgspec.to_builtins(event).items() if key != "type"}
        self.put(row.time, row.kind, row.peer, event.text, fields)

    def alert(self, alert: Alert, now: float, *, is_raised: bool) -> None:
        kind = "AlertRaised" if is_raised else "AlertResolved"
        self.put(now, kind, None, alert.text, {"name": alert.name, "since": alert.since})

    def put(self, time: float, kind: str, peer: str | None, text: str, fields: dict[str, Any]) -> None:
        line = {"time": time, "kind": kind, "step": self.step, "peer": peer, "text": text, "fields": fields}
        if self.left_out:
            line["left_out"] = self.left_out  # lines before this one
        try:
            self._queue.put_nowait(encoded(line))
            self.left_out = 0
        except queue.Full:
            self.left_out += 1

    def close(self) -> None:
        """What waits is written first, unless the disk hangs."""
        logging.getLogger("potluck").removeHandler(self._handler)
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _write(self) -> None:
        is_refused = False
        while (line := self._queue.get()) is not None:
            try:
                self._file.write(line)
                is_refused = False
            except OSError as error:
                if not is_refused:  # not through `logging`: that comes back here
                    print(f"potluck: observe.log cannot be written ({error.strerror}): lines are lost", file=sys.stderr)  # noqa: T201
                is_refused = True
        self._file.close()


class Rotating:
    """An append-only file, readable by its owner; at ``most_nbytes`` it becomes ``.1``, that ``.2`` and so on."""

    def __init__(self, path: Path, most_nbytes: int) -> None:
        self.path, self.most_nbytes = path, most_nbytes
        self._open()

    def _open(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        self._nbytes, self._descriptor = os.fstat(descriptor).st_size, descriptor
        if self._nbytes and not self._ends_line():  # the last process died in a line
            self._nbytes += os.write(descriptor, b"\n")

    def _ends_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def write(self, line: bytes) -> None:
        if self._nbytes and self._nbytes + len(line) > self.most_nbytes:
            self._rotate()
        self._nbytes += os.write(self._descriptor, line)

    def _rotate(self) -> None:
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{i}") for i in range(1, OLDER_FILES + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)
        os.close(self._descriptor)
        self._open()

    def close(self) -> None:
        os.close(self._descriptor)


class _Warnings(logging.Handler):
    """The log's own warnings and errors, beside what it is told."""

    def __init__(self, log: JsonLog) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[0]:
                text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
            self.log.put(record.created, "Log", None, text, {"level": record.levelname, "logger": record.name})
        except Exception:
            self.handleError(record)


def encoded(line: dict[str, Any]) -> bytes:
    """One line for every reader: some end it at characters that JSON leaves as they are."""
    text = msgspec.json.encode(clean(line))
    for char in BREAKS:
        text = text.replace(char.encode(), f"\\u{ord(char):04x}".encode())
    return text + b"\n"


def clean(value: Any) -> Any:
    """With every text short and without network addresses."""
    if isinstance(value, str):
        return masked(value[:MOST_TEXT])
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value
