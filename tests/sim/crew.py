"""The workers of a world, as they see one another: views that several see are unpacked once, and states are fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan, SavePoint
from potluck.worker.control import view_from
from potluck.worker.plan import View

from .weights import State

if TYPE_CHECKING:
    from .world import World


class Crew:
    def __init__(self, world: World) -> None:
        self.world = world
        self._views: dict[bytes, View] = {}
        self._plans: dict[bytes, Plan] = {}

    def view_from(self, message: pb.View) -> View:
        packed = message.SerializeToString(deterministic=True)
        if packed not in self._views:
            view = view_from(message)
            if view.plan is not None:
                known = self._plans.setdefault(message.plan.SerializeToString(deterministic=True), view.plan)
                object.__setattr__(view, "plan", known)
            if len(self._views) > 1000:
                self._views.clear()
            self._views[packed] = view
        return self._views[packed]

    def flush(self) -> None:
        """Something was healed: what was held back goes on."""
        for machine in self.world.machines.values():
            if machine.worker and machine.alive:
                for path in list(machine.worker.links.paths.values()):
                    path.flush()

    def is_unreachable(self, peer: str, other: str) -> bool:
        return self.world.machines[other].away() or self.world.net.is_cut(peer, other)

    def fetch(self, peer: str, donor: str, point: SavePoint) -> State | str | None:
        """A donor's state: None while it does not answer, or what is wrong."""
        if self.is_unreachable(peer, donor):
            return None
        worker = self.world.machines[donor].worker
        assert worker
        layers = (point.first_layer, point.last_layer)
        state = worker.states.find("round", point.generation, point.step, layers)
        if state is None:
            return "does not hold it"
        if point.digest and state.content.name != point.digest:
            return "its weights are not the run's"
        return state.shared()
