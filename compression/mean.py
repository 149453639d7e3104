"""The weighted mean of pieces, whose bits depend neither on their order nor on the machine.

Floats do not add associatively, integers do. All values become whole multiples of one power of two, chosen so
that no sum of theirs can leave 64 bits; the choice needs only the largest magnitude and the total weight, which
do not depend on the order either.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .jit import jit
from .sync import Sparse

MAX_WEIGHT = 1 << 40
_WEIGHT_BITS = 36  # larger totals are rounded to this, which leaves 26 bits for the values, 2 more than float32's


def weighted_mean(pieces: Sequence[tuple[Sparse, int]], n: int) -> Tensor:
    """sum(weight * piece) / sum(weight), float32 [n]; where a piece has no value it counts as zero.

    The same bits for any order of the pieces, on every platform. Error: at most 1 ulp of the largest magnitude
    among the pieces (1/4 before the last rounding to float32), with up to 500 pieces; of a single piece of weight
    1, values above 2^-37 of the largest come back exactly. Pieces of weight zero do not matter; if all weights
    are zero, so is the mean.
    Memory: 8 bytes per element. ValueError for weights outside [0, 2^40), values that are not finite, and
    pieces that do not fit `n`.
    """
    for sparse, weight in pieces:
        if not 0 <= weight < MAX_WEIGHT:
            raise ValueError(f"a weight is a whole number from 0 to {MAX_WEIGHT - 1}, not {weight}")
        size = n if sparse.indices is None else sparse.indices.numel()
        if sparse.values.shape != (size,):
            raise ValueError(f"a piece of {sparse.values.numel()} values does not fit {size} positions")
    total = sum(weight for _, weight in pieces)
    cut = max(0, total.bit_length() - _WEIGHT_BITS)
    parts = [(sparse, (weight + (1 << cut >> 1)) >> cut) for sparse, weight in pieces]
    parts = [(sparse, weight) for sparse, weight in parts if weight and sparse.values.numel()]
    total = sum((weight + (1 << cut >> 1)) >> cut for _, weight in pieces)
    magnitudes = [_magnitude(sparse.values) for sparse, _ in parts]
    if not all(map(math.isfinite, magnitudes)):
        raise ValueError("a piece has infinite or NaN values")
    largest = max(magnitudes, default=0.0)
    if largest == 0.0:
        return torch.zeros(n)
    power = 62 - total.bit_length() - math.frexp(largest)[1]
    unit = math.ldexp(1.0, power)  # units in 1: values scaled by it stay within 2^62 / total
    sums = np.zeros(n, np.int64)
    for sparse, weight in parts:
        values = sparse.values.detach().to(torch.float32).contiguous().numpy()
        if sparse.indices is None:
            _add_all(sums, values, unit, weight)
        elif not _add_at(sums, sparse.indices.contiguous().numpy(), values, unit, weight):
            raise ValueError(f"a piece has positions outside of {n}")
    mean = torch.empty(n)
    _divide(sums, float(total), 1.0 / unit, mean.numpy())
    return mean


def _magnitude(values: Tensor) -> float:
    low, high = torch.aminmax(values.detach())  # `abs` would make a copy
    return max(-float(low), float(high))


@jit
def _add_all(sums: np.ndarray, values: np.ndarray, unit: float, weight: int) -> None:
    for i in range(sums.size):
        sums[i] += np.int64(np.rint(np.float64(values[i]) * unit)) * weight


@jit
def _add_at(sums: np.ndarray, indices: np.ndarray, values: np.ndarray, unit: float, weight: int) -> bool:
    for j in range(indices.size):
        i = indices[j]
        if i < 0 or i >= sums.size:
            return False
        sums[i] += np.int64(np.rint(np.float64(values[j]) * unit)) * weight
    return True


@jit
def _divide(sums: np.ndarray, total: float, size: float, mean: np.ndarray) -> None:
    for i in range(sums.size):
        mean[i] = np.float32(np.float64(sums[i]) / total * size)
