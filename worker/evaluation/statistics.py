"""Scores with their uncertainty. Everything is seeded: the same rows give the same interval.

Intervals are percentile bootstraps over the test rows (Efron, 1979): they say how far a score would move had other
rows been drawn, not how far it moves with other training rows or another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95

Labels = NDArray[np.int64]


def macro_f1(truth: Labels, guess: Labels) -> float:
    """Mean of the classes' F1 over classes that are in ``truth`` or ``guess`` (int64 [n] both), as RAFT has it."""
    return float(_macro_f1(truth, guess, np.arange(len(truth))[None])[0])


def _macro_f1(truth: Labels, guess: Labels, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R] macro-F1 of each of the R resamples ``draws`` (int64 [R, n]), over the classes of the whole: one that a
    resample lacks counts as 0, or small samples would look better than they are."""
    classes = int(max(truth.max(), guess.max())) + 1
    offset = np.arange(len(draws))[:, None] * classes

    def counted(values: Labels, kept: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        weights = None if kept is None else kept.ravel().astype(np.float64)
        found = np.bincount((values[draws] + offset).ravel(), weights, minlength=len(draws) * classes)
        return found.reshape(len(draws), classes).astype(np.float64)

    both = counted(truth) + counted(guess)
    hits = counted(truth, (truth == guess)[draws])
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return f1.sum(1) / len(np.union1d(truth, guess))


def resamples(n: int, seed: int = SEED) -> NDArray[np.int64]:
    """int64 [RESAMPLES, n]: rows drawn with replacement."""
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The middle ``LEVEL`` of ``values``."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def f1_interval(truth: Labels, guess: Labels, seed: int = SEED) -> tuple[float, float]:
    return interval(_macro_f1(truth, guess, resamples(len(truth), seed)))


def f1_difference(truth: Labels, first: Labels, second: Labels, seed: int = SEED) -> tuple[float, float, float]:
    """(``second``'s macro-F1 minus ``first``'s, low, high): a paired bootstrap, both on the same drawn rows."""
    draws = resamples(len(truth), seed)
    difference = _macro_f1(truth, second, draws) - _macro_f1(truth, first, draws)
    return macro_f1(truth, second) - macro_f1(truth, first), *interval(difference)


def mean_interval(values: Sequence[float], seed: int = SEED) -> tuple[float, float, float]:
    """(mean, low, high)."""
    return ratio_interval(values, [1.0] * len(values), seed)


def ratio_interval(above: Sequence[float], below: Sequence[float], seed: int = SEED) -> tuple[float, float, float]:
    """(sum of ``above`` over sum of ``below``, low, high), rows drawn together."""
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    draws = resamples(len(a), seed)
    return float(a.sum() / b.sum()), *interval(a[draws].sum(1) / b[draws].sum(1))


def mean_of_tasks(tasks: Sequence[tuple[Labels, Labels]], seed: int = SEED) -> tuple[float, float, float]:
    """(mean macro-F1 over (truth, guess) of each task, low, high): each task's rows are drawn on their own."""
    drawn = [_macro_f1(t, g, resamples(len(t), seed + i)) for i, (t, g) in enumerate(tasks)]
    return float(np.mean([macro_f1(t, g) for t, g in tasks])), *interval(np.mean(drawn, axis=0))
