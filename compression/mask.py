"""Positions drawn from a seed, so that a sparse message needs no indices.

Method. [0, n) is cut into m = count(n, density) strata, stratum i being [i n // m, (i + 1) n // m). Each gives
one position: a hashed start, moved on by one with every turn, modulo the stratum's width. So positions are
distinct and come sorted, the density is the same everywhere in the vector, and every position has its turn
once in about 1 / density rounds, where chance alone would leave a third of them out of as many. (A mask that
moves on is what CocktailSGD's code does, too; its own has no hash.)

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

    Both ends make it from (n, density, seed, turn), so it costs no bytes; it holds no indices, so it costs no
    memory. Vectors are flat, float32, on the CPU, of `n` elements; values have `count` elements, in increasing
    position.
    """

    def __init__(self, n: int, density: float, seed: int, turn: int = 0) -> None:
        """ValueError for a density outside (0, 1], or 2^31 and more positions or elements per position."""
        self.n = n
        self.count = count(n, density)
        self._rule: tuple[int, int, np.uint64, int, int] | None = None
        if self.count < n:
            width = n // self.count
            if max(self.count, width) >= _MAX_WIDTH:
                raise ValueError(f"a mask of {self.count} of {n} positions is too large; cut the vector into shards")
            key = np.uint64(_mix_int((seed & _WORD) ^ _GOLDEN_INT))
            self._rule = n, self.count, key, turn % width, turn % (width + 1)

    def gather(self, vector: Tensor) -> Tensor:
        """The values at the positions, float32 [count]; with density 1 it may be `vector` itself, not a copy."""
        self._check(vector, self.n, "a vector")
        source = vector.detach().to(torch.float32)
        if self._rule is None:
            return source
        out = torch.empty(self.count)
        _gather(source.contiguous().numpy(), *self._rule, out.numpy())
        return out

    def put(self, vector: Tensor, values: Tensor) -> Tensor:
        """Overwrite the positions of `vector` (float32) with `values` in place, and return it."""
        self._check(vector, self.n, "a vector")
        self._check(values, self.count, "values")
        if vector.dtype != torch.float32:
            raise ValueError(f"a mask writes into float32, not {vector.dtype}")
        target = vector.detach().contiguous()
        source = values.detach().to(torch.float32).contiguous()
        if self._rule is None:
            target.copy_(source)
        else:
            _put(target.numpy(), *self._rule, source.numpy())
        if target.data_ptr() != vector.data_ptr():
            vector.detach().copy_(target)
        return vector

    def indices(self) -> Tensor:
        """The positions themselves, int64 [count]: 8 bytes each, for tests and small vectors."""
        if self._rule is None:
            return torch.arange(self.n)
        out = torch.empty(self.count, dtype=torch.int64)
        _indices(*self._rule, out.numpy())
        return out

    def _check(self, x: Tensor, n: int, what: str) -> None:
        if x.shape != (n,):
            raise ValueError(f"a mask of {self.count} of {self.n} positions was given {what} of shape {tuple(x.shape)}")


@jit
def _mix(z: np.uint64) -> np.uint64:
    """splitmix64's output function; arithmetic wraps."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@jit
def _next(block: np.ndarray, done: int, n: int, m: int, key: np.uint64, narrow: int, wide: int) -> int:
    """Put the positions of strata done, done + 1, ... into `block`; how many.

    `narrow` and `wide`: how far the strata of n // m positions and those of one more have moved on.
    """
    width = n // m
    rest = n - width * m
    edge = done * width + done * rest // m  # done * n // m without its overflow
    carry = done * rest % m
    size = min(block.size, m - done)
    for j in range(size):
        carry += rest
        length, moved = width, narrow
        if carry >= m:
            carry -= m
            length, moved = width + 1, wide
        hashed = _mix(np.uint64(done + j + 1) * _GOLDEN + key) >> _S32
        at = np.int64(hashed * np.uint64(length) >> _S32) + moved
        if at >= length:
            at -= length
        block[j] = edge + at
        edge += length
    return size


@jit
def _gather(vector: np.ndarray, n: int, m: int, key: np.uint64, narrow: int, wide: int, values: np.ndarray) -> None:
    block = np.empty(_BLOCK, np.int64)
    done = 0
    while done < m:
        size = _next(block, done, n, m, key, narrow, wide)
        for j in range(size):
            values[done + j] = vector[np.uint64(block[j])]
        done += size


@jit
def _put(vector: np.ndarray, n: int, m: int, key: np.uint64, narrow: int, wide: int, values: np.ndarray) -> None:
    block = np.empty(_BLOCK, np.int64)
    done = 0
    while done < m:
        size = _next(block, done, n, m, key, narrow, wide)
        for j in range(size):
            vector[np.uint64(block[j])] = values[done + j]
        done += size


@jit
def _indices(n: int, m: int, key: np.uint64, narrow: int, wide: int, out: np.ndarray) -> None:
    done = 0
    while done < m:
        done += _next(out[done : done + _BLOCK], done, n, m, key, narrow, wide)


def _mix_int(z: int) -> int:
    return int(_mix(np.uint64(z)))
