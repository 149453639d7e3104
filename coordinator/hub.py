"""The shell around the state machine: takes what comes in, writes it down, then tells the peers.

One task owns the state. It takes everything that has arrived, steps the machine, writes all commands in one durable
transaction, and only then acknowledges reports and sends views.

When the disk refuses, nothing of the batch takes effect: the same inputs are tried again until it is written, in a
state whose clock has stood still. Meanwhile what comes in waits, within bounds: of heartbeats the newest is kept, ticks
are left out, a newcomer waits at the door, and of a worker that says too much no more is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from ..protocol import control_pb2 as pb
from ..protocol.errors import StateError
from ..protocol.failpoints import failpoint, failpoint_async
from .dashboard.board import Board, Shown
from .events import PhaseChanged
from .operating import Objection, objection
from .resume import keep
from .run import step
from .standstill import Standstill, shifted
from .state import (
    Command,
    Dismiss,
    Gone,
    Input,
    Joined,
    Journal,
    Member,
    Order,
    Rules,
    RunState,
    Said,
    StopAsked,
    Tick,
)
from .store import Store, passing
from .views import note_of, view_of

log = logging.getLogger(__name__)
TICK_SECONDS = 0.5
HANG_SECONDS = 2.0  # of one write, or between two turns: from here on the time counts for nobody
BATCH = 500
REDIALS_SECONDS = (60.0, 4.0), (600.0, 11.0)  # whose line broke less than so long ago dials at least so often
MOST_WAITING_NBYTES = 256 * 1024  # of one worker's reports, before no more of them is read
MOST_LINKS = 256  # of one peer's heartbeat, that are looked at
REPORT_NBYTES = 200  # that a report costs beside its own


@dataclass(eq=False)
class Line:
    """One worker's open control stream. ``outbox`` ends with None."""

    peer: str
    session: bytes
    outbox: asyncio.Queue[pb.Down | None] = field(default_factory=asyncio.Queue)
    last_view: bytes = b""
    entered: bool = False  # the state machine was told of the session
    waiting_nbytes: int = 0  # of reports that are not in the state yet
    room: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, message: pb.Down) -> None:
        self.outbox.put_nowait(message)

    def close(self) -> None:
        self.outbox.put_nowait(None)


Item = tuple[Input, Line | None, int]  # what happened, whose line it came on, and the report's number


