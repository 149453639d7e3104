"""What a generation starts from: our own state, or a donor's."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol.plan import Plan, SavePoint
from .outside import MissingError
from .stage import State
from .states import States
from .transfer import LackingError, Wanted


def origin(states: States, plan: Plan, peer: str, size: int, stopped: Callable[[], bool]) -> State | None:
    """The state of our stage (of ``size`` weights) that ``plan`` starts from; None for a run's beginning.

    ``MissingError`` if it cannot be had, ``Fenced`` if the plan is over meanwhile.
    """
    kind, generation, step = plan.origin, plan.origin_generation, plan.first_step
    if kind == "init":
        return None
    number, _ = plan.places[peer]
    stage = plan.stages[number]
    layers = stage.first_layer, stage.last_layer
    donors = [d.peer for d in stage.donors]
    if peer in donors:
        state = states.find(kind, generation, step, layers)
        if state is None:
            raise MissingError(f"our own state of step {step} is damaged or gone", peer)
        return state
    point = SavePoint(
        kind="round",
        generation=generation,
        step=step,
        first_layer=layers[0],
        last_layer=layers[1],
        digest=stage.digest,
    )
    if states.joiner is not None and (state := states.joiner.take(point, number, donors, stopped)) is not None:
        return state
    try:
        return states.fetch(Wanted(point=point, stage=number, size=size), donors, stopped)
    except LackingError as error:
        names = ", ".join(d[:8] for d in donors)
        holder = next(iter(error.donors), "")
        raise MissingError(f"the state of step {step} cannot be had from {names}: {error}", holder) from None
