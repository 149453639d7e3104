"""The curves for an experiment tracker, in a log of its own kind that goes on after a restart: no step is in it twice.

Every point of the loss curve is one row; the newest has the run's rates beside it. A log that can take back what it
said (TensorBoard's) has a step that was done again as it was done last; the others keep it as it was done first. Where
a log stands is kept in a file beside it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...protocol.config import RunConfig
from ..dashboard.board import Board
from ..dashboard.shapes import Point, State

log = logging.getLogger(__name__)
MOST_ROWS = 2000  # of a batch
TRAIN, HELDOUT = "loss/train", "loss/heldout"


@dataclass(frozen=True, kw_only=True)
class Row:
    """``values`` by name at a step; ``id`` grows by the row, over restarts too. ``takes_back``: from this step on, all
    that was written before is void."""

    id: int
    step: int
    time: float
    values: Mapping[str, float]
    takes_back: bool = False


class Sink(Protocol):
    """One kind of log."""

    can_take_back: bool

    def write(self, rows: Sequence[Row]) -> None:
        """In order; all of it is handed to the disk or to the tracker's own process when it returns."""

    def close(self) -> None: ...


@dataclass
class Place:
    """Up to where a log is written: the last point, and the newest step of each name."""

    id: int = 0
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Place:
        """The beginning if there is nothing to be read. ``ValueError`` if it makes no sense."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not (isinstance(raw, dict) and is_count(raw.get("id")) and isinstance(raw.get("steps"), dict)):
            raise ValueError("not what it must be")
        return cls(raw["id"], {str(name): step for name, step in raw["steps"].items() if is_count(step)})

    def write(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"id": self.id, "steps": self.steps}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Tracker:
    """Feeds a log from threads of its own: one that hangs holds nobody up."""

    def __init__(self, kind: str, folder: Path, config: RunConfig, run_id: str) -> None:
        """``ConfigError`` if the tracker's package is not installed."""
        from . import sinks

        sinks.check(kind)
        self.kind = kind
        self._file = folder / f"{kind}.json"
        self._make = lambda: sinks.made(kind, folder / kind, config, run_id)
        self._sink: Sink | None = None
        self._place: Place | None = None
        self._thread: threading.Thread | None = None
        self._told: tuple[int, str] = (0, "")  # last point, why the last batch was not written

    def feed(self, board: Board) -> None:
        """Hands over what is new, and returns at once; while the last is not written yet, does nothing."""
        if self._thread is not None and self._thread.is_alive():
            return
        points = board.points(self._told[0] if self._sink else 0)
        if points:
            self._thread = threading.Thread(target=self._feed, args=(points, board.state()), name="track", daemon=True)
            self._thread.start()

    async def close(self, board: Board, seconds: float) -> None:
        """With the last rows; a tracker that needs longer is left alone."""
        until = time.monotonic() + seconds
        await self._wait(until)
        self.feed(board)
        await self._wait(until)
        if self._sink and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._sink.close, name="track", daemon=True)
            self._thread.start()
            await self._wait(until)

    async def _wait(self, until: float) -> None:
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    def _feed(self, points: Sequence[Point], state: State) -> None:
        try:
            if self._sink is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._place = self._begun(points)
                self._sink = self._make()
                rows = list(again(points, self._place) if self._sink.can_take_back else fresh(points, self._place))
            else:
                assert self._place is not None
                anew = self._sink.can_take_back
                rows = list(rewound(points, self._place) if anew else fresh(points, self._place))
            self._write(self._sink, with_rates(rows, state), points[-1].id)
        except Exception as error:  # whatever a tracker may raise
            why = f"{type(error).__name__}: {error}"
            if why != self._told[1]:
                log.warning("observe.track: %s takes nothing (%s). It is tried again.", self.kind, why)
            self._sink, self._told = None, (0, why)
        else:
            self._told = (points[-1].id, "")

    def _begun(self, points: Sequence[Point]) -> Place:
        try:
            return Place.read(self._file)
        except ValueError as error:
            if self.kind == "tensorboard":  # it takes back all that is there
                return Place()
            steps = {name: max((p.step for p in points), default=0) for name in (TRAIN, HELDOUT)}
            log.warning("%s cannot be read (%s): the log goes on with what comes now", self._file, error)
            return Place(points[-1].id, steps)

    def _write(self, sink: Sink, rows: Sequence[Row], last: int) -> None:
        """Where nothing can be taken back, the place is written first: what a crash cuts off is missing, not twice."""
        assert self._place is not None
        for start in range(0, max(1, len(rows)), MOST_ROWS):
            batch = rows[start : start + MOST_ROWS]
            reached = Place(batch[-1].id if batch else last, dict(self._place.steps))
            for row in batch:
                for name in row.values:
                    reached.steps[name] = row.step
            if not sink.can_take_back:
                reached.write(self._file)
            sink.write(batch)
            self._place = reached
        self._place.id = max(self._place.id, last)
        if sink.can_take_back:
            self._place.write(self._file)


