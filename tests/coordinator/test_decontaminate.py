from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.coordinator import decontaminate
from potluck.coordinator.decontaminate import Overlap, Protected, overlaps, scan


def by_hand(row: list[int], texts: list[list[int]], n: int) -> list[int]:
    grams = {tuple(text[place : place + n]) for text in texts for place in range(len(text) - n + 1)}
    return [place for place in range(len(row) - n + 1) if tuple(row[place : place + n]) in grams]


TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=5)


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, rows=TEXTS, n=st.integers(1, 5))
def test_it_finds_what_a_set_of_tuples_finds(texts: list[list[int]], rows: list[list[int]], n: int) -> None:
    protected = Protected([np.array(text, np.int64) for text in texts], n)
    for row in rows:
        assert protected.matches(np.array(row, np.uint16)).tolist() == by_hand(row, texts, n)
    covered = {
        (number, place + k) for number, row in enumerate(rows) for place in by_hand(row, texts, n) for k in range(n)
    }
    found = overlaps([np.array(row, np.int64) for row in rows], [np.array(text, np.int64) for text in texts], n)
    assert {(one.row, one.start + k) for one in found for k in range(one.length)} == covered
    assert sum(one.length for one in found) == len(covered)  # none twice


def test_every_planted_overlap_is_found_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 50_000, size=n) for n in random.integers(13, 300, size=100)]
    rows = [random.integers(0, 50_000, size=2049) for _ in range(200)]
    planted = []
    for number in range(0, 200, 2):
        text = texts[number // 2]
        length = int(random.integers(13, len(text) + 1))
        begin = int(random.integers(0, len(text) - length + 1))
        start = int(random.integers(0, 2049 - length + 1))
        rows[number][start : start + length] = text[begin : begin + length]
        planted.append(Overlap(number, start, length))
    report = scan(rows, texts)
    assert report.overlaps == planted
    assert report.texts_found == {place: one.length - 12 for place, one in enumerate(planted)}
    assert (report.rows_found, report.tokens_found) == (100, sum(one.length for one in planted))


def test_twelve_tokens_are_no_overlap_and_texts_do_not_run_together() -> None:
    text, row = np.arange(100, 140), np.arange(1000, 1100)
    row[50:62] = text[:12]
    assert overlaps([row], [text]) == []
    row[62] = text[12]
    assert overlaps([row], [text]) == [Overlap(0, 50, 13)]
    assert overlaps([text], [text[:20], text[20:]]) == [Overlap(0, 0, 40)]  # the two touch
    assert overlaps([text[10:30]], [text[:20], text[20:]]) == []


def test_disjoint_text_has_no_overlap() -> None:
    random = np.random.default_rng(1)
    rows = [random.integers(0, 100, size=2000) for _ in range(50)]
    assert overlaps(rows, [random.integers(100, 200, size=2000) for _ in range(50)]) == []


def test_short_texts_are_counted_not_hidden() -> None:
    report = scan([np.arange(20)], [np.arange(5), np.arange(13), np.zeros(0, int)])
    assert (report.n_texts, report.n_short, report.texts_found) == (3, 2, {1: 1})
    assert report.one_line() == (
        "1 of 1 rows and 13 of 20 tokens repeat 1 of 3 protected texts (13-grams); 2 are too short to be looked for"
    )
    assert scan([], []).overlaps == overlaps([np.arange(50)], []) == []


def test_a_text_that_occurs_twice_is_named_twice() -> None:
    text = np.arange(30)
    assert scan([text, text], [text, np.arange(50, 90), text[5:]]).texts_found == {0: 18, 2: 13}


def test_equal_hashes_of_different_tokens_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "_hashes", lambda tokens, n: np.zeros(len(tokens) - n + 1, np.uint64))
    protected = Protected([np.array([1, 2, 3, 4]), np.array([5, 6])], 2)
    assert protected.matches(np.array([9, 5, 6, 3, 4, 5, 1])).tolist() == [1, 3]
    assert protected.owners(np.array([5, 6])) == {1}


def test_ngrams_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="n-grams of 0"):
        Protected([], 0)
