"""Denoisers: a piece of text with spans cut out, and what was cut out behind it. Numpy only.

Spans are drawn like T5's (Raffel et al., 2020, ``random_spans_noise_mask``): the number of noise tokens and of spans
follows from the length, noise and the rest are split into as many parts, both uniformly, which take turns, and the
whole is turned by a random number of places. A span that the turn cuts in two is two spans, with a sentinel each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..protocol.objective import Mode
from .packing import Example
from .randomness import Random

SHORT_PREFIX = 20  # a short prefix has fewer tokens (GPT-JT)
MIN_NOISY = 2  # tokens: one to cut out, one to keep


class Denoiser(NamedTuple):
    """``mean_span``: tokens. ``corruption``: share of tokens cut out. Neither means anything for S. ``rate``: how often
    it is drawn, beside the others of its mixture."""

    mode: Mode
    mean_span: int
    corruption: float
    rate: float

    def noise(self, n: int) -> tuple[int, int]:
        """(tokens cut out, spans they make before the turn) of n >= 2 tokens."""
        n_noise = min(max(round(n * self.corruption), 1), n - 1)
        return n_noise, min(max(round(n_noise / self.mean_span), 1), n - n_noise)


UL2R = (  # arXiv 2210.11399, section 2.3, at the rates of Levanter
    Denoiser("S", 0, 0.0, 0.5),
    Denoiser("R", 3, 0.15, 0.25),
    Denoiser("X", 32, 0.15, 0.125),
    Denoiser("X", 3, 0.5, 0.125),
)
UL2 = (  # arXiv 2205.05131, table 1, uniformly
    Denoiser("R", 3, 0.15, 1.0),
    Denoiser("R", 8, 0.15, 1.0),
    Denoiser("S", 0, 0.0, 1.0),
    Denoiser("X", 3, 0.5, 1.0),
    Denoiser("X", 8, 0.5, 1.0),
    Denoiser("X", 64, 0.15, 1.0),
    Denoiser("X", 64, 0.5, 1.0),
)


def most_raw(denoiser: Denoiser, room: int, n_sentinels: int, limit: int) -> int:
    """The most raw tokens, at most ``limit``, whose example surely fits into ``room`` positions without its mode tokens
    and needs no more than ``n_sentinels``; 0 when fewer than ``MIN_NOISY`` do."""

    def fits(n: int) -> bool:
        n_spans = denoiser.noise(n)[1] + 1  # the turn may cut one in two
        return n_spans <= n_sentinels and n + 2 * n_spans <= room

    low, high = MIN_NOISY - 1, min(limit, room)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= MIN_NOISY else 0


def noise_mask(n: int, denoiser: Denoiser, random: Random) -> NDArray[np.bool_]:
    """Bool [n]: which of n >= 2 tokens are cut out."""
    n_noise, n_spans = denoiser.noise(n)
    lengths = np.empty((n_spans, 2), np.int64)
    lengths[:, 0] = random.split(n - n_noise, n_spans)
    lengths[:, 1] = random.split(n_noise, n_spans)
    mask = np.repeat(np.arange(2 * n_spans) % 2 == 1, lengths.ravel())
    turn = random.below(n)
    return np.concatenate([mask[n - turn :], mask[: n - turn]])


def span_example(
    raw: NDArray[np.int64],
    noise: NDArray[np.bool_],
    mode: str,
    mode_ids: tuple[int, ...],
    sentinels: tuple[int, ...],
    eos: int,
) -> Example:
    """``mode_ids``, ``raw`` with every noise span replaced by a sentinel of its own, then each sentinel with its span,
    then eos. What stands before the first sentinel's second coming is given."""
    begins = noise.copy()
    begins[1:] &= ~noise[:-1]
    starts = np.flatnonzero(begins)
    inputs = raw.copy()
    inputs[starts] = sentinels[: len(starts)]
    inputs = inputs[~noise | begins]
    cut_out = raw[noise]
    n_given = len(mode_ids) + len(inputs)
    targets = np.empty(len(cut_out) + len(starts) + 1, np.int64)
    is_mark = np.zeros(len(targets), np.bool_)
    is_mark[np.cumsum(noise)[starts] - 1 + np.arange(len(starts))] = True
    is_mark[-1] = True
    targets[is_mark] = (*sentinels[: len(starts)], eos)
    targets[~is_mark] = cut_out
    return Example(np.concatenate([np.array(mode_ids, np.int64), inputs, targets]), n_given, mode)


def split_place(n: int, short_prefix: float, random: Random) -> int:
    """How many of n >= 1 tokens are the prefix: uniform in [0, n), or with this probability below ``SHORT_PREFIX``."""
    return random.below(min(SHORT_PREFIX, n) if random.uniform() < short_prefix else n)