class Hub:
    """Runs one run. ``standing`` is set while the disk refuses.

    ``failed`` is set if that can never get better: nothing is acknowledged from then on.
    """

    def __init__(self, rules: Rules, state: RunState, store: Store, board: Board) -> None:
        self.rules, self.state, self.store, self.board = rules, state, store, board
        self.clock = board.clock
        self.failed: StateError | None = None
        self.standing: Standstill | None = None
        self.lines: dict[bytes, Line] = {}
        self.acked: dict[bytes, int] = {}
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._orders: dict[int, asyncio.Future[list[str]]] = {}  # the operator's, that wait for their answer
        self.rates: dict[tuple[str, str], float] = {}  # bytes per second from one peer to another, as it last said
        self._beats: dict[bytes, Item] = {}  # the newest of each session, while the disk refuses
        self._writing = asyncio.Event()
        self._writing.set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._awake = self.clock()  # when this process was last seen to run

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

    async def order(self, order: Order) -> list[str] | Objection:
        """What happened by the operator's order, once it is on the disk; or why it was not carried out.

        ``StateError`` if the disk has failed for good.
        """
        if self.failed:
            raise self.failed
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._orders[id(order)] = answer
        before = self.state
        self.put(order)
        if said := await answer:
            return said
        against = objection(self.rules, self.state, order) or objection(self.rules, before, order)
        return against or Objection(text="the run has changed meanwhile", hint="Look at it and try again.")

    async def until_phase(self, *phases: str) -> str:
        """Waits until the run is in one of ``phases``, or the disk has failed (raises its ``StateError``)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.failed or self.state.phase in phases)
        if self.failed:
            raise self.failed
        return self.state.phase

    async def until_stuck(self, seconds: float) -> Standstill:
        """Waits until the disk has refused for ``seconds`` from now on."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self.standing)
            try:
                async with asyncio.timeout(seconds):
                    await self._writing.wait()
            except TimeoutError:
                if self.standing:
                    return self.standing

    async def until_alone(self, seconds: float) -> None:
        """Waits until every worker has hung up and its last words are on disk, at most ``seconds``, and until those
        whose lines had broken have had the time to dial again and hear of the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.failed or not (self.lines or self.state.members))
        now, unaware = self.clock(), self.state.unaware.values()
        redials = [next((pause for most, pause in REDIALS_SECONDS if now - at < most), 0.0) for at in unaware]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(redials, default=0.0)), self._changed:
                await self._changed.wait_for(lambda: self.failed or not (self.lines or self.state.unaware))

    def connect(self, line: Line) -> None:
        """A worker has dialled; an older line of its session is closed."""
        previous = self.lines.get(line.session)
        self.lines[line.session] = line
        if previous:
            line.entered = previous.entered
            previous.close()
        if self.standing:
            self._show(replace(self.state, note=self.standing.note), line)

    async def enter(self, line: Line, member: Member) -> None:
        """Lets a connected worker in, as soon as that can be written down."""
        await self._writing.wait()
        line.entered = True
        self.put(Joined(member=member), line)

    async def report(self, line: Line, up: pb.Up) -> None:
        """A message from a worker; repeated ones are acknowledged again and otherwise ignored.

        Returns when there is room for another one.
        """
        if up.seq and up.seq <= self.acked.get(line.session, 0):
            line.send(pb.Down(ack=pb.Ack(seq=up.seq)))
            return
        if self.standing and up.WhichOneof("body") == "heartbeat":
            self._beats[line.session] = (Said(peer=line.peer, report=up), line, 0)
            return
        self.put(Said(peer=line.peer, report=up), line, up.seq)
        line.waiting_nbytes += up.ByteSize() + REPORT_NBYTES
        if line.waiting_nbytes > MOST_WAITING_NBYTES:
            line.room.clear()
            await line.room.wait()

    def hang_up(self, line: Line) -> None:
        """A worker's stream has ended."""
        if self.lines.get(line.session) is line:
            del self.lines[line.session]
            if line.entered or not self.standing:
                self.put(Gone(peer=line.peer, session=line.session))

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs something on the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, function, *arguments)

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if not self.standing:
                self.put(Tick())

    async def _work(self) -> None:
        batch: list[Item] = []  # not empty here: it was refused
        while True:
            if not batch:
                batch.append(await self._queue.get())
            while not self._queue.empty() and len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
            now = self.clock()
            if (asleep := now - self._awake) > HANG_SECONDS:  # a lid, a paused machine
                log.warning("this process slept for %.1f s: that counts for nobody", asleep)
                self.state = shifted(self.state, asleep)
            try:
                await self._take(batch, now)
            except StateError as error:
                if not passing(error):
                    await self._fail(error)
                    return
                await self._stand(error, now)
            else:
                batch = []

    async def _take(self, batch: list[Item], now: float) -> None:
        """Everything that follows from a batch, if it can be written down; ``StateError`` and nothing of it if not."""
        await failpoint_async("coordinator.batch.taken")
        state, beats = self.state, dict(self._beats)
        commands: list[Command] = []
        if self.standing:
            state, event = self.standing.resumed(state, now)
            commands.append(Journal(event=event))
        items = [*beats.values(), *batch]  # beats first: who has been heard meanwhile is not silent
        answers: dict[int, list[str]] = {}
        for what, _, _ in items:
            state, ordered = step(self.rules, state, what, now)
            commands += ordered
            if isinstance(what, Order):
                answers[id(what)] = [c.event.text for c in ordered if isinstance(c, Journal)]
        said = [(line.session, what) for what, line, _ in items if line is not None and isinstance(what, Said)]
        durable = [*(c for c in commands if not isinstance(c, Dismiss)), *entered(self.state, state)]
        heard = self.board.heard(said, durable, now)
        durable += keep(self.state, state)
        if durable or heard.statements:
            await self.read(self.store.write, durable, now, heard.statements)
        fewer = (
            self.state.members.keys() - state.members.keys()
            or self.state.unaware != state.unaware
            or any(isinstance(what, Gone) for what, _, _ in batch)
        )
        changed = state.phase != self.state.phase or fewer
        self._awake = self.clock()
        waited = self._awake - now
        self.state = state if waited < HANG_SECONDS else shifted(state, waited)  # a disk that hangs is nobody's fault
        if self.standing:
            self._go_on(beats)
        await failpoint_async("coordinator.acks")
        self._tell(batch, commands)
        for key, texts in answers.items():
            if (answer := self._orders.pop(key, None)) is not None and not answer.done():
                answer.set_result(texts)
        self._measure(said)
        noted = replace(self.state, note=note_of(self.state))
        self.board.update(noted, [c for c in durable if isinstance(c, Shown)], now, heard)
        if changed:
            await self._notify()

    def _measure(self, said: Sequence[tuple[bytes, Said]]) -> None:
        """How fast lines are, as their senders say."""
        for _, what in said:
            if what.report.WhichOneof("body") == "heartbeat":
                for link in what.report.heartbeat.links[:MOST_LINKS]:
                    if link.peer in self.state.members and 0.0 < link.bytes_per_second < 1e12:
                        self.rates[what.peer, link.peer] = link.bytes_per_second
        members = self.state.members.keys()
        if len(self.rates) > MOST_LINKS * len(members):  # of those who are gone
            self.rates = {pair: rate for pair, rate in self.rates.items() if {*pair} <= members}

    def _tell(self, batch: list[Item], commands: Sequence[Command]) -> None:
        highest: dict[bytes, tuple[Line, int]] = {}
        for what, line, seq in batch:
            if line is not None and isinstance(what, Said):
                line.waiting_nbytes -= what.report.ByteSize() + REPORT_NBYTES
                line.room.set()
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
            failpoint("coordinator.view")
            self._show(self.state, line)

    def _show(self, state: RunState, line: Line) -> None:
        """Sends a worker its view of ``state``, if that is another than its last."""
        member = state.members.get(line.peer)
        if member is not None and member.session == line.session:
            view = view_of(self.rules, state, line.peer)
        elif self.standing and not line.entered:
            view = pb.View(phase="waiting", note=state.note)
        else:
            return
        packed = view.SerializeToString(deterministic=True)
        if packed != line.last_view:
            line.last_view = packed
            line.send(pb.Down(view=view))

    # When the disk refuses.

    async def _stand(self, error: StateError, now: float) -> None:
        """Says so, once for each reason, and waits before the next try."""
        before = self.standing
        self.standing = before.again(error) if before else Standstill(since=now, error=error)
        self._writing.clear()
        if before is None or before.note != self.standing.note:
            log.error("%s Nothing is acknowledged until it can be written.", error.one_line())
            noted = replace(self.state, note=self.standing.note)
            self.board.update(noted, [], now)
            for line in self.lines.values():
                self._show(noted, line)
            await self._notify()
        await asyncio.sleep(self.standing.pause_seconds)
        self._awake = self.clock()

    def _go_on(self, beats: dict[bytes, Item]) -> None:
        """It is written: ``beats`` with it, newer ones follow."""
        self.standing = None
        for session, item in self._beats.items():
            if beats.get(session) is not item:
                self.put(item[0])  # its totals come again with the next one
        self._beats.clear()
        self._writing.set()

    async def _fail(self, error: StateError) -> None:
        self.failed = error
        self.state = replace(self.state, note=error.one_line())
        for answer in self._orders.values():
            if not answer.done():
                answer.set_exception(error)
        self._orders.clear()
        self.board.update(self.state, [], self.clock())
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def entered(before: RunState, after: RunState) -> list[Journal]:
    """A phase or a note that a batch has led to."""
    note = note_of(after)
    if (before.phase, note_of(before)) == (after.phase, note):
        return []
    return [Journal(event=PhaseChanged(phase=after.phase, note=note))]
