"""Seeded positions: exact number, sorted, distinct, even, and the same everywhere for ever."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.mask import count, seeded_indices


@given(n=st.integers(0, 3000), density=st.floats(1e-6, 1.0), seed=st.integers(-(1 << 70), 1 << 70))
@settings(max_examples=400, deadline=None)
def test_positions_are_sorted_distinct_and_counted(n: int, density: float, seed: int) -> None:
    positions = seeded_indices(n, density, seed)
    assert positions.dtype == torch.int64
    assert positions.shape == (count(n, density),)
    assert (positions.diff() > 0).all()
    if n:
        assert positions[0] >= 0
        assert positions[-1] < n
    assert torch.equal(positions, seeded_indices(n, density, seed))


def test_density_one_is_everything() -> None:
    assert torch.equal(seeded_indices(1000, 1.0, 7), torch.arange(1000))
    assert seeded_indices(0, 0.5, 7).shape == (0,)


@pytest.mark.parametrize("density", [0.1, 0.37, 0.7, 0.95])
def test_every_position_has_the_same_chance(density: float) -> None:
    n, rounds = 211, 4000
    hits = torch.zeros(n)
    for seed in range(rounds):
        hits[seeded_indices(n, density, seed)] += 1
    p = count(n, density) / n
    deviation = (hits - rounds * p) / (rounds * p * (1 - p)) ** 0.5
    assert deviation.abs().max() < 4.5
    assert 0.7 < deviation.square().mean() < 1.3


def test_neighbouring_seeds_overlap_as_chance_has_it() -> None:
    n = 100_000
    a, b = (set(seeded_indices(n, 0.1, seed).tolist()) for seed in (41, 42))
    assert len(a & b) == pytest.approx(1000, abs=150)


@pytest.mark.parametrize(("n", "density"), [(-1, 0.5), (5, 0.0), (5, 1.1), (5, float("nan")), (1 << 33, 0.9)])
def test_impossible_masks_are_refused(n: int, density: float) -> None:
    with pytest.raises(ValueError, match="mask"):
        seeded_indices(n, density, 0)
