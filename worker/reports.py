"""What a worker has to say: until the coordinator has it on disk, and once more to a coordinator that began anew."""

from __future__ import annotations

from collections import deque

from ..protocol import control_pb2 as pb

REPEATED = ("ready", "step_done", "round_done", "eval_done", "saved")
STANDING = ("held", "prepared")  # of no generation: the newest is what counts
KEPT = 8  # of each kind: more than anybody can be ahead of the slowest


class Reports:
    """The newest reports of a generation are kept though they are acknowledged.

    A coordinator that was started again has its plan and its leases, but not how far everybody is.
    """

    def __init__(self) -> None:
        self._seq = self._acked = self._generation = 0
        self._waiting: list[pb.Up] = []
        self._said: dict[str, deque[pb.Up]] = {}
        self._standing: dict[str, pb.Up] = {}

    def __bool__(self) -> bool:
        """Whether anything is not acknowledged."""
        return bool(self._waiting)

    def add(self, **body: object) -> None:
        self._seq += 1
        up = pb.Up(seq=self._seq, **body)  # type: ignore[arg-type]
        self._waiting.append(up)
        kind = up.WhichOneof("body")
        if kind in STANDING:
            self._standing[kind] = up
        elif kind in REPEATED:
            generation = getattr(up, kind).generation
            if generation > self._generation:
                self._generation, self._said = generation, {}
            if generation == self._generation:
                self._said.setdefault(kind, deque(maxlen=KEPT)).append(up)

    def after(self, seq: int) -> list[pb.Up]:
        """What is to be sent to a coordinator that was sent everything up to ``seq``."""
        return [up for up in self._waiting if up.seq > seq]

    def acknowledged(self, seq: int) -> None:
        self._acked = max(self._acked, seq)
        self._waiting = self.after(seq)

    def welcomed(self, acked: int) -> None:
        """A coordinator that has less on record than it acknowledged is another one: it is told again."""
        if acked < self._acked:
            again = {
                up.seq: up for kept in (*self._said.values(), self._standing.values(), self._waiting) for up in kept
            }
            self._waiting = [again[seq] for seq in sorted(again)]
            self._acked = 0
        self.acknowledged(acked)
