"""How frames get from worker to worker: the real mailbox and rules of links.py, over paths that break and give up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potluck.protocol.frames import Kind
from potluck.worker.links import BOUNDARY, Links
from potluck.worker.mailbox import Address, Fenced, Mailbox, Rerouted

from . import fiber

if TYPE_CHECKING:
    from .worker import Worker

GIVE_UP_SECONDS = 10.0  # a path to a peer that stays broken for so long is a fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Of a frame's, what anybody looks at."""

    kind: Kind
    generation: int
    step: int
    microbatch: int
    part: int = 0
    attempt: int = 0
    targets: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """``payload`` is a tuple: nothing is encoded."""

    header: Header
    payload: tuple[Any, ...]
    arrived: float = 0.0


class SimMailbox(Mailbox):
    """The real one, but for how a thread waits."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(lambda: worker.world.kernel.now)
        self.worker = worker
        self.waiting = 0  # of the computing thread and that of rounds

    def take(
        self, wanted: Sequence[Address], attempt: int = 0, timeout_seconds: float | None = None
    ) -> tuple[Address, Any]:
        generation = wanted[0].generation

        def over() -> bool:
            return self._closed or generation < self._generation

        def something() -> bool:
            return over() or bool(self._newer(generation, attempt)) or any(place in self._frames for place in wanted)

        engine = fiber.Fiber.current is self.worker.computing
        self.waiting += engine
        try:
            fiber.wait(self.worker.bell, something)
        finally:
            self.waiting -= engine
        if over():
            raise Fenced
        if plan := self._newer(generation, attempt):
            raise Rerouted(plan)
        place = next(place for place in wanted if place in self._frames)
        frame = self._drop(place)
        assert frame is not None
        return place, frame

    def fence(self, generation: int) -> None:
        if generation > self._generation:
            self.worker.world.trace(self.worker.peer, f"fences off what is before generation {generation}")
        super().fence(generation)
        self.worker.bell.ring()

    def reroute(self, plan: Any) -> None:
        super().reroute(plan)
        self.worker.bell.ring()

    def close(self) -> None:
        super().close()
        self.worker.bell.ring()


class Path:
    """What one worker sends to another one, in order. It ends when it was broken for too long."""

    def __init__(self, links: SimLinks, peer: str, address: str) -> None:
        self.links, self.peer = links, peer
        self.target = links.worker.world.session(peer, address)
        self.held: deque[Frame] = deque()
        self._last = self._since = 0.0

    def is_broken(self) -> bool:
        target, world = self.target, self.links.worker.world
        if target is None or not target.process.alive or target.process.paused_until > world.kernel.now:
            return True
        return world.net.is_cut(self.links.worker.peer, self.peer)

    def send(self, frame: Frame) -> None:
        world = self.links.worker.world
        self._last = max(self._last, world.kernel.now + world.net.delay(self.links.worker.peer, self.peer))
        world.kernel.at(self._last, lambda: self._arrived(frame))

    def _arrived(self, frame: Frame) -> None:
        self.held.append(frame)
        if len(self.held) == 1 and self.is_broken():
            self._since = now = self.links.worker.kernel.now
            self.links.worker.kernel.later(GIVE_UP_SECONDS, lambda: self._give_up(now))
        self.flush()

    def flush(self) -> None:
        if self.held and not self.is_broken():
            assert self.target
            while self.held:
                frame = self.held.popleft()
                self.target.mailbox.put(Address.of(frame.header, self.links.worker.peer), frame)  # type: ignore[arg-type]
            self.target.bell.ring()

    def _give_up(self, since: float) -> None:
        worker = self.links.worker
        if not self.held or self._since != since or not worker.process.alive or not self.links.has(self):
            return
        if worker.process.paused_until > worker.kernel.now:
            worker.kernel.at(worker.process.paused_until + 1.0, lambda: self._give_up(since))
            return
        self.held.clear()
        self.links.gave_up(self)


class SimLinks(Links):
    """The real rules; a path for each lane."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker.mailbox, lambda *_: None, worker.fault)
        self.worker = worker
        self.paths: dict[tuple[str, bool], Path] = {}

    def _reach(self) -> None:
        plan = self.plan
        gone = {lost.peer for lost in plan.lost} if plan else set()
        parts = [r for r in plan.everybody if r.peer not in gone] if plan else []
        addresses = {r.peer: r.addresses for r in (*self._guests, *parts)}
        self.paths = {
            lane: path for lane, path in self.paths.items() if addresses.get(lane[0]) == self._addresses.get(lane[0])
        }
        self._addresses = addresses

    def has(self, path: Path) -> bool:
        return path in self.paths.values()

    def gave_up(self, path: Path) -> None:
        self.paths = {lane: p for lane, p in self.paths.items() if p is not path}
        if self.plan is not None:
            self.on_fault(self.plan.generation, path.peer, f"cannot send to {path.peer}")

    def post(self, peer: str, frame: Any) -> None:
        if self.plan is None or frame.header.generation != self.plan.generation or peer not in self._addresses:
            return
        lane = peer, frame.header.kind in BOUNDARY
        if lane not in self.paths:
            self.paths[lane] = Path(self, peer, self._addresses[peer][0])
        self.paths[lane].send(frame)
