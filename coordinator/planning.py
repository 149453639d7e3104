"""Where the next generation starts from, and who sits where: pure choices of the state machine."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.plan import Plan, SavePoint, StagePlan
from .assignment import Offer, assign
from .state import Mark, Member, Rules, RunState


@dataclass(frozen=True)
class Start:
    """A generation can begin at ``mark`` with these peers of every stage."""

    mark: Mark
    seats: list[list[str]]


@dataclass(frozen=True)
class Wait:
    """Not yet, and why."""

    why: str


def choose(rules: Rules, state: RunState, now: float) -> Start | Wait:
    """The newest point that can be gone on from with the peers that are here.

    A stop between two rounds needs the very peers that saved it; a committed round one holder of every stage. An
    older point is taken only after ``patience_seconds`` without the holders of the newer one.
    """
    if any(m.away is not None for m in state.members.values()):
        return Wait("a worker's line broke: it has a moment to dial again")
    free = {p: m for p, m in state.members.items() if not m.leaving}
    wanted = max(len(rules.layers), rules.wait_for if state.generation == 0 else 0)
    if len(free) < wanted:
        missing = wanted - len(free)
        return Wait(f"{missing} more worker{'s' if missing > 1 else ''} must join")
    enough = rules.wait_for and len(free) >= rules.wait_for
    in_haste = len(free) < len(state.members)  # who leaves may be a donor, and goes if there is no plan
    if now - state.last_join < rules.settle_seconds and not enough and not in_haste:
        return Wait("workers are joining")
    patient = now - max(state.since, state.last_join) <= rules.patience_seconds
    if state.stop:
        if holds_stop(rules, state, state.stop):
            return Start(state.stop, [list(peers) for peers in state.stop.holders])
        if patient:
            return Wait("the workers that saved the run's last steps must come back")
    for mark in (state.committed, *state.marks):
        held = holders(rules, state, mark)
        if all(held) or mark.kind == "init":
            return seated(rules, state, mark, held)
        if patient:
            gap = next(i for i, peers in enumerate(held) if not peers)
            return Wait(f"nobody here holds stage {gap} as of step {mark.step}: its workers must come back")
    return Wait("nobody here holds any state of this run")


def seated(rules: Rules, state: RunState, mark: Mark, held: list[list[str]]) -> Start | Wait:
    """Peers assigned to the stages, at home with what they hold."""
    wanted = [mark.savepoint(i, layers) for i, layers in enumerate(rules.layers)]
    offers = {
        peer: Offer(
            speed=member.speed,
            memory_gb=member.memory_gb,
            home=next((i for i, point in enumerate(wanted) if is_home(member, point)), None),
            keeps=frozenset(i for i, peers in enumerate(held) if peer in peers),
        )
        for peer, member in state.members.items()
        if not member.leaving
    }
    seats = assign(rules.needs, offers)
    if seats is None:
        worst = max(need.memory_gb for need in rules.needs)
        offered = max(offer.memory_gb for offer in offers.values())
        return Wait(
            f"a stage needs {worst:.3g} GB and the largest worker offers {offered:.3g} GB:"
            " more or larger workers must join, or the run needs more pipeline.stages"
        )
    return Start(mark, seats)


def is_home(member: Member, point: SavePoint) -> bool:
    """Whether a peer holds a stage's state, or has got ready for the stage and lacks but its last rounds."""
    layers = point.first_layer, point.last_layer
    ready = member.prepared is not None and (member.prepared.first_layer, member.prepared.last_layer) == layers
    return point in member.savepoints or ready


def prospects(rules: Rules, state: RunState) -> dict[str, int]:
    """The stage of every peer that the plan does not seat, if all were seated now; only while a generation trains.

    Nobody is told of one before there is a committed round to fetch.
    """
    plan = state.plan
    if plan is None or state.phase != "training" or state.committed.kind != "round":
        return {}
    free = {p: m for p, m in state.members.items() if not m.leaving}
    if free.keys() <= plan.peers:
        return {}
    points = [state.committed.savepoint(i, layers) for i, layers in enumerate(rules.layers)]
    homes = {p: next((i for i, point in enumerate(points) if is_home(m, point)), None) for p, m in free.items()}
    homes |= {p: stage for p, (stage, _) in plan.places.items()}
    offers = {p: Offer(speed=m.speed, memory_gb=m.memory_gb, home=homes[p]) for p, m in free.items()}
    seats = assign(rules.needs, offers) or []
    return {p: i for i, peers in enumerate(seats) for p in peers if p not in plan.peers}


def holds_stop(rules: Rules, state: RunState, mark: Mark) -> bool:
    """Whether every peer of a stop is back with its own part."""
    for peers, layers in zip(mark.holders, rules.layers, strict=True):
        for peer in peers:
            member = state.members.get(peer)
            wanted = ("step", mark.generation, mark.step, *layers)
            if member is None or member.leaving or wanted not in {name(s) for s in member.savepoints}:
                return False
    return True


def holders(rules: Rules, state: RunState, mark: Mark) -> list[list[str]]:
    """Of each stage, the peers (leaving ones too) that hold its state at a committed round; if none, its keepers."""
    found = []
    for i, layers in enumerate(rules.layers):
        wanted, members = mark.savepoint(i, layers), sorted(state.members.items())
        trained = [p for p, m in members if wanted in m.savepoints]
        found.append(trained or [p for p, m in members if wanted in m.held])
    return found


def name(point: SavePoint) -> tuple[str, int, int, int, int]:
    return point.kind, point.generation, point.step, point.first_layer, point.last_layer


def make_plan(rules: Rules, state: RunState, start: Start) -> Plan:
    """The next generation's plan."""
    mark, members = start.mark, state.members
    held = start.seats if mark.kind == "step" else holders(rules, state, mark)
    return Plan(
        generation=state.generation + 1,
        first_step=mark.step,
        first_sample=mark.sample,
        origin=mark.kind,
        origin_generation=mark.generation,
        microbatches=rules.microbatches,
        microbatch_size=rules.microbatch_size,
        stages=tuple(
            StagePlan(
                first_layer=first,
                last_layer=last,
                replicas=tuple(members[p].replica for p in peers),
                donors=tuple(members[p].replica for p in donors),
                digest=mark.digests[i] if mark.kind == "round" else b"",
            )
            for i, ((first, last), peers, donors) in enumerate(zip(rules.layers, start.seats, held, strict=True))
        ),
    )
