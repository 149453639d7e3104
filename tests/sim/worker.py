"""A volunteer's machine: its disk, the process on it, and that process's control stream by the rules of control.py."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING

from potluck.coordinator.state import Member
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import SavePoint
from potluck.worker.control import HEARTBEAT_SECONDS, pause_seconds
from potluck.worker.plan import View
from potluck.worker.reports import Reports
from potluck.worker.session import Session

from . import fiber
from .kernel import Process, Signal, sleep
from .links import SimLinks, SimMailbox
from .net import COORDINATOR, Connection
from .states import SimStates
from .weights import SavePoints, State

if TYPE_CHECKING:
    from .world import World

CLOSE_SECONDS = 2.0


class Machine:
    """What outlives a worker's process. A volunteer starts it again when it ended, sooner or later."""

    def __init__(self, world: World, peer: str, rng: random.Random) -> None:
        self.world, self.peer, self.rng = world, peer, rng
        self.speed = rng.choice([0.5, 1.0, 1.0, 2.0])
        self.memory_gb = rng.choice([1.0, 1.0, 2.0, 4.0])  # a layer needs 1 where it is counted at all
        self.disk: dict[SavePoint, State] = {}
        self.worker: Worker | None = None
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
        from .engine import SimEngine, Views

        self.machine, self.world, self.session = machine, machine.world, session
        self.peer, self.rng, self.kernel = machine.peer, machine.rng, machine.world.kernel
        self.identity = SimpleNamespace(peer_id=self.peer)
        self.process = Process(self.peer)
        self.points = SavePoints(machine.disk)
        self.states = SimStates(self)
        self.bell = Signal(self.kernel)  # something has changed: a view, a frame, a round
        self.leaving = self.welcomed_once = False
        self.reports = Reports()
        self._sent = 0
        self.connection: Connection | None = None
        self._welcome = False
        self._welcomed = 0.0
        self._told = ""
        self.computing: fiber.Fiber | None = None
        self.views, self.mailbox = Views(self), SimMailbox(self)
        self.links = SimLinks(self)
        self.engine = SimEngine(self)
        self.kernel.spawn(self._run(), self.process)

    # Its end.

    def end(self, *, silent: bool = False) -> None:
        """At once."""
        if self.connection:
            self.connection.client.close(silent=silent)
        self.process.kill()

    async def close(self) -> None:
        """In order: first the reports that are not acknowledged yet."""
        late = self.kernel.now + CLOSE_SECONDS
        while self.reports and self.kernel.now < late:
            await self.bell.wait(late - self.kernel.now)
        self.world.trace(self.peer, f"ends, {self.views.newest[0].phase}")
        self.end()
        self.world.ended(self.machine)

    # Computing.

    def compute(self, lanes: float) -> None:
        """As long as it takes to compute that many microbatches, and as long as it hangs."""
        world, machine = self.world, self.machine
        if lanes:
            share = world.step_seconds / world.rules.microbatches
            fiber.sleep(lanes * share * self.rng.uniform(0.5, 1.5) / machine.speed)
        if machine.hang_until > self.kernel.now:
            fiber.sleep(machine.hang_until - self.kernel.now)

    def _engine(self) -> None:
        self.computing = fiber.Fiber.current
        self.engine.run()
        self.kernel.spawn(self.close(), self.process)

    def idle(self) -> bool:
        return self.views.idle or self.mailbox.waiting > 0

    def fault(self, generation: int, peer: str, text: str) -> None:
        self.world.trace(self.peer, text)
        self.report(fault=pb.Fault(generation=generation, text=text, peer=peer))

    # A view, by the real rules.

    def say(self, _: str) -> None: ...

    def wording(self, _: View) -> str:
        return ""

    def follow(self, view: View) -> None:
        Session.follow(self, view)  # type: ignore[arg-type]
        self.bell.ring()

    # The control stream.

    def report(self, **body: object) -> None:
        """Repeated until the coordinator has it on disk."""
        self.reports.add(**body)
        self._flush()

    def leave(self) -> None:
        self.leaving = True
        self.report(leaving=pb.Leaving())

    def _flush(self) -> None:
        if self._welcome and self.connection:
            for up in self.reports.after(self._sent):
                self.connection.client.send(up)
                self._sent = up.seq

    async def _run(self) -> None:
        tries, broken = 0, self.kernel.now
        while True:
            began = self.kernel.now
            code = await self._connect()
            if code not in ("", "silent", "unreachable") or (code == "unreachable" and not self.welcomed_once):
                self.world.trace(self.peer, f"ends: {code}")
                self.end()
                self.world.ended(self.machine)
                return
            now = self.kernel.now
            if self._welcomed >= began:
                broken = now
                tries = 0 if now - self._welcomed > HEARTBEAT_SECONDS else tries
            await sleep(self.rng.uniform(0.5, 1.0) * pause_seconds(tries, now - broken))
            tries += 1

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
                    self.reports.welcomed(down.welcome.acked)
                    self.bell.ring()
                    self._sent, self._welcome, self._welcomed = 0, True, self.kernel.now
                    if self.welcomed_once and self.leaving:
                        self.report(leaving=pb.Leaving())
                    if not self.welcomed_once:
                        self.welcomed_once = True
                        fiber.spawn(self.kernel, self._engine, self.process)
                    self._flush()
                    beating = self.kernel.spawn(self._beat(connection), self.process)
                elif body == "refuse":
                    return str(down.refuse.code)
                elif body == "ack":
                    self.reports.acknowledged(down.ack.seq)
                    self.bell.ring()
                elif body == "view":
                    self.follow(self.world.crew.view_from(down.view))
            return "" if self._welcome else "unreachable"
        finally:
            self._welcome = False
            if beating:
                beating.cancel()
            end.close()

    async def _beat(self, connection: Connection) -> None:
        while True:
            beat = pb.Heartbeat(state=self.engine.hq.state, idle=self.idle())
            connection.client.send(pb.Up(heartbeat=beat))
            await sleep(HEARTBEAT_SECONDS)

    def _hello(self) -> Member:
        return Member(
            peer=self.peer,
            name=self.peer,
            speed=self.machine.speed,
            memory_gb=self.machine.memory_gb,
            addresses=(self.session.decode(),),
            session=self.session,
            savepoints=frozenset(self.points.points()),
        )
