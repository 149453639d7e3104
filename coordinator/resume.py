"""What a coordinator that was killed needs, when it is started again, to go on with the generation.

The plan, its crew and its course are written down with whatever changes them. How far everybody is, workers tell
again: they are waited for as if their lines had broken when it was started.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Literal

import msgspec
from google.protobuf.message import DecodeError
from msgspec import Struct

from ..protocol import control_pb2 as pb
from ..protocol.errors import StateError, WireError
from ..protocol.plan import Plan
from .state import Ban, Keep, Member, Pause, Rules, RunState
from .store import Store
from .views import keeping

# For workers to dial again: one whose line has died without a word notices it by keepalive, after 25 s at the latest
# (protocol/tls.py), and dials within seconds.
DIAL_SECONDS = 30.0


class Peer(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    device: str
    memory_gb: float
    speed: float
    addresses: tuple[str, ...]
    session: str
    leaving: bool
    drained: str = ""
    missed: str = ""


class Crew(Struct, frozen=True, kw_only=True):
    plan: str
    peers: tuple[Peer, ...]


class Divided(Struct, frozen=True, kw_only=True):
    generation: int
    step: int
    digests: tuple[str, ...]


class Paused(Struct, frozen=True, kw_only=True):
    who: str
    why: str
    since: float


class Banned(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    who: str
    why: str


class Operated(Struct, frozen=True, kw_only=True):
    """What the operator has ordered and holds until another order."""

    paused: Paused | None = None
    bans: tuple[Banned, ...] = ()
    checkpoint: int | None = None


class Course(Struct, frozen=True, kw_only=True):
    phase: Literal["preparing", "training", "finishing"]
    note: str
    closing: Literal["", "round", "save"]
    end: int | None
    publish: int | None
    evaluated: int
    charted: int


def keep(before: RunState, after: RunState) -> list[Keep]:
    """What has changed of it."""
    values: dict[str, object] = {}
    peers, plan = peers_of(after), going_on(after)
    if plan is not going_on(before) or peers != peers_of(before):
        packed = plan and base64.b64encode(plan.to_proto().SerializeToString()).decode()
        values["crew"] = msgspec.to_builtins(Crew(plan=packed, peers=peers)) if packed else None
    course = course_of(after)
    if course != course_of(before):
        values["course"] = msgspec.to_builtins(course)
    if after.undivided is not before.undivided:
        values["divided"] = divided_of(after)
    if (operated := operated_of(after)) != operated_of(before):
        values["operated"] = msgspec.to_builtins(operated)
    if (unaware := unaware_of(after)) != unaware_of(before):
        values["unaware"] = unaware
    return [Keep(values=values)] if values else []


def operated_of(state: RunState) -> Operated:
    pause = state.paused
    return Operated(
        paused=None if pause is None else Paused(who=pause.who, why=pause.why, since=pause.since),
        bans=tuple(Banned(id=peer, name=b.name, who=b.who, why=b.why) for peer, b in state.bans.items()),
        checkpoint=state.checkpoint,
    )


def as_operated(state: RunState, store: Store) -> RunState:
    """``state`` with what the operator had ordered. ``StateError`` if that cannot be read: a ban is not forgotten."""
    try:
        operated = msgspec.convert(store.meta("operated", {}), Operated)
    except msgspec.ValidationError as error:
        hint = "Go on with the version of potluck that wrote it."
        raise StateError(f"{store.path}: the operator's orders cannot be read ({error})", hint=hint) from None
    pause = operated.paused
    return replace(
        state,
        paused=None if pause is None else Pause(who=pause.who, why=pause.why, since=pause.since),
        bans={b.id: Ban(name=b.name, who=b.who, why=b.why) for b in operated.bans},
        checkpoint=operated.checkpoint,
    )


def divided_of(state: RunState) -> dict[str, object] | None:
    """The last committed round in the stages that its layers were divided into since."""
    mark = state.committed
    divided = Divided(generation=mark.generation, step=mark.step, digests=tuple(d.hex() for d in mark.digests))
    return msgspec.to_builtins(divided) if state.undivided else None


def unaware_of(state: RunState) -> dict[str, float]:
    """Who has to be told how the run ended, should this process end first."""
    ended = state.phase in ("finished", "stopped")
    return {**state.unaware, **({peer: state.since for peer in state.members} if ended else {})}


def going_on(state: RunState) -> Plan | None:
    return state.plan if state.phase in ("preparing", "training", "finishing") else None


def peers_of(state: RunState) -> tuple[Peer, ...]:
    if going_on(state) is None:
        return ()
    return tuple(
        Peer(
            id=m.peer,
            name=m.name,
            device=m.device,
            memory_gb=m.memory_gb,
            speed=m.speed,
            addresses=m.addresses,
            session=m.session.hex(),
            leaving=m.leaving,
            drained=m.drained,
            missed=m.missed,
        )
        for m in state.members.values()
    )


def course_of(state: RunState) -> Course | None:
    if going_on(state) is None:
        return None
    return Course(
        phase=state.phase,  # type: ignore[arg-type]
        note=state.note,
        closing=state.closing,
        end=state.end,
        publish=state.publish,
        evaluated=state.evaluated,
        charted=state.charted,
    )


def resumed(rules: Rules, state: RunState, store: Store) -> RunState:
    """``state`` with the generation that was under way, if there was one.

    A stop that was asked for is forgotten: who starts a run again wants it to go on.
    """
    state = as_operated(state, store)
    try:
        unaware = msgspec.convert(store.meta("unaware", {}), dict[str, float])
        state = replace(state, unaware=unaware)
        divided, last = msgspec.convert(store.meta("divided"), Divided | None), state.committed
        if divided is not None and (divided.generation, divided.step) == (last.generation, last.step):
            digests = tuple(map(bytes.fromhex, divided.digests))
            state = replace(state, committed=replace(last, digests=digests), undivided=last)
        crew = msgspec.convert(store.meta("crew"), Crew | None)
        course = msgspec.convert(store.meta("course"), Course | None)
        if crew is None or course is None:
            return state
        plan = Plan.from_proto(pb.Plan.FromString(base64.b64decode(crew.plan)))
    except (msgspec.ValidationError, WireError, DecodeError, ValueError):  # another version's
        return state
    if plan.generation != state.generation:
        return state
    now = state.since
    leased = "SELECT COALESCE(MAX(step) + 1, ?) FROM ledger WHERE generation = ? AND state != 'returned'"
    until = store.rows(leased, (plan.first_step, plan.generation))[0][0]
    done = max(plan.first_step, until - rules.lease_ahead)  # by everybody: else the last steps were not leased
    stopping = course.closing == "save"
    return replace(
        state,
        phase=course.phase,
        note=course.note,
        members={
            peer.id: Member(
                peer=peer.id,
                name=peer.name,
                device=peer.device,
                memory_gb=peer.memory_gb,
                speed=peer.speed,
                addresses=peer.addresses,
                session=bytes.fromhex(peer.session),
                joined=now,
                last_seen=now,
                busy=now,
                leaving=peer.leaving,
                drained=peer.drained,
                missed=peer.missed,
                away=now + DIAL_SECONDS,
                ready=0 if course.phase == "preparing" else plan.generation,
                step=done,
            )
            for peer in crew.peers
        },
        plan=plan,
        keeping=keeping(rules, plan),
        until=until,
        end=None if stopping else course.end,
        closing="" if stopping else course.closing,
        publish=course.publish if course.publish is None or course.publish > state.published else None,
        evaluated=course.evaluated,
        charted=course.charted,
        last_join=now,
        leased_at={at: now + rules.lease_seconds * (1 + at - done) for at in range(done, until)},
    )
