"""What published models scored, as a run's events tell: for the page and the model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ..events import Evaluated, EvaluationIgnored, Published
from ..store import Store

MOST_ROWS = 200  # that the page shows
KINDS = Evaluated | EvaluationIgnored | Published
DECODER: msgspec.json.Decoder[KINDS] = msgspec.json.Decoder(KINDS)
EVENTS = "SELECT id, time, data FROM events WHERE kind IN ('Evaluated', 'EvaluationIgnored', 'Published') ORDER BY id"


def told(store: Store) -> list[tuple[int, float, KINDS]]:
    """Id, time and content of every event that has to do with evaluations, oldest first."""
    return [(number, at, DECODER.decode(data)) for number, at, data in store.rows(EVENTS)]


class Scores:
    """The newest evaluation of each step and suite. ``version`` is the id of the event that last changed anything."""

    def __init__(self) -> None:
        self.version = 0
        self._found: dict[tuple[int, str], tuple[float, Evaluated]] = {}

    @classmethod
    def read(cls, store: Store) -> Scores:
        scores = cls()
        for number, at, event in told(store):
            scores.take(number, at, event)
        return scores

    def take(self, number: int, at: float, event: object) -> None:
        """One more event of the run, with its id and time."""
        if isinstance(event, Evaluated):
            self._found[event.step, event.suite] = (at, event)
            self.version = number
        elif isinstance(event, Published) and (stale := [key for key in self._found if key[0] == event.step]):
            for key in stale:  # the step was trained and published anew: those were other weights
                del self._found[key]
            self.version = number

    @classmethod
    def of(cls, rows: Callable[[str, Sequence[Any]], Iterable[tuple[Any, ...]]], until: float) -> Scores:
        """As of a moment."""
        scores = cls()
        for number, at, data in rows(EVENTS, ()):
            if at <= until:
                scores.take(number, at, DECODER.decode(data))
        return scores

    def newest(self, before: int) -> Evaluated | None:
        """Of the highest step below ``before`` that has a score, the one that came last."""
        found = [
            (event.step, at, event) for at, event in self._found.values() if event.step < before and event.headline
        ]
        return max(found, key=lambda entry: entry[:2])[2] if found else None

    def rows(self) -> list[dict[str, Any]]:
        """For the page: the highest steps first, by suite."""
        order = sorted(self._found.values(), key=lambda pair: (-pair[1].step, pair[1].suite))
        return [row(at, event) for at, event in order[:MOST_ROWS]]


def row(at: float, event: Evaluated) -> dict[str, Any]:
    label, score = event.headline or ("", None)
    return {
        "step": event.step,
        "suite": event.suite,
        "time": at,
        "label": label,
        "score": msgspec.to_builtins(score),
        "tasks": msgspec.to_builtins(event.tasks),
    }
