"""The shell around the state machine: takes what comes in, writes it down, then tells the peers.

One task owns the state. It takes everything that has arrived, steps the machine, writes all commands in one durable
transaction, and only then acknowledges reports and sends views.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from ..protocol import control_pb2 as pb
from ..protocol.errors import StateError
from .board import Board
from .run import step, view_of
from .state import Commit, Dismiss, Gone, Input, Journal, Point, Rules, RunState, Said, StopAsked, Tick
from .store import Store

log = logging.getLogger(__name__)
TICK_SECONDS = 0.5
BATCH = 500


@dataclass(eq=False)
class Line:
    """One worker's open control stream. ``outbox`` ends with None."""

    peer: str
    session: bytes
    outbox: asyncio.Queue[pb.Down | None] = field(default_factory=asyncio.Queue)
    last_view: bytes = b""

    def send(self, message: pb.Down) -> None:
        self.outbox.put_nowait(message)

    def close(self) -> None:
        self.outbox.put_nowait(None)


class Hub:
    """Runs one run. ``failed`` is set if the disk refuses: nothing is acknowledged from then on."""

    def __init__(self, rules: Rules, state: RunState, store: Store, board: Board) -> None:
        self.rules, self.state, self.store, self.board = rules, state, store, board
        self.failed: StateError | None = None
        self.lines: dict[bytes, Line] = {}
        self.acked: dict[bytes, int] = {}
        self._queue: asyncio.Queue[tuple[Input, Line | None, int]] = asyncio.Queue()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._ticks())]

    async def close(self) -> None:
        for line in self.lines.values():
            line.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._writer, self.store.close)
        self._writer.shutdown()

    def put(self, what: Input, line: Line | None = None, seq: int = 0) -> None:
        """Queues something that happened."""
        self._queue.put_nowait((what, line, seq))

    def stop(self) -> None:
        """The operator asks for an orderly stop."""
        self.put(StopAsked())

    async def until_phase(self, *phases: str) -> str:
        """Waits until the run is in one of ``phases``, or the disk has failed (raises its ``StateError``)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.failed or self.state.phase in phases)
        if self.failed:
            raise self.failed
        return self.state.phase

    async def until_alone(self, seconds: float) -> None:
        """Waits until every worker has hung up and its last words are on disk, at most ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.failed or not (self.lines or self.state.members))

    def report(self, line: Line, up: pb.Up) -> None:
        """A message from a worker; repeated ones are acknowledged again and otherwise ignored."""
        if up.seq and up.seq <= self.acked.get(line.session, 0):
            line.send(pb.Down(ack=pb.Ack(seq=up.seq)))
            return
        self.put(Said(peer=line.peer, report=up), line, up.seq)

    def hang_up(self, line: Line) -> None:
        """A worker's stream has ended."""
        if self.lines.get(line.session) is line:
            del self.lines[line.session]
            self.put(Gone(peer=line.peer, session=line.session))

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs something on the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, function, *arguments)

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.put(Tick())

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty() and len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
            now, state, commands = time.time(), self.state, []
            for what, _, _ in batch:
                state, ordered = step(self.rules, state, what, now)
                commands += ordered
            traffic = self.board.heard([(x.session, w) for w, x, _ in batch if isinstance(w, Said) and x is not None])
            durable = [c for c in commands if not isinstance(c, Dismiss)]
            if durable or traffic:
                try:
                    await self.read(self.store.write, durable, now, traffic)
                except StateError as error:
                    await self._fail(error)
                    return
            changed = state.phase != self.state.phase or any(isinstance(what, Gone) for what, _, _ in batch)
            self.state = state
            self._tell(batch, commands)
            self.board.update(state, [c for c in durable if isinstance(c, Journal | Point | Commit)], now)
            if changed:
                async with self._changed:
                    self._changed.notify_all()

    def _tell(self, batch: list[tuple[Input, Line | None, int]], commands: list[Any]) -> None:
        highest: dict[bytes, tuple[Line, int]] = {}
        for _, line, seq in batch:
            if line is not None and seq:
                highest[line.session] = (line, max(seq, highest.get(line.session, (line, 0))[1]))
        for session, (line, seq) in highest.items():
            self.acked[session] = seq
            line.send(pb.Down(ack=pb.Ack(seq=seq)))
        for command in commands:
            if isinstance(command, Journal):
                log.info("%s", command.event.text)
            if isinstance(command, Dismiss) and (line := self.lines.get(command.session)):
                line.send(pb.Down(refuse=pb.Refuse(code=command.code, text=command.text, hint=command.hint)))
                line.close()
        for line in self.lines.values():
            member = self.state.members.get(line.peer)
            if member is not None and member.session == line.session:
                view = view_of(self.rules, self.state, line.peer)
                packed = view.SerializeToString(deterministic=True)
                if packed != line.last_view:
                    line.last_view = packed
                    line.send(pb.Down(view=view))

    async def _fail(self, error: StateError) -> None:
        self.failed = error
        self.state = replace(self.state, note=error.one_line())
        self.board.update(self.state, [], time.time())
        async with self._changed:
            self._changed.notify_all()
