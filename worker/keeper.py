"""Keeping stages of others: their base and redo log, so that a stage outlives all of its replicas.

Owners send what they decide in a round to the stage's keepers too (``protocol/keepers.py`` says who those are). Whether
it counted, and with which digest, comes from the coordinator; then the round goes to the log, and the coordinator is
told that it can be had here. Who has no base, or missed a round, fetches the newest one from a replica. All of it
happens on a thread of its own.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from ..protocol import control_pb2 as pb
from ..protocol.config import RunConfig
from ..protocol.errors import StateError, WireError
from ..protocol.frames import Frame
from ..protocol.plan import Plan, SavePoint, Shape
from ..protocol.schedule import fragments
from .initial import initial
from .mailbox import Fenced
from .plan import View
from .redo import Entry, Kept, Payload, pieces_of
from .reference import Rule
from .stage import State, digest
from .transfer import Wanted
from .weights import Beginning

log = logging.getLogger(__name__)
LATE_SECONDS = 60.0  # after its commit, a round that is not here in full is given up: the state is fetched instead
PAUSE_SECONDS = 1.0  # after a fetch that failed
MOST_NBYTES = 64 << 20  # of rounds on their way, beyond four times the reference
TOLD = 16  # newest rounds that the coordinator hears of


class _Round(NamedTuple):
    generation: int
    step: int
    attempt: int


class Fetch(Protocol):
    def __call__(self, wanted: Wanted, donors: Sequence[str], stopped: Callable[[], bool]) -> State: ...


class Report(Protocol):
    def __call__(self, **body: object) -> None: ...


class _Place(NamedTuple):
    """A stage of one division of the layers: what a round does to it depends on its number, too."""

    number: int
    first_layer: int
    last_layer: int

    @property
    def layers(self) -> tuple[int, int]:
        return self.first_layer, self.last_layer


class _Stage:
    """One kept stage: what came of its rounds, which of them count, and what is on disk."""

    def __init__(self, place: _Place, size: int) -> None:
        self.place, self.number, self.size = place, place.number, size
        self.kept: Kept | None = None  # opened by the thread
        self.rounds: dict[_Round, dict[tuple[int, int], tuple[Payload, int]]] = {}  # (piece, owner) -> ..., weights
        self.nbytes = 0
        self.marks: list[SavePoint] = []  # committed, oldest first
        self.missing: tuple[SavePoint, float] | None = None  # the first that is not here in full, and since when

    def put(self, frame: Frame) -> None:
        header = frame.header
        round_ = self.rounds.setdefault(_Round(header.generation, header.step, header.attempt), {})
        (spec,) = header.tensors
        place = header.part, header.microbatch
        self.nbytes += len(frame.payload) - (len(round_[place][0][1]) if place in round_ else 0)
        round_[place] = (spec.codec, frame.payload), spec.shape[0]
        while self.nbytes > MOST_NBYTES + 16 * self.size and len(self.rounds) > 1:
            self.let_go(min(self.rounds))

    def let_go(self, which: _Round) -> None:
        self.nbytes -= sum(len(data) for (_, data), _ in self.rounds.pop(which).values())

    def hear(self, marks: Sequence[SavePoint]) -> None:
        """The newest committed rounds, oldest first; some may be undone, some known already."""
        known = self.marks
        if not marks or (known and known[-1] == marks[-1]):
            return
        if marks[-1] in known:
            del known[known.index(marks[-1]) + 1 :]
        elif known and known[-1] in marks:
            known += marks[marks.index(known[-1]) + 1 :]
        else:
            self.marks = list(marks)


class Keeper:
    """What one worker keeps of others' stages. Thread-safe."""

    def __init__(
        self, run: RunConfig, shape: Shape, folder: Path, report: Report, beginning: Beginning | None = None
    ) -> None:
        """``folder`` may have something of an earlier process."""
        self.beginning = beginning
        self.run, self.shape, self.folder, self.report = run, shape, folder, report
        self.fetch: Fetch | None = None
        self._sync = run.sync.resolved()
        self._changed = threading.Condition()
        self._disk = threading.RLock()
        self._stages: dict[_Place, _Stage] = {}
        self._keeping: frozenset[_Place] = frozenset()
        self._committed = 0
        self._plan: Plan | None = None
        self._news = self._closed = self._settled = False
        self._thread = threading.Thread(target=self._work, name="keeper", daemon=True)
        for left in folder.glob("kept-*-*-*"):
            numbers = left.name.split("-")[1:]
            if all(n.isdecimal() for n in numbers) and 0 <= int(numbers[1]) < int(numbers[2]) <= shape.layers:
                self._disk_of(self._open(_Place(*map(int, numbers))))

    def start(self, fetch: Fetch) -> None:
        """Begins; ``fetch`` gets a state from donors."""
        self.fetch = fetch
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        for stage in self._stages.values():
            if stage.kept is not None:
                stage.kept.close()

    # From the event loop.

    def follow(self, view: View) -> None:
        """What we are to keep, and which rounds of it count."""
        with self._changed:
            self._plan, self._settled = view.plan or self._plan, view.phase == "training"
            self._committed = view.committed
            if (plan := view.plan) is not None:
                kept = {_Place(i, *plan.layers[i]): marks for i, marks in view.kept if i < len(plan.stages)}
                self._keeping = frozenset(kept)
                for place, marks in kept.items():
                    self._open(place).hear(marks[::-1])
            self._news = True
            self._changed.notify_all()

    def put(self, peer: str, frame: Frame) -> None:
        """What an owner decided of its shard; ``WireError`` from somebody who owns none."""
        header = frame.header
        with self._changed:
            plan = self._plan
            if plan is None or header.generation != plan.generation or header.stage >= len(plan.stages):
                return
            place = _Place(header.stage, *plan.layers[header.stage])
            if peer not in {r.peer for r in plan.stages[header.stage].replicas}:
                raise WireError(f"{peer[:8]} sends a round of a stage that it does not hold")
            if place not in self._keeping:
                return
            self._open(place).put(frame)
            self._news = True
            self._changed.notify_all()

    # For the other threads.

    def find(self, generation: int, step: int, layers: tuple[int, int]) -> State | None:
        """A committed round of a stage we keep, without moments; None if it is not here."""
        for place, stage in list(self._stages.items()):
            if place.layers == layers:
                with self._disk:
                    for point in stage.kept.points if stage.kept is not None else ():
                        if (point.generation, point.step) == (generation, step):
                            return self._disk_of(stage).rebuild(point)
        return None

    # The thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._closed, max(PAUSE_SECONDS, LATE_SECONDS / 2))
                self._news = False
                if self._closed:
                    return
            for place, stage in list(self._stages.items()):
                try:
                    if place in self._keeping:
                        self._advance(stage)
                    elif self._settled and self._is_past(place):
                        self._drop(stage)
                except Fenced:
                    pass
                except (StateError, WireError) as error:
                    log.warning("keeping stage %d: %s", place.number, error)
                    self._pause()
                except Exception:
                    log.exception("keeping stage %d", place.number)
                    self._pause()

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, PAUSE_SECONDS)
            self._news = True

    def _advance(self, stage: _Stage) -> None:
        """Takes every committed round that is here to the disk; fetches a base if there is none to build on."""
        kept = self._disk_of(stage)
        before = list(kept.points)
        with self._changed:
            marks = list(stage.marks)
        if not marks:
            return
        at = self._reach(kept, marks)
        if at is None:
            self._begin(stage, marks)
            at = self._reach(kept, marks)
            assert at is not None
        for mark in marks[at + 1 :]:
            entry = self._entry(stage, kept.points[-1], mark)
            if entry is None:
                now = time.monotonic()
                if stage.missing is None or stage.missing[0] != mark:
                    stage.missing = mark, now
                elif now - stage.missing[1] > LATE_SECONDS:
                    log.warning("stage %d: the round of step %d did not come in full", stage.number, mark.step)
                    with self._disk:
                        kept.drop()
                    self._news = True
                break
            with self._disk:
                if not kept.append(entry):
                    raise WireError(f"the round of step {mark.step} cannot be built on")
        if kept.points != before:
            self.tell()
        self._tidy(stage)

    def _reach(self, kept: Kept, marks: Sequence[SavePoint]) -> int | None:
        """Which of the committed rounds we have come to; goes back to it if we are beyond."""
        for point in reversed(kept.points):
            for at, mark in enumerate(marks):
                if mark == point or mark.step == point.step == 0:
                    if point != kept.points[-1]:
                        with self._disk:
                            state = kept.rebuild(point)
                            if state is None:
                                return None
                            kept.begin(state)
                    return at
        return None

    def _begin(self, stage: _Stage, marks: Sequence[SavePoint]) -> None:
        """A base: the run's beginning where all rounds since are on their way to us, else the newest round."""
        first, newest = marks[0], marks[-1]
        if first.step == 0 and all(self._entry(stage, first, mark) is not None for mark in marks[1:]):
            g = initial(self.run.model, self.shape.vocab_size, *stage.place.layers, self.run.seed, self.beginning)
            point = replace(first, kind="round", step=0, digest=digest(g))
            state = State(point=point, g=g, m=None, v=None, updates=0)
        else:
            assert self.fetch is not None
            plan = self._plan
            donors = [r.peer for r in plan.replicas[stage.number]] if plan is not None else []
            wanted = Wanted(point=newest, size=stage.size, moments=False)
            state = self.fetch(wanted, donors, lambda: self._closed or stage.place not in self._keeping)
        with self._disk:
            self._disk_of(stage).begin(state)

    def _entry(self, stage: _Stage, base: SavePoint, mark: SavePoint) -> Entry | None:
        """A committed round as an entry, if all of it is here."""
        with self._changed:
            tries = [r for r in stage.rounds if (r.generation, r.step) == (mark.generation, mark.step)]
            if not tries:
                return None
            which = max(tries)
            parts = dict(stage.rounds[which])
        last = mark.step == self.run.steps
        exchanged = tuple(fragments(self._sync, self.run.seed, mark.step - 1, last))
        owners = 1 + max(owner for _, owner in parts)
        payloads = []
        for piece in pieces_of(self._rule(stage.number), stage.size, exchanged, owners):
            for owner, (start, end) in enumerate(piece.shards):
                payload, weights = parts.get((piece.number, owner), (None, 0))
                if payload is None or weights != end - start:
                    return None
                payloads.append(payload)
        return Entry(
            generation=mark.generation,
            attempt=which.attempt,
            step=mark.step,
            fragments=exchanged,
            replicas=owners,
            full=last and self._sync.completes,
            base_digest=base.digest,
            digest=mark.digest,
            payloads=tuple(payloads),
        )

    def _tidy(self, stage: _Stage) -> None:
        """Lets go of rounds that are on the disk, or were never to count."""
        points = self._disk_of(stage).points
        if not points:
            return
        with self._changed:
            tip = points[-1]
            for which in [r for r in stage.rounds if (r.generation, r.step) <= (tip.generation, tip.step)]:
                stage.let_go(which)
            if tip in stage.marks:
                del stage.marks[: stage.marks.index(tip)]

    def tell(self) -> None:
        """Says what of others' stages can be had here."""
        with self._disk:
            points = [p for stage in self._stages.values() if stage.kept for p in stage.kept.points[-TOLD:]]
        self.report(held=pb.Held(savepoints=[p.to_proto() for p in points]))

    # Folders.

    def _is_past(self, place: _Place) -> bool:
        """Whether nobody can want to go back to a stage that we keep no more: not so after the layers were divided
        anew, until a round of the new stages is committed and what we keep of them is on the disk."""
        plan, mine = self._plan, [self._stages[p] for p in self._keeping if p in self._stages]
        if plan is None or place.layers in plan.layers:
            return True
        return self._committed > plan.first_step and all(s.kept is not None and s.kept.points for s in mine)

    def _place(self, place: _Place) -> Path:
        return self.folder / ("-".join(["kept", *map(str, place)]))

    def _rule(self, number: int) -> Rule:
        return Rule(sync=self._sync, seed=self.run.seed, stage=number)

    def _open(self, place: _Place) -> _Stage:
        if place not in self._stages:
            self._stages[place] = _Stage(place, self.shape.size(*place.layers))
        return self._stages[place]

    def _disk_of(self, stage: _Stage) -> Kept:
        with self._disk:
            if stage.kept is None:
                stage.kept = Kept(self._place(stage.place), self._rule(stage.number), stage.size)
            return stage.kept

    def _drop(self, stage: _Stage) -> None:
        """Others keep it now."""
        with self._changed, self._disk:
            del self._stages[stage.place]
            if stage.kept is not None:
                stage.kept.close()
            shutil.rmtree(self._place(stage.place), ignore_errors=True)
