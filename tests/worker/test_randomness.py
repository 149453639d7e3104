from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.worker.randomness import Random

KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 9))


class Scripted(Random):
    """Says these words, then fails."""

    def __init__(self, words: list[int]) -> None:
        self.script = np.array(words, np.uint64)

    def words(self, n: int) -> np.ndarray:
        said, self.script = self.script[:n], self.script[n:]
        assert len(said) == n
        return said


def chi2(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def test_golden_values_hold_on_every_platform() -> None:
    """A run's samples: if these change, every run in progress trains on other samples."""
    random = Random((42, 0, 7))
    assert [random.word() for _ in range(3)] == [7367127870087529206, 2845446080666183064, 11772606071939655269]
    assert [random.below(1000) for _ in range(5)] == [519, 501, 340, 232, 323]
    assert [random.uniform() for _ in range(2)] == [0.39595544423176254, 0.07989531956299045]
    assert [random.choose((0.5, 0.25, 0.25)) for _ in range(8)] == [2, 2, 2, 0, 2, 0, 0, 1]
    assert random.split(100, 6).tolist() == [2, 14, 23, 23, 16, 22]


@settings(max_examples=20, deadline=None)
@given(key=KEYS, sizes=st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_the_stream_does_not_depend_on_how_much_is_taken_at_once(key: tuple[int, ...], sizes: list[int]) -> None:
    one, other = Random(key), Random(key)
    together = one.words(sum(sizes))
    assert np.array_equal(together, np.concatenate([other.words(size) for size in sizes]))


def test_every_key_has_a_stream_of_its_own() -> None:
    keys = [*product(range(4), repeat=2), *product(range(4), repeat=3), (), (0,), (2**64 - 1,)]
    assert len({Random(key).word() for key in keys}) == len(keys)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_below_is_uniform(n: int) -> None:
    random = Random((n,))
    counts = Counter(random.below(n) for _ in range(7000))
    assert set(counts) == set(range(n))
    assert chi2(list(counts.values()), 7000 / n) < 28  # 9 d.f., p = 0.001


def test_below_refuses_the_incomplete_multiple() -> None:
    assert Scripted([2**64 - 1, 5]).below(3) == 2  # 2**64 = 3 * k + 1: the last word is one too many
    assert Scripted([2**64 - 2]).below(3) == (2**64 - 2) % 3
    assert Scripted([2**64 - 1]).below(2**64) == 2**64 - 1
    for n in (0, -1, 2**64 + 1):
        with pytest.raises(ValueError, match="no number below"):
            Random(()).below(n)


def test_uniform_reaches_zero_but_not_one() -> None:
    assert Scripted([0]).uniform() == 0.0
    assert Scripted([2**64 - 1]).uniform() == 1 - 2**-53


def test_choose_follows_the_weights_and_never_takes_a_zero() -> None:
    random = Random((5,))
    counts = Counter(random.choose((0.0, 3.0, 1.0, 0.0)) for _ in range(8000))
    assert set(counts) == {1, 2}
    assert abs(counts[1] - 6000) < 4 * math.sqrt(8000 * 0.75 * 0.25)
    assert Scripted([2**64 - 1]).choose((0.1,) * 10 + (0.0,)) == 9


def test_every_composition_is_equally_likely() -> None:
    random = Random((1, 2))
    counts = Counter(tuple(random.split(6, 3).tolist()) for _ in range(10_000))
    assert set(counts) == {parts for parts in product(range(1, 5), repeat=3) if sum(parts) == 6}
    assert chi2(list(counts.values()), 1000) < 27.9  # 9 d.f., p = 0.001


@settings(max_examples=50, deadline=None)
@given(key=KEYS, total=st.integers(1, 3000), data=st.data())
def test_parts_are_not_empty_and_sum_up(key: tuple[int, ...], total: int, data: st.DataObject) -> None:
    n_parts = data.draw(st.integers(1, total))
    parts = Random(key).split(total, n_parts)
    assert len(parts) == n_parts and parts.min() >= 1 and parts.sum() == total


def test_equal_words_still_make_the_right_number_of_parts() -> None:
    assert Scripted([7, 7, 7, 7, 7]).split(6, 3).tolist() == [1, 1, 4]
    assert Scripted([9, 7, 1, 7, 7]).split(6, 4).tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize(("total", "parts"), [(3, 4), (3, 0), (0, 1)])
def test_what_cannot_be_split_is_refused(total: int, parts: int) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        Random(()).split(total, parts)
