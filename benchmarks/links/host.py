"""A worker of a known speed that writes down where its time goes.

    python -m benchmarks.links.host PACE TRACE -- worker join ...

``PACE`` is a JSON object: ``forward`` and ``backward``, in seconds a microbatch for each of the stage's blocks, and
``head``, how many blocks the output head counts for; ``compute``, whether it computes for real and then sleeps until
its seconds are over (else it only sleeps, and passes on noise); ``time`` and ``bytes``, by which time is shorter and
frames smaller than in the run that this one stands for (1: not). A line ``late`` tells of what took longer than it
should.

``TRACE`` gets one JSON line for everything that happened, in seconds of the machine's monotonic clock, which all hosts
share. Nothing of potluck knows of this: functions are wrapped from outside.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEAST_MESSAGE_NBYTES = 4096


class Trace:
    """Lines in memory, written at the end of every step."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._lines: list[dict[str, Any]] = []

    def add(self, **what: Any) -> None:
        with self._lock:
            self._lines.append(what)

    def flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()


def around(holder: Any, name: str, after: Callable[..., None]) -> None:
    """Calls ``after(start, end, result, *arguments)`` behind every ``holder.name``."""
    inner = getattr(holder, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        result = inner(*args, **kwargs)
        after(start, time.monotonic(), result, *args)
        return result

    setattr(holder, name, outer)


def calibrate(pace: dict[str, float], trace: Trace) -> None:
    """Makes forward and backward last as long as they are told."""
    import torch

    from potluck.worker.model import StageModule

    blocks = [0.0]

    def until(start: float, seconds: float) -> None:
        left = start + seconds - time.monotonic()
        if left > 0:
            time.sleep(left)
        else:
            trace.add(op="late", t=start, seconds=-left)

    def forward(start: float, end: float, result: Any, module: StageModule, *_: Any) -> None:
        blocks[0] = len(module.blocks) + pace["head"] * module.is_last
        until(start, pace["forward"] * blocks[0])

    def backward(start: float, end: float, result: Any, *_: Any) -> None:
        until(start, pace["backward"] * blocks[0])

    around(StageModule, "forward", forward)
    around(torch.Tensor, "backward", backward)


def pretend() -> None:
    """Blocks pass on what they get, losses and updates are noise: all that is sent has its shape, nothing its sense."""
    import torch
    from torch import Tensor

    from potluck.worker.layout import Layout
    from potluck.worker.model import StageModule
    from potluck.worker.stage import Stage

    generator = torch.Generator().manual_seed(time.monotonic_ns() % 2**63)
    pool = torch.randn(1 << 25, generator=generator)

    def noise(n: int) -> Tensor:
        start = int(torch.randint(len(pool) - n, (1,), generator=generator))
        return pool[start : start + n]

    def forward(self: StageModule, x: Tensor, layout: Layout | None = None) -> Tensor:
        anchor = 0.0 * next(self.parameters()).flatten()[0]
        if self.is_first:
            shape = (*x.shape, self.model_config.d_model)
            return noise(x.numel() * shape[-1]).view(shape) + anchor
        return x + anchor

    def loss_sum(self: StageModule, hidden: Tensor, targets: Tensor) -> Tensor:
        return 1e-3 * (hidden * noise(hidden.numel()).view_as(hidden)).sum()

    def update(self: Stage, targets: int) -> None:
        self.x.add_(noise(len(self.x)), alpha=1e-3)
        self.grad.zero_()
        self.updates, self.steps = self.updates + 1, self.steps + 1

    StageModule.forward = forward  # type: ignore[method-assign]
    StageModule.loss_sum = loss_sum  # type: ignore[method-assign]
    Stage.update = update  # type: ignore[method-assign]


def scale(bytes_factor: float, time_factor: float) -> None:
    """Makes what gives way to what about as fine as it is in the real run, where frames and times are longer."""
    from potluck.protocol import flow, frames
    from potluck.worker import links

    frames.MESSAGE_NBYTES = max(LEAST_MESSAGE_NBYTES, round(frames.MESSAGE_NBYTES * bytes_factor))
    flow.ACK_NBYTES = max(LEAST_MESSAGE_NBYTES // 2, round(flow.ACK_NBYTES * bytes_factor))
    links.LEAST_NBYTES = 3 * frames.MESSAGE_NBYTES
    links.GIVE_WAY_SECONDS *= time_factor
    links.QUEUE_SECONDS *= time_factor


def watch(trace: Trace) -> None:
    """Notes what the computing thread does, what is handed to the line and what comes in."""
    from potluck.protocol.frames import Kind
    from potluck.worker.boundary import Boundary
    from potluck.worker.links import Links
    from potluck.worker.mailbox import Mailbox
    from potluck.worker.pipeline import Pipeline

    def way(op: str) -> Callable[..., None]:
        def after(start: float, end: float, result: Any, pipeline: Pipeline, lane: Any, *_: Any) -> None:
            trace.add(op=op, t=start, end=end, step=lane.step, m=lane.m, stage=pipeline.seat.stage)

        return after

    around(Pipeline, "_forward", way("forward"))
    around(Pipeline, "_backward", way("backward"))

    def stepped(start: float, end: float, result: Any, pipeline: Pipeline, step: int) -> None:
        trace.add(op="step", t=start, end=end, step=step, stage=pipeline.seat.stage, replica=pipeline.seat.replica)
        trace.flush()

    around(Pipeline, "step", stepped)
    for name in ("activation", "gradient"):
        around(Boundary, name, lambda start, end, *_: trace.add(op="encode", t=start, end=end))
    for name in ("received", "received_gradient"):
        around(Boundary, name, lambda start, end, *_: trace.add(op="decode", t=start, end=end))

    def frame(op: str, at: float, header: Any, nbytes: int, peer: str) -> None:
        trace.add(op=op, t=at, kind=Kind(header.kind).name, step=header.step, m=header.microbatch, n=nbytes, peer=peer)

    def posted(start: float, end: float, result: Any, links: Links, peer: str, what: Any) -> None:
        frame("post", start, what.header, len(what.payload), peer)

    def arrived(start: float, end: float, result: Any, box: Mailbox, address: Any, what: Any) -> None:
        frame("arrive", start, what.header, len(what.payload), address.sender)

    around(Links, "post", posted)
    around(Mailbox, "put", arrived)


def main() -> None:
    pace, path, dash, *arguments = sys.argv[1:]
    if dash != "--":
        raise SystemExit(__doc__)
    trace, factors = Trace(Path(path)), json.loads(pace)
    if not factors["compute"]:
        pretend()
    calibrate(factors, trace)
    scale(factors["bytes"], factors["time"])
    watch(trace)
    from potluck.cli import main as potluck

    sys.argv = ["potluck", *arguments]
    try:
        potluck()
    finally:
        trace.flush()


if __name__ == "__main__":
    main()
