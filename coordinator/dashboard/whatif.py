"""How long a step would have taken if something in it had taken less: the longest path through the recorded order.

Everybody does the same things in the same order; each begins when the one before it is done and its input is there, and
as much later as it did. So a step is never longer if a part of it is shorter (Coffman, 1976, on why the order is kept).
What came before the step stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

from .clocks import Pair
from .shapes import Counterfactual, Segment
from .track import Done, Place, Step, Track

MOST_ASKED = 8  # peers and lines on the critical path, the longest on it first, that are asked about
LEAST_SHARE = 0.01  # of a step, that a change must save to be told
Names = Callable[[str], str]
Kind = Literal["speed", "line", "absence"]


class Change(NamedTuple):
    """Of a peer's speed, of a line's, or that a peer is not there."""

    kind: Kind
    told: Counterfactual


@dataclass(slots=True)
class Node:
    """Something done, in the order of its peer. ``ready``: when its input was there, if nobody has told who made it."""

    peer: str
    kind: str
    seconds: float
    lag: float
    begin: float = 0.0
    ready: float | None = None
    before: Place | None = None
    source: Place | None = None
    wire: float = 0.0
    sender: str = ""


@dataclass(kw_only=True)
class Order:
    """All that was done in a step, each after what it depends on."""

    begin: float
    nodes: dict[Place, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step, begin: float) -> Order:
        order = cls(begin=begin)
        for i, track in enumerate(step.tracks):
            for j, d in enumerate(track.done):
                order.nodes[i, j] = node(step, (i, j), d)
        return order

    def seconds(
        self, took: Callable[[Node], float] | None = None, wired: Callable[[Node], float] | None = None
    ) -> float | None:
        """The step's length with other durations and other times on the line; None if the order goes in circles."""
        after: dict[Place, list[Place]] = {}
        left: dict[Place, int] = {}
        for place, n in self.nodes.items():
            needs = [p for p in (n.before, n.source) if p is not None]
            left[place] = len(needs)
            for p in needs:
                after.setdefault(p, []).append(place)
        ready = [place for place, count in left.items() if not count]
        ends: dict[Place, float] = {}
        while ready:
            place = ready.pop()
            n = self.nodes[place]
            start = n.begin if n.before is None else ends[n.before]
            if n.source is not None:
                start = max(start, ends[n.source] + (n.wire if wired is None else wired(n)))
            elif n.ready is not None:
                start = max(start, n.ready)
            ends[place] = start + n.lag + (n.seconds if took is None else took(n))
            for p in after.get(place, ()):
                left[p] -= 1
                if not left[p]:
                    ready.append(p)
        if len(ends) < len(self.nodes):
            return None
        return max(ends.values(), default=self.begin) - self.begin


def node(step: Step, place: Place, d: Done) -> Node:
    i, j = place
    track, free, source = step.tracks[i], step.free(place), step.source(place)
    lag = d.start - max(free, free if d.arrived is None else d.arrived)
    made = Node(track.peer, d.kind, d.end - d.start, lag, begin=track.begin, before=(i, j - 1) if j else None)
    if source is None:
        made.ready = d.arrived
    else:
        made.source, made.sender = source, step.tracks[source[0]].peer
        made.wire = (d.arrived or 0.0) - step.at(source).end
    return made


def typical(step: Step, track: Track) -> dict[str, float]:
    """Seconds of a forward, a backward and an update by the others of a peer's stage; if there are none, by all
    others, for its share of the work. Without those that nobody else did."""
    mates = [t for t in step.tracks if t.done and t.stage == track.stage and t is not track]
    others = mates or [t for t in step.tracks if t.done and t is not track and t.work > 0]
    found: dict[str, list[float]] = {}
    for other in others:
        factor = 1.0 if mates else track.work / other.work
        for kind, seconds in medians(other).items():
            found.setdefault(kind, []).append(seconds * factor)
    return {kind: median(x) for kind, x in found.items()}


def medians(track: Track) -> dict[str, float]:
    """Of a peer's forwards, backwards and updates."""
    found: dict[str, list[float]] = {}
    for d in track.done:
        found.setdefault(d.kind, []).append(d.end - d.start)
    return {kind: median(x) for kind, x in found.items()}


def without_slowness(order: Order, step: Step, peer: str) -> float | None:
    """The step's length, were ``peer`` no slower than :func:`typical`."""
    track = next(t for t in step.tracks if t.peer == peer)
    most = typical(step, track)
    return order.seconds(took=lambda n: min(n.seconds, most.get(n.kind, n.seconds)) if n.peer == peer else n.seconds)


