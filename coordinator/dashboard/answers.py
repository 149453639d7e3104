"""Answers to the questions of :mod:`.endpoints`: asked, encoded and compressed once for all who ask the same.

What needs the run's file is asked in threads, a few at once, so the event loop, which the run shares, never waits for
the disk. An answer is kept until the source's version changes.
"""

from __future__ import annotations

import asyncio
import gzip
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import msgspec

from ...protocol.errors import PotluckError
from .endpoints import Arguments, Endpoint
from .parameters import Refused
from .shapes import State
from .source import Source
from .tables import table

AT_ONCE = 3  # questions to the file
MOST_WAITING = 64  # of them, under way or for their turn
MOST_KEPT_NBYTES = 32 << 20
WORTH_PACKING = 1000  # bytes
FASTEST = 5  # of gzip's levels, that is still close to the best


@dataclass
class Answer:
    """``version``: the source's before it was asked. ``packed``: the body with gzip, once somebody wanted that."""

    version: int
    body: bytes
    packed: bytes | None = None

    @property
    def nbytes(self) -> int:
        return len(self.body) + len(self.packed or b"")


class Answers:
    """For one source, in one event loop."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._kept: OrderedDict[Hashable, Answer] = OrderedDict()
        self._asked: dict[Hashable, asyncio.Task[Answer]] = {}
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def find(self, endpoint: Endpoint, arguments: Arguments, as_csv: bool, packed: bool) -> Answer:
        """`Refused` with 404 where there is nothing, 429 if too many ask, 503 if the file cannot be read now."""
        version = self.source.version
        key = (endpoint.path, as_csv, tuple(arguments.items()))
        answer = self._kept.get(key)
        if answer is None or answer.version != version:
            flight = (version, key)
            task = self._asked.get(flight)
            if task is None:
                task = self._asked[flight] = asyncio.create_task(self._ask(endpoint, arguments, as_csv, version))
                task.add_done_callback(lambda done: self._done(flight, done))
            answer = await asyncio.shield(task)  # others may wait for it, too
            if endpoint.answer is not State or not endpoint.is_quick(arguments):  # that says what time it is
                self._keep(key, answer)
        if packed and answer.packed is None and len(answer.body) >= WORTH_PACKING:
            answer.packed = await asyncio.to_thread(gzip.compress, answer.body, FASTEST, mtime=0)
        return answer

    async def _ask(self, endpoint: Endpoint, arguments: Arguments, as_csv: bool, version: int) -> Answer:
        def question() -> bytes:
            return encoded(endpoint, endpoint.ask(self.source, arguments), as_csv)

        if endpoint.is_quick(arguments):
            found = endpoint.ask(self.source, arguments)
            return Answer(version, await asyncio.to_thread(encoded, endpoint, found, as_csv))
        if self._waiting >= MOST_WAITING:
            raise Refused(429, "Too many questions at once", "Ask again in a second", {"Retry-After": "1"})
        self._waiting += 1
        try:
            async with self._turn:
                return Answer(version, await asyncio.to_thread(question))
        except PotluckError as error:  # its message may name folders of the machine
            raise Refused(503, "The run's file cannot be read right now", "Ask again later") from error
        finally:
            self._waiting -= 1

    def _done(self, flight: Hashable, task: asyncio.Task[Answer]) -> None:
        del self._asked[flight]
        if not task.cancelled():
            task.exception()  # who asked has it; nobody may have waited

    def _keep(self, key: Hashable, answer: Answer) -> None:
        for old in [old for old, kept in self._kept.items() if kept.version != self.source.version]:
            del self._kept[old]
        self._kept[key] = answer
        self._kept.move_to_end(key)
        while sum(kept.nbytes for kept in self._kept.values()) > MOST_KEPT_NBYTES:
            self._kept.popitem(last=False)


def encoded(endpoint: Endpoint, found: Any, as_csv: bool = False) -> bytes:
    """`Refused` with 404 if nothing was found. Numbers that are not finite are null: JSON has no word for them."""
    if found is None:
        raise Refused(404, endpoint.missing or "Nothing is known of that", "What there is, the lists of /api say")
    return table(endpoint.columns, endpoint.cells(found)) if as_csv else msgspec.json.encode(found)
