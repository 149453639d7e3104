"""What a peer should know now: everything it does follows from its newest view."""

from __future__ import annotations

import itertools

from ..protocol import control_pb2 as pb
from ..protocol.keepers import all_keepers
from ..protocol.plan import Plan
from .orders import reason
from .planning import committed_point, prospects
from .state import Mark, Rules, RunState
from .turn import released

TOLD_MARKS = 4


def view_of(rules: Rules, state: RunState, peer: str) -> pb.View:
    """What this peer should know now; everything it does follows from its newest view."""
    plan = state.plan
    coming = prospects(rules, state)
    at, layers = coming.get(peer), plan.layers if plan else ()
    place = plan.places.get(peer) if plan else None
    return pb.View(
        phase=state.phase,
        note=note_of(state, peer),
        plan=plan.to_proto() if plan else None,
        until=state.until,
        end=state.end or 0,
        closing=state.closing,
        committed=state.committed.step,
        publish=state.publish or 0,
        publishing=state.publish is not None,
        released=released(state, peer),
        keep=[
            pb.Keep(stage=stage, rounds=[m.savepoint(stage, layers[stage]).to_proto() for m in newest(state)])
            for stage in (state.keeping.get(peer, ()) if layers else ())
        ],
        prospect=None if at is None else pb.Prospect(stage=at, point=committed_point(rules, state, at).to_proto()),
        guests=[
            pb.Replica(peer=p, addresses=state.members[p].addresses)
            for p, stage in sorted(coming.items())
            if place is not None and stage == place[0]
        ],
    )


def note_of(state: RunState, peer: str = "") -> str:
    """The run's note, as ``peer`` is told it: what the operator said comes first."""
    member = state.members.get(peer)
    if member is not None and member.drained and released(state, peer):
        return member.drained
    if state.paused is None or state.phase in ("finished", "stopped"):
        return state.note
    said = f"paused by {state.paused.who}{reason(state.paused.why)}"
    return f"{said}; {state.note}" if state.note else said


def keeping(rules: Rules, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The stages that each peer of a plan keeps a redo log of."""
    keepers = all_keepers(plan, rules.keepers)
    return {p: tuple(i for i, who in enumerate(keepers) if p in who) for p in plan.peers}


def newest(state: RunState) -> list[Mark]:
    """The last committed rounds of the plan's stages, newest first: a keeper that hears only now and then misses none.

    What was before the layers were divided anew, none of these stages' rounds leads on from.
    """
    stages = len(state.plan.stages) if state.plan else 0
    marks = list(itertools.takewhile(lambda m: m.stages in (0, stages), [state.committed, *state.marks][:TOLD_MARKS]))
    if 0 < len(marks) == 1 + len(state.marks) < TOLD_MARKS and marks[-1].step:
        marks.append(Mark(kind="init", generation=0, step=0, sample=0))
    return marks
