"""Macro-F1, bootstraps and what is written down."""

from __future__ import annotations

import numpy as np
import pytest

from potluck.protocol.errors import StateError
from potluck.worker.evaluation import report, statistics
from potluck.worker.evaluation.baselines import majority
from potluck.worker.evaluation.report import Evaluation, Guess, Score, TaskScore


def plain_macro_f1(truth, guess, labels=()):
    scores = []
    for label in labels or set(truth) | set(guess):
        hits = sum(t == g == label for t, g in zip(truth, guess, strict=True))
        scores.append(2 * hits / max(1, truth.count(label) + guess.count(label)))
    return sum(scores) / len(scores)


def test_macro_f1_and_its_resamples_equal_the_definition():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, 30), rng.integers(0, 5, 30)
    assert statistics.macro_f1(truth, guess) == pytest.approx(plain_macro_f1(truth.tolist(), guess.tolist()))
    draws, labels = statistics.resamples(30)[:20], set(truth.tolist()) | set(guess.tolist())
    found = statistics._macro_f1(truth, guess, draws)
    assert found == pytest.approx([plain_macro_f1(truth[d].tolist(), guess[d].tolist(), labels) for d in draws])


def test_macro_f1_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: potluck[eval]")
    rng = np.random.default_rng(1)
    truth, guess = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    assert statistics.macro_f1(truth, guess) == pytest.approx(metrics.f1_score(truth, guess, average="macro"))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """200 worlds of 60 rows: 95 % of intervals hold the mean they were drawn around; fewer for a percentile."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        _, low, high = statistics.mean_interval(list(rng.normal(3.0, 1.0, 60)))
        held += low <= 3.0 <= high
    assert 176 <= held <= 199


def test_intervals_are_the_same_every_time_and_narrow_with_rows():
    truth = np.array([0, 1] * 20)
    guess = np.where(np.arange(40) % 5 == 0, 1 - truth, truth)
    low, high = statistics.f1_interval(truth, guess)
    assert (low, high) == statistics.f1_interval(truth, guess)
    more = statistics.f1_interval(np.tile(truth, 10), np.tile(guess, 10))
    assert more[1] - more[0] < 0.5 * (high - low)


def test_a_paired_difference_is_surer_than_two_intervals():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 200)
    first = np.where(rng.random(200) < 0.4, 1 - truth, truth)
    second = np.where((first != truth) & (rng.random(200) < 0.3), truth, first)
    difference, low, high = statistics.f1_difference(truth, first, second)
    assert 0 < low < difference < high
    assert statistics.f1_interval(truth, first)[1] > statistics.f1_interval(truth, second)[0]


def test_majority_is_of_the_training_rows():
    assert majority(np.array([2, 0, 2, 1]), 3).tolist() == [2, 2, 2]
    assert majority(np.array([1, 0]), 1).tolist() == [0]


def evaluation(guesses, values, name="m"):
    rows = tuple(Guess(id=f"r{i}", truth=i % 2, guess=g, guess_per_byte=g) for i, g in enumerate(guesses))
    task = TaskScore(
        name="t",
        metric="macro-f1",
        score=Score(value=0.5, low=0.4, high=0.6, n=len(rows)),
        labels=("a", "b"),
        rows=rows,
    )
    text = TaskScore(
        name="x",
        metric="bits-per-byte",
        score=Score(value=sum(values) / 10 / len(values), low=0.0, high=9.0, n=len(values)),
        ids=tuple(f"d{i}" for i in range(len(values))),
        values=tuple(values),
        weights=(10.0,) * len(values),
        lower_is_better=True,
    )
    return Evaluation(
        model=name, is_prefix=True, suite="offline", date="2026-01-01", versions={}, settings={}, tasks=(task, text)
    )


def test_what_is_written_is_read_again_and_compared(tmp_path):
    first = evaluation([0, 0, 0, 0, 0, 1], [9.0, 8.0, 7.0])
    second = evaluation([0, 1, 0, 1, 0, 1], [8.0, 7.0, 6.0])
    (tmp_path / "a.json").write_bytes(first.encode())
    assert report.read(tmp_path / "a.json") == first
    differences, alone = report.compare(first, second)
    assert alone == []
    assert differences[0].paired == 6 and differences[0].second == 1.0 and differences[0].low >= 0
    assert differences[1].second - differences[1].first == pytest.approx(-0.1)
    assert differences[1].low == pytest.approx(-0.1) == differences[1].high


def test_other_rows_are_not_compared_as_pairs():
    first, second = evaluation([0, 0], [1.0]), evaluation([0, 1], [1.0])
    task = second.tasks[0]
    moved = tuple(Guess(id="z" + row.id, truth=row.truth, guess=row.guess, guess_per_byte=0) for row in task.rows)
    other = report.msgspec.structs.replace(task, rows=moved)
    differences, alone = report.compare(first, report.msgspec.structs.replace(second, tasks=(other,)))
    assert differences[0].paired == 0 and differences[0].low is None
    assert alone == ["x bits-per-byte"]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"format": 1}', b"\xff\xfe"])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(StateError, match="no evaluation"):
        report.read(tmp_path / "a.json")


def test_another_format_is_refused(tmp_path):
    later = report.msgspec.structs.replace(evaluation([0], [1.0]), format=99)
    (tmp_path / "a.json").write_bytes(later.encode())
    with pytest.raises(StateError, match="format 99"):
        report.read(tmp_path / "a.json")
