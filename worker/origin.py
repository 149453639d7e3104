"""What a generation starts from: our own state, or a donor's; where the layers are divided anew, made of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..protocol.plan import Plan, SavePoint, Shape, StagePlan
from .moments import part_of
from .outside import MissingError
from .stage import State, digest
from .states import States
from .transfer import LackingError, Wanted

Stopped = Callable[[], bool]


def origin(states: States, plan: Plan, peer: str, shape: Shape, stopped: Stopped) -> State | None:
    """The state of our stage that ``plan`` starts from; None for a run's beginning.

    ``MissingError`` if it cannot be had, ``Fenced`` if the plan is over meanwhile.
    """
    if plan.origin == "init":
        return None
    number, _ = plan.places[peer]
    stage = plan.stages[number]
    if plan.parts:
        first, last = stage.first_layer, stage.last_layer
        old = [i for i, p in enumerate(plan.parts) if p.first_layer < last and first < p.last_layer]
        state = divided([part(states, plan, peer, i, shape, stopped) for i in old], (first, last), shape)
    else:
        state = part(states, plan, peer, number, shape, stopped)
    if states.joiner is not None:
        states.joiner.let_go()
    return state


def part(states: States, plan: Plan, peer: str, number: int, shape: Shape, stopped: Stopped) -> State:
    """The state of one stage that there was: whole, because only so can it be held to the round's digest."""
    kind, generation, step = plan.origin, plan.origin_generation, plan.first_step
    stage: StagePlan = (plan.parts or plan.stages)[number]
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
    if (joiner := states.joiner) is not None and (state := joiner.take(point, number, donors, stopped)) is not None:
        return state
    try:
        return states.fetch(Wanted(point=point, size=shape.size(*layers)), donors, stopped)
    except LackingError as error:
        names = ", ".join(d[:8] for d in donors)
        holder = next(iter(error.donors), "")
        raise MissingError(f"the state of step {step} cannot be had from {names}: {error}", holder) from None


def divided(parts: Sequence[State], layers: tuple[int, int], shape: Shape) -> State:
    """The state of ``layers`` from those of the stages that they were in, which follow one another.

    Every weight, with its moments and its outer momentum, is what it was; of our own parts also what their rounds left
    in the weights or beside them. What we owed as an owner is let go: its shards are no more. Where some parts' moments
    began anew later than others', they count as the older ones do, which makes the first updates smaller, not larger.
    """
    first, last = layers

    def vector(name: str, otherwise: str = "") -> Tensor | None:
        found = [getattr(state, name) for state in parts]
        if all(v is None for v in found):
            return None
        out = torch.empty(shape.start(last) - shape.start(first))
        for state, value in zip(parts, found, strict=True):
            a, b = max(first, state.point.first_layer), min(last, state.point.last_layer)
            here, there = shape.start(first), shape.start(state.point.first_layer)
            whole = getattr(state, otherwise) if value is None and otherwise else value
            out[shape.start(a) - here : shape.start(b) - here] = (
                0.0 if whole is None else part_of(whole, shape.start(a) - there, shape.start(b) - there)
            )
        return out

    g = vector("g")
    assert g is not None
    point = parts[0].point
    return State(
        point=SavePoint(
            kind="round",
            generation=point.generation,
            step=point.step,
            first_layer=first,
            last_layer=last,
            digest=digest(g),
        ),
        g=g,
        m=vector("m"),
        v=vector("v"),
        updates=max(state.updates for state in parts),
        x=vector("x", otherwise="g"),
        momentum=vector("momentum"),
        unsent=vector("unsent"),
    )
