"""A peer behind a router is asked to dial: the one of two that can be dialled asks for it at a relay.

Each side dials those it sends to; but who has a public address, and sends to one that nobody can dial, need not go
through the relay: the other can dial *it*. The relay tells the other so (``relay.RETURN``), which looks into its plan
for where the asker is, and dials there. The connection is proven as every other, and then is a pipe of who asked: its
channel runs on it, and asks again when it breaks. Nothing of that passes through the relay.

Both ends know from the plan which of them has addresses; so exactly one of two has a reason to ask. If the other
cannot or does not dial, the way fails, and the relay itself is next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from datetime import timedelta
from typing import Any

from .errors import UnreachableError
from .grpc_pipes import ReturnedPipe
from .pipe import Pipe
from .relayed import Relays


class Returns:
    """The pipes that peers were asked for, by peer."""

    def __init__(self) -> None:
        self._awaited: dict[str, deque[asyncio.Future[ReturnedPipe]]] = {}

    async def take(self, peer_id: str, pipe: ReturnedPipe) -> None:
        """A peer has dialled us because it was told to; until the pipe is done with, or at once if nobody waits."""
        waiting = self._awaited.get(peer_id, ())
        awaited = next((each for each in waiting if not each.done()), None)
        if awaited is None:
            return
        awaited.set_result(pipe)
        await pipe.over.wait()

    async def ask(self, relays: Relays, peer_id: str, timeout: timedelta) -> Pipe:
        """A pipe that this very peer has dialled. ``UnreachableError`` if it does not."""
        awaited: asyncio.Future[ReturnedPipe] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(peer_id, deque()).append(awaited)
        asking = asyncio.ensure_future(relays.ask_to_dial(peer_id, timeout))
        ends: set[asyncio.Future[Any]] = {awaited, asking}
        try:
            seconds = timeout.total_seconds()
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not awaited.done():
                if asking.done():
                    await asking
                raise UnreachableError(
                    f"{peer_id} was asked to dial, and did not within {seconds:g} s", hint="see its log", code="silent"
                )
            return awaited.result()
        except BaseException:
            if awaited.done() and not awaited.cancelled():
                await awaited.result().close()
            raise
        finally:
            awaited.cancel()
            self._awaited[peer_id].remove(awaited)
            if not self._awaited[peer_id]:
                del self._awaited[peer_id]
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError, UnreachableError):
                await asking
