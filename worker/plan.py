"""What a worker does next: a pure function of the coordinator's view and of what is done already."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.config import RunConfig
from ..protocol.plan import Plan, Replica, SavePoint
from ..protocol.schedule import is_eval


@dataclass(frozen=True, kw_only=True)
class View:
    """The coordinator's newest word, its plan unpacked."""

    phase: str = "waiting"
    note: str = ""
    plan: Plan | None = None
    until: int = 0
    end: int = 0
    closing: str = ""
    committed: int = 0
    publish: int | None = None
    released: bool = False
    kept: tuple[tuple[int, tuple[SavePoint, ...]], ...] = ()  # others' stages, and their newest rounds, newest first
    prospect: tuple[int, SavePoint] | None = None  # the stage we are to have next, probably, and its newest round
    guests: tuple[Replica, ...] = ()  # who will ask for our state


@dataclass(frozen=True, kw_only=True)
class Local:
    """What this worker has done in its current generation."""

    peer: str
    generation: int = 0
    seated: bool = False
    step: int = 0  # steps done
    evaluated: int = -1  # newest position whose held-out loss is measured
    round: int = 0  # steps done when the newest round was captured
    attempt: int = 0  # replicas that the plan had lost when we last looked
    saved: int = -1
    published: int = -1


@dataclass(frozen=True)
class Exit:
    """Nothing more is wanted here."""


@dataclass(frozen=True)
class TakeSeat:
    """A new generation: build or fetch the stage's state, or stand by."""

    plan: Plan


@dataclass(frozen=True)
class Reroute:
    """The generation goes on without somebody: rounds on their way are void, and his work is perhaps ours."""

    plan: Plan


@dataclass(frozen=True)
class Publish:
    """Upload the reference weights of a committed round."""

    step: int


@dataclass(frozen=True)
class Evaluate:
    position: int


@dataclass(frozen=True)
class Train:
    step: int


@dataclass(frozen=True)
class CloseRound:
    """A round at the generation's end, whatever the coin says."""

    step: int


@dataclass(frozen=True)
class Save:
    """Everything to disk, to go on from exactly here."""

    step: int


Action = Exit | TakeSeat | Reroute | Publish | Evaluate | Train | CloseRound | Save


def next_action(view: View, local: Local, config: RunConfig) -> Action | None:
    """The first rule that applies; None: wait for another view."""
    if view.released:
        return Exit()
    plan = view.plan
    if plan is None:
        return None
    if local.generation != plan.generation or (local.seated and local.peer not in plan.places):
        return TakeSeat(plan)
    if local.seated and local.attempt < plan.attempt:
        return Reroute(plan)
    if not local.seated or view.phase not in ("training", "finishing"):
        return None
    _, replica = plan.places[local.peer]
    if view.publish is not None and replica == 0 and view.publish > local.published and view.publish <= view.committed:
        return Publish(view.publish)
    void = local.step <= plan.void and local.step < config.steps and plan.attempt > 0
    final = local.step < config.steps or local.round == local.step or view.phase == "finishing"
    if is_eval(config.eval, config.steps, local.step) and local.evaluated < local.step and not void and final:
        return Evaluate(local.step)
    # Only now: some of us may have begun to evaluate before they knew that the round is to be closed.
    if view.closing == "round" and local.step == view.end and local.round < view.end:
        return CloseRound(view.end)
    if local.step < view.until:
        return Train(local.step)
    if view.closing == "save" and local.step == view.end and local.saved < view.end:
        return Save(view.end)
    return None
