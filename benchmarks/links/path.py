"""Where a step's time goes: its critical path, found by walking back from its end.

From the last thing that was done in a step we go to what it began after: the thing that this stage did before, or, if
it waited, the arrival of its input, and through the line to what the sender did before it handed that over. Every
second of the step is on the path once, as one of

    compute PEER       forward or backward
    encode PEER        codecs, between computing and the line, and behind it
    wire PEER -> PEER  from handing over to arriving: the line's queue, its rate, its latency
    update PEER        the optimizer
    round PEER         between two steps: the capture of a round, waiting for a round that is due, or for leases
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Traces of all workers of a run, by their names."""

    def __init__(self, traces: Mapping[str, Sequence[Event]]) -> None:
        self.ops: dict[str, list[Event]] = {}
        self.arrivals: dict[tuple[str, str, int, int], float] = {}  # who, kind, step, microbatch
        self.posts: dict[tuple[str, int, int], list[tuple[float, str]]] = defaultdict(list)
        self.coding: dict[str, list[Event]] = {}
        self.steps: dict[str, dict[int, Event]] = {}
        for peer, trace in traces.items():
            self.ops[peer] = sorted((e for e in trace if e["op"] in ("forward", "backward")), key=lambda e: e["t"])
            self.coding[peer] = [e for e in trace if e["op"] in ("encode", "decode")]
            self.steps[peer] = {e["step"]: e for e in trace if e["op"] == "step"}
            for e in trace:
                if e["op"] == "arrive":
                    self.arrivals.setdefault((peer, e["kind"], e["step"], e["m"]), e["t"])
                elif e["op"] == "post":
                    self.posts[e["kind"], e["step"], e["m"]].append((e["t"], peer))
        self.stage = {peer: ops[0]["stage"] for peer, ops in self.ops.items() if ops}

    def path(self, step: int) -> list[Segment]:
        """The critical path of one step, from its end to its beginning; empty if the records do not reach so far."""
        ends = [(steps[step]["end"], peer) for peer, steps in self.steps.items() if step in steps]
        if not ends:
            return []
        at, peer = max(ends)
        out: list[Segment] = []
        ops = [e for e in self.ops[peer] if e["step"] == step]
        if not ops:
            return []
        op = ops[-1]
        out.append(Segment(what="update", peer=peer, start=op["end"], end=at))
        while True:
            out += self._op(peer, op)
            begun = self.steps[peer][step]["t"]
            before = max(
                (e for e in self.ops[peer] if e["end"] <= op["t"] + CLOSE_SECONDS), key=lambda e: e["end"], default=None
            )
            source = self._source(peer, op)
            free = before["end"] if before is not None and before["step"] == step else begun
            if source is None or source[0] <= free + CLOSE_SECONDS:
                if before is None or before["step"] != step:
                    if op["t"] > begun:
                        out.append(Segment(what="encode", peer=peer, start=begun, end=op["t"]))
                    if step - 1 in self.steps[peer]:
                        ended = self.steps[peer][step - 1]["end"]
                        out.append(Segment(what="round", peer=peer, start=ended, end=begun))
                    return out
                if op["t"] - before["end"] > CLOSE_SECONDS:
                    out.append(Segment(what="encode", peer=peer, start=before["end"], end=op["t"]))
                op = before
                continue
            arrived, posted, sender = source
            if op["t"] > arrived:
                out.append(Segment(what="encode", peer=peer, start=arrived, end=op["t"]))
            out.append(Segment(what="wire", peer=sender, to=peer, start=posted, end=arrived))
            before = max((e for e in self.ops[sender] if e["t"] <= posted), key=lambda e: e["t"], default=None)
            if before is None or before["step"] != step:
                return out
            if posted > before["end"]:
                out.append(Segment(what="encode", peer=sender, start=before["end"], end=posted))
            op = {**before, "end": min(before["end"], posted)}
            peer = sender

    def _source(self, peer: str, op: Event) -> tuple[float, float, str] | None:
        """When the input of an operation arrived, when it was handed over, and by whom; None if it has none."""
        kind = "ACTIVATION" if op["op"] == "forward" else "GRADIENT"
        arrived = self.arrivals.get((peer, kind, op["step"], op["m"]))
        posts = self.posts.get((kind, op["step"], op["m"]), [])
        if arrived is None or not (earlier := [p for p in posts if p[0] <= arrived]):
            return None
        return arrived, *max(earlier)

    def _op(self, peer: str, op: Event) -> list[Segment]:
        inside = [
            e for e in self.coding[peer] if e["t"] >= op["t"] - CLOSE_SECONDS and e["end"] <= op["end"] + CLOSE_SECONDS
        ]
        coding = min(sum(e["end"] - e["t"] for e in inside), op["end"] - op["t"])
        cut = op["end"] - coding
        found = [Segment(what="encode", peer=peer, start=cut, end=op["end"])] if coding else []
        return [*found, Segment(what="compute", peer=peer, start=op["t"], end=cut)]


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
