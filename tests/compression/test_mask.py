"""Seeded positions: exact number, sorted, distinct, even, and the same everywhere for ever."""

from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.jit import jit
from potluck.compression.mask import Mask, count


@given(n=st.integers(0, 9000), density=st.floats(1e-6, 1.0), seed=st.integers(-(1 << 70), 1 << 70))
@settings(max_examples=250, deadline=None)
def test_positions_are_sorted_distinct_and_counted(n: int, density: float, seed: int) -> None:
    positions = Mask(n, density, seed).indices()
    assert positions.dtype == torch.int64
    assert positions.shape == (count(n, density),)
    assert (positions.diff() > 0).all()
    if n:
        assert positions[0] >= 0
        assert positions[-1] < n
    assert torch.equal(positions, Mask(n, density, seed).indices())


def by_definition(n: int, m: int, seed: int, turn: int) -> list[int]:
    """The module's docstring in Python's unbounded integers."""
    word, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    key = mix((seed & word) ^ golden)
    edges = [i * n // m for i in range(m + 1)]
    hashes = [mix((i + 1) * golden + key & word) >> 32 for i in range(m)]
    return [a + ((h * (b - a) >> 32) + turn) % (b - a) for a, b, h in zip(edges, edges[1:], hashes, strict=False)]


@given(
    n=st.integers(1, 6000) | st.integers(1, 1 << 41),
    m=st.integers(1, 5000),
    seed=st.integers(0, 1 << 64),
    turn=st.integers(0, 1 << 40),
)
@settings(max_examples=100, deadline=None)
def test_positions_are_those_of_the_definition(n: int, m: int, seed: int, turn: int) -> None:
    density = min(1.0, m / n)
    m = count(n, density)
    if n // m < 1 << 31:
        wanted = by_definition(n, m, seed, turn) if m < n else list(range(n))
        assert Mask(n, density, seed, turn).indices().tolist() == wanted


@given(n=st.integers(0, 6000), density=st.floats(1e-3, 1.0), seed=st.integers(0, 1 << 64), stride=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_a_mask_reads_and_writes_where_its_indices_say(n: int, density: float, seed: int, stride: int) -> None:
    mask, where = Mask(n, density, seed), Mask(n, density, seed).indices()
    assert torch.equal(mask.indices(), where)
    assert mask.count == where.numel()
    vector = torch.randn(n * stride, generator=torch.Generator().manual_seed(n))[::stride]
    values = torch.randn(mask.count * stride, generator=torch.Generator().manual_seed(n + 1))[::stride]
    before = vector.clone()
    assert torch.equal(mask.gather(vector), vector[where])
    assert mask.put(vector, values) is vector
    assert torch.equal(vector, before.index_copy(0, where, values))


def test_a_parameter_can_be_masked() -> None:
    weights = torch.nn.Parameter(torch.arange(10.0))
    mask = Mask(10, 0.5, 3)
    part = mask.gather(weights)
    assert not part.requires_grad
    mask.put(weights, torch.zeros_like(part))
    assert weights.detach()[mask.indices()].tolist() == [0.0] * 5
    assert weights.detach().sum() == 45 - part.sum()


def test_density_one_is_everything_without_a_copy() -> None:
    vector = torch.randn(1000)
    assert torch.equal(Mask(1000, 1.0, 7).indices(), torch.arange(1000))
    assert Mask(1000, 1.0, 7).gather(vector).data_ptr() == vector.data_ptr()
    assert Mask(0, 0.5, 7).indices().shape == (0,)


@pytest.mark.parametrize("density", [0.1, 0.37, 0.7, 0.95])
def test_the_seed_gives_every_position_of_a_stratum_the_same_chance(density: float) -> None:
    n, rounds = 211, 4000
    m = count(n, density)
    hits = torch.zeros(n)
    for seed in range(rounds):
        hits[Mask(n, density, seed).indices()] += 1
    edges = [i * n // m for i in range(m + 1)]
    p = torch.cat([torch.full((b - a,), 1 / (b - a)) for a, b in pairwise(edges)])
    assert torch.equal(hits[p == 1], torch.full_like(hits[p == 1], rounds))
    free = p < 1
    deviation = (hits - rounds * p)[free] / (rounds * p * (1 - p))[free] ** 0.5
    assert deviation.abs().max() < 4.5
    assert 0.7 < deviation.square().mean() < 1.3


@pytest.mark.parametrize(("n", "density"), [(1000, 0.1), (997, 0.1), (500, 0.37), (100, 0.9), (64, 0.02)])
def test_every_position_has_its_turn_in_as_many_rounds_as_a_stratum_is_wide(n: int, density: float) -> None:
    width = -(-n // count(n, density))
    turns = [Mask(n, density, 5, turn).indices() for turn in range(7, 7 + width)]
    assert torch.cat(turns).unique().numel() == n
    assert not torch.equal(turns[0], turns[1])


def test_neighbouring_seeds_overlap_as_chance_has_it() -> None:
    n = 100_000
    a, b = (set(Mask(n, 0.1, seed).indices().tolist()) for seed in (41, 42))
    assert len(a & b) == pytest.approx(1000, abs=150)


@pytest.mark.parametrize(("n", "density"), [(-1, 0.5), (5, 0.0), (5, 1.1), (5, float("nan")), (1 << 33, 0.9)])
def test_impossible_masks_are_refused(n: int, density: float) -> None:
    with pytest.raises(ValueError, match="mask"):
        Mask(n, density, 0)


def test_tensors_of_other_sizes_are_refused() -> None:
    mask = Mask(10, 0.5, 0)
    with pytest.raises(ValueError, match="vector"):
        mask.gather(torch.zeros(11))
    with pytest.raises(ValueError, match="vector"):
        mask.put(torch.zeros(10, 1), torch.zeros(5))
    with pytest.raises(ValueError, match="values"):
        mask.put(torch.zeros(10), torch.zeros(6))
    with pytest.raises(ValueError, match="float32"):
        mask.put(torch.zeros(10, dtype=torch.float64), torch.zeros(5))


def test_loops_are_compiled_where_nothing_can_be_cached() -> None:
    made: dict[str, Callable[[int], int]] = {}
    exec("def double(x):\n    return 2 * x", made)  # of no file, so there is no folder for its cache
    assert jit(made["double"])(21) == 42