def with_quick_line(order: Order, pair: Pair) -> float | None:
    """The step's length, were a line as quick as the median of the others; None if there are no others."""
    found: dict[Pair, list[float]] = {}
    for n in order.nodes.values():
        if n.source is not None and (n.sender, n.peer) != pair:
            found.setdefault((n.sender, n.peer), []).append(n.wire)
    if not found:
        return None
    usual = median(median(x) for x in found.values())
    return order.seconds(wired=lambda n: min(n.wire, usual) if (n.sender, n.peer) == pair else n.wire)


def without(step: Step, begin: float, peer: str) -> float | None:
    """The step's length, were ``peer`` gone and the others of its stage did its microbatches as quickly as their own,
    in the order of the time; None if there are no others."""
    gone = next(t for t in step.tracks if t.peer == peer)
    mates = [i for i, t in enumerate(step.tracks) if t.done and t.stage == gone.stage and t is not gone]
    if not mates:
        return None
    own = step.tracks.index(gone)
    full = Order.of(step, begin)
    wires: dict[tuple[int, bool], list[float]] = {}  # of the hops between stages, with who goes left out if it can be
    for (i, j), n in full.nodes.items():
        if n.source is not None and peer not in (n.peer, n.sender):
            wires.setdefault((step.tracks[i].stage, step.at((i, j)).kind == "forward"), []).append(n.wire)
    lots = {m: mates[k % len(mates)] for k, m in enumerate(sorted({d.microbatch or 0 for d in gone.done}))}
    moved = {(own, j): lots[d.microbatch] for j, d in enumerate(gone.done) if d.microbatch is not None}
    usual = {i: medians(step.tracks[i]) for i in mates}
    for i in mates:
        mine = [(own, j) for (_, j), mate in moved.items() if mate == i]
        line = sorted([*((i, j) for j in range(len(step.tracks[i].done) - 1)), *mine], key=lambda p: step.at(p).start)
        previous: Place | None = None
        for place in [*line, (i, len(step.tracks[i].done) - 1)]:
            n = full.nodes[place]
            n.before, n.begin = previous, step.tracks[i].begin
            if place[0] == own:
                n.peer, n.seconds, n.lag = step.tracks[i].peer, usual[i].get(n.kind, n.seconds), 0.0
            previous = place
    full.nodes.pop((own, len(gone.done) - 1), None)
    for (i, j), n in full.nodes.items():
        if n.source is not None and (i == own or n.source[0] == own):
            hop = wires.get((step.tracks[i].stage, step.at((i, j)).kind == "forward"))
            n.wire = median(hop) if hop else n.wire
    return full.seconds()


def changes(step: Step, pieces: Sequence[Segment], name: Names) -> list[Change]:
    """What would have made a step shorter, the most helpful first. Only what is on the critical path can."""
    if not pieces:
        return []
    begin, took = pieces[0].start, pieces[-1].end - pieces[0].start
    order = Order.of(step, begin)
    stages = {t.peer: t.stage for t in step.tracks if t.done}
    computing, lines = Counter[str](), Counter[Pair]()
    for s in pieces:
        if s.what == "wire" and s.receiver is not None:
            lines[s.peer, s.receiver] += s.end - s.start  # type: ignore[assignment]
        elif s.what != "round" and s.peer in stages:
            computing[s.peer] += s.end - s.start  # type: ignore[assignment]
    found: list[Change] = []

    def note(kind: Kind, seconds: float | None, text: str, peer: str, receiver: str | None = None) -> None:
        if seconds is not None and took - seconds >= LEAST_SHARE * took:
            found.append(Change(kind, Counterfactual(text=text, seconds=seconds, peer=peer, receiver=receiver)))

    for peer, _ in computing.most_common(MOST_ASKED):
        is_alone = list(stages.values()).count(stages[peer]) == 1
        others = "the others for as large a part of the model" if is_alone else "the others of its stage"
        note("speed", without_slowness(order, step, peer), f"with {name(peer)} as quick as {others}", peer)
        text = f"without {name(peer)}, its microbatches at the others of its stage"
        note("absence", without(step, begin, peer), text, peer)
    for a, b in (pair for pair, _ in lines.most_common(MOST_ASKED)):
        text = f"with the line from {name(a)} to {name(b)} as quick as the median line"
        note("line", with_quick_line(order, (a, b)), text, a, b)
    return sorted(found, key=lambda change: change.told.seconds)
