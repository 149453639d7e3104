"""Integer tiles for activations and their gradients, on the grid of :mod:`.grid`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .codec import Codec, CodecError, checked_payload, checked_shape, from_bytes, to_bytes
from .grid import check_scales, pack_codes, packed_nbytes, tile_codes, tile_scales, tile_values, unpack_codes

TILE_BITS = (2, 4, 8)
TILES = (32, 64, 128)
DEFAULT_TILE = 64
_CHUNK = 1 << 18  # elements worked on at a time: temporaries stay in the cache of a core

# Shapes: R rows, T tiles of a row, W elements of a tile, N elements of a row, B tiles in any arrangement.


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
