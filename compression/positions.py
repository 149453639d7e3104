"""Which positions a top-k message holds, in as few bits as pays.

Forms; each message takes the shortest and names it in its first byte:

    bitmap    a bit per position of the vector
    indices   ceil(log2(chunk)) bits per position, packed tight; how many a chunk has is known to both ends
    golomb    gaps in Golomb's code (IEEE Trans. Inf. Theory 12(3), 1966), with the best parameter for positions
              drawn at random (Gallager, van Voorhis, IEEE Trans. Inf. Theory 21(2), 1975), which both ends know
    rans      gaps by their own frequencies (:mod:`.rans`), where there are enough to pay for the table
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from . import position_kernels as kernels
from . import rans
from .codec import CodecError
from .mask import count

_MAX_N = 1 << 31
_LN2 = 2977044472  # times 2^32
_MANY = 1 << 16  # positions from which `golomb` cannot be shorter by more than 0.1 %: it is not even measured


class Form(IntEnum):
    """How the positions of one message are written."""

    BITMAP = 0
    INDICES = 1
    GOLOMB = 2
    RANS = 3


@dataclass(frozen=True)
class Layout:
    """Where positions may lie: `each` of every `chunk` of `n` elements, and `last` of the shorter last chunk."""

    n: int
    chunk: int
    each: int
    last: int

    @classmethod
    def of(cls, n: int, share: float, chunk: int = 0) -> "Layout":
        """The layout that keeps a `share` of every chunk, at least one; `chunk` 0 is one chunk of all.

        CodecError for a negative `n` or 2^31 and more elements.
        """
        if not 0 <= n < _MAX_N:
            raise CodecError(f"a vector of {n} elements", "cut it into shards of less than 2^31")
        chunk = min(chunk, n) or n
        return cls(n, chunk, count(chunk, share), count(n % chunk, share) if chunk else 0)

    @property
    def kept(self) -> int:
        """How many positions there are."""
        return self.n // self.chunk * self.each + self.last if self.chunk else 0

    @property
    def width(self) -> int:
        """Bits of a position inside its chunk."""
        return (self.chunk - 1).bit_length() if self.chunk else 0


def positions_bound(layout: Layout) -> int:
    """The most bytes that `encode_positions` makes."""
    if layout.kept == layout.n:
        return 0
    return 1 + min(_bitmap_nbytes(layout), _indices_nbytes(layout), _golomb_bound(layout))


def encode_positions(positions: Tensor, layout: Layout) -> bytes:
    """Sorted distinct positions (int64 [layout.kept]) to bytes; none at all if every position is kept."""
    if layout.kept == layout.n:
        return b""
    array = positions.numpy()
    parameter = _golomb_parameter(layout)
    sizes = {
        Form.BITMAP: _bitmap_nbytes(layout),
        Form.INDICES: _indices_nbytes(layout),
        Form.GOLOMB: _golomb_bound(layout),
    }
    if layout.kept < _MANY:
        sizes[Form.GOLOMB] = _golomb_nbytes(array, parameter)
    if (shorter := rans.write(array, min(sizes.values()))) is not None:
        return bytes([Form.RANS]) + shorter
    sizes[Form.GOLOMB] = _golomb_nbytes(array, parameter)
    form = min(sizes, key=sizes.__getitem__)
    out = np.zeros(1 + sizes[form], np.uint8)
    out[0] = form
    if form == Form.BITMAP:
        kernels.write_bitmap(array, out[1:])
    elif form == Form.INDICES:
        kernels.write_indices(array, layout.chunk, layout.width, out[1:])
    else:
        kernels.write_golomb(array, parameter, out[1:])
    return out.tobytes()


def decode_positions(payload: bytes | memoryview, layout: Layout) -> Tensor:
    """The positions, int64 [layout.kept]; CodecError for bytes that no encoder makes for this layout."""
    if layout.kept == layout.n:
        if len(payload):
            raise CodecError(f"{len(payload)} bytes of positions where all are sent")
        return torch.arange(layout.n)
    if not 2 <= len(payload) <= positions_bound(layout):
        raise CodecError(f"positions in {len(payload)} bytes, expected at most {positions_bound(layout)}")
    data = np.frombuffer(payload, np.uint8)
    data.flags.writeable = False
    form, body = int(data[0]), data[1:]
    out = np.empty(layout.kept, np.int64)
    if form == Form.BITMAP:
        good = body.size == _bitmap_nbytes(layout) and kernels.read_bitmap(body, out)
    elif form == Form.INDICES:
        good = body.size == _indices_nbytes(layout) and kernels.read_indices(
            body, layout.chunk, layout.each, layout.width, out
        )
    elif form == Form.GOLOMB:
        good = kernels.read_golomb(body, _golomb_parameter(layout), layout.n, out)
    elif form == Form.RANS:
        good = rans.read(body, layout.n, out)
    else:
        raise CodecError(f"positions in an unknown form {form}")
    if not (good and kernels.fits(out, layout.n, layout.chunk, layout.each)):
        raise CodecError(f"not {layout.kept} increasing positions of {layout.n}")
    return torch.from_numpy(out)


def _bitmap_nbytes(layout: Layout) -> int:
    return -(-layout.n // 8)


def _indices_nbytes(layout: Layout) -> int:
    return -(-layout.kept * layout.width // 8)


def _golomb_nbytes(array: np.ndarray, parameter: int) -> int:
    return -(-int(kernels.golomb_bits(array, parameter)) // 8)


def _golomb_bound(layout: Layout) -> int:
    m = _golomb_parameter(layout)
    return -(-(layout.kept * (1 + (m - 1).bit_length()) + (layout.n - layout.kept) // m) // 8)


def _golomb_parameter(layout: Layout) -> int:
    """Where half of the gaps are shorter: ln 2 of the mean gap, in whole numbers, to be the same everywhere."""
    return 1 + (layout.n - layout.kept) * _LN2 // (layout.kept << 32)
