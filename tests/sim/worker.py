"""A volunteer's machine: its disk, the process on it, and that process's control stream by the rules of control.py."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

from potluck.coordinator.state import Member
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import SavePoint
from potluck.worker.plan import View

from .kernel import Process, Signal, sleep
from .net import COORDINATOR, Connection
from .weights import SavePoints, State

if TYPE_CHECKING:
    from .engine import Engine
    from .world import World

HEARTBEAT_SECONDS = 2.0
BACKOFF_SECONDS = (0.5, 15.0)
CLOSE_SECONDS = 2.0


class Machine:
    """What outlives a worker's process. A volunteer starts it again when it ended, sooner or later."""

    def __init__(self, world: World, peer: str, rng: random.Random) -> None:
        self.world, self.peer, self.rng = world, peer, rng
        self.speed = rng.choice([0.5, 1.0, 1.0, 2.0])
        self.disk: dict[SavePoint, State] = {}
        self.worker: Worker | None = None
        self.down_since = 0.0
        self.hang_until = 0.0  # it computes nothing, and says that it is well
        self.sessions = 0

    @property
    def alive(self) -> bool:
        return self.worker is not None and self.worker.process.alive

    @property
    def paused(self) -> bool:
        return self.worker is not None and self.worker.process.paused_until > self.world.kernel.now

    def start(self) -> None:
        if not self.alive:
            self.sessions += 1
            self.worker = Worker(self, f"{self.peer}/{self.sessions:06}".encode())
            self.world.trace(self.peer, f"starts, session {self.sessions}")

    def kill(self, *, silent: bool = False) -> None:
        """SIGKILL, or the power fails (``silent``)."""
        if self.alive:
            assert self.worker
            self.world.trace(self.peer, "loses power" if silent else "is killed")
            self.worker.end(silent=silent)

    def away(self) -> bool:
        """Whether it answers nobody at all."""
        return not self.alive or self.paused


class Worker:
    """A process from its start to its end."""

    def __init__(self, machine: Machine, session: bytes) -> None:
        from .engine import Engine

        self.machine, self.world, self.session = machine, machine.world, session
        self.peer, self.rng, self.kernel = machine.peer, machine.rng, machine.world.kernel
        self.process = Process(self.peer)
        self.points = SavePoints(machine.disk)
        self.bell = Signal(self.kernel)  # something has changed: a view, a round, a meeting
        self.view, self.version = View(), 0
        self.fence = 0  # generations below are over
        self._generation = -1
        self.leaving = self.closing = self.welcomed_once = False
        self.unacked: deque[pb.Up] = deque()
        self._seq = self._sent = 0
        self.connection: Connection | None = None
        self._welcome = False
        self.engine: Engine = Engine(self)
        self.kernel.spawn(self._run(), self.process)

    # Its end.

    def end(self, *, silent: bool = False) -> None:
        """At once."""
        if self.connection:
            self.connection.client.close(silent=silent)
        self.machine.down_since = self.kernel.now
        self.process.kill()

    async def close(self) -> None:
        """In order: first the reports that are not acknowledged yet."""
        late = self.kernel.now + CLOSE_SECONDS
        while self.unacked and self.kernel.now < late:
            await self.bell.wait(late - self.kernel.now)
        self.world.trace(self.peer, f"ends, {self.view.phase}")
        self.end()
        self.world.ended(self.machine)

    # The control stream.

    def report(self, **body: Any) -> None:
        """Repeated until the coordinator has it on disk."""
        self._seq += 1
        self.unacked.append(pb.Up(seq=self._seq, **body))
        self._flush()

    def leave(self) -> None:
        if not self.leaving:
            self.leaving = True
            self.report(leaving=pb.Leaving())

    def _flush(self) -> None:
        if self._welcome and self.connection:
            for up in self.unacked:
                if up.seq > self._sent:
                    self.connection.client.send(up)
                    self._sent = up.seq

    def _acknowledged(self, seq: int) -> None:
        while self.unacked and self.unacked[0].seq <= seq:
            self.unacked.popleft()
        self.bell.ring()

    async def _run(self) -> None:
        tries = 0
        while True:
            code = await self._connect()
            if code == "ended":
                tries = 0
            elif code not in ("silent", "unreachable") or (code == "unreachable" and not self.welcomed_once):
                self.world.trace(self.peer, f"ends: {code}")
                self.end()
                self.world.ended(self.machine)
                return
            tries += 1
            low, high = BACKOFF_SECONDS
            await sleep(self.rng.uniform(0.5, 1.0) * min(high, low * 2.0 ** min(tries, 10)))

    async def _connect(self) -> str:
        """One connection, until it breaks; how it ended."""
        net = self.world.net
        if net.is_cut(self.peer, COORDINATOR):
            await sleep(self.rng.uniform(5, 15))
            return "unreachable"
        await sleep(3 * net.delay(self.peer, COORDINATOR))
        connection = Connection(net, self.peer)
        self.connection, self._welcome = connection, False
        end = connection.client
        if not self.world.coordinator.accept(connection):
            connection.server.close(silent=True)
            end.close(silent=True)
            return "unreachable"
        end.send(self._hello())
        beating = None
        try:
            while (down := await end.inbox.get()) is not None:
                body = down.WhichOneof("body")
                if body == "welcome":
                    self._acknowledged(down.welcome.acked)
                    self._sent, self._welcome = 0, True
                    if self.welcomed_once and self.leaving:
                        self.report(leaving=pb.Leaving())
                    if not self.welcomed_once:
                        self.welcomed_once = True
                        self.kernel.spawn(self.engine.run(), self.process)
                    self._flush()
                    beating = self.kernel.spawn(self._beat(connection), self.process)
                elif body == "refuse":
                    return str(down.refuse.code)
                elif body == "ack":
                    self._acknowledged(down.ack.seq)
                elif body == "view":
                    self._follow(self.world.crew.view_from(down.view))
            return "ended" if self._welcome else "unreachable"
        finally:
            self._welcome = False
            if beating:
                beating.cancel()
            end.close()

    async def _beat(self, connection: Connection) -> None:
        while True:
            connection.client.send(pb.Up(heartbeat=pb.Heartbeat(state=self.engine.doing)))
            await sleep(HEARTBEAT_SECONDS)

    def _hello(self) -> Member:
        return Member(
            peer=self.peer,
            name=self.peer,
            speed=self.machine.speed,
            session=self.session,
            savepoints=frozenset(self.points.points()),
        )

    def _follow(self, view: View) -> None:
        """A new view: nothing of an older generation comes in any more."""
        known = self.fence
        if view.plan is not None:
            self._generation = view.plan.generation
        self.fence = max(self.fence, self._generation + (view.plan is None))
        self.view, self.version = view, self.version + 1
        if self.fence != known:
            self.world.trace(self.peer, f"sees generation {self.fence}, {view.phase}")
        self.bell.ring()
