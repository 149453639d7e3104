"""A worker's dealings in states: fetched as wholes, from whoever holds them; newcomers get ready beside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import WireError
from potluck.protocol.plan import SavePoint
from potluck.worker.joiner import Prospect
from potluck.worker.mailbox import Fenced
from potluck.worker.plan import View
from potluck.worker.states import States
from potluck.worker.transfer import SILENCE_SECONDS, LackingError, Wanted

from . import fiber
from .kernel import Signal, sleep
from .weights import State

if TYPE_CHECKING:
    from .worker import Worker

TICK_SECONDS = 0.5
FIRST_SECONDS = 20.0  # that a newcomer takes for its stage, at most
REDO_SECONDS = 0.5  # and for the rounds since


class SimStates:
    """As :class:`potluck.worker.states.States`; nobody keeps anything of others' stages."""

    keeper = None

    def __init__(self, worker: Worker) -> None:
        self.worker, self.points = worker, worker.points
        self.recent = SimpleNamespace(add=lambda *_: None, most_nbytes=0)
        self.joiner = SimJoiner(worker, self)

    def follow(self, view: View) -> None:
        States.follow(self, view)  # type: ignore[arg-type]

    def find(self, kind: str, generation: int, step: int, layers: tuple[int, int]) -> State | None:
        found: Any = States.find(self, kind, generation, step, layers)  # type: ignore[arg-type]
        return found

    def fetch(
        self, wanted: Wanted, donors: Sequence[str], stopped: Callable[[], bool], most_seconds: float = 2.0
    ) -> State:
        """The state of the first donor that has it, once it has come; a donor that is gone meanwhile gave nothing."""
        worker, world = self.worker, self.worker.world
        late = world.kernel.now + SILENCE_SECONDS
        silent, lacking = list(donors), []
        while silent and world.kernel.now < late:
            for donor in list(silent):
                found = world.crew.fetch(worker.peer, donor, wanted.point)
                if isinstance(found, State):
                    fiber.sleep(worker.rng.uniform(0.05, 1.0) * most_seconds * world.net.slow.get(worker.peer, 1.0))
                    found = world.crew.fetch(worker.peer, donor, wanted.point)
                if stopped():
                    raise Fenced
                if isinstance(found, State):
                    return found
                if found is not None:
                    silent.remove(donor)
                    lacking.append(donor)
            if silent:
                fiber.sleep(TICK_SECONDS)
                if stopped():
                    raise Fenced
        raise LackingError("nobody has it", lacking)


class SimJoiner:
    """As :class:`potluck.worker.joiner.Joiner`: a stage that was got ready is taken over in no time."""

    def __init__(self, worker: Worker, states: SimStates) -> None:
        self._worker, self._states = worker, states
        self._changed = Signal(worker.kernel)
        self._prospect: Prospect | None = None
        self._done: Prospect | None = None
        self._layers: tuple[int, int] | None = None  # of the stage that is ready
        self._works = False

    def follow(self, prospect: Prospect | None) -> None:
        if prospect == self._prospect:
            return
        self._prospect = prospect
        if prospect is not None and not self._works:
            self._works = True
            self._worker.kernel.spawn(self._work(), self._worker.process)
        self._changed.ring()

    def take(self, point: SavePoint, stage: int, donors: Sequence[str], stopped: Callable[[], bool]) -> State | None:
        self.follow(None)
        if self._layers != (point.first_layer, point.last_layer):
            return None
        try:
            return self._states.fetch(Wanted(point=point, size=0), donors, stopped, REDO_SECONDS)
        except WireError:
            return None

    def let_go(self) -> None:
        self.follow(None)
        self._layers = None

    async def _work(self) -> None:
        worker = self._worker
        while True:
            while self._prospect is None or self._prospect == self._done:
                await self._changed.wait()
            prospect = self._prospect
            layers = (prospect.point.first_layer, prospect.point.last_layer)
            most = REDO_SECONDS if layers == self._layers else FIRST_SECONDS
            await sleep(worker.rng.uniform(0.05, 1.0) * most * worker.world.net.slow.get(worker.peer, 1.0))
            now = self._prospect
            if now is not None and now.stage == prospect.stage:
                worker.world.trace(worker.peer, f"has stage {prospect.stage} ready")
                self._layers, self._done = layers, prospect
                worker.report(prepared=pb.Prepared(savepoint=prospect.point.to_proto()))
