"""A worker's dealings in states: what it serves, what it fetches, both under the owner's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..protocol.frames import Frame, Kind
from .checkpoint import SavePoints
from .donor import Donor
from .inventory import StateName
from .redo import Recent
from .stage import State
from .throttle import Bucket
from .transfer import Desk, Fetch, Wanted

Layers = Callable[[int], tuple[int, int]]


class States:
    """``post`` sends a frame to a peer, ``layers`` are those of a stage by its number. Thread-safe."""

    def __init__(
        self, run: bytes, points: SavePoints, layers: Layers, post: Callable[[str, Frame], None], mbps: float
    ) -> None:
        self.points, self.layers, self.recent = points, layers, Recent()
        self._received = Bucket(mbps)
        self._donor = Donor(run, self._find, self.recent.after, post, Bucket(mbps))
        self._desk = Desk(run, post)

    def put(self, peer: str, frame: Frame) -> None:
        """A frame about states came in; ``WireError`` for what nobody asked for."""
        if frame.header.kind == Kind.STATE_REQUEST:
            self._donor.ask(peer, frame.header)
        else:
            self._desk.put(peer, frame)

    def fetch(self, wanted: Wanted, donors: Sequence[str], stopped: Callable[[], bool]) -> State:
        """See :class:`.transfer.Fetch`; blocks."""
        name = wanted.name
        folder = self.points.folder / f"fetch-{name.generation}-{name.step}-{name.stage}"
        return Fetch(wanted, donors, self._desk, folder, self._received, stopped).run()

    def close(self) -> None:
        self._donor.close()

    def _find(self, name: StateName) -> State | None:
        try:
            layers = self.layers(name.stage)
        except IndexError:
            return None
        return self.points.find("round", name.generation, name.step, layers)
