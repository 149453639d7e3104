"""A newcomer's way to its stage, while the others train on: the state first, then the rounds committed meanwhile.

The coordinator says which stage it will probably be, and names each committed round. The first one is fetched from the
replicas; later ones are done again from their redo log entries, which replicas keep for a while. So the seat is taken
with what the last rounds changed, and nobody waits for a transfer. Of a run that began from a checkpoint the stage's
part of that comes first. Who was away for a little while and has a round of the stage on disk fetches nothing but the
rounds since. AdamW's moments stay those of the first fetch, or of that round.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..protocol import control_pb2 as pb
from ..protocol.architecture import tensors
from ..protocol.config import RunConfig
from ..protocol.errors import PotluckError, WireError
from ..protocol.plan import SavePoint, Shape
from .inventory import PIECE_NBYTES, Part, PieceName, StateName
from .mailbox import Fenced
from .redo import Entry, replay
from .reference import Rule
from .stage import State, digest
from .transfer import TICK_SECONDS, Arrivals, Desk, Wanted
from .weights import Beginning

log = logging.getLogger(__name__)
ENTRY_SECONDS = 30.0  # for a piece of an entry to come
PAUSE_SECONDS = 1.0
Stopped = Callable[[], bool]
Own = Callable[[tuple[int, int], int], State | None]


class Fetch(Protocol):
    def __call__(self, wanted: Wanted, donors: Sequence[str], stopped: Stopped) -> State: ...


@dataclass(frozen=True)
class Prospect:
    """The stage that a newcomer will probably get, the newest committed round of it, and who has that."""

    stage: int
    point: SavePoint
    donors: tuple[str, ...]


def fetch_entry(desk: Desk, name: StateName, donor: str, most_nbytes: int, stopped: Stopped) -> Entry:
    """The round that came after a state. ``WireError`` if the donor does not have it (any more)."""
    data, total, arrivals = bytearray(), 1, Arrivals()
    while len(data) < total:
        desk.ask(donor, name, PieceName(Part.ENTRY, len(data) // PIECE_NBYTES), arrivals)
        deadline = time.monotonic() + ENTRY_SECONDS
        while True:
            try:
                *_, frame = arrivals.get(timeout=TICK_SECONDS)
                break
            except queue.Empty:
                if stopped():
                    raise Fenced from None
                if time.monotonic() > deadline:
                    raise WireError(f"{donor[:8]} does not answer") from None
        total = frame.header.targets
        left = total - len(data)
        if not frame.payload or total > most_nbytes or len(frame.payload) != min(left, PIECE_NBYTES):
            raise WireError(f"{donor[:8]} does not have the round after step {name.step}")
        data += frame.payload
    return Entry.decode(bytes(data))


def catch_up(desk: Desk, rule: Rule, state: State, to: Prospect, stopped: Stopped) -> State:
    """``state``, with the rounds since done again; ``WireError`` if nobody has all of them."""
    g, momentum, point = state.g, state.momentum, state.point
    while (point.generation, point.step) != (to.point.generation, to.point.step):
        name, error = StateName.of(point), WireError("nobody to ask")
        for donor in to.donors:
            try:
                entry = fetch_entry(desk, name, donor, 8 * g.numel() + (1 << 20), stopped)
                if entry.base_digest != point.digest or not point.step < entry.step <= to.point.step:
                    raise WireError(f"{donor[:8]} has other rounds after step {point.step}")
                g, momentum = replay(rule, g, momentum, entry)
                break
            except WireError as problem:
                error = problem
        else:
            raise error
        point = replace(point, generation=entry.generation, step=entry.step, digest=entry.digest)
    if to.point.digest != digest(g):
        raise WireError("the rounds done again lead elsewhere")
    return replace(state, point=to.point, g=g, momentum=momentum)


class Joiner:
    """Gets the state of a newcomer's stage, on a thread of its own. Thread-safe."""

    def __init__(
        self,
        run: RunConfig,
        shape: Shape,
        desk: Desk,
        fetch: Fetch,
        own: Own,
        report: Callable[..., None],
        beginning: Beginning | None = None,
    ) -> None:
        """``own``: the newest round of some layers on this disk that is not beyond a step. ``beginning``: what the
        stage's base is read from, too; brought to this disk beforehand."""
        self._run, self._shape, self._desk, self._report = run, shape, desk, report
        self._fetch, self._own, self._beginning = fetch, own, beginning
        self._brought: set[tuple[int, int]] = set()  # layers whose base is on the disk
        self._changed = threading.Condition()
        self._busy = threading.Lock()  # while the state is worked on
        self._prospect: Prospect | None = None
        self._done: Prospect | None = None
        self._state: State | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def follow(self, prospect: Prospect | None) -> None:
        """What the coordinator says now; None: we are seated, or there is nothing to prepare for."""
        with self._changed:
            if prospect == self._prospect:
                return
            self._prospect = prospect
            if prospect is not None and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="joiner", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take(self, point: SavePoint, stage: int, donors: Sequence[str], stopped: Stopped) -> State | None:
        """The state of ``point``, if what was got ready leads there."""
        self.follow(None)
        with self._busy:
            state = self._state
            if state is None or not self._is_of(state, point):
                return None
            try:
                return catch_up(self._desk, self._rule(stage), state, Prospect(stage, point, tuple(donors)), stopped)
            except WireError as error:
                log.info("what was got ready is of no use: %s", error)
                return None

    def let_go(self) -> None:
        """A seat is taken: what was got ready is of no more use."""
        self.follow(None)
        with self._busy:
            self._state = None

    def close(self) -> None:
        with self._changed:
            self._closed, self._prospect = True, None
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _rule(self, stage: int) -> Rule:
        return Rule(sync=self._run.sync.resolved(), seed=self._run.seed, stage=stage)

    @staticmethod
    def _is_of(state: State | Prospect, point: SavePoint) -> bool:
        return (state.point.first_layer, state.point.last_layer) == (point.first_layer, point.last_layer)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._prospect not in (None, self._done))
                if self._closed:
                    return
                prospect = self._prospect
            assert prospect is not None
            try:
                with self._busy:
                    self._bring(prospect)
                    self._state = self._get(prospect)
                self._report(prepared=pb.Prepared(savepoint=prospect.point.to_proto()))
                self._done = prospect
            except Fenced:
                pass
            except PotluckError as error:  # the next committed round's state, perhaps
                log.info("the state of stage %d: %s", prospect.stage, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, PAUSE_SECONDS)

    def _stopped(self, to: Prospect) -> bool:
        now = self._prospect
        return now is None or not self._is_of(now, to.point)

    def _bring(self, to: Prospect) -> None:
        """The part of the run's checkpoint that the stage reads: long before the others wait for it."""
        layers = to.point.first_layer, to.point.last_layer
        if self._beginning is None or layers in self._brought:
            return
        for name, shape in tensors(self._run.model, self._shape.vocab_size, *layers).items():
            if self._stopped(to):
                raise Fenced
            self._beginning.bring(name, shape)
        self._brought.add(layers)

    def _get(self, to: Prospect) -> State:
        def stopped() -> bool:
            return self._stopped(to)

        state = self._state
        if state is None or not self._is_of(state, to.point):
            found = self._own((to.point.first_layer, to.point.last_layer), to.point.step)
            state = found and found.shared()
        if state is not None:
            try:
                return catch_up(self._desk, self._rule(to.stage), state, to, stopped)
            except WireError as error:
                log.info("fetching the state as a whole: %s", error)
        wanted = Wanted(point=to.point, size=self._shape.size(to.point.first_layer, to.point.last_layer))
        return self._fetch(wanted, to.donors, stopped)
