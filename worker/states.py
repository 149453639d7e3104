"""A worker's dealings in states: what it serves, fetches (both under the owner's limit) and keeps of others' stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..protocol.config import RunConfig
from ..protocol.frames import Frame, Kind
from ..protocol.plan import Shape
from ..protocol.throttle import Bucket
from .checkpoint import SavePoints
from .donor import Donor
from .inventory import StateName
from .joiner import Joiner, Prospect
from .keeper import Keeper
from .plan import View
from .redo import Recent
from .stage import State
from .transfer import Desk, Fetch, Wanted
from .weights import Beginning


class States:
    """``post`` sends a frame to a peer. Thread-safe."""

    def __init__(self, run: bytes, points: SavePoints, post: Callable[[str, Frame], None], mbps: float) -> None:
        self.points, self.recent = points, Recent()
        self.keeper: Keeper | None = None
        self.joiner: Joiner | None = None
        self._received = Bucket(mbps)
        self._donor = Donor(run, self._find, self.recent.after, post, Bucket(mbps))
        self._desk = Desk(run, post)

    def put(self, peer: str, frame: Frame) -> None:
        """A frame about states came in; ``WireError`` for what nobody asked for."""
        if frame.header.kind == Kind.STATE_REQUEST:
            self._donor.ask(peer, frame.header)
        elif frame.header.kind == Kind.REDO:
            if self.keeper is not None:
                self.keeper.put(peer, frame)
        else:
            self._desk.put(peer, frame)

    def fetch(self, wanted: Wanted, donors: Sequence[str], stopped: Callable[[], bool]) -> State:
        """See :class:`.transfer.Fetch`; blocks."""
        kept = "" if wanted.moments else "-kept"
        folder = self.points.folder / ("-".join(["fetch", *map(str, wanted.name)]) + kept)
        return Fetch(wanted, donors, self._desk, folder, self._received, stopped).run()

    def prepare(
        self, run: RunConfig, shape: Shape, report: Callable[..., None], beginning: Beginning | None = None
    ) -> None:
        """Gets ready for the stage that the coordinator names, from now on."""
        self.joiner = Joiner(run, shape, self._desk, self.fetch, self.points.newest, report, beginning)

    def keep(self, keeper: Keeper) -> None:
        """Keeps others' stages from now on."""
        self.keeper = keeper
        keeper.start(self.fetch)
        keeper.tell()

    def follow(self, view: View) -> None:
        if self.keeper is not None:
            self.keeper.follow(view)
        if self.joiner is not None and view.plan is not None and view.phase == "training":
            prospect = None
            if view.prospect is not None:
                stage, point = view.prospect
                prospect = Prospect(stage, point, tuple(r.peer for r in view.plan.replicas[stage]))
            self.joiner.follow(prospect)

    def find(self, kind: str, generation: int, step: int, layers: tuple[int, int]) -> State | None:
        """A state of our own, or one that we keep; None if it is not here or damaged."""
        state = self.points.find(kind, generation, step, layers)
        if state is None and kind == "round" and self.keeper is not None:
            state = self.keeper.find(generation, step, layers)
        return state

    def close(self) -> None:
        if self.joiner is not None:
            self.joiner.close()
        if self.keeper is not None:
            self.keeper.close()
        self._donor.close()

    def _find(self, name: StateName) -> State | None:
        return self.find("round", name.generation, name.step, name.layers)
