"""Steps on record: what their peers did, on one clock, and what follows from that.

A step is written when all its peers have said that it is done, or are steps ahead. The newest are kept, and of the
older ones the slowest. All that was concluded (path, words, what if) is concluded anew from what was said whenever
somebody asks; only the clocks are on record, since many steps are needed to tell them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from ...protocol import control_pb2 as pb
from ...protocol.plan import Plan, Shape
from . import shapes
from .clocks import Clocks
from .critical import path
from .times import Spent, spent
from .track import Step, Track, packed, parsed, unpacked
from .whatif import changes
from .why import words

NEWEST, LEAST_NEWEST, SLOWEST = 2000, 200, 200  # steps that are kept
MOST_ROWS = 200_000  # traces of the newest steps: in large swarms, fewer steps
MOST_OPEN = 8  # steps that not everybody has said to be done: nobody gets further ahead
AROUND = 16  # steps on each side, whose median is what is usual
LEAST_TOLD = 0.5  # of the peers, for a step to be worth a record
Reports = Mapping[str, tuple[float, pb.Trace | None]]  # of one step, by peer: when it was heard that it is done
Statement = tuple[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class TraceNews:
    """What is known after a batch of reports, and what writes it down."""

    statements: tuple[Statement, ...] = ()
    generation: int = -1
    newest: int = 0  # step that anybody has said to be done
    open: Mapping[int, Reports] = field(default_factory=dict)
    closed: frozenset[int] = frozenset()  # of the newest steps, those of which nothing more is taken
    clocks: Clocks = field(default_factory=Clocks)
    times: Mapping[str, Spent] = field(default_factory=dict)


class TraceRecorder:
    """Collects the traces of steps. Bounded: by a few steps of a plan's peers."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._now = TraceNews()

    def time(self, peer: str) -> shapes.StepTime | None:
        """Where a peer's time goes, over its newest steps."""
        found = self._now.times.get(peer)
        return None if found is None else found.row()

    def heard(self, reports: Sequence[tuple[str, pb.StepDone]], plan: Plan | None, until: int, now: float) -> TraceNews:
        """What a batch of reports adds; it counts once :meth:`take` has it. ``until``: steps below that are leased."""
        known = replace(self._now, statements=())
        if plan is None or not reports:
            return known
        if plan.generation != known.generation:
            known = TraceNews(generation=plan.generation, newest=plan.first_step, times=known.times)
        opened = dict(known.open)
        newest = known.newest
        for peer, done in reports:
            if done.generation != plan.generation or peer not in plan.places:
                continue
            if not max(plan.first_step, newest - MOST_OPEN) <= done.step < until or done.step in known.closed:
                continue
            newest = max(newest, done.step)
            trace = done.trace if done.HasField("trace") else None
            opened[done.step] = {**opened.get(done.step, {}), peer: (now, trace)}
        known = replace(known, open=opened, newest=newest)
        for step in sorted(opened):
            if plan.peers <= opened[step].keys() or step + MOST_OPEN <= newest:
                known = self._closed(known, step, plan, now)
        return known

    def take(self, recorded: TraceNews) -> None:
        """What was heard is on disk."""
        self._now = recorded

    def _closed(self, known: TraceNews, number: int, plan: Plan, now: float) -> TraceNews:
        """A step of which nothing more is to come."""
        said = known.open[number]
        known = replace(
            known,
            open={n: x for n, x in known.open.items() if n != number},
            closed=frozenset({number, *(n for n in known.closed if n + MOST_OPEN >= known.newest)}),
        )
        if all(trace is None for _, trace in said.values()):
            return known
        tracks, blobs = self._tracks(said, plan)
        if sum(bool(t.done) for t in tracks) < LEAST_TOLD * len(tracks):
            return known
        clocks = known.clocks.learnt(Step(tracks=tracks), {peer: at for peer, (at, _) in said.items()})
        step = clocks.aligned(Step(tracks=tracks))
        if not (pieces := path(step)):
            return known
        begin, seconds = pieces[0].start, pieces[-1].end - pieces[0].start
        times = {p: x for p, x in known.times.items() if p in plan.places}
        for i, track in enumerate(step.tracks):
            if track.done:
                new = spent(step, i)
                times[track.peer] = times[track.peer].mean(new) if track.peer in times else new
        rows: list[Statement] = [
            ("DELETE FROM traces WHERE step=?", [number]),
            ("INSERT OR REPLACE INTO steps VALUES (?,?,?,?)", [number, known.generation, now, seconds]),
        ]
        rows += [
            (
                "INSERT INTO traces VALUES (?,?,?,?,?,?)",
                [number, t.peer, t.stage, t.work, t.begin - begin if t.done else None, blobs.get(t.peer)],
            )
            for t in step.tracks
        ]
        newest = max(LEAST_NEWEST, min(NEWEST, MOST_ROWS // len(tracks)))
        rows.append((ROLL, [newest, SLOWEST - 1]))
        return replace(known, statements=(*known.statements, *rows), clocks=clocks, times=times)

    def _tracks(self, said: Reports, plan: Plan) -> tuple[tuple[Track, ...], dict[str, bytes]]:
        """Of every peer of the plan, by stage, on its own clock; and what is kept of what they said."""
        tracks, blobs = [], {}
        whole = self._shape.work(0, self._shape.layers)
        for peer, (stage, _) in sorted(plan.places.items(), key=lambda place: place[1]):
            work = self._shape.work(*plan.layers[stage]) / whole
            silent = Track(peer=peer, stage=stage, work=work)
            _, trace = said.get(peer, (0.0, None))
            track = None if trace is None else unpacked(trace, peer, stage, work)
            if trace is not None and track is not None:
                blobs[peer] = packed(trace)
            tracks.append(track or silent)
        return tuple(tracks), blobs


# The trigger of the table deletes the traces of the steps that go.
ROLL = """DELETE FROM steps WHERE step <= (SELECT step FROM steps ORDER BY step DESC LIMIT 1 OFFSET ?)
    AND seconds < (SELECT seconds FROM steps ORDER BY seconds DESC LIMIT 1 OFFSET ?)"""


# Reading.


def read_steps(db: sqlite3.Connection, limit: int, order: Literal["newest", "slowest"]) -> list[shapes.StepRow]:
    """Steps on record, the newest or the slowest first. To people a step is what the curve names it: the steps done
    with it, so the first is 1."""
    by = "step" if order == "newest" else "seconds"
    rows = db.execute(f"SELECT step, time, seconds FROM steps ORDER BY {by} DESC LIMIT ?", (limit,)).fetchall()
    return [shapes.StepRow(step=s + 1, time=t, seconds=x, usual=usual(db, s, x)) for s, t, x in rows]


def usual(db: sqlite3.Connection, step: int, otherwise: float) -> float:
    """The median length of the steps around one."""
    around = [
        *db.execute("SELECT seconds FROM steps WHERE step < ? ORDER BY step DESC LIMIT ?", (step, AROUND)),
        *db.execute("SELECT seconds FROM steps WHERE step > ? ORDER BY step LIMIT ?", (step, AROUND)),
    ]
    return median(x for (x,) in around) if around else otherwise


def read_step(db: sqlite3.Connection, number: int) -> shapes.StepPage | None:
    """Everything about one step, by the steps done with it; None if it is not on record."""
    step = number - 1
    found = db.execute("SELECT time, seconds FROM steps WHERE step=?", (step,)).fetchone()
    if found is None:
        return None
    row = shapes.StepRow(step=number, time=found[0], seconds=found[1], usual=usual(db, step, found[1]))
    tracks, names = read_tracks(db, step)
    whole = Step(tracks=tracks)

    def name(peer: str) -> str:
        return names.get(peer) or peer[:8]

    pieces = path(whole)
    changed = changes(whole, pieces, name)
    told = words(pieces, changed, row.usual, name, {t.peer: t.stage for t in tracks})
    lanes = tuple(
        shapes.Lane(
            peer=t.peer,
            name=name(t.peer),
            stage=t.stage,
            ops=tuple(shapes.Op(kind=d.kind, microbatch=d.microbatch, start=d.start, end=d.end) for d in t.done),
        )
        for t in tracks
    )
    before = db.execute("SELECT MAX(step) FROM steps WHERE step < ?", (step,)).fetchone()[0]
    after = db.execute("SELECT MIN(step) FROM steps WHERE step > ?", (step,)).fetchone()[0]
    return shapes.StepPage(
        row=row,
        words=tuple(told),
        path=tuple(pieces),
        lanes=lanes,
        counterfactuals=tuple(change.told for change in changed),
        before=None if before is None else before + 1,
        after=None if after is None else after + 1,
    )


def read_tracks(db: sqlite3.Connection, step: int) -> tuple[tuple[Track, ...], dict[str, str]]:
    """A step's tracks on the clock that its path begins at 0 of, and the peers' names."""
    rows = db.execute(
        "SELECT t.peer, t.stage, t.work, t.begin, t.trace, p.name FROM traces t LEFT JOIN peers p ON p.id = t.peer"
        " WHERE t.step=? ORDER BY t.stage, t.peer",
        (step,),
    ).fetchall()
    tracks, names = [], {}
    for peer, stage, work, begin, blob, called in rows:
        names[peer] = called
        track = None
        if blob is not None and (trace := parsed(blob)) is not None:
            track = unpacked(trace, peer, stage, work)
        track = track and track.later(begin - track.begin)
        tracks.append(track or Track(peer=peer, stage=stage, work=work))
    return tuple(tracks), names
