"""A relay: peers that cannot be dialled meet here, each on a connection that it opened itself.

It moves messages from one stream to the other and sees nothing of what is in them (``protocol/tunnel.py``). A stream is
read only as fast as the other one takes, so it holds a message or two of each (half a megabyte at most); all streams
take turns, so 200 peers share the machine evenly, and each may send ``peer_mbps`` at most. Every coordinator is one;
``potluck relay up`` starts others for the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from ..protocol.errors import WireError
from ..protocol.grpc_pipes import ListenerPipe
from ..protocol.pipe import Pipe, PipeClosed
from ..protocol.relay import ANSWER, ATTACH, CALL, CALL_NBYTES, RETURN, Asked, admit, refusal, ring, verdict
from ..protocol.throttle import Bucket
from ..protocol.tunnel import MOST_NBYTES

log = logging.getLogger(__name__)
ENTER_SECONDS = 10.0  # to prove who one is
ANSWER_SECONDS = 10.0  # for a peer that is called to dial back
SILENT_SECONDS = 15.0  # after which a peer that should say every two that it is there, is not


@dataclass
class Usage:
    """What one peer had the relay do."""

    calls: int = 0
    sent_nbytes: int = 0
    received_nbytes: int = 0


@dataclass(eq=False)
class _Call:
    asked: Asked
    answered: asyncio.Future[Pipe | None]  # None: the peer that is called is gone
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Attached:
    """A peer that can be called, and the calls to it."""

    rings: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    calls: set[_Call] = field(default_factory=set)


class Relay:
    """``usage`` has totals by peer since the start; ``peer_mbps`` 0 is no limit."""

    def __init__(
        self,
        run: str,
        secret: str,
        fingerprint: str,
        *,
        peer_mbps: float = 0.0,
        most_peers: int = 10_000,
        most_calls: int = 64,
        is_banned: Callable[[str], bool] = lambda peer: False,
    ) -> None:
        self._run, self._secret, self._fingerprint = run, secret, fingerprint
        self._is_banned = is_banned
        self._peer_mbps, self._most_peers, self._most_calls = peer_mbps, most_peers, most_calls
        self.usage: dict[str, Usage] = {}
        self._attached: dict[str, _Attached] = {}
        self._calls: dict[bytes, _Call] = {}  # not answered yet
        self._going: Counter[str] = Counter()  # calls by caller
        self._buckets: dict[str, Bucket] = {}

    @property
    def attached(self) -> int:
        return len(self._attached)

    @property
    def calls(self) -> int:
        return self._going.total()

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """For a server; messages are bytes."""
        service = ATTACH.split("/")[1]
        doors: dict[str, Callable[[ListenerPipe], Awaitable[None]]] = {
            ATTACH: self._attach,
            CALL: self._call,
            ANSWER: self._answer,
            RETURN: self._return,
        }

        def handler(door: Callable[[ListenerPipe], Awaitable[None]]) -> grpc.RpcMethodHandler:
            async def serve(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
                with contextlib.suppress(WireError, PipeClosed, TimeoutError):
                    await door(ListenerPipe(context))

            return grpc.stream_stream_rpc_method_handler(serve)

        methods = {path.split("/")[2]: handler(door) for path, door in doors.items()}
        return [grpc.method_handlers_generic_handler(service, methods)]

    async def _enter(self, pipe: Pipe, method: str) -> Asked | None:
        async with asyncio.timeout(ENTER_SECONDS):
            asked = await admit(pipe, self._secret, self._fingerprint, self._run, method)
        return None if asked is None or self._is_banned(asked.peer) else asked

    async def _attach(self, pipe: ListenerPipe) -> None:
        """One peer's stay. A newer one of the same peer replaces it.

        Calls to the peer end with it: the lines that they use are likely dead, too, and who called calls again.
        """
        asked = await self._enter(pipe, ATTACH)
        if asked is None:
            return
        before = self._attached.get(asked.peer)
        if before is None and len(self._attached) >= self._most_peers:
            await verdict(pipe, "busy")
            return
        mine = self._attached[asked.peer] = _Attached()
        if before is not None:
            before.rings.put_nowait(None)
        listening = asyncio.create_task(self._listen(pipe, mine))
        try:
            await verdict(pipe)
            while (call := await mine.rings.get()) is not None:
                await pipe.send(call)
        finally:
            listening.cancel()
            if self._attached.get(asked.peer) is mine:
                del self._attached[asked.peer]
            for going in mine.calls:
                going.over.set()
                if not going.answered.done():
                    going.answered.set_result(None)

    async def _listen(self, pipe: ListenerPipe, mine: _Attached) -> None:
        """Ends a stay whose peer is gone or silent."""
        with contextlib.suppress(PipeClosed, TimeoutError):
            while True:
                async with asyncio.timeout(SILENT_SECONDS):
                    await pipe.recv()
        mine.rings.put_nowait(None)

    async def _call(self, pipe: ListenerPipe) -> None:
        """One call, from who dials to its end."""
        asked = await self._enter(pipe, CALL)
        if asked is None:
            return
        async with self._ringing(pipe, asked, "") as call:
            if call is None:
                return
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    far = await call.answered
            except TimeoutError:
                await verdict(pipe, "silent")
                return
            if far is None:
                await verdict(pipe, "absent")
                return
            await verdict(pipe)
            self._of(asked.peer).calls += 1
            await self._join(pipe, far, call)

    async def _return(self, pipe: ListenerPipe) -> None:
        """Has a peer told to dial who asks. Nothing is heard of it again, unless it does not: who asked leaves."""
        asked = await self._enter(pipe, RETURN)
        if asked is None:
            return
        async with self._ringing(pipe, asked, asked.peer) as call:
            if call is None:
                return
            left = asyncio.ensure_future(pipe.recv())
            ends: set[asyncio.Future[Any]] = {left, call.answered}
            try:
                await asyncio.wait(ends, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if left.done():
                    left.exception()
                    return
                why = "silent"
                if call.answered.done():
                    far = call.answered.result()
                    async with asyncio.timeout(ENTER_SECONDS):
                        why = "absent" if far is None else refusal(await far.recv())
                await verdict(pipe, why)
            finally:
                left.cancel()

    @contextlib.asynccontextmanager
    async def _ringing(self, pipe: ListenerPipe, asked: Asked, caller: str) -> AsyncIterator[_Call | None]:
        """A call that its callee is told of; None if that cannot be, and who calls was told why."""
        callee = self._attached.get(asked.target)
        if callee is None:
            await verdict(pipe, "absent")
            yield None
            return
        if self._going[asked.peer] >= self._most_calls:
            await verdict(pipe, "busy")
            yield None
            return
        number = secrets.token_bytes(CALL_NBYTES)
        call = self._calls[number] = _Call(asked, asyncio.get_running_loop().create_future())
        self._going[asked.peer] += 1
        try:
            callee.calls.add(call)
            callee.rings.put_nowait(ring(number, caller))
            yield call
        finally:
            self._calls.pop(number, None)
            callee.calls.discard(call)
            self._going[asked.peer] -= 1
            call.over.set()

    async def _answer(self, pipe: ListenerPipe) -> None:
        """The other end of a call. Its number was told to nobody but the peer that is called."""
        async with asyncio.timeout(ENTER_SECONDS):
            call = self._calls.pop(await pipe.recv(), None)
        if call is not None and not call.answered.done():
            call.answered.set_result(pipe)
            await call.over.wait()

    async def _join(self, near: Pipe, far: Pipe, call: _Call) -> None:
        """Until either end is gone, or the call is over."""
        caller, callee = call.asked
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(self._pump(near, far, caller, callee)),
            asyncio.create_task(self._pump(far, near, callee, caller)),
            asyncio.create_task(call.over.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, source: Pipe, sink: Pipe, sender: str, receiver: str) -> None:
        bucket = self._buckets.setdefault(sender, Bucket(self._peer_mbps))
        sent, got = self._of(sender), self._of(receiver)
        while True:
            message = await source.recv()
            if len(message) > MOST_NBYTES:
                raise WireError("a message that is too long")
            if pause := bucket.take(len(message)):
                await asyncio.sleep(pause)
            await sink.send(message)
            sent.sent_nbytes += len(message)
            got.received_nbytes += len(message)

    def _of(self, peer: str) -> Usage:
        return self.usage.setdefault(peer, Usage())
