"""Which way to a peer is taken: several are tried, the better ones with a head start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from .errors import UnreachableError
from .pipe import Pipe

STAGGER_SECONDS = 0.3  # between two direct addresses (RFC 8305 has 0.25)
HEAD_START_SECONDS = 2.0  # of direct addresses before a relay

_ORDER = {"admission": 0, "identity": 1}  # that the right peer says no tells more than that an old address is dead


class Way(NamedTuple):
    connect: Callable[[], Awaitable[Pipe]]
    head_start: float  # seconds that all ways before it have


async def first_of(ways: Sequence[Way]) -> Pipe:
    """The pipe that is there first. A way begins when its head start is over, or all before it have failed.

    ``UnreachableError`` if none leads anywhere: the most telling one.
    """
    waiting, going = list(ways), set[asyncio.Task[Pipe]]()
    failures: list[UnreachableError] = []
    begin = asyncio.get_running_loop().time()
    found: Pipe | None = None
    try:
        while found is None and (waiting or going):
            now = asyncio.get_running_loop().time()
            if waiting and (not going or now >= begin + waiting[0].head_start):
                going.add(asyncio.ensure_future(waiting.pop(0).connect()))
                begin = now
                continue
            patience = begin + waiting[0].head_start - now if waiting else None
            done, going = await asyncio.wait(going, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    pipe = task.result()
                except UnreachableError as error:
                    failures.append(error)
                else:
                    if found is None:
                        found = pipe
                    else:
                        await pipe.close()
    finally:
        await _drop(going)
    if found is None:
        raise min(failures, key=lambda error: _ORDER.get(error.code, 2))
    return found


async def _drop(tasks: set[asyncio.Task[Pipe]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, BaseException):
            await result.close()
