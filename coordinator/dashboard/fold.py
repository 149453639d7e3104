"""What a run's events and points say of it: a pure value, the same for a run that goes on and one that is read back.

Nothing here reads a file or a clock. What the totals say (see :mod:`.rollups`) joins it in :mod:`.picture`.
"""

from __future__ import annotations

from collections import deque
from pathlib import PurePosixPath

from msgspec import Struct

from .. import events as ev
from ..masking import masked
from .shapes import Caps, EventRow, Incident, Point, RoundRow

KEPT_EVENTS = 100
KEPT_ROUNDS = 64
SMOOTHED = 40  # losses that the shown one is a mean of
PACED = 256  # newest steps that the pace is learned from
GROUPS = {
    "PeerGone": "lost",
    "PeerJoined": "joined",
    "Redivided": "divided",
    "DivisionFailed": "divided",
    "Moved": "divided",
    "Held": "degraded",
    "Degraded": "degraded",
    "RoundCommitted": "degraded",
    "RolledBack": "back",
    "Faulted": "fault",
    "RoundRefused": "fault",
    "Rerouted": "fault",
    "Paused": "paused",
    "Resumed": "paused",
    "Stopped": "paused",
    "RunOpened": "paused",
    "Banned": "left",
    "Drained": "left",
    "StoodStill": "disk",
}
QUOTING = ("Faulted", "RolledBack", "Waiting", "PublishFailed", "DivisionFailed")  # somebody's words: see masking.py


class Person(Struct, frozen=True, kw_only=True):
    """A peer as it came last."""

    peer: str
    name: str
    device: str
    first_seen: float
    region: str = ""
    caps: Caps = Caps()


class Reached(Struct, frozen=True):
    """A step that was done. ``still``: seconds of the run so far in which it did not train."""

    time: float
    step: int
    tokens: int
    loss: float
    still: float


class Kept(Struct, frozen=True):
    """A committed round, and what was before it."""

    row: RoundRow
    sample: int
    layers: tuple[tuple[int, int], ...]


