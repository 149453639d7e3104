"""What workers do with one another: meetings, in which a step or a round is done together, and states that are fetched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan
from potluck.worker.control import view_from
from potluck.worker.plan import View

from .weights import Lanes, State

if TYPE_CHECKING:
    from .world import World

Key = tuple[Any, ...]


class Meeting:
    """Everybody in ``needed`` must have come before anybody goes on; who is cut off from a partner holds up all."""

    def __init__(self, needed: Iterable[str], partners: dict[str, list[str]]) -> None:
        self.needed, self.partners = frozenset(needed), partners
        self.came: dict[str, Any] = {}  # peer to what it brings
        self.over: dict[str, float] = {}  # peer to when it has all that it needs


class Crew:
    """The workers of a world, as they see one another."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.meetings: dict[Key, Meeting] = {}
        self._views: dict[bytes, View] = {}
        self._plans: dict[bytes, Plan] = {}
        self._lanes: dict[int, tuple[Lanes, dict[str, list[str]]]] = {}

    # Views and plans, each unpacked once.

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

    def lanes(self, plan: Plan) -> Lanes:
        return self._of(plan)[0]

    def neighbours(self, plan: Plan) -> dict[str, list[str]]:
        return self._of(plan)[1]

    def _of(self, plan: Plan) -> tuple[Lanes, dict[str, list[str]]]:
        """Plans are kept, so their identity names them."""
        if id(plan) not in self._lanes:
            lanes = Lanes(plan)
            self._lanes[id(plan)] = lanes, lanes.neighbours()
        return self._lanes[id(plan)]

    # Meetings.

    def come(self, key: Key, peer: str, brings: Any, needed: Iterable[str], partners: dict[str, list[str]]) -> Meeting:
        meeting = self.meetings.get(key)
        if meeting is None:
            meeting = self.meetings[key] = Meeting(needed, partners)
        meeting.came[peer] = brings
        self.settle(key)
        return meeting

    def settle(self, key: Key) -> None:
        """Ends a meeting if everybody is there and reaches their partners."""
        meeting, world = self.meetings[key], self.world
        if meeting.over or meeting.came.keys() != meeting.needed:
            return
        if any(world.machines[p].away() for p in meeting.needed):
            return
        if world.net.cut_since and any(
            world.net.is_cut(p, other) for p in meeting.needed for other in meeting.partners[p]
        ):
            return
        for peer in meeting.came:
            slowest = max((world.net.delay(peer, other) for other in meeting.partners[peer][:4]), default=0.0)
            meeting.over[peer] = world.kernel.now + 3 * slowest + 0.01 * world.rng.random()
        for peer, when in meeting.over.items():
            worker = world.machines[peer].worker
            assert worker
            world.kernel.at(when, worker.bell.ring)
        if len(self.meetings) > 500:
            self.meetings = {k: m for k, m in self.meetings.items() if k[0] >= key[0] - 2 and not self._stale(m)}

    def _stale(self, meeting: Meeting) -> bool:
        return bool(meeting.over) and max(meeting.over.values()) < self.world.kernel.now - 3600.0

    def settle_all(self) -> None:
        """Something was healed."""
        for key in [k for k, m in self.meetings.items() if not m.over]:
            self.settle(key)

    def unreachable_since(self, peer: str, other: str) -> float | None:
        """Since when ``other`` has not answered ``peer``; None: it does."""
        world = self.world
        machine = world.machines[other]
        if not machine.alive:
            return machine.down_since
        if machine.paused:
            return world.kernel.now - 15.0  # a path breaks soon enough
        return world.net.cut_since.get((peer, other) if peer < other else (other, peer))

    # States.

    def fetch(self, peer: str, donor: str, plan: Plan, number: int) -> State | str | None:
        """A donor's state: None while it cannot answer yet, or what is wrong."""
        machine = self.world.machines[donor]
        if machine.away() or self.world.net.is_cut(peer, donor):
            return None
        worker = machine.worker
        assert worker
        seen = worker.view.plan
        if seen is None or seen.generation < plan.generation:
            return None
        if seen.generation > plan.generation:
            return None  # fenced: it answers no more
        stage = plan.stages[number]
        layers = (stage.first_layer, stage.last_layer)
        state = worker.points.find("round", plan.origin_generation, plan.first_step, layers)
        if state is None:
            return "does not hold it"
        if stage.digest and state.content.name != stage.digest:
            return "its weights are not the run's"
        return state.shared()
