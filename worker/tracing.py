"""When a replica did what in a step, for the coordinator: who was waited for, and which line was slow.

Where steps are short, a share of them is told: every ``2**k``-th, so that peers whose clocks differ by a little agree
on most of them, and each that takes much longer than usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..protocol import control_pb2 as pb
from ..protocol.frames import Frame, Kind

MOST_OPS = 256  # of a step, that are told: as many of its first as of its last ones
TOLD_SECONDS = 2.0  # between two steps that are told, on average
SLOW = 1.5  # times the usual: such a step is told whatever its number
LONGEST = 2**32 - 2  # microseconds that a trace can hold, over an hour
Posted = tuple[Kind, int]  # of a step: the kind of a frame, its microbatch


def is_told(step: int, seconds: float, usual: float | None) -> bool:
    """Whether a step's trace is sent; ``usual``: how long steps take, in seconds, None as long as nobody knows."""
    if usual is None or seconds > SLOW * usual:
        return True
    return step % (1 << max(0, math.ceil(math.log2(TOLD_SECONDS / max(usual, 1e-6))))) == 0


@dataclass(slots=True)
class Operation:
    """A forward or a backward that is going on. Moments are the clock's seconds."""

    clock: Callable[[], float]
    step: int
    m: int
    is_backward: bool
    arrived: float  # 0: it has no input
    start: float
    decoded: float
    computed: float = 0.0
    end: float = 0.0

    def has_input(self) -> None:
        """The input is decoded."""
        self.decoded = self.clock()

    def has_output(self) -> None:
        """What follows is encoding."""
        self.computed = self.clock()


class Tracer:
    """Of one replica in one generation. Its clock begins with it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._origin = clock, clock()
        self._began = self._ended = 0.0
        self._step = -1
        self._usual: float | None = None
        self._ops: list[Operation] = []

    def begin(self, step: int) -> None:
        self._began, self._step = self._clock(), step
        self._ops = []

    def start(self, step: int, m: int, frame: Frame | None, *, is_backward: bool) -> Operation:
        """A forward or a backward begins; :meth:`end` keeps it."""
        now = self._clock()
        return Operation(self._clock, step, m, is_backward, frame.arrived if frame else 0.0, now, now)

    def end(self, operation: Operation) -> None:
        operation.end = self._clock()
        operation.computed = operation.computed or operation.end
        self._ops.append(operation)

    def done(self, updating: float, told: Mapping[Posted, float]) -> pb.Trace | None:
        """The step is over, its update began at ``updating``; ``told``: when what was sent in it was acknowledged.
        None if the step need not be told."""
        before, self._ended = self._ended, self._clock()
        seconds, usual = self._ended - (before or self._began), self._usual
        self._usual = seconds if usual is None else usual + (min(seconds, 2 * usual) - usual) / 8
        return self._message(updating, before, told) if is_told(self._step, seconds, usual) else None

    def _message(self, updating: float, before: float, told: Mapping[Posted, float]) -> pb.Trace:
        half = MOST_OPS // 2
        ops = self._ops if len(self._ops) <= MOST_OPS else [*self._ops[:half], *self._ops[-half:]]
        trace = pb.Trace(
            began=micros(self._began - self._origin),
            before=1 + micros(self._began - before) if before else 0,
            left_out=len(self._ops) - len(ops),
            pause_update=micros(updating - (ops[-1].end if ops else self._began)),
            update=micros(self._ended - updating),
        )
        at = self._began
        for op in ops:
            trace.ops.append(op.m * 4 + 2 * (op.step != self._step) + op.is_backward)
            trace.pause.append(micros(op.start - at))
            trace.took.append(micros(op.end - op.start))
            trace.early.append(1 + micros(op.start - op.arrived) if op.arrived else 0)
            trace.decode.append(micros(op.decoded - op.start))
            trace.encode.append(micros(op.end - op.computed))
            heard = told.get((Kind.GRADIENT if op.is_backward else Kind.ACTIVATION, op.m), 0.0)
            trace.told.append(1 + micros(heard - op.end) if heard and op.step == self._step else 0)
            at = op.end
        return trace


def micros(seconds: float) -> int:
    """Whole microseconds, none if time seems to run back."""
    return min(LONGEST, max(0, round(seconds * 1e6)))
