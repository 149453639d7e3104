"""What a worker of a scenario writes down: who it computed what with, and in which order. The oracle repeats it.

One line per operation, written before it is done, so that whatever another worker has got is on the record:

``seat``      a generation begins: plan, place, and whose state it starts from
``forward``   of a lane, with the peer that its activation came from
``backward``  of a lane, with the peer that its gradient came from
``update``    of the optimizer, with everything since the last one
``capture``   of a round
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
    from potluck.worker import engine
    from potluck.worker.engine import Engine
    from potluck.worker.pipeline import Pipeline
    from potluck.worker.stage import Stage
    from potluck.worker.sync import Synchronizer

    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    donors: list[str] = []

    def note(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    def neighbour(pipeline: Pipeline, m: int, by: int) -> str:
        seat = pipeline.seat
        stage = seat.stage + by
        return seat.plan.peer_of(stage, m) if 0 <= stage < seat.stages else ""

    fetch, take_seat = engine.fetch_state, Engine._take_seat

    def fetch_state(*args: Any) -> bytes | None:
        data = fetch(*args)
        donors.append(args[5])
        return data

    def seat(self: Engine, plan: Any) -> None:
        donors.clear()
        take_seat(self, plan)
        if self.local.seated:
            stage, replica = plan.places[self.config.peer]
            note(
                op="seat",
                generation=plan.generation,
                peer=self.config.peer,
                stage=stage,
                replica=replica,
                origin=[plan.origin, plan.origin_generation, plan.first_step],
                donor=donors[-1] if donors else "",
                first_sample=plan.first_sample,
                microbatches=plan.microbatches,
                microbatch_size=plan.microbatch_size,
                stages=[[s.first_layer, s.last_layer, [r.peer for r in s.replicas]] for s in plan.stages],
            )

    engine.fetch_state = fetch_state  # type: ignore[assignment]
    Engine._take_seat = seat  # type: ignore[method-assign]
    before(
        Pipeline,
        "_forward",
        lambda self, step, m, result: {"op": "forward", "step": step, "m": m, "by": neighbour(self, m, -1)},
        note,
    )
    before(
        Pipeline,
        "_backward",
        lambda self, step, m: {"op": "backward", "step": step, "m": m, "by": neighbour(self, m, 1)},
        note,
    )
    before(Stage, "update", lambda self, targets: {"op": "update", "targets": targets}, note)
    before(
        Synchronizer,
        "capture",
        lambda self, stage, steps_done, samples, fragments, **how: {
            "op": "capture",
            "step": steps_done,
            "samples": samples,
            "fragments": list(fragments),
        },
        note,
    )
    before(
        engine,
        "apply",
        lambda stage, outcome, late: {"op": "apply", "step": outcome.state.point.step, "late": late},
        note,
    )
    before(Engine, "_save", lambda self, step, view: {"op": "save", "step": step}, note)
