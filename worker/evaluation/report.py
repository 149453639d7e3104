"""What an evaluation found: what is written as JSON, kept in a run's history, and shown as a table."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from ...protocol.errors import StateError
from ...protocol.evaluation import FORMAT, Score, Summary, TaskSummary
from . import statistics

__all__ = ["Difference", "Evaluation", "Guess", "Score", "TaskScore", "compare", "read"]
_MOST_BYTES = 1 << 28


class Guess(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One test row: its id (no text), the right label's number, the one chosen, and the one chosen by log-probability
    per byte."""

    id: str
    truth: int
    guess: int
    guess_per_byte: int


class TaskScore(TaskSummary, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the table, and what it was made from.

    A classification task has ``labels``, ``rows`` and the baselines; ``score_per_byte`` is the same with labels chosen
    by log-probability per byte. ``shots``: fewest and most examples shown; ``cut``: prompts that lost text. ``values``:
    per row, where rows are numbers. ``weights``: what each counts for.
    """

    score_per_byte: Score | None = None
    labels: tuple[str, ...] = ()
    train_rows: int = 0
    shots: tuple[int, int] = (0, 0)
    cut: int = 0
    rows: tuple[Guess, ...] = ()
    ids: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    note: str = ""


class Evaluation(Summary, frozen=True, kw_only=True, omit_defaults=True):
    """One model, one suite. ``date`` is what the caller says (ISO 8601), ``versions`` of the packages that took part,
    ``settings`` whatever changes a score."""

    model: str
    is_prefix: bool
    date: str
    versions: dict[str, str]
    settings: dict[str, str | int | float | bool | None]
    tasks: tuple[TaskScore, ...]

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def without_rows(self) -> Evaluation:
        """The scores alone: such a result can be compared, but without intervals of the differences."""
        tasks = (msgspec.structs.replace(t, rows=(), ids=(), values=(), weights=()) for t in self.tasks)
        return msgspec.structs.replace(self, tasks=tuple(tasks))


def read(path: Path) -> Evaluation:
    """An evaluation's JSON. Raises StateError when it is none, or of another format."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise StateError(f"{path} is too large for an evaluation", hint="Name a file that --json wrote.")
        found = msgspec.json.decode(path.read_bytes(), type=Evaluation)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}", hint="Name a file that --json wrote.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError(f"{path} is no evaluation: {error}", hint="Name a file that --json wrote.") from error
    if found.format != FORMAT:
        raise StateError(f"{path} has format {found.format}, not {FORMAT}", hint="Evaluate the model again.")
    return found


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Second minus first. ``low`` and ``high`` only where the same rows were scored (``paired`` of them)."""

    name: str
    metric: str
    first: float
    second: float
    paired: int = 0
    low: float | None = None
    high: float | None = None


def compare(first: Evaluation, second: Evaluation) -> tuple[list[Difference], list[str]]:
    """What changed on the tasks that both scored, and the names of those that only one did."""
    left = {(t.name, t.metric): t for t in first.tasks if t.score}
    right = {(t.name, t.metric): t for t in second.tasks if t.score}
    differences = [_difference(left[name], right[name]) for name in left if name in right]
    return differences, [" ".join(name) for name in sorted(left.keys() ^ right.keys())]


def _difference(a: TaskScore, b: TaskScore) -> Difference:
    assert a.score and b.score
    plain = Difference(name=a.name, metric=a.metric, first=a.score.value, second=b.score.value)
    if a.rows and b.rows and a.labels == b.labels:
        ours, theirs = {row.id: row for row in a.rows}, {row.id: row for row in b.rows}
        shared = [i for i in ours if i in theirs and ours[i].truth == theirs[i].truth]
        if not shared:
            return plain
        truth = np.array([ours[i].truth for i in shared])
        one, two = (np.array([table[i].guess for i in shared]) for table in (ours, theirs))
        _, low, high = statistics.f1_difference(truth, one, two)
        return msgspec.structs.replace(
            plain,
            first=statistics.macro_f1(truth, one),
            second=statistics.macro_f1(truth, two),
            paired=len(shared),
            low=low,
            high=high,
        )
    if a.ids and b.ids:
        ours_v, theirs_v = ({i: (v, w) for i, v, w in zip(t.ids, t.values, t.weights, strict=True)} for t in (a, b))
        shared = [i for i in ours_v if i in theirs_v and ours_v[i][1] == theirs_v[i][1]]
        if not shared:
            return plain
        weights = np.array([ours_v[i][1] for i in shared])
        one, two = (np.array([table[i][0] for i in shared]) for table in (ours_v, theirs_v))
        _, low, high = statistics.ratio_interval(list(two - one), list(weights))
        total = weights.sum()
        return msgspec.structs.replace(
            plain,
            first=float(one.sum() / total),
            second=float(two.sum() / total),
            paired=len(shared),
            low=low,
            high=high,
        )
    return plain
