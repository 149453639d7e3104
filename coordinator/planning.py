"""Where the next generation starts from, and who sits where: pure choices of the state machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..protocol.plan import Plan, SavePoint, StagePlan
from .assignment import Offer, assign
from .state import Mark, Member, Rules, RunState

BEGINNING = Mark(kind="init", generation=0, step=0, sample=0)
MOST_PAUSE_SECONDS = 30.0


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
    older point is taken only after ``patience_seconds`` without the holders of the newer one, in the end the run's
    beginning. Who is barred is left out where that changes nothing else.
    """
    if (pause := pause_seconds(len(state.broken))) and now - state.since < pause:
        return Wait(f"workers do not reach each other: the next plan in {pause:.0f} s")
    found = choose_among(rules, state, now)
    barred = {p for p in state.members if p in state.barred and now < state.barred[p].until}
    if barred and isinstance(found, Start):
        fewer = choose_among(rules, without(state, barred), now)
        if isinstance(fewer, Start) and fewer.mark == found.mark:
            return fewer
    return found


def pause_seconds(broken: int) -> float:
    """How long to wait for a plan when so many in a row have ended over what does not mend by itself."""
    return 0.0 if broken < 2 else min(2.0 ** min(broken - 2, 10), MOST_PAUSE_SECONDS)


def without(state: RunState, peers: set[str]) -> RunState:
    return replace(state, members={p: m for p, m in state.members.items() if p not in peers})


def is_dispensable(rules: Rules, state: RunState, peer: str, now: float) -> bool:
    """Whether a plan can begin at the same point without ``peer``."""
    found, fewer = choose_among(rules, state, now), choose_among(rules, without(state, {peer}), now)
    return isinstance(found, Start) and isinstance(fewer, Start) and fewer.mark == found.mark


def choose_among(rules: Rules, state: RunState, now: float) -> Start | Wait:
    """The same of all members, at once."""
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
    return seated(rules, state, BEGINNING, [[] for _ in rules.layers])


def seated(rules: Rules, state: RunState, mark: Mark, held: list[list[str]]) -> Start | Wait:
    """Peers assigned to the stages, at home with what they hold."""
    wanted = [mark.savepoint(i, layers) for i, layers in enumerate(rules.layers)]
    free = {p: m for p, m in state.members.items() if not m.leaving}
    homes = homes_of(free, wanted)
    offers = {
        peer: Offer(
            speed=member.speed,
            memory_gb=member.memory_gb,
            home=homes.get(peer),
            keeps=frozenset(i for i, peers in enumerate(held) if peer in peers),
        )
        for peer, member in free.items()
    }
    # Who moves now is waited for by everybody; later it gets ready beside its work (moving.py).
    seats = assign(rules.needs, offers, moves=mark.kind == "init" or not rules.prepare_seconds)
    if seats is None:
        worst = max(need.memory_gb for need in rules.needs)
        offered = max(offer.memory_gb for offer in offers.values())
        return Wait(
            f"a stage needs {worst:.3g} GB and the largest worker offers {offered:.3g} GB:"
            " more or larger workers must join, or the run needs more pipeline.stages"
        )
    return Start(mark, seats)


def homes_of(members: Mapping[str, Member], points: Sequence[SavePoint]) -> dict[str, int]:
    """The stage that each peer is at home at: whose state it holds, or has got ready for and lacks but its last rounds.

    Who holds one and is ready for another goes there, if it leaves somebody behind.
    """
    first = {p: next((i for i, point in enumerate(points) if point in m.savepoints), None) for p, m in members.items()}
    homes = {p: stage for p, stage in first.items() if stage is not None}
    for peer, member in sorted(members.items()):
        ready = next((i for i, point in enumerate(points) if is_ready(member, point)), None)
        if ready is not None and (peer not in homes or list(homes.values()).count(homes[peer]) > 1):
            homes[peer] = ready
    return homes


def is_ready(member: Member, point: SavePoint) -> bool:
    """Whether a peer has got ready for a stage."""
    ready = member.prepared
    return ready is not None and (ready.first_layer, ready.last_layer) == (point.first_layer, point.last_layer)


def prospects(rules: Rules, state: RunState) -> dict[str, int]:
    """The stage that each peer must get ready for: who is not seated, as if all were seated now, and who is to move.

    Only while a generation trains. Nobody is told of one before there is a committed round to fetch.
    """
    plan, move = state.plan, state.move
    if plan is None or state.phase != "training" or state.committed.kind != "round":
        return {}
    moved = {move.peer: move.stage} if move is not None and move.begun and move.peer in plan.peers else {}
    return newcomers(rules, state, moved) | moved


def newcomers(rules: Rules, state: RunState, moved: dict[str, int]) -> dict[str, int]:
    """The stages of those whom the plan does not seat; of others, ``moved`` are to go elsewhere."""
    plan = state.plan
    assert plan is not None
    free = {p: m for p, m in state.members.items() if not m.leaving}
    if free.keys() <= plan.peers:
        return {}
    homes = homes_of(free, [state.committed.savepoint(i, layers) for i, layers in enumerate(rules.layers)])
    homes |= {p: stage for p, (stage, _) in plan.places.items()} | moved
    offers = {p: Offer(speed=m.speed, memory_gb=m.memory_gb, home=homes.get(p)) for p, m in free.items()}
    seats = assign(rules.needs, offers, moves=not rules.prepare_seconds) or []
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
    seated = {peer for peers in start.seats for peer in peers}
    held = [[p for p in peers if p in seated] or peers for peers in held]  # who is left out gives only what nobody has
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
