"""Loops of :mod:`.positions`. Bits fill bytes from the low end; readers trust nothing but the array sizes.

A reader returns False for a stream that is too short, too long, or padded with anything but zeros; whether the
positions make sense is for `fits`.
"""

import numpy as np

from .jit import jit

_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


@jit
def fits(positions: np.ndarray, n: int, chunk: int, each: int) -> bool:
    """Whether positions increase, are below n, and lie `each` in a chunk."""
    before = -1
    start, left, j = 0, each, 0
    while j < positions.size:
        if left == 0:
            start, left = start + chunk, each
        stop = min(start + chunk, n)
        size = min(left, positions.size - j)
        for i in range(j, j + size):
            if positions[i] <= before or positions[i] < start or positions[i] >= stop:
                return False
            before = positions[i]
        j += size
        left = 0
    return True


@jit
def write_bitmap(positions: np.ndarray, out: np.ndarray) -> None:
    for p in positions:
        out[p >> 3] |= np.uint8(1 << (p & 7))


@jit
def read_bitmap(data: np.ndarray, out: np.ndarray) -> bool:
    found = 0
    for i in range(data.size):
        byte = data[i]
        base = 8 * i
        while byte:
            if byte & 1:
                if found == out.size:
                    return False
                out[found] = base
                found += 1
            byte >>= 1
            base += 1
    return found == out.size


@jit
def spill(acc: np.uint64, filled: int, place: int, out: np.ndarray) -> tuple[np.uint64, int, int]:
    """Write the whole bytes among the `filled` low bits of `acc`; what is left of the three."""
    while filled >= 8:
        out[place] = np.uint8(acc & np.uint64(255))
        place += 1
        acc >>= np.uint64(8)
        filled -= 8
    return acc, filled, place


@jit
def write_indices(positions: np.ndarray, chunk: int, width: int, out: np.ndarray) -> None:
    acc, filled, place = np.uint64(0), 0, 0
    start = 0
    for p in positions:
        while p - start >= chunk:
            start += chunk
        acc |= np.uint64(p - start) << np.uint64(filled)
        filled += width
        acc, filled, place = spill(acc, filled, place, out)
    if filled:
        out[place] = np.uint8(acc)


@jit
def read_indices(data: np.ndarray, chunk: int, each: int, width: int, out: np.ndarray) -> bool:
    acc, filled, place = np.uint64(0), 0, 0
    mask = (_ONE << np.uint64(width)) - _ONE
    start, left = 0, each
    for j in range(out.size):
        if left == 0:
            start, left = start + chunk, each
        left -= 1
        while filled < width:
            if place == data.size:
                return False
            acc |= np.uint64(data[place]) << np.uint64(filled)
            place += 1
            filled += 8
        out[j] = start + np.int64(acc & mask)
        acc >>= np.uint64(width)
        filled -= width
    return place == data.size and acc == 0


@jit
def golomb_bits(positions: np.ndarray, m: int) -> int:
    """The length of the stream that `write_golomb` makes."""
    width = _width(m)
    short = (1 << width) - m  # remainders below this take a bit less
    bits = positions.size * (1 + width)
    before = -1
    for p in positions:
        gap = np.uint64(p - before - 1)
        quotient = np.int64(gap // np.uint64(m))
        bits += quotient - np.int64(np.int64(gap) - quotient * m < short)
        before = p
    return bits


@jit
def _width(m: int) -> int:
    width = 0
    while (1 << width) < m:
        width += 1
    return width


@jit
def write_golomb(positions: np.ndarray, m: int, out: np.ndarray) -> None:
    width = _width(m)
    short = (1 << width) - m
    acc, filled, place = np.uint64(0), np.int64(0), 0
    before = -1
    for p in positions:
        gap = p - before - 1
        before = p
        quotient = np.int64(np.uint64(gap) // np.uint64(m))
        rest = gap - quotient * m
        while quotient >= 24:  # a one per quotient, ended by a zero
            acc |= np.uint64(0xFFFFFF) << np.uint64(filled)
            acc, filled, place = spill(acc, filled + 24, place, out)
            quotient -= 24
        acc |= ((_ONE << np.uint64(quotient)) - _ONE) << np.uint64(filled)
        acc, filled, place = spill(acc, filled + quotient + 1, place, out)
        if width and rest < short:
            acc |= np.uint64(rest) << np.uint64(filled)
            acc, filled, place = spill(acc, filled + width - 1, place, out)
        elif width:  # the first width - 1 bits tell that another one follows
            code = rest + short
            acc |= (np.uint64(code >> 1) | np.uint64(code & 1) << np.uint64(width - 1)) << np.uint64(filled)
            acc, filled, place = spill(acc, filled + width, place, out)
    if filled:
        out[place] = np.uint8(acc)


@jit
def read_golomb(data: np.ndarray, m: int, n: int, out: np.ndarray) -> bool:
    width = _width(m)
    short = (1 << width) - m
    low = (_ONE << np.uint64(max(width - 1, 0))) - _ONE
    acc, filled, place = np.uint64(0), np.int64(0), 0
    position = np.int64(-1)
    for j in range(out.size):
        position += 1
        while True:
            if filled == 0:
                if place == data.size:
                    return False
                acc, filled, place = np.uint64(data[place]), np.int64(8), place + 1
            bit = acc & _ONE
            acc >>= _ONE
            filled -= 1
            if bit == 0:
                break
            position += m
            if position >= n:
                return False
        if width:
            while filled < width and place < data.size:
                acc |= np.uint64(data[place]) << np.uint64(filled)
                place += 1
                filled += 8
            rest = np.int64(acc & low)
            used = width - 1
            if rest >= short:
                rest = 2 * rest + np.int64(acc >> np.uint64(width - 1) & _ONE) - short
                used = width
            if used > filled:
                return False
            acc >>= np.uint64(used)
            filled -= used
            position += rest
        out[j] = position
    return bool(place == data.size and filled < 8 and acc == 0)
