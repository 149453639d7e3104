"""Positions drawn from a seed, so that a sparse message needs no indices.

Method. [0, n) is cut into m = count(n, density) strata, stratum i being [i n // m, (i + 1) n // m). One
position is hashed into each stratum, and the whole pattern is turned by a hashed offset modulo n; without the
turn, strata of different widths would favour the same positions in every round. So every position has chance
m / n over the seeds, the density is the same everywhere in the vector, and positions are distinct and come
sorted.

The hash is the output function of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, OOPSLA 2014) over a counter, in integers only: no library's random generator, whose streams change
between versions and devices.
"""

import numpy as np
import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MAX_WIDTH = 1 << 31


def count(n: int, density: float) -> int:
    """How many of `n` positions a mask selects: the nearest whole number, at least one if n > 0."""
    if n < 0 or not 0.0 < density <= 1.0:
        raise ValueError(f"a mask needs n >= 0 and a density in (0, 1], not n={n}, density={density}")
    return min(n, max(1, round(n * density)))


def seeded_indices(n: int, density: float, seed: int) -> Tensor:
    """Sorted distinct positions, int64 [count(n, density)], the same on every machine."""
    m = count(n, density)
    if m == n:
        return torch.arange(n)
    width, rest = divmod(n, m)
    if max(m, width) >= _MAX_WIDTH:
        raise ValueError(f"a mask of {m} out of {n} positions is too large; cut the vector into shards")
    key = _mix_int((seed & _WORD) ^ _GOLDEN)
    offset = _mix_int(key) % n
    i = np.arange(m + 1, dtype=np.uint64)
    edges = i * np.uint64(width) + i * np.uint64(rest) // np.uint64(m)  # i * n // m without its overflow
    hashed = _mix(i[1:] * np.uint64(_GOLDEN) + np.uint64(key)) >> np.uint64(32)
    positions = edges[:-1] + (hashed * np.diff(edges) >> np.uint64(32)) + np.uint64(offset)
    wrapped = int(np.searchsorted(positions, np.uint64(n)))
    turned = np.concatenate([positions[wrapped:] - np.uint64(n), positions[:wrapped]])
    return torch.from_numpy(turned.astype(np.int64))


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's output function on uint64; arithmetic wraps."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    return int(_mix(np.array([z], dtype=np.uint64))[0])