class Fold:
    """Changed by :meth:`event` and :meth:`point`; what its fields hold is replaced, never changed."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.started: float | None = None
        self.time = 0.0  # of the newest of them
        self.phase, self.note, self.is_paused = "waiting", "", False
        self.step = self.generation = self.round = 0
        self.sample = 0  # committed ones
        self.persons: dict[str, Person] = {}
        self.members: dict[str, str] = {}  # who is here, in order, and in what state if it has a seat
        self.seats: tuple[tuple[str, ...], ...] = ()
        self.layers: tuple[tuple[int, int], ...] = ()  # of the plan's stages
        self.divided: tuple[tuple[int, int], ...] = ()  # of the stages of the last committed round
        self.published: str | None = None
        self.rounds: deque[Kept] = deque(maxlen=KEPT_ROUNDS)
        self.events: deque[EventRow] = deque(maxlen=KEPT_EVENTS)
        self.reached: deque[Reached] = deque(maxlen=PACED)
        self.heldout: tuple[float, float] | None = None  # the first one and the newest
        self._still, self._since = 0.0, 0.0

    def copy(self) -> Fold:
        other = Fold(self.seq_len)
        other.__dict__ |= self.__dict__
        other.persons, other.members = dict(self.persons), dict(self.members)
        other.rounds, other.events, other.reached = self.rounds.copy(), self.events.copy(), self.reached.copy()
        return other

    # What comes in.

    def point(self, point: Point) -> None:
        self._passes(point.time)
        if point.train is not None:
            self.step = point.step
            self.reached.append(Reached(point.time, point.step, point.tokens, point.train, self._idle(point.time)))
        if point.heldout is not None:
            self.heldout = (self.heldout[0] if self.heldout else point.heldout, point.heldout)

    def event(
        self, number: int, time: float, kind: str, text: str, event: ev.Event | None, step: int | None = None
    ) -> tuple[EventRow, Incident | None]:
        """One more event, with its id. ``event`` is None where another version wrote it; ``step`` as it was stored."""
        self._passes(time)
        at = self.step if step is None else step
        row = EventRow(
            id=number,
            time=time,
            step=at,
            kind=kind,
            text=masked(text) if kind in QUOTING else text,
            peer=getattr(event, "peer", None),
        )
        incident = self._incident(row, event)
        if event is not None:
            self._follow(event, time)
        if kind not in ev.QUIET:
            self.events.append(row)
        return row, incident

    def _passes(self, time: float) -> None:
        self.started = time if self.started is None else self.started
        self.time = time

    def _idle(self, time: float) -> float:
        return self._still + (0.0 if self.phase == "training" and not self.is_paused else max(0.0, time - self._since))

    def _enter(self, phase: str, time: float, note: str = "", *, paused: bool | None = None) -> None:
        if not (self.phase == "training" and not self.is_paused):
            self._still += max(0.0, time - self._since)
        self.phase, self.note, self._since = phase, note, time
        self.is_paused = self.is_paused if paused is None else paused
        if phase == "waiting":
            self.seats, self.layers = (), ()

    def _follow(self, event: ev.Event, time: float) -> None:
        match event:
            case ev.RunOpened(generation=0):
                self.members = {}
                self._enter("waiting", time)
            case ev.PeerJoined():
                self._joined(event, time)
            case ev.PeerLeaving(peer=peer):
                self.members = {**self.members, peer: "leaving"}
            case ev.PeerGone(peer=peer):
                self.members = {p: word for p, word in self.members.items() if p != peer}
                self._without(peer)
            case ev.Rerouted(peer=peer):
                self._without(peer)
            case ev.PlanIssued():
                self._planned(event)
                self._enter("preparing", time, self.note)
            case ev.TrainingStarted():
                self._enter("training", time)
            case ev.PhaseChanged(phase=phase, note=note):
                self._enter(phase, time, note)
            case ev.Waiting(why=why):
                self._enter("waiting", time, why)
            case ev.RoundCommitted():
                self._committed(event, time)
            case ev.RolledBack(step=step):
                self._back(step)
            case ev.Published(path=path):
                self.published = PurePosixPath(path).name
            case ev.Finished() | ev.Stopped():
                self._enter(event.kind.lower(), time)
            case _ if event.kind in ("Paused", "Resumed"):
                self._enter(self.phase, time, self.note, paused=event.kind == "Paused")

    def _joined(self, event: ev.PeerJoined, time: float) -> None:
        known = self.persons.get(event.peer)
        caps = Caps(
            memory_gb=event.memory_gb,
            threads=event.threads,
            upload_mbps=event.upload_mbps,
            state_mbps=event.state_mbps,
        )
        self.persons[event.peer] = Person(
            peer=event.peer,
            name=event.name,
            device=event.device,
            first_seen=known.first_seen if known else time,
            region=event.region,
            caps=caps,
        )
        self.members = {**self.members, event.peer: ""}

    def _planned(self, event: ev.PlanIssued) -> None:
        self.generation = event.generation
        ids = {self.persons[peer].name: peer for peer in self.members}  # of plans that do not say them
        named = tuple(tuple(ids[name] for name in names if name in ids) for names in event.stages)
        self.seats, self.layers = event.peers or named, event.layers

    def _without(self, peer: str) -> None:
        self.seats = tuple(tuple(p for p in peers if p != peer) for peers in self.seats)

    def _committed(self, event: ev.RoundCommitted, time: float) -> None:
        row = RoundRow(
            round=event.round,
            step=event.step,
            replicas=event.replicas,
            samples=event.samples,
            agree=True,  # a round whose replicas differ is refused, not committed
            nbytes=event.nbytes,
            seconds=event.seconds,
            committed=time,
            degraded=event.degraded,
        )
        self.rounds.append(Kept(row, self.sample, self.divided))
        self.sample += event.samples
        self.round, self.divided = event.round, self.layers or self.divided

    def _back(self, step: int) -> None:
        """Rounds after ``step`` are lost; the steps after it are done again."""
        self.step = step
        while self.rounds and self.rounds[-1].row.step > step:
            last = self.rounds.pop()
            self.sample, self.divided = last.sample, last.layers
        if step == 0:
            self.sample, self.divided = 0, ()

    def _incident(self, row: EventRow, event: ev.Event | None) -> Incident | None:
        group = GROUPS.get(row.kind)
        match event:
            case ev.PeerGone(graceful=True):
                group = "left"
            case ev.RoundCommitted(degraded=False):
                return None
            case ev.RunOpened(step=0, generation=0):
                return None
            case ev.PeerJoined() if not self.generation:  # before there is a curve
                return None
            case ev.Rerouted(peer=peer) if peer not in self.members:  # its loss is one
                return None
        if group is None:
            return None
        return Incident(id=row.id, time=row.time, step=row.step, group=group, text=row.text, peer=row.peer)

    def newest_rounds(self, count: int) -> tuple[RoundRow, ...]:
        return tuple(kept.row for kept in reversed(self.rounds))[:count]

    def newest_events(self, count: int) -> tuple[EventRow, ...]:
        return tuple(reversed(self.events))[:count]
