"""How the values of a weight difference are written: exactly, or on the grid that activations have too.

Scales are float32 because differences of weights are around 1e-6 and below, where fp16 has no precision left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import CodecError, from_bytes, to_bytes
from .grid import check_scales, pack_codes, packed_nbytes, tile_codes, tile_scales, tile_values, unpack_codes

_BLOCK = 1 << 17  # values worked on at a time: temporaries stay in the cache of a core


class Exact:
    """Float32 as they are."""

    def nbytes(self, m: int) -> int:
        """The exact length for `m` values."""
        return 4 * m

    def encode(self, x: Tensor) -> tuple[bytes, Tensor]:
        """The bytes of float32 [m], and what they decode to; CodecError if an element is not finite."""
        if not torch.isfinite(x).all():
            raise CodecError("the weight difference has infinite or NaN elements")
        return to_bytes(x), x.clone()

    def decode(self, view: memoryview, m: int) -> Tensor:
        """The `m` values of `nbytes(m)` bytes; CodecError for bytes that `encode` does not make."""
        values = from_bytes(view, torch.float32)
        if not torch.isfinite(values).all():
            raise CodecError("a value in the payload is not finite")
        return values


@dataclass(frozen=True)
class Grid:
    """Codes on :mod:`.grid`, and one float32 scale per `bucket` of them. Bytes: scales, packed codes."""

    bits: int
    bucket: int

    def nbytes(self, m: int) -> int:
        """The exact length for `m` values."""
        return 4 * self._buckets(m) + packed_nbytes(m, self.bits)

    def encode(self, x: Tensor) -> tuple[bytes, Tensor]:
        """The bytes of float32 [m], and what they decode to; CodecError if an element is not finite."""
        m = x.numel()
        scales = torch.empty(self._buckets(m))
        codes = torch.empty(m, dtype=torch.int16 if self.bits == 16 else torch.uint8)
        sent = torch.empty(m)
        for part, buckets, width in self._blocks(m):
            x_BW = x[part].view(-1, width)
            s_B = tile_scales(x_BW, self.bits)
            codes_BW = tile_codes(x_BW, s_B, self.bits)
            sent[part] = tile_values(codes_BW, s_B, self.bits).view(-1)
            codes[part], scales[buckets] = codes_BW.view(-1), s_B
        if self.bits < 16:
            codes = pack_codes(codes.view(1, m), self.bits)
        return to_bytes(scales) + to_bytes(codes), sent

    def decode(self, view: memoryview, m: int) -> Tensor:
        """The `m` values of `nbytes(m)` bytes; CodecError for bytes that `encode` does not make."""
        cut = 4 * self._buckets(m)
        scales = from_bytes(view[:cut], torch.float32)
        check_scales(scales, self.bits)
        codes = from_bytes(view[cut:], torch.int16) if self.bits == 16 else unpacked(view[cut:], self.bits, m)
        values = torch.empty(m)
        for part, buckets, width in self._blocks(m):
            values[part] = tile_values(codes[part].view(-1, width), scales[buckets], self.bits).view(-1)
        return values

    def _buckets(self, m: int) -> int:
        return -(-m // self.bucket)

    def _blocks(self, m: int) -> list[tuple[slice, slice, int]]:
        """(values, buckets, width of a bucket) of runs of whole buckets, and of the short last one."""
        whole, step = m // self.bucket, max(1, _BLOCK // self.bucket)
        starts = range(0, whole, step)
        runs = [(i, min(i + step, whole), self.bucket) for i in starts]
        blocks = [(slice(i * w, j * w), slice(i, j), w) for i, j, w in runs]
        if m % self.bucket:
            blocks.append((slice(whole * self.bucket, m), slice(whole, whole + 1), m % self.bucket))
        return blocks


def unpacked(view: memoryview, bits: int, m: int) -> Tensor:
    """`m` packed codes of up to 8 bits; CodecError if the bits after the last one are not zero."""
    packed = from_bytes(view, torch.uint8).view(1, -1)
    codes_1M = unpack_codes(packed, bits, m)
    if not torch.equal(pack_codes(codes_1M, bits), packed):
        raise CodecError("bits after the last value are not zero")
    return codes_1M.view(m)
