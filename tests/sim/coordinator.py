"""The coordinator's machine: the real hub, store and state machine, its gRPC methods, crashes and clocks.

The hub's own coroutines run on the kernel: while the world lives, ``patched`` replaces the clock and the few parts of
asyncio that the hub uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from potluck.coordinator import hub as hub_module
from potluck.coordinator import service
from potluck.coordinator.events import RunOpened
from potluck.coordinator.hub import Hub, Item, Line
from potluck.coordinator.planning import prospects
from potluck.coordinator.state import Journal, Member, Rules, RunState, Uploaded
from potluck.coordinator.turn import banned, released
from potluck.coordinator.views import view_of
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import StateError
from potluck.protocol.plan import Plan
from potluck.worker.control import HEARTBEAT_SECONDS

from .checks import Batch
from .disk import Disk, SimStore
from .kernel import Condition, Gate, Kernel, Process, Queue, sleep
from .net import Connection, End

if TYPE_CHECKING:
    from .world import World

WALL = 1.75e9  # seconds since 1970 when the clock shows 0
HELLO_SECONDS = 15.0
FAREWELL_SECONDS = 10.0


@contextmanager
def patched(world: World) -> Iterator[None]:
    """The hub lives in the world's time while this is open."""
    kernel, coordinator = world.kernel, world.coordinator
    clock = SimpleNamespace(time=coordinator.wall, monotonic=lambda: kernel.now)
    loop = SimpleNamespace(
        Queue=lambda: Queue(kernel), Event=lambda: Gate(kernel), Condition=Condition, sleep=sleep, Task=object
    )
    views = Views()
    with ExitStack() as stack:
        for module, name, value in (
            (hub_module, "asyncio", loop),
            (hub_module, "ThreadPoolExecutor", lambda *_, **__: None),
            (hub_module, "step", world.watch.step),
            (hub_module, "view_of", views.of),
            (service, "time", clock),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


class Views:
    """The real ``view_of``; what depends on the same parts of the state is made once."""

    def __init__(self) -> None:
        self._state: RunState | None = None
        self._key: tuple[Any, ...] = ()
        self._coming: dict[str, int] = {}
        self._views: dict[tuple[bool, int | None, int | None, str], pb.View] = {}

    def of(self, rules: Rules, state: RunState, peer: str) -> pb.View:
        if state is not self._state:
            s = self._state = state
            self._coming = prospects(rules, state)
            guests = tuple((p, stage, s.members[p].addresses) for p, stage in sorted(self._coming.items()))
            key = (s.plan, s.phase, s.note, s.paused, s.until, s.end, s.closing, s.committed, s.publish, guests)
            if key != self._key:
                self._key, self._views = key, {}
        place = state.plan.places.get(peer) if state.plan and self._coming else None
        drained = state.members[peer].drained
        which = released(state, peer), self._coming.get(peer), place and place[0], drained
        if which not in self._views:
            self._views[which] = view_of(rules, state, peer)
        return self._views[which]


class SimLine(Line):
    """A worker's line, on a connection."""

    def __init__(self, peer: str, session: bytes, end: End, world: World) -> None:
        super().__init__(peer, session, outbox=None, room=Gate(world.kernel))  # type: ignore[arg-type]
        self.end, self.world, self.closed = end, world, Gate(world.kernel)
        self.shown: pb.View | None = None

    def send(self, message: pb.Down) -> None:
        if self.end.open:
            self.world.watch.sent(self, message)
            self.end.send(message)

    def close(self) -> None:
        self.closed.set()


class NoBoard:
    """No page; the run's clock, which the wall's can set no more."""

    def __init__(self, kernel: Kernel, began: float) -> None:
        self.clock = lambda: began + kernel.now

    def heard(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(statements=[])

    def update(self, *_: object) -> None: ...


class SimHub(Hub):
    """The real hub; its store's thread takes virtual time before and after each commit."""

    def __init__(self, rules: Rules, state: RunState, store: SimStore, machine: Coordinator) -> None:
        board = NoBoard(machine.kernel, machine.wall() - machine.kernel.now)
        super().__init__(rules, state, store, board)  # type: ignore[arg-type]
        self.machine = machine

    async def _take(self, batch: list[Item], now: float) -> None:
        watch = self.machine.world.watch
        numbers = {(line.session, seq) for _, line, seq in batch if line is not None}
        new = {
            (session, seq) for session, seq in numbers if seq > self.acked.get(session, 0)
        }  # others may be acked again
        watch.batch = Batch(new, len(batch))
        await super()._take(batch, now)
        watch.batch = None

    def _show(self, state: RunState, line: Line) -> None:
        """The real one, where the view is another than the line's last."""
        assert isinstance(line, SimLine)
        member, view = state.members.get(line.peer), None
        if member is not None and member.session == line.session:
            view = hub_module.view_of(self.rules, state, line.peer)
        if view is None or view is not line.shown:
            super()._show(state, line)
            line.shown = view

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        machine = self.machine
        await sleep(machine.disk.seconds())
        if machine.crash_at == "write":
            machine.crash()
            await sleep(0.0)
        result = function(*arguments)
        if machine.crash_at == "commit":
            machine.crash()
        await sleep(machine.disk.seconds())
        return result


class Coordinator:
    """A machine on which a coordinator is started again whenever it ended."""

    def __init__(self, world: World, folder: Path, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.disk = Disk(folder / "run.sqlite", rng)
        self.skew = 0.0  # of its wall clock
        self.process = Process("coordinator")
        self.process.alive = False
        self.hub: SimHub | None = None
        self.crash_at = ""  # "write" or "commit": the next one is the last thing this process does
        self.starts = 0
        self._arrived: set[int] = set()
        self._collecting = (-1, -1)

    @property
    def kernel(self) -> Kernel:
        return self.world.kernel

    @property
    def state(self) -> RunState:
        return self.hub.state if self.hub else self.world.watch.last_state

    def wall(self) -> float:
        return WALL + self.kernel.now + self.skew

    def start(self) -> None:
        """``potluck coordinator up``."""
        if self.process.alive:
            return
        world = self.world
        self.process, store = Process("coordinator"), None
        try:
            store = SimStore(self.disk, world.watch)
            _, _, state = service.open_run(store, world.config, world.manifest)
            going_on = state.plan.generation if state.plan else 0
            opened = RunOpened(name=world.config.name, step=state.committed.step, generation=going_on)
            store.write([Journal(event=opened)], self.wall())
        except StateError as error:
            world.trace("coordinator", f"cannot start: {error}")
            if store:
                store.close()
            self.process.alive = False
            self.kernel.later(self.rng.uniform(2, 10), self.start)
            return
        world.watch.opened(state, store)
        where = f"step {state.committed.step}, generation {state.generation}, {state.phase}"
        world.trace("coordinator", f"starts at {where}")
        self.starts += 1
        for connection in world.net.connections:  # this machine knows nothing of them, and says so when it is asked
            self.kernel.later(self.rng.uniform(0.0, HEARTBEAT_SECONDS), connection.refused)
        self.hub = SimHub(world.rules, state, store, self)
        if state.plan and state.publish is not None:  # as Publisher.resume
            if self._collecting != (state.publish, state.plan.generation):
                self._collecting, self._arrived = (state.publish, state.plan.generation), set()
            self._assemble(state.publish)
        self.kernel.spawn(self.hub._work(), self.process)
        self.kernel.spawn(self.hub._ticks(), self.process)
        self.kernel.spawn(self._until_over(self.hub), self.process)

    def crash(self, *, power: bool = False) -> None:
        """SIGKILL, or the power fails: then nobody is told."""
        if not self.process.alive:
            return
        self.crash_at = ""
        self.world.trace("coordinator", "loses power" if power else "is killed")
        self._end(silent=power)
        if power:
            self.disk.power_fails()
        self.kernel.later(self.rng.choice([0.2, 2.0, 10.0, 60.0]) * self.rng.random() + 0.1, self.start)

    def _end(self, *, silent: bool) -> None:
        assert self.hub
        self.world.watch.last_state = self.hub.state
        self.process.kill()
        self.hub.store.close()
        self.hub = None
        for connection in list(self.world.net.connections):
            connection.server.close(silent=silent)

    async def _until_over(self, hub: SimHub) -> None:
        """Stopped or finished: it says farewell and ends; after a stop the operator starts it again."""
        while hub.state.phase not in ("stopped", "finished"):
            await sleep(1.0)
        for _ in range(int(FAREWELL_SECONDS)):
            if hub.lines or hub.state.members:
                await sleep(1.0)
        over = hub.state.phase == "finished"
        self.world.trace("coordinator", f"ends: {hub.state.phase}")
        if over:
            self.world.finished = True
        else:
            self.kernel.later(self.rng.uniform(1, 20), self.start)
        self._end(silent=False)

    # Its gRPC methods, by the rules of doors.py.

    def accept(self, connection: Connection) -> bool:
        if not self.process.alive:
            return False
        self.kernel.spawn(self._control(connection.server), self.process)
        return True

    async def _control(self, end: End) -> None:
        """One worker's stream, from its hello to its end."""
        hub = self.hub
        assert hub
        late = self.kernel.now + HELLO_SECONDS
        while end.inbox.empty() and self.kernel.now < late:
            await end.inbox._signal.wait(late - self.kernel.now)
        member = None if end.inbox.empty() else end.inbox.get_nowait()
        if not isinstance(member, Member):
            end.close()
            return
        ban = hub.state.bans.get(member.peer)
        if ban is not None and self.rng.random() < 0.5:  # else its hello came before the ban
            end.send(pb.Down(refuse=pb.Refuse(code="banned", text=banned(ban))))
            end.close()
            return
        line = SimLine(member.peer, member.session, end, self.world)
        line.send(pb.Down(welcome=pb.Welcome(acked=hub.acked.get(member.session, 0))))
        hub.connect(line)
        listening = self.kernel.spawn(self._listen(hub, line, member), self.process)
        await line.closed.wait()
        listening.cancel()
        end.close()
        hub.hang_up(line)

    async def _listen(self, hub: SimHub, line: SimLine, member: Member) -> None:
        await hub.enter(line, member)
        while (up := await line.end.inbox.get()) is not None:
            await hub.report(line, up)
        line.close()

    def upload(self, peer: str, step: int, stage: int, plan: Plan | None = None) -> bool:
        """A stage of a round that is published; first without ``plan``: whether it is wanted; then it is there."""
        if not self.hub or not self.process.alive:
            return False
        state = self.hub.state
        if not state.plan or state.plan.places.get(peer) != (stage, 0) or state.publish != step:
            return False
        if plan is None:
            if self._collecting != (step, state.plan.generation):
                self._collecting, self._arrived = (step, state.plan.generation), set()
            return True
        if self._collecting != (step, plan.generation) or state.plan.generation != plan.generation:
            return False
        self._arrived.add(stage)
        self._assemble(step)
        return True

    def _assemble(self, step: int) -> None:
        assert self.hub and self.hub.state.plan
        if len(self._arrived) == len(self.hub.state.plan.stages):
            folder = self.disk.path.parent / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            self.hub.put(Uploaded(step=step, path=str(folder)))
