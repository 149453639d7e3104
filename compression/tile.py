"""Integer tiles for activations and their gradients; the bytes are laid out in :mod:`.tile_format`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import tile_torch
from .codec import Codec, checked_payload, checked_shape, to_bytes
from .tile_format import MAX_EXPONENT, TileFormat

_CPU_CHUNK = 1 << 18  # elements brought into float32 and order at a time: they stay in the cache of a core
_DEVICE_CHUNK = 1 << 22  # elements that torch works on at a time, which bounds its temporaries
_WORD = (1 << 64) - 1


class TileCodec(Codec):
    """Quantize the last dimension in tiles, in the format of `fmt`.

    Bytes of a row depend on that row and the seed only: not on other rows, nor on its place among them. An
    element is within half a step of its tile's scale; within one and a half on the side opposite to the
    tile's extreme, where the signed grid has a level less; with `hadamard` this holds of the rotated tile.
    Elements that are infinite, NaN, or 2^100 and more in magnitude raise CodecError. A tile whose scale is
    2^15 times smaller than the row's largest gets the smallest scale there is. A tensor without dimensions is
    a row of one element.

    `random` rounds up or down by chance, so that the mean over seeds is the value (Gupta et al., 2015; AQ-SGD,
    Wang et al., 2022, asks for it). The noise is a hash of the seed, the row's content, and the element's
    number. `hadamard` spreads an outlier over its tile (QuIP#, Tseng et al., 2024); a short last tile is left
    as it is. `outliers` gives 8 bits to the tiles of largest scale (LLM.int8(), Dettmers et al., 2022, keeps
    outliers apart), a fixed number in every row.
    """

    def __init__(self, fmt: TileFormat) -> None:
        self.fmt = fmt
        self.spec = fmt.spec
        self._grids = [fmt.grid(fmt.bits), fmt.grid(8)]
        self._constants = np.array(
            [[g.p_divisor, g.q_divisor, g.unit, g.margin, *fmt.rotation] for g in self._grids], dtype=np.float32
        )
        self._clamps = np.array([[g.low, g.high] for g in self._grids], dtype=np.int64)

    def nbytes(self, shape: Sequence[int]) -> int:
        rows, n = _rows(checked_shape(shape))
        return rows * self._row_nbytes(n)

    def encode(self, x: Tensor, seed: int = 0) -> bytes:
        rows, n = _rows(checked_shape(x.shape))
        if rows * n == 0:
            return b""
        x_RN = x.detach().reshape(rows, n)
        out = torch.empty((rows, self._row_nbytes(n)), dtype=torch.uint8, device=x.device)
        if x.device.type != "cpu":
            step = max(1, _DEVICE_CHUNK // n)
        else:
            step = rows if x.dtype is torch.float32 and x_RN.is_contiguous() else max(1, _CPU_CHUNK // n)
        for start in range(0, rows, step):
            self._encode_rows(x_RN[start : start + step].float().contiguous(), out[start : start + step], seed)
        return to_bytes(out)

    def decode(self, payload: bytes | memoryview, shape: Sequence[int]) -> Tensor:
        dims = checked_shape(shape)
        rows, n = _rows(dims)
        view = checked_payload(payload, self.nbytes(dims), self.spec)
        out_RN = torch.empty((rows, n), dtype=torch.float32)
        if rows * n:
            self._decode_rows(np.frombuffer(view.toreadonly(), np.uint8).reshape(rows, -1), out_RN)
        return out_RN.view(dims)

    def _row_nbytes(self, n: int) -> int:
        return self.fmt.sections(n)[-1]

    def _encode_rows(self, x_RN: Tensor, out: Tensor, seed: int) -> None:
        if x_RN.device.type != "cpu":
            return tile_torch.encode_rows(self.fmt, x_RN, out, seed)
        from . import tile_kernels  # numba: half a second that a process without tiles need not wait

        n = x_RN.shape[1]
        failure = tile_kernels.encode(
            x_RN.numpy(), out.numpy(), *self._layout(n), self._constants, self._clamps, np.uint64(seed & _WORD)
        )
        if failure:
            raise tile_torch.non_finite()

    def _decode_rows(self, data: np.ndarray, out_RN: Tensor) -> None:
        from . import tile_kernels

        layout = self._layout(out_RN.shape[1])
        failure = tile_kernels.decode(data, out_RN.numpy(), *layout, self._constants, MAX_EXPONENT)
        if failure:
            bad = {
                tile_kernels.BAD_EXPONENT: tile_torch.bad_exponent,
                tile_kernels.BAD_POSITIONS: tile_torch.bad_positions,
            }
            raise bad[failure]()

    def _layout(self, n: int) -> tuple[np.ndarray, tuple[int, int, bool, bool, bool, int, int, int]]:
        """What the kernels have to know of the format of a row."""
        f = self.fmt
        options = (f.bits, f.tile, f.zero, f.hadamard, f.random, f.kept(n), f.extra(n), f.index_nbytes(n))
        return np.array(f.sections(n), dtype=np.int64), options


def _rows(dims: tuple[int, ...]) -> tuple[int, int]:
    """Rows and elements of a row; a tensor without elements has no rows."""
    n = dims[-1] if dims else 1
    return (math.prod(dims[:-1]), n) if n else (0, 0)
