"""Where the next generation starts from, and who sits where: pure choices of the state machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..protocol.plan import Plan, Replica, SavePoint, StagePlan
from .assignment import MOVE_GAIN, Offer, assign, slowest
from .state import Division, Mark, Member, Rules, RunState

BEGINNING = Mark(kind="init", generation=0, step=0, sample=0)
MOST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Start:
    """A generation can begin at ``mark`` with these layers and peers of every stage."""

    mark: Mark
    layers: tuple[tuple[int, int], ...]
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
    wanted = max(len(rules.divisions[0].layers), rules.wait_for if state.generation == 0 else 0)
    if len(free) < wanted:
        missing = wanted - len(free)
        return Wait(f"{missing} more worker{'s' if missing > 1 else ''} must join")
    enough = rules.wait_for and len(free) >= rules.wait_for
    in_haste = len(free) < len(state.members)  # who leaves may be a donor, and goes if there is no plan
    if now - state.last_join < rules.settle_seconds and not enough and not in_haste:
        return Wait("workers are joining")
    patient = state.paused is not None or now - max(state.since, state.last_join) <= rules.patience_seconds
    if state.stop:
        if holds_stop(rules, state, state.stop):
            layers = rules.division(state.stop.stages).layers
            return Start(state.stop, layers, [list(peers) for peers in state.stop.holders])
        if patient:
            return Wait("the workers that saved the run's last steps must come back")
    for mark in known_marks(state):
        held = holders(rules, state, mark)
        if all(held) or mark.kind == "init":
            return seated(rules, state, mark, held, not in_haste and (patient or now < state.whole_until))
        if patient:
            gap = next(i for i, peers in enumerate(held) if not peers)
            return Wait(f"nobody here holds stage {gap} as of step {mark.step}: its workers must come back")
    return seated(rules, state, BEGINNING, [], patient)


def known_marks(state: RunState) -> tuple[Mark, ...]:
    """The committed rounds, newest first; that one is there twice, in its new stages and the old ones, until another
    follows it."""
    return (state.committed, *([state.undivided] if state.undivided else []), *state.marks)


def seated(rules: Rules, state: RunState, mark: Mark, held: list[list[str]], patient: bool) -> Start | Wait:
    """Peers assigned to the stages, at home with what they hold.

    The layers stay divided as they are, unless they are to be divided anew, or nobody can hold one of these stages and
    those who could were waited for (``patient``).
    """
    free = {p: m for p, m in state.members.items() if not m.leaving}
    own, wish = rules.division(mark.stages), state.redivide
    divisions = [own]
    if mark.kind == "init":
        divisions = [best_division(rules, free.values()) or own]
    elif wish is not None and wish.begun and mark == state.committed:
        divisions = [rules.division(wish.stages), own]
    for division in divisions:
        if (seats := seats_of(rules, free, division, mark, held)) is not None:
            return Start(mark, division.layers, seats)
    largest = max(free.values(), key=lambda member: member.memory_gb)
    worst, offered = max(need.gigabytes(largest.device) for need in own.needs), largest.memory_gb
    if not patient and (other := best_division(rules, free.values())) is not None:
        seats = seats_of(rules, free, other, mark, held)
        assert seats is not None
        return Start(mark, other.layers, seats)
    if (missing := len(own.needs) - len(free)) > 0:
        return Wait(f"{missing} more worker{'s' if missing > 1 else ''} must join: there are {len(own.needs)} stages")
    more = "" if len(rules.divisions) > 1 else ", or the run needs more pipeline.stages"
    return Wait(
        f"a stage needs {worst:.3g} GB and the largest worker offers {offered:.3g} GB:"
        f" more or larger workers must join{more}"
    )


def seats_of(
    rules: Rules, free: Mapping[str, Member], division: Division, mark: Mark, held: list[list[str]]
) -> list[list[str]] | None:
    """Who sits at each stage; None if one cannot be held."""
    own = rules.division(mark.stages)
    homes = homes_of(free, mark.savepoints(own))
    is_kept = division is own or mark.kind == "init"
    if not is_kept:
        homes = {peer: nearest(own.layers[stage], division) for peer, stage in homes.items()}
    offers = {
        peer: Offer(
            speed=member.speed,
            memory_gb=member.memory_gb,
            device=member.device,
            home=homes.get(peer),
            keeps=frozenset(i for i, peers in enumerate(held) if is_kept and peer in peers),
        )
        for peer, member in free.items()
    }
    # Who moves now is waited for by everybody; later it gets ready beside its work (moving.py).
    moves = mark.kind == "init" or not rules.prepare_seconds or not is_kept
    return assign(division.needs, offers, moves=moves)


def nearest(layers: tuple[int, int], division: Division) -> int:
    """The stage that has most of these layers."""
    first, last = layers
    shared = [min(last, b) - max(first, a) for a, b in division.layers]
    return shared.index(max(shared))


def best_division(rules: Rules, members: Collection[Member]) -> Division | None:
    """The fewest stages that these peers can hold: fewer boundaries are fewer bytes; more of them where that makes the
    slowest stage clearly faster. None if they can hold none."""
    offers = {m.peer: Offer(speed=m.speed, memory_gb=m.memory_gb, device=m.device) for m in members}
    if len(rules.divisions) == 1:
        return rules.divisions[0] if assign(rules.divisions[0].needs, offers) is not None else None
    best, least = None, float("inf")
    for division in rules.divisions:
        if (seconds := slowest(division.needs, offers)) < MOVE_GAIN * least:
            best, least = division, seconds
    return best


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
    division = rules.division(len(plan.stages))
    homes = homes_of(free, state.committed.savepoints(division))
    homes |= {p: stage for p, (stage, _) in plan.places.items()} | moved
    offers = {
        p: Offer(speed=m.speed, memory_gb=m.memory_gb, device=m.device, home=homes.get(p)) for p, m in free.items()
    }
    seats = assign(division.needs, offers, moves=not rules.prepare_seconds) or []
    return {p: i for i, peers in enumerate(seats) for p in peers if p not in plan.peers}


def committed_point(rules: Rules, state: RunState, stage: int) -> SavePoint:
    """The newest committed round of a stage, while a generation trains."""
    return state.committed.savepoint(stage, rules.division(state.committed.stages).layers[stage])


def holds_stop(rules: Rules, state: RunState, mark: Mark) -> bool:
    """Whether every peer of a stop is back with its own part."""
    for peers, layers in zip(mark.holders, rules.division(mark.stages).layers, strict=True):
        for peer in peers:
            member = state.members.get(peer)
            wanted = ("step", mark.generation, mark.step, *layers)
            if member is None or member.leaving or wanted not in {name(s) for s in member.savepoints}:
                return False
    return True


def holders(rules: Rules, state: RunState, mark: Mark) -> list[list[str]]:
    """Of each stage, the peers (leaving ones too) that hold its state at a committed round; if none, its keepers."""
    found, members = [], sorted(state.members.items())
    for wanted in mark.savepoints(rules.division(mark.stages)) if mark.digests else ():
        trained = [p for p, m in members if wanted in m.savepoints]
        found.append(trained or [p for p, m in members if wanted in m.held])
    return found


def name(point: SavePoint) -> tuple[str, int, int, int, int]:
    return point.kind, point.generation, point.step, point.first_layer, point.last_layer


def make_plan(rules: Rules, state: RunState, start: Start) -> Plan:
    """The next generation's plan."""
    mark, members, own = start.mark, state.members, rules.division(start.mark.stages).layers
    held = start.seats if mark.kind == "step" else holders(rules, state, mark)
    seated = {peer for peers in start.seats for peer in peers}
    held = [[p for p in peers if p in seated] or peers for peers in held]  # who is left out gives only what nobody has

    def replicas(peers: Sequence[str]) -> tuple[Replica, ...]:
        return tuple(members[p].replica for p in peers)

    digests = mark.digests or (b"",) * len(held)
    origins = tuple(
        StagePlan(first_layer=first, last_layer=last, replicas=(), donors=replicas(donors), digest=digest)
        for (first, last), donors, digest in zip(own if held else (), held, digests, strict=True)
    )
    stages = tuple(
        StagePlan(first_layer=first, last_layer=last, replicas=replicas(peers))
        for (first, last), peers in zip(start.layers, start.seats, strict=True)
    )
    is_divided = bool(origins) and start.layers != own
    if origins and not is_divided:
        stages = tuple(replace(o, replicas=s.replicas) for o, s in zip(origins, stages, strict=True))
    return Plan(
        generation=state.generation + 1,
        first_step=mark.step,
        first_sample=mark.sample,
        origin=mark.kind,
        origin_generation=mark.generation,
        microbatches=rules.microbatches,
        microbatch_size=rules.microbatch_size,
        stages=stages,
        parts=origins if is_divided else (),
    )
