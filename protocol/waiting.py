"""Waiting inside one event loop for a state to be reached, or for the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .errors import PotluckError


class Waiting:
    """Base of what has waiters: whoever changes its state wakes them, each looks whether its time has come."""

    def __init__(self) -> None:
        self._ended: PotluckError | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Returns once ``ready``; raises a copy of ``_ended`` if that comes first."""
        while not ready():
            if self._ended is not None:
                raise type(self._ended)(str(self._ended), hint=self._ended.hint, code=self._ended.code)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
