"""Where a step's time goes: its critical path, found by walking back from its end.

Found as the coordinator finds it (``coordinator/dashboard/critical.py``), from what is noted here on one clock; its
*codec* is called *encode* here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.coordinator.dashboard import critical
from potluck.coordinator.dashboard.track import Done, Step, Track

Event = dict[str, Any]
CLOSE_SECONDS = 0.002  # between what belongs together


@dataclass(frozen=True, kw_only=True)
class Segment:
    """``peer``: who; for the wire, who sends, ``to`` whom."""

    what: str
    peer: str
    start: float
    end: float
    to: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def label(self) -> str:
        return f"{self.what} {self.peer} -> {self.to}" if self.to else f"{self.what} {self.peer}"


class Records:
    """Traces of all workers of a run, by their names, all on one machine's clock."""

    def __init__(self, traces: Mapping[str, Sequence[Event]]) -> None:
        self.ops: dict[str, list[Event]] = {}
        self.arrivals: dict[tuple[str, str, int, int], float] = {}  # who, kind, step, microbatch
        self.coding: dict[str, list[Event]] = {}
        self.steps: dict[str, dict[int, Event]] = {}
        for peer, trace in traces.items():
            self.ops[peer] = sorted((e for e in trace if e["op"] in ("forward", "backward")), key=lambda e: e["t"])
            self.coding[peer] = [e for e in trace if e["op"] in ("encode", "decode")]
            self.steps[peer] = {e["step"]: e for e in trace if e["op"] == "step"}
            for e in trace:
                if e["op"] == "arrive":
                    self.arrivals.setdefault((peer, e["kind"], e["step"], e["m"]), e["t"])
        self.stage = {peer: ops[0]["stage"] for peer, ops in self.ops.items() if ops}

    def path(self, step: int) -> list[Segment]:
        """The critical path of one step, from its end to its beginning; empty if the records do not reach so far."""
        tracks = tuple(self._track(peer, step) for peer in sorted(self.stage) if step in self.steps[peer])
        found = critical.path(Step(tracks=tracks))
        return [
            Segment(what=s.what.replace("codec", "encode"), peer=s.peer, start=s.start, end=s.end, to=s.receiver or "")
            for s in reversed(found)
        ]

    def _track(self, peer: str, step: int) -> Track:
        whole, earlier = self.steps[peer][step], self.steps[peer].get(step - 1)
        ops = [e for e in self.ops[peer] if e["step"] == step]
        done = []
        for op, following in zip(ops, [*ops[1:], None], strict=True):
            end = op["end"] if following is None else min(op["end"], following["t"])  # the last stage's are nested
            kind = "ACTIVATION" if op["op"] == "forward" else "GRADIENT"
            done.append(
                Done(
                    kind=op["op"],
                    microbatch=op["m"],
                    start=op["t"],
                    end=end,
                    arrived=self.arrivals.get((peer, kind, step, op["m"])),
                    decode=self._coding(peer, "decode", op["t"], end),
                    encode=self._coding(peer, "encode", op["t"], end),
                )
            )
        computed = done[-1].end if done else whole["t"]
        done.append(Done(kind="update", microbatch=None, start=computed, end=max(computed, whole["end"])))
        return Track(
            peer=peer,
            stage=self.stage[peer],
            work=1.0,
            begin=whole["t"],
            before=None if earlier is None else whole["t"] - earlier["end"],
            done=tuple(done),
        )

    def _coding(self, peer: str, what: str, start: float, end: float) -> float:
        inside = [
            e["end"] - e["t"] for e in self.coding[peer] if e["op"] == what and start <= e["t"] <= e["end"] <= end
        ]
        return min(sum(inside), (end - start) / 2)


def shares(paths: Sequence[Sequence[Segment]]) -> dict[str, float]:
    """Mean seconds a step by label, the largest first."""
    total: dict[str, float] = defaultdict(float)
    for path in paths:
        for segment in path:
            total[segment.label] += segment.seconds / len(paths)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def draw(records: Records, step: int, path: Sequence[Segment], out: Path, title: str) -> None:
    """One step as lanes, the critical path in red above what everybody did."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start = min(s.start for s in path)
    peers = sorted(records.stage, key=lambda p: (records.stage[p], p))
    row = {peer: len(peers) - 1 - i for i, peer in enumerate(peers)}
    figure, axes = pyplot.subplots(figsize=(11, 1.1 + 0.75 * len(peers)))
    for peer in peers:
        for op in records.ops[peer]:
            if op["step"] == step:
                color = "#4c78a8" if op["op"] == "forward" else "#9ecae9"
                axes.barh(
                    row[peer],
                    op["end"] - op["t"],
                    left=op["t"] - start,
                    height=0.5,
                    color=color,
                    edgecolor="white",
                    linewidth=0.4,
                )
    for segment in path:
        a, b = segment.start - start, segment.end - start
        if segment.to:
            axes.plot([a, b], [row[segment.peer], row[segment.to]], color="#d62728", linewidth=1.6)
        else:
            y = row[segment.peer] + 0.34
            axes.plot([a, b], [y, y], color="#d62728", linewidth=3, solid_capstyle="butt")
    axes.set_yticks([row[p] for p in peers], [f"{p}, stage {records.stage[p]}" for p in peers])
    axes.set_xlabel("seconds of the step")
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color="#4c78a8"),
        pyplot.Rectangle((0, 0), 1, 1, color="#9ecae9"),
        pyplot.Line2D([], [], color="#d62728", linewidth=2),
    ]
    axes.legend(
        handles,
        ["forward", "backward", "critical path"],
        loc="upper center",
        ncol=3,
        frameon=False,
        bbox_to_anchor=(0.5, -0.16),
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
