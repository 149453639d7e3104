"""Steps of a made-up swarm, by calculation: who does what when, and what everybody would say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from potluck.protocol import control_pb2 as pb

ACK_SECONDS = 0.01  # the way back of an acknowledgement, and the least way there


@dataclass(kw_only=True)
class Swarm:
    """``stages``: the replicas of each; seconds of a forward (a backward takes twice as long), of the way from one to
    another (else ``ACK_SECONDS``), of an update. ``clocks``: how far everybody's is ahead."""

    stages: Sequence[Sequence[str]]
    microbatches: int = 4
    forward: Mapping[str, float] = field(default_factory=dict)
    wire: Mapping[tuple[str, str], float] = field(default_factory=dict)
    clocks: Mapping[str, float] = field(default_factory=dict)
    update: float = 0.1
    codec: float = 0.01  # of each forward and backward, half of it at either end

    @property
    def peers(self) -> list[str]:
        return [peer for stage in self.stages for peer in stage]

    def server(self, stage: int, m: int) -> str:
        return self.stages[stage][m % len(self.stages[stage])]

    def took(self, peer: str, kind: str) -> float:
        return self.forward.get(peer, 1.0) * (2 if kind == "backward" else 1)

    def step(self, begin: float = 0.0) -> tuple[float, dict[str, pb.Trace]]:
        """The step's length, and what everybody says."""
        last = len(self.stages) - 1
        arrived: dict[tuple[int, str, int], float] = {(0, "forward", m): begin for m in range(self.microbatches)}
        free = dict.fromkeys(self.peers, begin)
        ops: dict[str, list[tuple[str, int, float, float, float | None]]] = {p: [] for p in self.peers}
        todo = {
            (s, kind, m) for s in range(last + 1) for kind in ("forward", "backward") for m in range(self.microbatches)
        }
        while todo:
            first = {}  # backwards run in the microbatches' order
            for s, _, m in sorted(x for x in todo if x[1] == "backward"):
                first.setdefault(self.server(s, m), m)
            ready = [x for x in todo if x in arrived and (x[1] == "forward" or first[self.server(x[0], x[2])] == x[2])]
            at, _, m, stage, kind = min(
                (max(free[self.server(s, m)], arrived[s, k, m]), k == "forward", m, s, k) for s, k, m in ready
            )
            todo.remove((stage, kind, m))
            peer = self.server(stage, m)
            end = free[peer] = at + self.took(peer, kind)
            has_input = not (kind == "forward" and stage == 0) and not (kind == "backward" and stage == last)
            ops[peer].append((kind, m, at, end, arrived[stage, kind, m] if has_input else None))
            if stage == last and kind == "forward":
                arrived[stage, "backward", m] = end
                continue
            to = stage + (1 if kind == "forward" else -1)
            if to >= 0:
                arrived[to, kind, m] = end + self.wire.get((peer, self.server(to, m)), ACK_SECONDS)
        told = {p: self._told(p, ops[p], begin, free[p] + self.update, arrived) for p in self.peers}
        return max(free.values()) + self.update - begin, told

    def _told(
        self,
        peer: str,
        ops: list[tuple[str, int, float, float, float | None]],
        begin: float,
        end: float,
        arrived: Mapping[tuple[int, str, int], float],
    ) -> pb.Trace:
        stage = next(s for s, replicas in enumerate(self.stages) if peer in replicas)
        at = begin
        trace = pb.Trace(began=micros(begin + self.clocks.get(peer, 0.0)), update=micros(self.update))
        for kind, m, start, done, came in ops:
            to = stage + (1 if kind == "forward" else -1)
            there = arrived.get((to, kind, m)) if 0 <= to < len(self.stages) else None
            trace.ops.append(4 * m + (kind == "backward"))
            trace.pause.append(micros(start - at))
            trace.took.append(micros(done - start))
            trace.early.append(0 if came is None else 1 + micros(start - came))
            trace.decode.append(micros(self.codec / 2))
            trace.encode.append(micros(self.codec / 2))
            trace.told.append(0 if there is None else 1 + micros(there + ACK_SECONDS - done))
            at = done
        return trace


def micros(seconds: float) -> int:
    return round(seconds * 1e6)
