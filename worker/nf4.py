"""Weights in four bits: NF4, the 16 levels at equal shares of a normal distribution, with a scale for every 64 weights
(Dettmers et al., QLoRA, arXiv 2305.14314, appendix E).

The bytes are those of bitsandbytes: two codes in each, the first one high; scales fp32, of blocks of the flat tensor.
We make them ourselves, on the CPU: so all replicas of a stage hold the same base, whatever they compute on. Where it is
installed its kernels unpack them, to the same bits. That for CPUs (0.50.2) counts blocks from the beginning of each
row, and its quantization does not: where a matrix' width is no multiple of 64, torch unpacks.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bnb

log = logging.getLogger(__name__)
BLOCK = 64  # weights that have one scale
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_PART = 1 << 20  # weights at a time, a multiple of BLOCK


def nbytes(n: int) -> tuple[int, int]:
    """How many codes' bytes and how many scales n weights have."""
    return -(-n // 2), -(-n // BLOCK)


@torch.no_grad()
def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, uint8 [ceil(n / 2)], and the scales, fp32 [ceil(n / 64)], of n floats on the CPU.

    A block of zeros has the scale 0. What is not finite makes its block so.
    """
    flat = values.reshape(-1)
    sizes = nbytes(flat.numel())
    codes, scales = torch.empty(sizes[0], dtype=torch.uint8), torch.empty(sizes[1])
    for start in range(0, flat.numel(), _PART):
        part = flat[start : start + _PART].float()
        blocks = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        shares = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        found = torch.bucketize(shares, _middles(), out_int32=True).to(torch.uint8).view(-1, 2)
        both = found[:, 0].bitwise_left_shift(4).bitwise_or_(found[:, 1])
        here = codes[start // 2 : (start + _PART) // 2]
        here.copy_(both[: here.numel()])
        scales[start // BLOCK : start // BLOCK + scale.numel()] = scale
    return codes, scales


@torch.no_grad()
def dequantized(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weights of such codes and scales, on their device: each a level times its scale in fp32, then rounded."""
    if (codes.is_cuda or shape[-1] % BLOCK == 0) and (library := _library()) is not None:
        return unpacked_by(library, codes, scales, shape, dtype)
    return _unpacked(codes, scales, shape, dtype)


def _unpacked(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    n = shape.numel()
    out = torch.empty(n, dtype=dtype, device=codes.device)
    pairs = _pairs(codes.device)
    for start in range(0, n, _PART):
        part = pairs[codes[start // 2 : (start + _PART) // 2].int()].view(-1)
        here = out[start : start + _PART]
        part = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        part.mul_(scales[start // BLOCK : (start + _PART) // BLOCK, None])
        here.copy_(part.view(-1)[: here.numel()])
    return out.view(shape)


def unpacked_by(library: Any, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same with ``bitsandbytes.functional``."""
    state = library.QuantState(absmax=scales, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    out: Tensor = library.dequantize_4bit(codes.view(-1, 1), quant_state=state)
    return out


@functools.cache
@torch.inference_mode(False)
@torch.no_grad()
def _library() -> Any | None:
    """bitsandbytes' functions, if they are here and unpack as we do."""
    shape = torch.Size((4, BLOCK))
    codes, scales = torch.arange(2 * BLOCK, dtype=torch.uint8), torch.tensor([0.1, 1.0, 0.3, 7.0])
    try:
        library = bnb.functions()
        theirs = unpacked_by(library, codes, scales, shape, torch.float32)
    except Exception as error:  # of another version, or without its compiled part
        log.info("bitsandbytes does not unpack 4 bits here: %s", error)
        return None
    return library if torch.equal(theirs, _unpacked(codes, scales, shape, torch.float32)) else None


@functools.cache
@torch.inference_mode(False)
def _middles() -> Tensor:
    """fp32 [15]: where one level ends and the next begins."""
    levels = torch.tensor(LEVELS)
    return (levels[1:] + levels[:-1]) / 2


@functools.cache
@torch.inference_mode(False)
def _pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two levels of a byte."""
    levels, codes = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[codes >> 4], levels[codes & 15]], dim=1).to(device)
