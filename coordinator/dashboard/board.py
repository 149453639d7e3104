"""What the dashboard shows of a run that goes on: the fold of what is written down, and what only the live state knows.

What it is asked about the past, and about what is not in memory, an :class:`.archive.Archive` of the same file answers.
"""

from __future__ import annotations

import asyncio
import bisect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from ...protocol import control_pb2 as pb
from ...protocol.config import RunConfig
from ...protocol.frames import Purpose
from ...protocol.identity import PEER_ID_LENGTH
from ...protocol.plan import Plan
from ..clock import Clock
from ..events import QUIET, Event
from ..state import Command, Commit, Journal, Member, Point, Rules, RunState, Said, Uncommit
from ..store import Store
from . import shapes
from .archive import Archive
from .links import MOST_LINKS, PATHS, LinkNews, LinkRecorder, known, nbytes_of, share
from .picture import Frame, peer_row, picture, stage_row, standings
from .replay import Replay, book_at, remembered
from .rollups import MOST_NBYTES, THINNED, Book, Statement, Thinning, kept, traffic_point
from .scores import Scores
from .traces import TraceNews, TraceRecorder

PURPOSES = frozenset(p.value for p in Purpose)
KEPT_NEWS = 1000  # events that the stream can go back
Shown = Journal | Point | Commit | Uncommit
Key = tuple[str, str, str, str]  # peer, session, purpose, direction


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a batch does to the totals: shown once it is on disk. ``statements`` keep it."""

    book: Book | None = None  # None: nothing has changed
    traffic: Mapping[Key, tuple[int, int]] = field(default_factory=dict)
    links: Mapping[str, tuple[shapes.LinkRow, ...]] = field(default_factory=dict)
    traced: TraceNews | None = None
    lines: LinkNews | None = None
    thinned: Sequence[int] = ()
    statements: list[Statement] = field(default_factory=list)


NOTHING = Heard()


class Board:
    """The dashboard's :class:`.source.Source` of a run that goes on."""

    def __init__(self, config: RunConfig, rules: Rules, run_id: str, vocab_size: int, store: Store) -> None:
        self.rules = rules
        self.version = 1
        self.published: str | None = None
        self.alerts: tuple[shapes.Alert, ...] = ()
        self.listeners: list[Callable[[shapes.EventRow, Event], None]] = []
        self.clock = Clock()
        self.archive = Archive(store.path)
        self._frame = Frame(config, run_id, vocab_size)
        self._state = RunState()
        self._changed = asyncio.Condition()
        self._links: dict[str, tuple[shapes.LinkRow, ...]] = {}  # of each peer to others, as it last said
        self._traces = TraceRecorder(self._frame.shape)
        self._lines = LinkRecorder()
        self._shares: dict[str, float] = {}  # of the model's work, of who has or had a seat
        self._places: tuple[Plan | None, dict[str, tuple[int, int]]] = (None, {})
        self._made: shapes.State | None = None  # as of the newest version
        self._load(store)

    def _load(self, store: Store) -> None:
        replay = Replay(self._frame.seq_len)
        replay.follow(store.rows)
        self._fold = replay.newest
        self._book = book_at(store.rows, None)
        remembered(store.rows, self._book)
        self._scores = Scores.read(store)
        self._thinning = Thinning(store.meta(THINNED, ()))
        self._last_event, self._last_point = replay.last_event, replay.last_point
        self._news: deque[shapes.EventRow] = deque(self._fold.events, maxlen=KEPT_NEWS)
        self._points = [
            shapes.Point(
                id=number, step=step, tokens=samples * self._frame.seq_len, time=time, train=train, heldout=heldout
            )
            for number, step, samples, time, train, heldout in store.rows(
                "SELECT id, step, samples, time, train, heldout FROM points ORDER BY id"
            )
        ]
        self._traffic: dict[Key, tuple[int, int]] = {
            (peer, session, purpose, direction): (nbytes, dense)
            for peer, session, purpose, direction, nbytes, dense in store.rows("SELECT * FROM traffic")
        }

    # What comes in.

    def heard(self, reports: Sequence[tuple[bytes, Said]], commands: Sequence[Command] = (), now: float = 0.0) -> Heard:
        """What is new in what workers said, with their sessions, and in what the run orders. Nothing of it is shown
        before :meth:`update`, and the same may be asked again."""
        if not (reports or commands):
            return NOTHING
        book, traffic = self._book.copy(), dict[Key, tuple[int, int]]()
        links: dict[str, tuple[shapes.LinkRow, ...]] = {}
        steps, beats = list[tuple[str, pb.StepDone]](), list[tuple[str, pb.Heartbeat]]()
        for session, said in reports:
            body = said.report.WhichOneof("body")
            if body == "step_done":
                steps.append((said.peer, said.report.step_done))
                self._step_done(book, said.peer, said.report.step_done, now)
            elif body == "heartbeat":
                beat = said.report.heartbeat
                beats.append((said.peer, beat))
                links[said.peer] = self._links_of(said.peer, beat, now)
                self._counted(book, traffic, said.peer, session.hex(), beat, now)
        book.follow(commands, now)
        statements: list[Statement] = [
            ("INSERT OR REPLACE INTO traffic VALUES (?,?,?,?,?,?)", [*key, *total]) for key, total in traffic.items()
        ]
        statements += kept(self._book, book)
        statements += [traffic_point(book, command, now) for command in commands if isinstance(command, Commit)]
        traced = self._traces.heard(steps, self._state.plan, self._state.until, now)
        lines = self._lines.heard(beats, self._state.members, now)
        statements += [(sql, list(values)) for kept in (traced, lines) for sql, values in kept.statements]
        thinned: Sequence[int] = ()
        if statements:  # else nothing is to be written at all
            thinned, left_out = self._thinning.due(now, self._fold.started or now)
            statements += left_out
        changed = book if statements else None
        return Heard(
            book=changed,
            traffic=traffic,
            links=links,
            traced=traced,
            lines=lines,
            thinned=thinned,
            statements=statements,
        )

    def _links_of(self, peer: str, beat: pb.Heartbeat, now: float) -> tuple[shapes.LinkRow, ...]:
        """What a peer says of its ways to others."""
        member = self._state.members.get(peer)
        cap = nbytes_of(member.caps.upload_mbps) if member else None
        before = {row.receiver: row for row in self._links.get(peer, ())}
        return tuple(link_row(peer, link, now, cap, before.get(link.peer)) for link in beat.links[:MOST_LINKS])

    def _step_done(self, book: Book, peer: str, done: pb.StepDone, now: float) -> None:
        plan = self._state.plan
        most = plan.samples_per_step if plan else MOST_NBYTES
        if plan and done.generation > plan.generation:
            return
        samples = min(done.samples, most, MOST_NBYTES)
        place = (done.generation, min(done.step, MOST_NBYTES))
        share = self._shares.get(peer, 0.0)
        book.stepped(peer, now, place, samples, share, done.compute_seconds, done.wait_seconds)

    def _counted(
        self,
        book: Book,
        traffic: dict[Key, tuple[int, int]],
        peer: str,
        session: str,
        beat: pb.Heartbeat,
        now: float,
    ) -> None:
        totals: dict[tuple[str, str], tuple[int, int]] = {}
        for t in beat.traffic:
            if t.purpose not in PURPOSES or t.direction not in ("in", "out"):
                continue
            nbytes, dense = totals.get((t.purpose, t.direction), (0, 0))
            sums = (min(nbytes + t.nbytes, MOST_NBYTES), min(dense + t.dense_nbytes, MOST_NBYTES))
            totals[t.purpose, t.direction] = sums
        for (purpose, direction), total in totals.items():
            key = (peer, session, purpose, direction)
            known = traffic.get(key, self._traffic.get(key))
            if known != total:
                traffic[key] = total
                before = known or (0, 0)
                book.moved(peer, now, purpose, direction, total[0] - before[0], total[1] - before[1])

    def update(self, state: RunState, commands: Sequence[Shown], now: float, heard: Heard = NOTHING) -> None:
        """The state after a batch, and what was written down in it."""
        self._state = state
        self._traffic.update(heard.traffic)
        self._book = heard.book or self._book
        self._thinning.done = list(heard.thinned) or self._thinning.done
        self._links = {peer: rows for peer, rows in {**self._links, **heard.links}.items() if peer in state.members}
        if heard.traced is not None:
            self._traces.take(heard.traced)
        if heard.lines is not None:
            self._lines.take(heard.lines)
        self._seat(state.plan)
        for command in commands:  # points first, as they are read back
            if isinstance(command, Point):
                self._last_point += 1
                point = shapes.Point(
                    id=self._last_point,
                    step=command.step,
                    tokens=command.tokens_samples * self._frame.seq_len,
                    time=now,
                    train=command.train,
                    heldout=command.heldout,
                )
                self._points.append(point)
                self._fold.point(point)
        for command in commands:
            if isinstance(command, Journal):
                self._happened(command, now)
        self._notify()

    def _happened(self, command: Journal, now: float) -> None:
        event = command.event
        self._last_event += 1
        self._scores.take(self._last_event, now, event)
        row, _ = self._fold.event(self._last_event, now, event.kind, event.text, event)
        if event.kind not in QUIET:
            self._news.append(row)
        for listen in self.listeners:
            listen(row, event)

    def _seat(self, plan: Plan | None) -> None:
        """Notes what share of the model's work each peer does; who has lost its seat keeps it, as its last reports may
        be on their way."""
        if plan is None or plan is self._places[0]:
            return
        self._places = (plan, dict(plan.places))
        work = [need.work for need in self.rules.division(len(plan.stages)).needs]
        if len(work) == len(plan.stages):
            self._shares |= {peer: work[stage] / sum(work) for peer, (stage, _) in plan.places.items()}

    def publish(self, path: str) -> None:
        self.published = path
        self._notify()

    def alert(self, alerts: Sequence[shapes.Alert]) -> None:
        """What is wrong at the moment."""
        if tuple(alerts) != self.alerts:
            self.alerts = tuple(alerts)
            self._notify()

    def _notify(self) -> None:
        self.version += 1
        self._made = None

        async def wake() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._waking = asyncio.get_running_loop().create_task(wake())

    # What the page asks, from memory.

    def state(self) -> shapes.State:
        if self._made is None:
            self._made = self._picture()
        return replace(self._made, now=self.clock())

    def _picture(self) -> shapes.State:
        state, frame = self._state, self._frame
        folded = picture(
            frame, self._fold, self._book, self.clock(), at=None, version=self.version, scores=self._scores.version
        )
        layers = state.plan.layers if state.plan else self.rules.division(state.committed.stages).layers
        replicas = [[r.peer for r in peers] for peers in state.plan.replicas] if state.plan else []
        stages = [stage_row(frame, i, stage, replicas[i] if replicas else ()) for i, stage in enumerate(layers)]
        return replace(
            folded,
            run=frame.row(layers),
            phase=state.phase,
            note=state.note,
            is_paused=state.paused is not None,
            stages=tuple(replace(s, is_thin=s.is_thin and not self._is_ready(layers[s.stage])) for s in stages),
            peers=tuple(self._peer(member) for member in state.members.values()),
            alerts=self.alerts,
            published=self.published or folded.published,
        )

    def _is_ready(self, layers: tuple[int, int]) -> bool:
        """Whether somebody beside its replicas has a stage's state."""
        points = (m.prepared for m in self._state.members.values() if m.away is None and not m.leaving)
        return any(point is not None and (point.first_layer, point.last_layer) == layers for point in points)

    def _peer(self, member: Member) -> shapes.PeerRow:
        state, peer = self._state, member.peer
        place = state.plan.places.get(peer) if state.plan else None
        shown = "leaving" if member.leaving else member.state
        if state.phase == "preparing" and place and state.plan and member.ready != state.plan.generation:
            shown = "loading"
        elif place is None:
            shown = "waiting"
        return replace(
            peer_row(self._frame, self._fold, self._book, peer),
            name=member.name,
            region=member.region,
            device=member.device,
            stage=place[0] if place else None,
            state="away" if member.away is not None else shown,
            last_seen=member.last_seen,
            time=self._traces.time(peer),
            links=tuple(link for link in self._links.get(peer, ()) if link.receiver in state.members),
        )

    async def changed(self, version: int) -> int:
        async with self._changed:
            await self._changed.wait_for(lambda: self.version != version)
        return self.version

    def points(self, after: int) -> list[shapes.Point]:
        return self._points[bisect.bisect_right(self._points, after, key=lambda point: point.id) :]

    def news(self, after: int) -> list[shapes.EventRow]:
        """The newest :data:`KEPT_NEWS` at most."""
        return [row for row in self._news if row.id > after]

    def evaluations(self) -> list[dict[str, Any]]:
        return self._scores.rows()

    def leaderboard(self) -> list[shapes.Standing]:
        return standings(self._frame, self._fold, self._book)

    # From the file: see the archive.

    def state_at(self, at: float) -> shapes.State:
        return self.archive.state_at(at)

    def curve(self, most: int, until: float | None) -> list[shapes.Point]:
        return self.archive.curve(most, until)

    def events(self, after: int, until: float | None, limit: int, kind: str | None) -> list[shapes.EventRow]:
        return self.archive.events(after, until, limit, kind)

    def incidents(self, until: float | None) -> list[shapes.Incident]:
        return self.archive.incidents(until)

    def rounds(self, before: int | None, limit: int) -> list[shapes.RoundRow]:
        return self.archive.rounds(before, limit)

    def round(self, step: int) -> shapes.RoundPage | None:
        return self.archive.round(step)

    def peer(self, peer: str, at: float | None) -> shapes.PeerPage | None:
        page = self.archive.peer(peer, at)
        member = self._state.members.get(peer) if at is None else None
        return replace(page, row=self._peer(member)) if page and member else page

    def links(self, at: float | None) -> list[shapes.LinkRow]:
        if at is not None:
            return self.archive.links(at)
        return [link for rows in list(self._links.values()) for link in rows]

    def link(self, sender: str, receiver: str) -> list[shapes.LinkPoint]:
        return self.archive.link(sender, receiver)

    def traffic(self, most: int, until: float | None) -> list[shapes.TrafficPoint]:
        return self.archive.traffic(most, until)

    def steps(self, limit: int, order: Literal["newest", "slowest"]) -> list[shapes.StepRow]:
        return self.archive.steps(limit, order)

    def step(self, step: int) -> shapes.StepPage | None:
        return self.archive.step(step)


def link_row(
    sender: str, link: pb.Link, now: float, cap: float | None = None, before: shapes.LinkRow | None = None
) -> shapes.LinkRow:
    """What a peer says of its way to another one; None for what it does not know, or makes no sense. ``before``: what
    it said last."""
    rate = known(link.bytes_per_second)
    return shapes.LinkRow(
        sender=sender,
        receiver=link.peer[:PEER_ID_LENGTH],
        path=PATHS.get(link.path),
        rtt_seconds=known(link.rtt_seconds),
        bytes_per_second=rate,
        cap=cap,
        share=share(rate, cap, fastest(rate, before)),
        time=now,
    )


def fastest(rate: float | None, before: shapes.LinkRow | None) -> float | None:
    """That a line without a cap has been, as far as its last row tells."""
    last = before.bytes_per_second / before.share if before and before.bytes_per_second and before.share else 0.0
    return max(rate or 0.0, last) or None
