"""Values that top-k left, in a sign and one of one or two levels.

None of them is near zero, so a grid around zero wastes its codes, and the magnitudes of a bucket lie to the right
of a sharp edge, many near it and few far out. A bucket has its mean magnitude as a float32. One bit is a sign before
that mean; two bits are a sign and one of two ratios to the mean, float32, which all buckets of a message share. Mean
squared error over mean square, buckets of 256, chunks of 4096:

                               N(0,1): top 3 %   top 20 %   Laplace: top 3 %   top 20 %
    1 bit                            0.016         0.052            0.047        0.128
    2 bits                           0.0055        0.017            0.016        0.045
    the signed grid, 3 bits          0.014         0.016            0.018        0.029
    the signed grid, 4 bits          0.0033        0.0049           0.0056       0.010

The two ratios are the best there are for the histogram of magnitude over mean. It is counted in whole numbers, and
the mean is a float64 sum in the order of the values, so that equal values make equal bytes on every machine.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .codec import CodecError, from_bytes, to_bytes
from .grid import pack_codes, packed_nbytes
from .jit import jit
from .values import unpacked

SIGN_BITS = (1, 2)
_UNIT = 1 << 20  # of a ratio; the sum of 2^31 ratios, whose mean is about 1, fits int64 in it
_BIN = 12  # bits of a ratio below its bin: 256 bins between 0 and 1
_BINS = 4096  # the last one holds all ratios from 16 on
_INFINITE = 0x7F800000  # float32s whose bits are whole numbers from 0 to below this are finite and not negative
_LARGEST = np.finfo(np.float32).max  # a level saturates here


@dataclass(frozen=True)
class Signs:
    """Sign and level of each value. Bytes: the ratios (two bits only), the mean of each bucket, packed codes."""

    bits: int
    bucket: int

    def nbytes(self, m: int) -> int:
        """The exact length for `m` values."""
        return self._head(m) + packed_nbytes(m, self.bits)

    def encode(self, x: Tensor) -> tuple[bytes, Tensor]:
        """The bytes of float32 [m], and what they decode to; CodecError if an element is not finite."""
        m = x.numel()
        means = np.empty(self._buckets(m), np.float32)
        counts, sums = np.zeros((2, _BINS if self.bits == 2 else 0), np.int64)
        if not _measure(x.numpy(), self.bucket, means, counts, sums):
            raise CodecError("the weight difference has infinite or NaN elements")
        ratios = _best_ratios(counts, sums) if self.bits == 2 else np.ones(1, np.float32)
        codes, sent = torch.empty(m, dtype=torch.uint8), torch.empty(m)
        _choose(x.numpy(), self.bucket, means, ratios, codes.numpy())
        _restore(codes.numpy(), self.bucket, means, ratios, sent.numpy())
        head = np.concatenate([ratios, means]) if self.bits == 2 and m else means
        return to_bytes(torch.from_numpy(head)) + to_bytes(pack_codes(codes.view(1, m), self.bits)), sent

    def decode(self, view: memoryview, m: int) -> Tensor:
        """The `m` values of `nbytes(m)` bytes; CodecError for bytes that `encode` does not make."""
        cut = self._head(m)
        head = from_bytes(view[:cut], torch.float32)
        bits = head.view(torch.int32)
        if not ((bits >= 0) & (bits < _INFINITE)).all():
            raise CodecError("a mean magnitude or a ratio in the payload is negative or not finite")
        ratios, means = np.ones(1, np.float32), head.numpy()
        if self.bits == 2 and m:
            ratios, means = means[:2], means[2:]
            if ratios[0] > ratios[1]:
                raise CodecError("the ratios in the payload do not rise")
        codes = unpacked(view[cut:], self.bits, m)
        values = torch.empty(m)
        _restore(codes.numpy(), self.bucket, means, ratios, values.numpy())
        return values

    def _buckets(self, m: int) -> int:
        return -(-m // self.bucket)

    def _head(self, m: int) -> int:
        return 4 * self._buckets(m) + (8 if self.bits == 2 and m else 0)


def _best_ratios(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The two ratios of least squared error for a histogram of ratios: the means on both sides of the best cut.

    All cuts between bins are tried, so nothing depends on where an iteration starts. Float64 holds the sums
    exactly, and each cut is weighed by itself.
    """
    if not counts.any():  # no bucket has a magnitude
        return np.ones(2, np.float32)
    n_low, low = np.cumsum(counts), np.cumsum(sums).astype(np.float64)
    n_high, high = n_low[-1] - n_low, low[-1] - low
    explained = low * low / np.maximum(n_low, 1) + high * high / np.maximum(n_high, 1)
    cut = int(explained.argmax())
    sides = [(s[cut], n[cut]) for s, n in ((low, n_low), (high, n_high)) if n[cut]]
    ratios = [s / n / _UNIT for s, n in sides]
    return np.array([ratios[0], ratios[-1]], np.float32)


@jit
def _measure(x: np.ndarray, bucket: int, means: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> bool:
    """Mean magnitudes of the buckets of `x`, and (unless empty) count and sum of the ratios in each bin.

    False if a value is not finite.
    """
    for b in range(means.size):
        start, stop = b * bucket, min((b + 1) * bucket, x.size)
        total = 0.0
        for i in range(start, stop):
            total += abs(np.float64(x[i]))
        if not total < np.inf:
            return False
        means[b] = total / (stop - start)
        if counts.size and means[b] > 0:
            scale = _UNIT / np.float64(means[b])
            for i in range(start, stop):
                ratio = int(abs(np.float64(x[i])) * scale + 0.5)
                at = min(ratio >> _BIN, _BINS - 1)
                counts[at] += 1
                sums[at] += ratio
    return True


@jit
def _choose(x: np.ndarray, bucket: int, means: np.ndarray, ratios: np.ndarray, codes: np.ndarray) -> None:
    """The code of each value: bit 0 is set for a negative one, bit 1 (two ratios only) if the upper level is nearer."""
    for b in range(means.size):
        middle = np.inf
        if ratios.size == 2:
            low, high = _level(means[b], ratios[0]), _level(means[b], ratios[1])
            middle = (np.float64(low) + np.float64(high)) / 2
        for i in range(b * bucket, min((b + 1) * bucket, x.size)):
            codes[i] = np.uint8(x[i] < 0) | np.uint8(abs(np.float64(x[i])) > middle) << np.uint8(1)


@jit
def _restore(codes: np.ndarray, bucket: int, means: np.ndarray, ratios: np.ndarray, values: np.ndarray) -> None:
    """The values of codes; always finite."""
    for b in range(means.size):
        low, high = _level(means[b], ratios[0]), _level(means[b], ratios[-1])
        for i in range(b * bucket, min((b + 1) * bucket, codes.size)):
            level = high if codes[i] & np.uint8(2) else low
            values[i] = -level if codes[i] & np.uint8(1) else level


@jit
def _level(mean: np.float32, ratio: np.float32) -> np.float32:
    return np.float32(min(np.float64(mean) * np.float64(ratio), np.float64(_LARGEST)))
