"""What a worker of a scenario writes down: who it computed what with, and in which order. The oracle repeats it.

One line per operation, written before it is done, so that whatever another worker has got is on the record:

``seat``      a generation begins: plan, place, and a file with the optimizer's part of the state it starts from
``forward``   of a lane, with the peer that its activation came from
``backward``  of a lane, with the peer that its gradient came from
``update``    of the optimizer, with everything since the last one: digests of weights and gradient before it, so that
              what differs is found where it begins
``capture``   of a round: the attempt, and the replicas that are in it
``void``      a round that was captured does not count, because somebody is lost: its samples go into the next
``apply``     of a finished round
``save``      of everything, at a stop
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def before(holder: Any, name: str, what: Callable[..., dict[str, Any] | None], note: Callable[..., None]) -> None:
    """Notes ``what`` says of the arguments whenever ``holder.name`` is called."""
    original = getattr(holder, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if (told := what(*args, **kwargs)) is not None:
            note(**told)
        return original(*args, **kwargs)

    setattr(holder, name, wrapper)


def record(path: Path) -> None:
    """For the forked process of a worker: everything from here on is noted in ``path``."""
    import torch

    from potluck.worker import engine
    from potluck.worker.engine import Engine
    from potluck.worker.pipeline import Pipeline
    from potluck.worker.stage import Stage, digest
    from potluck.worker.sync import Synchronizer

    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    taken: list[str] = []  # the file of a state that somebody else gave

    def note(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    def neighbour(pipeline: Pipeline, m: int, by: int) -> str:
        seat = pipeline.seat
        stage = seat.stage + by
        return seat.plan.peer_of(stage, m) if 0 <= stage < seat.stages else ""

    get, take_seat = engine.origin, Engine._take_seat

    def origin(states: Any, plan: Any, *more: Any) -> Any:
        state = get(states, plan, *more)
        if state is not None and plan.origin == "round":
            taken.append(str(path.with_suffix(f".{plan.generation}.state")))
            torch.save((state.m, state.v, state.updates), taken[-1])
        return state

    def seat(self: Engine, plan: Any, view: Any) -> None:
        taken.clear()
        take_seat(self, plan, view)
        if self.local.seated:
            stage, replica = plan.places[self.config.peer]
            note(
                op="seat",
                generation=plan.generation,
                peer=self.config.peer,
                stage=stage,
                replica=replica,
                origin=[plan.origin, plan.origin_generation, plan.first_step],
                taken=taken[-1] if taken else "",
                first_sample=plan.first_sample,
                microbatches=plan.microbatches,
                microbatch_size=plan.microbatch_size,
                stages=[[s.first_layer, s.last_layer, [r.peer for r in s.replicas]] for s in plan.stages],
            )

    engine.origin = origin
    Engine._take_seat = seat  # type: ignore[method-assign]
    for name, by in (("_forward", -1), ("_backward", 1)):

        def way(self: Pipeline, lane: Any, frame: Any = None, name: str = name, by: int = by) -> dict[str, Any]:
            return {"op": name[1:], "step": lane.step, "m": lane.m, "by": neighbour(self, lane.m, by)}

        before(Pipeline, name, way, note)

    def update(self: Stage, targets: int) -> dict[str, Any]:
        return {"op": "update", "targets": targets, "x": digest(self.x).hex(), "grad": digest(self.grad).hex()}

    before(Stage, "update", update, note)
    before(
        Synchronizer,
        "capture",
        lambda self, stage, steps_done, samples, fragments, **how: {
            "op": "capture",
            "step": steps_done,
            "samples": samples,
            "fragments": list(fragments),
            "attempt": self.seat.plan.attempt,
            "replicas": self.peers,
        },
        note,
    )

    def void(self: Engine, plan: Any, view: Any) -> dict[str, Any] | None:
        return {"op": "void", "step": self._captured} if self._captured > view.committed and self._pending else None

    before(Engine, "_reroute", void, note)
    before(
        engine,
        "apply",
        lambda stage, outcome, late: {"op": "apply", "step": outcome.state.point.step, "late": late},
        note,
    )
    before(Engine, "_save", lambda self, step, view: {"op": "save", "step": step}, note)
