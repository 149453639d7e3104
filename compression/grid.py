"""The signed grid: scales, codes and values of weight differences, and codes packed into bytes.

Activations have the same grid with coarser scales, see :mod:`.tile_format`, and pack their codes alike.

The grid. A tile has one signed scale, s = -extreme / divisor, where `extreme` is its element of largest
magnitude; codes are round(x / s) cut to [-2^(b-1), 2^(b-1) - 1], half to even. Turning the grid so that the
extreme meets the side with the extra level uses all 2^b levels and keeps an exact zero. Mean squared error
over mean square, tile 64:

    grid                            4 bits N(0,1)   one outlier x20   2 bits N(0,1)   one outlier x20
    -7..7, absmax / 7  (-1..1)         0.0116           0.053            0.514            0.12
    half-integer, absmax / 7.5         0.0101           0.116            0.256            5.1
    half-integer, best divisor            -                -             0.121            1.5
    signed, / 8        (/ 2.5)         0.0090           0.046            0.134            0.13

At 2 bits the half-integer grid with a fitted divisor is a little better on N(0,1) but ruins every tile that
has an outlier, as the residual stream does; the signed grid with divisor 2.5 (the extreme is cut to 0.8 of
itself) is good on both.
"""

import torch
from torch import Tensor

from .codec import CodecError

DIVISORS = {2: 2.5, 3: 4.5, 4: 8.0, 6: 32.0, 8: 128.0, 16: 32768.0}
_LARGEST = 3.3e38  # a scale saturates here, so that rounding it cannot push the grid's end past float32

# Shapes: R rows, T tiles of a row, W elements of a tile, N elements of a row, B tiles in any arrangement.


def tile_scales(x_BW: Tensor, bits: int) -> Tensor:
    """The signed float32 scale of each tile (last dimension); CodecError if an element is not finite."""
    low_B, high_B = x_BW.amin(dim=-1), x_BW.amax(dim=-1)  # aminmax is 6 times slower than the two
    s_B = torch.where(-low_B > high_B, low_B, high_B).div_(-DIVISORS[bits])
    if not torch.isfinite(s_B).all():
        raise CodecError("the tensor has infinite or NaN elements", "quantizers refuse them; look upstream")
    limit = _LARGEST / (1 << (bits - 1))
    return s_B.clamp_(-limit, limit).add_(0.0)  # -0.0 becomes 0.0


def tile_codes(x_BW: Tensor, s_B: Tensor, bits: int) -> Tensor:
    """Codes on the grid of `s_B`: uint8 counted from zero up to 8 bits, signed int16 for 16."""
    half = 1 << (bits - 1)
    s_B1 = torch.where(s_B == 0, torch.inf, s_B).unsqueeze(-1)  # no scale, no values: every code is zero
    q_BW = (x_BW / s_B1).round_().clamp_(-half, half - 1)
    return q_BW.to(torch.int16) if bits == 16 else q_BW.add_(half).to(torch.uint8)


def tile_values(codes_BW: Tensor, s_B: Tensor, bits: int) -> Tensor:
    """Float32 values of codes made by `tile_codes`."""
    zero = 0 if bits == 16 else 1 << (bits - 1)
    return codes_BW.to(torch.float32).sub_(zero).mul_(s_B.unsqueeze(-1))


def check_scales(s_B: Tensor, bits: int) -> None:
    """CodecError unless every value on the grid of every scale is finite."""
    if not torch.isfinite(s_B * float(1 << (bits - 1))).all():
        raise CodecError("a scale in the payload is not finite")


def packed_nbytes(n: int, bits: int) -> int:
    """Bytes of a row of `n` packed codes."""
    return sum(-(-n * width // 8) for width in _planes(bits))


def pack_codes(codes_RN: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes of 1 to 6, or 8, bits into uint8 [R, packed_nbytes(N)].

    Bits that are no power of two go in two planes, the low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. With
    w bits in a plane, k = 8 / w and M bytes, byte j holds codes j, j + M, ..., j + (k-1) M from the low bits
    up: each part is one contiguous run of the row. Codes past the end of the row are zero.
    """
    if bits == 8:
        return codes_RN
    planes, done = [], 0
    for width in _planes(bits):
        planes.append(_pack_plane((codes_RN >> done) & ((1 << width) - 1), width))
        done += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=1)


def unpack_codes(packed_RM: Tensor, bits: int, n: int) -> Tensor:
    """The uint8 codes [R, n] that `pack_codes` packed."""
    if bits == 8:
        return packed_RM
    codes_RN = torch.zeros((packed_RM.shape[0], n), dtype=torch.uint8, device=packed_RM.device)
    at, done = 0, 0
    for width in _planes(bits):
        m = -(-n * width // 8)
        for part in range(8 // width):
            run_RM = packed_RM[:, at : at + max(min(n - part * m, m), 0)]
            codes_RN[:, part * m : part * m + run_RM.shape[1]] |= (
                (run_RM >> (part * width)) & ((1 << width) - 1)
            ) << done
        at += m
        done += width
    return codes_RN


def _planes(bits: int) -> tuple[int, ...]:
    """The widths, powers of two, that codes of `bits` bits are cut into, from the low bits up."""
    return (bits,) if bits & (bits - 1) == 0 else (4, bits - 4) if bits > 4 else (2, bits - 2)


def _pack_plane(codes_RN: Tensor, width: int) -> Tensor:
    n = codes_RN.shape[1]
    m = -(-n * width // 8)
    out_RM = codes_RN[:, :m].clone()
    for part in range(1, 8 // width):
        run = max(min(n - part * m, m), 0)
        out_RM[:, :run] |= codes_RN[:, part * m : part * m + run] << (part * width)
    return out_RM
