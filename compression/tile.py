"""Integer tiles for activations and their gradients, and the grid that the sync codec shares.

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

from collections.abc import Sequence

import torch
from torch import Tensor

from .codec import Codec, CodecError, checked_payload, checked_shape, from_bytes, to_bytes

TILE_BITS = (2, 4, 8)
TILES = (32, 64, 128)
DEFAULT_TILE = 64
DIVISORS = {2: 2.5, 4: 8.0, 8: 128.0, 16: 32768.0}
_LARGEST = 3.3e38  # a scale saturates here, so that rounding it cannot push the grid's end past float32
_CHUNK = 1 << 18  # elements worked on at a time: temporaries stay in the cache of a core

# Shapes: R rows, T tiles of a row, W elements of a tile, N elements of a row, B tiles in any arrangement.


def tile_scales(x_BW: Tensor, bits: int) -> Tensor:
    """The signed float32 scale of each tile (last dimension); CodecError if an element is not finite."""
    low_B, high_B = x_BW.amin(dim=-1), x_BW.amax(dim=-1)  # aminmax is 6 times slower than the two
    s_B = torch.where(-low_B > high_B, low_B, high_B).div_(-DIVISORS[bits])
    if not torch.isfinite(s_B).all():
        raise CodecError("the tensor has infinite or NaN elements", "quantizers refuse them; look upstream")
    limit = _LARGEST / (1 << (bits - 1))
    return s_B.clamp_(-limit, limit).add_(0.0)  # -0.0 becomes 0.0


def tile_codes(x_BW: Tensor, s_B: Tensor, bits: int, shift: float = 0.0) -> Tensor:
    """Codes on the grid of `s_B`: uint8 counted from zero up to 8 bits, signed int16 for 16.

    A `shift` of 0.5 gives the half-integer grid, for values of which none is near zero.
    """
    half = 1 << (bits - 1)
    s_B1 = torch.where(s_B == 0, torch.inf, s_B).unsqueeze(-1)  # no scale, no values: every code is zero
    q_BW = x_BW / s_B1
    if shift:
        q_BW.sub_(shift)
    q_BW.round_().clamp_(-half, half - 1)
    return q_BW.to(torch.int16) if bits == 16 else q_BW.add_(half).to(torch.uint8)


def tile_values(codes_BW: Tensor, s_B: Tensor, bits: int, shift: float = 0.0) -> Tensor:
    """Float32 values of codes made by `tile_codes`."""
    zero = 0 if bits == 16 else 1 << (bits - 1)
    return codes_BW.to(torch.float32).sub_(zero - shift).mul_(s_B.unsqueeze(-1))


def check_scales(s_B: Tensor, bits: int) -> None:
    """CodecError unless every value on the grid of every scale is finite."""
    if not torch.isfinite(s_B * float(1 << (bits - 1))).all():
        raise CodecError("a scale in the payload is not finite")


def packed_nbytes(n: int, bits: int) -> int:
    """Bytes of a row of `n` packed codes."""
    return -(-n * bits // 8)


def pack_codes(codes_RN: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes of `bits` bits into uint8 [R, packed_nbytes(N)].

    With k = 8 / bits and M bytes in a row, byte j holds codes j, j + M, ..., j + (k-1) M from the low bits
    up: each part is one contiguous run of the row. Codes past the end of the row are zero.
    """
    k = 8 // bits
    if k == 1:
        return codes_RN
    n = codes_RN.shape[1]
    m = packed_nbytes(n, bits)
    out_RM = codes_RN[:, :m].clone()
    for part in range(1, k):
        width = max(min(n - part * m, m), 0)
        out_RM[:, :width] |= codes_RN[:, part * m : part * m + width] << (part * bits)
    return out_RM


def unpack_codes(packed_RM: Tensor, bits: int, n: int) -> Tensor:
    """The uint8 codes [R, n] that `pack_codes` packed."""
    k = 8 // bits
    if k == 1:
        return packed_RM
    m = packed_RM.shape[1]
    codes_RN = torch.empty((packed_RM.shape[0], n), dtype=torch.uint8)
    for part in range(k):
        width = max(min(n - part * m, m), 0)
        codes_RN[:, part * m : part * m + width] = (packed_RM[:, :width] >> (part * bits)) & ((1 << bits) - 1)
    return codes_RN


