"""The mean of a round: the same bits in any order, the right value, nothing overflows."""

import itertools
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.mean import weighted_mean
from potluck.compression.sync import Sparse, SyncCodec

Piece = tuple[Sparse, int]


def ulp(largest: float) -> float:
    """The distance of float32 numbers at `largest`."""
    x = torch.tensor(largest)
    inf = torch.tensor(torch.inf)
    return float(x - torch.nextafter(x, -inf)) if largest > 3.4e38 else float(torch.nextafter(x, inf) - x)


def reference(pieces: list[Piece], n: int) -> torch.Tensor:
    total = torch.zeros(n, dtype=torch.float64)
    for sparse, weight in pieces:
        total += sparse.dense(n).double() * weight
    return total / max(1, sum(weight for _, weight in pieces))


def made(n: int, number: int, seed: int, power: float = -6.0, most: int = 1000) -> list[Piece]:
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    pieces = []
    for _ in range(number):
        x = (torch.randn(n, generator=g, dtype=torch.float64) * 10.0**power).clamp(-3.3e38, 3.3e38).float()
        codec = SyncCodec(topk=rng.choice([1.0, 0.3, 0.05]), bits=rng.choice([2, 4, 32]))
        pieces.append((codec.encode(x).sent, rng.randint(0, most)))
    return pieces


@given(
    n=st.integers(0, 300),
    number=st.integers(0, 9),
    seed=st.integers(0, 1 << 30),
    power=st.floats(-44, 38),
    most=st.sampled_from([1, 1000, (1 << 36) - 1, (1 << 40) - 1]),
)
@settings(max_examples=250, deadline=None)
def test_any_order_gives_the_same_bits_and_the_right_value(
    n: int, number: int, seed: int, power: float, most: int
) -> None:
    pieces = made(n, number, seed, power, most)
    mean = weighted_mean(pieces, n)
    assert mean.shape == (n,) and mean.dtype == torch.float32
    for _ in range(3):
        random.Random(seed + 1).shuffle(pieces)
        assert torch.equal(weighted_mean(pieces, n).view(torch.int32), mean.view(torch.int32))
    largest = max((float(s.values.abs().max()) for s, w in pieces if w and s.values.numel()), default=0.0)
    if n:
        assert (mean.double() - reference(pieces, n)).abs().max() <= ulp(largest)


def test_all_permutations_of_values_that_do_not_add_associatively() -> None:
    pieces = [(Sparse(None, torch.tensor([v, -v / 3])), w) for v, w in [(1e8, 3), (1.0, 1), (-1e8, 3), (3e-7, 2)]]
    means = {tuple(weighted_mean(list(order), 2).tolist()) for order in itertools.permutations(pieces)}
    assert len(means) == 1


def test_weights_are_respected() -> None:
    a, b = Sparse(None, torch.tensor([4.0, 8.0])), Sparse(torch.tensor([1]), torch.tensor([-8.0]))
    assert weighted_mean([(a, 3), (b, 1)], 2).tolist() == [3.0, 4.0]
    assert weighted_mean([(a, 1), (b, 0)], 2).tolist() == [4.0, 8.0]
    assert weighted_mean([(a, 0), (b, 0)], 2).tolist() == [0.0, 0.0]
    assert weighted_mean([], 3).tolist() == [0.0, 0.0, 0.0]
    huge = (1 << 40) - 1
    assert weighted_mean([(a, huge), (a, 1)] + [(a, huge)] * 50, 2).tolist() == [4.0, 8.0]


@pytest.mark.parametrize("weight", [1, 7, 12345, (1 << 40) - 1])
def test_one_piece_comes_back(weight: int) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-5
    mean = weighted_mean([(Sparse(None, x), weight)], 1000)
    assert (mean - x).abs().max() <= ulp(float(x.abs().max()))
    if weight == 1:
        assert torch.equal(mean, x)


@pytest.mark.parametrize("values", [[1e-38, -1e-38], [3e38, -3e38], [1e-45, 3.4028235e38], [0.0, -0.0], [1e-45, 0.0]])
def test_extremes(values: list[float]) -> None:
    x = torch.tensor(values)
    for weights in ((1, 1), (1, (1 << 40) - 1), (3, 5)):
        mean = weighted_mean([(Sparse(None, x), w) for w in weights], 2)
        assert (mean.double() - x.double()).abs().max() <= ulp(float(x.abs().max()))
    opposite = weighted_mean([(Sparse(None, x), 9), (Sparse(None, -x), 9)], 2)
    assert (opposite == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    one = Sparse(None, torch.ones(2))
    for weight in (-1, 1 << 40):
        with pytest.raises(ValueError, match="weight"):
            weighted_mean([(one, weight)], 2)
    for piece in (one, Sparse(torch.tensor([0, 1]), torch.ones(3))):
        with pytest.raises(ValueError, match="does not fit"):
            weighted_mean([(piece, 1)], 3)
    for place in (-1, 3):
        with pytest.raises(ValueError, match="outside"):
            weighted_mean([(Sparse(torch.tensor([place]), torch.ones(1)), 1)], 3)
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="infinite or NaN"):
            weighted_mean([(one, 1), (Sparse(None, torch.tensor([1.0, bad])), 1), (one, 1)], 2)
