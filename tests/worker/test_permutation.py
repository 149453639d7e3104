from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.worker.permutation import epoch_key, mix64, permute

KEYS = st.integers(min_value=0, max_value=(1 << 64) - 1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(min_value=1, max_value=5000), key=KEYS)
def test_it_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(position, n, key) for position in range(n)) == list(range(n))


@pytest.mark.parametrize("n", range(1, 70))
def test_small_sets_are_permuted_too(n: int) -> None:
    assert sorted(permute(position, n, 7) for position in range(n)) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(min_value=1, max_value=1 << 60), key=KEYS, data=st.data())
def test_it_stays_inside_large_sets(n: int, key: int, data: st.DataObject) -> None:
    assert 0 <= permute(data.draw(st.integers(min_value=0, max_value=n - 1)), n, key) < n


def test_golden_values_hold_on_every_platform() -> None:
    """A run's data order: if these change, every run in progress trains on other samples."""
    assert mix64(0) == 0xE220A8397B1DCDAF  # the first output of the published splitmix64 with seed 0
    assert (epoch_key(0, 0), epoch_key(7, 3)) == (12035550249420947055, 17670481865470212032)
    assert [permute(position, 10, 0) for position in range(10)] == [8, 5, 0, 4, 7, 3, 1, 6, 9, 2]
    assert [permute(position, 17, 1) for position in range(5)] == [9, 8, 3, 1, 7]
    assert [permute(position, 10**6, 42) for position in (0, 1, 999_999)] == [782562, 148651, 836373]
    n = (1 << 40) + 1
    assert [permute(position, n, (1 << 63) + 5) for position in (0, n - 1)] == [790709317416, 1080260308136]


def test_every_order_of_a_small_set_is_about_as_likely() -> None:
    n_epochs = 4800
    orders = Counter(
        tuple(permute(position, 4, epoch_key(0, epoch)) for position in range(4)) for epoch in range(n_epochs)
    )
    assert len(orders) == 24
    expected = n_epochs / 24
    assert sum((count - expected) ** 2 / expected for count in orders.values()) < 49.7  # chi2, 23 d.f., p = 0.001


@pytest.mark.parametrize(("position", "n"), [(-1, 3), (3, 3), (0, 0)])
def test_a_position_outside_is_refused(position: int, n: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        permute(position, n, 0)