class TileCodec(Codec):
    """Quantize the last dimension in tiles of `tile` elements, the last one shorter where it does not divide.

    Bytes of a row (they depend on that row only): one exponent, an fp16 scale per tile, the packed codes. The
    scales are in units of 2^(exponent - 127), chosen so that the row's largest lies in [2^14, 2^15): a bare
    fp16 scale would lose the gradients of a mean loss (at 8 bits, precision falls off below 8e-3 and tiles
    below 4e-6 vanish). A tile 2^39 times smaller than its row's largest becomes zeros. Non-finite input
    raises CodecError.
    """

    def __init__(self, bits: int, tile: int = DEFAULT_TILE) -> None:
        if bits not in TILE_BITS or tile not in TILES:
            raise CodecError(f"no codec of {bits} bits with tile {tile}")
        self.bits = bits
        self.tile = tile
        self.spec = f"int{bits}:tile={tile}"

    def nbytes(self, shape: Sequence[int]) -> int:
        rows, n = _rows(checked_shape(shape))
        return rows * self._row_nbytes(n)

    def encode(self, x: Tensor, seed: int = 0) -> bytes:
        rows, n = _rows(checked_shape(x.shape))
        if rows * n == 0:
            return b""
        x_RN = x.detach().reshape(rows, n)
        out = torch.empty((rows, self._row_nbytes(n)), dtype=torch.uint8, device=x.device)
        step = max(1, _CHUNK // n)
        for start in range(0, rows, step):
            self._encode_rows(x_RN[start : start + step].float(), out[start : start + step])
        return to_bytes(out)

    def decode(self, payload: bytes | memoryview, shape: Sequence[int]) -> Tensor:
        dims = checked_shape(shape)
        rows, n = _rows(dims)
        view = checked_payload(payload, self.nbytes(dims), self.spec)
        out_RN = torch.empty((rows, n), dtype=torch.float32)
        if rows * n:
            data = from_bytes(view, torch.uint8).view(rows, -1)
            step = max(1, _CHUNK // n)
            for start in range(0, rows, step):
                self._decode_rows(data[start : start + step], out_RN[start : start + step])
        return out_RN.view(dims)

    def _row_nbytes(self, n: int) -> int:
        return 1 + 2 * -(-n // self.tile) + packed_nbytes(n, self.bits)

    def _sections(self, n: int) -> list[tuple[slice, slice, int]]:
        """(elements, tiles, width) of the whole tiles and of the short last one."""
        whole = n // self.tile
        cut = whole * self.tile
        both = [
            (slice(0, cut), slice(0, whole), self.tile),
            (slice(cut, n), slice(whole, whole + 1), n - cut),
        ]
        return [s for s in both if s[0].start < s[0].stop]

    def _encode_rows(self, x_RN: Tensor, out: Tensor) -> None:
        n = x_RN.shape[1]
        sections = self._sections(n)
        parts = [x_RN[:, cols].unflatten(1, (-1, width)) for cols, _, width in sections]
        s_RT = torch.cat([tile_scales(part, self.bits) for part in parts], dim=1)
        exponent_R1 = _exponents(s_RT)
        unit_R1 = _power_of_two(exponent_R1)
        s16_RT = (s_RT / unit_R1).to(torch.float16)
        s_RT = s16_RT.float() * unit_R1
        codes_RN = torch.empty(x_RN.shape, dtype=torch.uint8, device=x_RN.device)
        for part, (cols, tiles, _) in zip(parts, sections, strict=True):
            codes_RN[:, cols] = tile_codes(part, s_RT[:, tiles], self.bits).flatten(1)
        body = 1 + 2 * s_RT.shape[1]
        out[:, :1] = exponent_R1.to(torch.uint8)
        bits_RT = s16_RT.view(torch.int16)
        out[:, 1:body:2] = (bits_RT & 0xFF).to(torch.uint8)
        out[:, 2:body:2] = ((bits_RT >> 8) & 0xFF).to(torch.uint8)
        out[:, body:] = pack_codes(codes_RN, self.bits)

    def _decode_rows(self, data: Tensor, out_RN: Tensor) -> None:
        n = out_RN.shape[1]
        body = 1 + 2 * -(-n // self.tile)
        bits_RT = data[:, 1:body:2].to(torch.int16) | (data[:, 2:body:2].to(torch.int16) << 8)
        s_RT = bits_RT.view(torch.float16).float() * _power_of_two(data[:, :1].to(torch.int32))
        check_scales(s_RT, self.bits)
        codes_RN = unpack_codes(data[:, body:], self.bits, n)
        for cols, tiles, width in self._sections(n):
            codes_RTW = codes_RN[:, cols].unflatten(1, (-1, width))
            out_RN[:, cols].unflatten(1, (-1, width)).copy_(tile_values(codes_RTW, s_RT[:, tiles], self.bits))


def _rows(dims: tuple[int, ...]) -> tuple[int, int]:
    """Rows and elements of a row; a tensor without elements has no rows."""
    n = dims[-1] if dims else 1
    rows = 1
    for d in dims[:-1]:
        rows *= d
    return (rows, n) if n else (0, 0)


def _exponents(s_RT: Tensor) -> Tensor:
    """Biased exponent [R, 1] of the unit in which the row's largest scale lies in [2^14, 2^15)."""
    top_R1 = s_RT.abs().amax(dim=1, keepdim=True)
    return ((top_R1.view(torch.int32) >> 23) - 14).clamp_(min=1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) by its bits, not by a `pow`; 0 gives 0 and 255 gives infinity."""
    return (exponent << 23).view(torch.float32)
