"""A shuffle that is a function: where position p of an epoch lands, without holding the epoch in memory.

A Feistel network (Luby and Rackoff, 1988) on the smallest domain 4**k >= n, k >= 3, is a bijection whatever
its round function; values outside [0, n) are encrypted again until they fall inside ("cycle walking", Black
and Rogaway, 2002), which keeps it a bijection on [0, n). The round function is the splitmix64 finalizer
(Steele, Lea and Flood, 2014). Python integers only: the same on every platform, pinned by golden values.
"""

from __future__ import annotations

from functools import lru_cache

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
_MIN_HALF_BITS = 3  # halves of one or two bits mix badly; walking a domain of 64 costs nothing


def mix64(value: int) -> int:
    """The splitmix64 finalizer of ``value`` modulo 2**64: a bijection on 64-bit integers."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def epoch_key(seed: int, epoch: int) -> int:
    """The 64-bit key of one epoch's shuffle in the run with this seed."""
    return mix64(mix64(seed) + epoch)


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(mix64(key + round_ * _GOLDEN) for round_ in range(1, _ROUNDS + 1))


def permute(position: int, n: int, key: int) -> int:
    """Where ``position`` lands in the shuffle of range(n) that ``key`` picks. Bijective for any n >= 1."""
    if not 0 <= position < n:
        raise IndexError(f"position {position} is outside [0, {n})")
    half_bits = max(_MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    round_keys = _round_keys(key & _MASK)
    while True:
        left, right = position >> half_bits, position & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & half_mask)
        position = left << half_bits | right
        if position < n:
            return position
