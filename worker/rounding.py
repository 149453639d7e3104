"""fp32 to bf16 by chance: up or down, each as likely as the value is near, so that small updates are not lost.

Rounded to nearest, an update below half a unit of a weight's eight bits of precision changes nothing, however often it
comes; rounded so, it arrives in the mean (Zamirai et al., arXiv 2010.06192). The chance is a function of a key and of
a weight's place in the model alone: the same on every device, and in a run that is done again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))  # of the hash lowbias32 (Wellons, 2018)
_WORD = (1 << 32) - 1
_PART = 1 << 20  # values at a time, which take a few copies of them


def noise(key: int, start: int, n: int, device: torch.device) -> Tensor:
    """int32 [n], uniform in [0, 2**16): that of the places ``start`` and on. ``key``: 64 bits. Arithmetic wraps."""
    place = torch.arange(n, dtype=torch.int32, device=device)
    place.add_(_signed(start + key))
    _mixed(place)
    place.add_(_signed(key >> 32))
    return _mixed(place).bitwise_and_(0xFFFF)


def round_by_chance(values: Tensor, key: int, start: int) -> Tensor:
    """bf16 [n] of fp32 [n] that lie at ``start`` and on. What bf16 can say stays as it is, infinite or not."""
    bits = noise(key, start, values.numel(), values.device).add_(values.view(torch.int32))
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def round_into(out: Tensor, weights: Tensor, key: int, start: int) -> None:
    """Writes weights [n] that lie at ``start`` and on to ``out``: to bf16 by chance, in parts."""
    if out.dtype != torch.bfloat16:
        out.copy_(weights)
        return
    for at in range(0, weights.numel(), _PART):
        here = slice(at, at + _PART)
        out[here] = round_by_chance(weights[here].float(), key, start + at)


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


def _mixed(x: Tensor) -> Tensor:
    """In place."""
    for shift, factor in _ROUNDS:
        x.bitwise_xor_(_shifted(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right, with zeros from the left."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)