def row_of(point: Point) -> Row:
    values = {TRAIN: point.train, HELDOUT: point.heldout}
    known = {name: value for name, value in values.items() if value is not None}
    if point.train is not None:
        known["tokens"] = point.tokens
    return Row(id=point.id, step=point.step, time=point.time, values=known)


def rewound(points: Sequence[Point], place: Place) -> Iterator[Row]:
    """Points behind the place; where a step is trained again, all from it on is taken back."""
    last = place.steps.get(TRAIN, -1)
    for point in points:
        if point.id <= place.id:
            continue
        row = row_of(point)
        if TRAIN in row.values:
            if point.step <= last:
                row = Row(id=row.id, step=row.step, time=row.time, values=row.values, takes_back=True)
            last = point.step
        if row.values:
            yield row


def again(points: Sequence[Point], place: Place) -> Iterator[Row]:
    """As :func:`rewound`, after a restart: what a crash may have left behind the place is taken back first, and with it
    what counts of the steps from there on."""
    new = [point.step for point in points if point.id > place.id]
    if not new:
        return
    since = min(new)
    old, last = list[Row](), -1  # what counts of what is written
    for row in (row_of(point) for point in points if point.id <= place.id):
        if TRAIN in row.values:
            if row.step <= last:
                old = [other for other in old if other.step < row.step]
            last = row.step
        old.append(row)
    yield Row(id=place.id, step=since, time=points[-1].time, values={}, takes_back=True)
    yield from (row for row in old if row.step >= since)
    yield from rewound(points, place)


def fresh(points: Sequence[Point], place: Place) -> Iterator[Row]:
    """Points behind the place, of steps that no row had yet."""
    steps = dict(place.steps)
    for point in points:
        row = row_of(point)
        values = {name: value for name, value in row.values.items() if row.step > steps.get(name, -1)}
        if point.id > place.id and values:
            steps |= dict.fromkeys(values, row.step)
            yield Row(id=row.id, step=row.step, time=row.time, values=values)


def with_rates(rows: Sequence[Row], state: State) -> list[Row]:
    """The run's rates beside the newest row."""
    if not rows:
        return []
    share = state.goodput.committed / state.goodput.computed if state.goodput.computed > 0 else None
    rates = {
        "rate/tokens_per_second": state.tokens_per_second,
        "rate/bytes_per_token": state.bytes_per_token,
        "rate/uncompressed_bytes_per_token": state.dense_bytes_per_token,
        "rate/goodput": share,
        "peers": float(sum(peer.state != "gone" for peer in state.peers)),
    }
    last = rows[-1]
    known = {name: value for name, value in rates.items() if value is not None and math.isfinite(value)}
    full = Row(id=last.id, step=last.step, time=last.time, values={**last.values, **known}, takes_back=last.takes_back)
    return [*rows[:-1], full]
