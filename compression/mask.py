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

from .jit import jit

_WORD = (1 << 64) - 1
_GOLDEN_INT = 0x9E3779B97F4A7C15
_GOLDEN = np.uint64(_GOLDEN_INT)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_MAX_WIDTH = 1 << 31
_BLOCK = 2048  # positions made at a time: they stay in a core's first cache


def count(n: int, density: float) -> int:
    """How many of `n` positions a mask selects: the nearest whole number, at least one if n > 0."""
    if n < 0 or not 0.0 < density <= 1.0:
        raise ValueError(f"a mask needs n >= 0 and a density in (0, 1], not n={n}, density={density}")
    return min(n, max(1, round(n * density)))


class Mask:
    """`count` sorted distinct positions of a vector of `n` elements, the same on every machine.

    Both ends make it from (n, density, seed), so it costs no bytes; it holds no indices, so it costs no memory.
    Vectors are flat, float32, on the CPU, of `n` elements; values have `count` elements, in increasing position.
    """

    def __init__(self, n: int, density: float, seed: int) -> None:
        """ValueError for a density outside (0, 1], or 2^31 and more positions or elements per position."""
        self.n = n
        self.count = count(n, density)
        self._turn: tuple[np.uint64, int, int] | None = None
        if self.count < n:
            if max(self.count, n // self.count) >= _MAX_WIDTH:
                raise ValueError(f"a mask of {self.count} of {n} positions is too large; cut the vector into shards")
            key = _mix_int((seed & _WORD) ^ _GOLDEN_INT)
            offset = _mix_int(key) % n
            self._turn = np.uint64(key), offset, _first(n, self.count, np.uint64(key), offset)

    def gather(self, vector: Tensor) -> Tensor:
        """The values at the positions, float32 [count]; with density 1 it may be `vector` itself, not a copy."""
        self._check(vector, self.n, "a vector")
        source = vector.detach().to(torch.float32)
        if self._turn is None:
            return source
        out = torch.empty(self.count)
        _gather(source.contiguous().numpy(), self.n, self.count, *self._turn, out.numpy())
        return out

    def add_to(self, vector: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
        """Add `scale` times `values` at the positions of `vector` in place, and return it."""
        self._check_pair(vector, values)
        if self._turn is None:
            vector.detach().add_(values, alpha=scale)
            return vector
        return self._write(_add, vector, values, np.float32(scale))

    def put(self, vector: Tensor, values: Tensor) -> Tensor:
        """Overwrite the positions of `vector` with `values` in place, and return it."""
        self._check_pair(vector, values)
        if self._turn is None:
            vector.detach().copy_(values)
            return vector
        return self._write(_put, vector, values, np.float32(1.0))

    def indices(self) -> Tensor:
        """The positions themselves, int64 [count]: 8 bytes each, for tests and small vectors."""
        if self._turn is None:
            return torch.arange(self.n)
        out = torch.empty(self.count, dtype=torch.int64)
        _indices(self.n, self.count, *self._turn, out.numpy())
        return out

    def _write(self, kernel: object, vector: Tensor, values: Tensor, scale: np.float32) -> Tensor:
        assert callable(kernel) and self._turn is not None
        target = vector.detach().contiguous()
        source = values.detach().to(torch.float32).contiguous()
        kernel(target.numpy(), self.n, self.count, *self._turn, source.numpy(), scale)
        if target.data_ptr() != vector.data_ptr():
            vector.detach().copy_(target)
        return vector

    def _check_pair(self, vector: Tensor, values: Tensor) -> None:
        self._check(vector, self.n, "a vector")
        self._check(values, self.count, "values")
        if vector.dtype != torch.float32:
            raise ValueError(f"a mask writes into float32, not {vector.dtype}")

    def _check(self, x: Tensor, n: int, what: str) -> None:
        if x.shape != (n,):
            raise ValueError(f"a mask of {self.count} of {self.n} positions was given {what} of shape {tuple(x.shape)}")


def seeded_indices(n: int, density: float, seed: int) -> Tensor:
    """The positions of `Mask(n, density, seed)`, int64 [count(n, density)]."""
    return Mask(n, density, seed).indices()


@jit
def _mix(z: np.uint64) -> np.uint64:
    """splitmix64's output function; arithmetic wraps."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@jit
def _fill(out: np.ndarray, size: int, i: int, n: int, m: int, key: np.uint64) -> None:
    """Positions of strata i .. i + size, not turned yet."""
    width = n // m
    rest = n - width * m
    edge = i * width + i * rest // m  # i * n // m without its overflow
    carry = i * rest % m
    for j in range(size):
        carry += rest
        wide = carry >= m
        if wide:
            carry -= m
        stop = edge + width + int(wide)
        hashed = _mix(np.uint64(i + j + 1) * _GOLDEN + key) >> _S32
        out[j] = edge + np.int64(hashed * np.uint64(stop - edge) >> _S32)
        edge = stop


@jit
def _first(n: int, m: int, key: np.uint64, offset: int) -> int:
    """The stratum whose position comes first once all are turned by `offset` modulo n."""
    one = np.empty(1, np.int64)
    low, high = 0, m
    while low < high:
        middle = (low + high) // 2
        _fill(one, 1, middle, n, m, key)
        if one[0] + offset < n:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _next(block: np.ndarray, done: int, n: int, m: int, key: np.uint64, offset: int, first: int) -> int:
    """Put positions done, done + 1, ... into `block`; how many."""
    i = first + done
    shift = offset - n
    if i >= m:
        i -= m
        shift = offset
    size = min(block.size, m - i, m - done)
    _fill(block, size, i, n, m, key)
    for j in range(size):
        block[j] += shift
    return size


@jit
def _gather(vector: np.ndarray, n: int, m: int, key: np.uint64, offset: int, first: int, values: np.ndarray) -> None:
    block = np.empty(_BLOCK, np.int64)
    done = 0
    while done < m:
        size = _next(block, done, n, m, key, offset, first)
        for j in range(size):
            values[done + j] = vector[np.uint64(block[j])]
        done += size


@jit
def _add(
    vector: np.ndarray,
    n: int,
    m: int,
    key: np.uint64,
    offset: int,
    first: int,
    values: np.ndarray,
    scale: np.float32,
) -> None:
    block = np.empty(_BLOCK, np.int64)
    done = 0
    while done < m:
        size = _next(block, done, n, m, key, offset, first)
        for j in range(size):
            vector[np.uint64(block[j])] += scale * values[done + j]
        done += size


@jit
def _put(
    vector: np.ndarray,
    n: int,
    m: int,
    key: np.uint64,
    offset: int,
    first: int,
    values: np.ndarray,
    scale: np.float32,
) -> None:
    block = np.empty(_BLOCK, np.int64)
    done = 0
    while done < m:
        size = _next(block, done, n, m, key, offset, first)
        for j in range(size):
            vector[np.uint64(block[j])] = values[done + j]
        done += size


@jit
def _indices(n: int, m: int, key: np.uint64, offset: int, first: int, out: np.ndarray) -> None:
    done = 0
    while done < m:
        done += _next(out[done : done + _BLOCK], done, n, m, key, offset, first)


def _mix_int(z: int) -> int:
    return int(_mix(np.uint64(z)))
