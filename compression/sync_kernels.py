"""Loops of :mod:`.sync`: exact top-k by magnitude without sorting, and adding values at positions.

A magnitude is compared as the integer of its 31 bits: IEEE 754 keeps the order, and counting finds the k-th.
"""

import numpy as np

from .jit import jit

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITE = np.uint32(0x7F800000)  # magnitudes from here on are infinite or NaN
_SLACK = np.uint32(1 << 21)  # a quarter of an octave


@jit
def top_of_chunks(bits: np.ndarray, chunk: int, each: int, last: int, out: np.ndarray) -> bool:
    """Sorted positions of the largest magnitudes of every chunk, the first ones among equals.

    bits: uint32 view of float32 values; out: int64, filled exactly. False if a value is not finite. Neighbouring
    chunks are alike, so the last threshold, lowered a little, leaves few candidates to count; a chunk in which
    it leaves too few is counted whole.
    """
    keys = np.empty(chunk, np.uint32)
    places = np.empty(chunk, np.int64)
    counts = np.empty(256, np.int64)
    guess = np.uint32(0)
    done = 0
    for start in range(0, bits.size, chunk):
        stop = min(start + chunk, bits.size)
        k = each if stop - start == chunk else last
        found = _candidates(bits, start, stop, guess, keys, places)
        if found < k:
            found = _candidates(bits, start, stop, np.uint32(0), keys, places)
        threshold, ties = _kth(keys[:found], k, counts)
        for j in range(found):
            key = keys[j]
            if key >= _INFINITE:
                return False
            if key > threshold or (key == threshold and ties > 0):
                ties -= int(key == threshold)
                out[done] = places[j]
                done += 1
        guess = threshold - min(threshold, _SLACK)
    return True


@jit
def top_of_all(bits: np.ndarray, k: int, out: np.ndarray) -> bool:
    """`top_of_chunks` for one chunk of any size, in three passes and no copy of the values."""
    upper = np.zeros(1 << 16, np.int64)
    for b in bits:
        upper[(b & _MAGNITUDE) >> np.uint32(15)] += 1
    for i in range(_INFINITE >> np.uint32(15), upper.size):
        if upper[i]:
            return False
    bin_, k_left = _bin(upper, k)
    lower = np.zeros(1 << 15, np.int64)
    for b in bits:
        if np.int64((b & _MAGNITUDE) >> np.uint32(15)) == bin_:
            lower[b & np.uint32(0x7FFF)] += 1
    low, ties = _bin(lower, k_left)
    threshold = np.uint32(bin_ << 15 | low)
    done = 0
    for i in range(bits.size):
        key = bits[i] & _MAGNITUDE
        if key >= threshold and (key > threshold or ties > 0):
            ties -= int(key == threshold)
            out[done] = i
            done += 1
    return True


@jit
def _candidates(bits: np.ndarray, start: int, stop: int, guess: np.uint32, keys: np.ndarray, places: np.ndarray) -> int:
    found = 0
    for i in range(start, stop):
        key = bits[i] & _MAGNITUDE
        keys[found] = key
        places[found] = i
        found += int(key >= guess)
    return found


@jit
def _kth(keys: np.ndarray, k: int, counts: np.ndarray) -> tuple[np.uint32, int]:
    """The k-th largest key (31 bits), and how many of the keys that equal it are among the k largest."""
    prefix, known = np.uint32(0), np.uint32(0)
    for shift in (24, 16, 8, 0):
        counts[:] = 0
        for key in keys:
            if key & known == prefix:
                counts[(key >> np.uint32(shift)) & np.uint32(255)] += 1
        digit, k = _bin(counts, k)
        prefix |= np.uint32(digit << shift)
        known |= np.uint32(255 << shift)
    return prefix, k


@jit
def _bin(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th from the top, and its rank inside."""
    i = counts.size - 1
    while counts[i] < k:
        k -= counts[i]
        i -= 1
    return i, k


@jit
def add_at(vector: np.ndarray, indices: np.ndarray, values: np.ndarray, scale: np.float32) -> bool:
    """vector[indices] += scale * values; False, perhaps half done, if an index lies outside."""
    for j in range(indices.size):
        i = indices[j]
        if i < 0 or i >= vector.size:
            return False
        vector[i] += scale * values[j]
    return True


@jit
def take(vector: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    """values = vector[indices], for indices known to lie inside."""
    for j in range(indices.size):
        values[j] = vector[np.uint64(indices[j])]
