"""The codec of a round: flat float32 differences of weights, top-k, then quantized.

The seeded mask comes before it (:mod:`.mask`). Mask 0.1, topk 0.2 and 4 bits is CocktailSGD's message (Wang et
al., ICML 2023); topk 0.03 in chunks of 4096 at 2 bits is SparseLoCo's (arXiv 2508.15706); with topk 1 it is a
plain quantizer. Payload: positions (only if top-k leaves any out, :mod:`.positions`), then values (:mod:`.values`,
:mod:`.signs`).
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import sync_kernels as kernels
from .codec import CodecError
from .positions import Layout, decode_positions, encode_positions, positions_bound
from .signs import SIGN_BITS, Signs
from .values import Exact, Grid

SYNC_BITS = (1, 2, 3, 4, 6, 8, 16, 32)
CHUNKS = (64, 65536)
_SAMPLE = 1 << 21  # values that `expected` encodes


@dataclass(frozen=True)
class Sparse:
    """Values at sorted distinct positions of a flat vector; `indices` None means all positions."""

    indices: Tensor | None
    values: Tensor

    def add_to(self, vector: Tensor, scale: float = 1.0) -> Tensor:
        """Add `scale` times this to `vector` (float32) in place, and return it; IndexError for a vector too short."""
        if self.indices is None:
            vector.detach().add_(self.values.to(vector.device), alpha=scale)
            return vector
        if vector.device.type != "cpu" or not vector.is_contiguous() or vector.dtype != torch.float32:
            vector.detach().index_add_(0, self.indices.to(vector.device), self.values.to(vector), alpha=scale)
            return vector
        indices, values = self.indices.contiguous().numpy(), self.values.contiguous().numpy()
        if not kernels.add_at(vector.detach().numpy(), indices, values, np.float32(scale)):
            raise IndexError(f"positions outside of a vector of {vector.numel()} elements")
        return vector

    def dense(self, n: int) -> Tensor:
        """A new float32 vector [n] with zeros where nothing was sent."""
        return self.add_to(torch.zeros(n))


@dataclass(frozen=True)
class Encoded:
    """The bytes for the wire, and exactly what a receiver will decode from them."""

    payload: bytes
    sent: Sparse


@dataclass(frozen=True, kw_only=True)
class SyncCodec:
    """How much of a weight difference is sent, and in how many bits.

    topk: share of the values that is sent, the largest by magnitude, the first ones among equals. chunk: 0 ranks
    all values together; else every `chunk` values among themselves, each chunk sending at least one. bits: per
    value; 32 is exact, 16 and below share one float32 scale per `bucket` values. With topk below 1, 2 bits are a
    sign and one of two levels, and 1 bit, which only then exists, is a sign. ValueError for settings out of range.
    """

    topk: float = 1.0
    chunk: int = 0
    bits: int = 4
    bucket: int = 256

    def __post_init__(self) -> None:
        if not 0.0 < self.topk <= 1.0:
            raise ValueError(f"topk must be above 0 and at most 1, not {self.topk}")
        low, high = CHUNKS
        if not (isinstance(self.chunk, int) and (self.chunk == 0 or low <= self.chunk <= high)):
            raise ValueError(f"chunk must be 0 or a whole number from {low} to {high}, not {self.chunk}")
        if self.bits not in SYNC_BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, SYNC_BITS))}, not {self.bits}")
        if self.bits == 1 and self.topk == 1.0:
            raise ValueError("bits must be 2 or more with topk 1: a sign alone is for values that are not near zero")
        if not (isinstance(self.bucket, int) and 8 <= self.bucket <= 65536):
            raise ValueError(f"bucket must be a whole number from 8 to 65536, not {self.bucket}")

    def bound(self, n: int) -> int:
        """The most bytes that a payload for `n` values can have; exact if topk is 1. CodecError from 2^31 on."""
        layout = self._layout(n)
        return positions_bound(layout) + self._values.nbytes(layout.kept)

    def expected(self, n: int) -> float:
        """Mean bytes of a payload for `n` independent values of one distribution, within 1 % from n = 10,000 on.

        Measured on a seeded sample: how positions fall does not depend on the distribution.
        """
        layout = self._layout(n)
        if layout.kept == n:
            return float(self._values.nbytes(n))
        return _positions_expected(self.topk, self.chunk, n) + self._values.nbytes(layout.kept)

    def encode(self, values: Tensor) -> Encoded:
        """Encode a flat vector (float32 [n], on any device); CodecError if it is not finite or not flat."""
        if values.dim() != 1:
            raise CodecError(f"a weight difference is a flat vector, not of shape {tuple(values.shape)}")
        x = values.detach().to("cpu", torch.float32).contiguous()
        layout = self._layout(x.numel())
        picked, head = None, b""
        if layout.kept < layout.n:
            picked = _largest(x, layout)
            head = encode_positions(picked, layout)
            source, x = x, torch.empty(layout.kept)
            kernels.take(source.numpy(), picked.numpy(), x.numpy())
        body, sent = self._values.encode(x)
        return Encoded(head + body, Sparse(picked, sent))

    def decode(self, payload: bytes | memoryview, n: int) -> Sparse:
        """What `encode` sent, on the CPU; CodecError for bytes that no encoder makes from `n` values."""
        layout = self._layout(n)
        view = memoryview(payload)
        if not view.contiguous:
            raise CodecError("a weight difference whose payload is not one run of bytes")
        view = view.cast("B")
        cut = view.nbytes - self._values.nbytes(layout.kept)
        if not 0 <= cut <= positions_bound(layout):
            raise CodecError(f"a weight difference of {n} values: payload of {view.nbytes} bytes")
        if layout.kept == layout.n:
            return Sparse(None, self._values.decode(view, n))
        picked = decode_positions(view[:cut], layout)
        return Sparse(picked, self._values.decode(view[cut:], layout.kept))

    def _layout(self, n: int) -> Layout:
        return Layout.of(n, self.topk, self.chunk)

    @property
    def _values(self) -> Exact | Grid | Signs:
        """How the values are written: in few bits, those that top-k left have a code of their own."""
        if self.bits == 32:
            return Exact()
        if self.topk < 1.0 and self.bits in SIGN_BITS:
            return Signs(self.bits, self.bucket)
        return Grid(self.bits, self.bucket)


def _largest(x: Tensor, layout: Layout) -> Tensor:
    """Sorted positions of the largest magnitudes, as `layout` shares them out; CodecError if one is not finite."""
    out = torch.empty(layout.kept, dtype=torch.int64)
    bits = x.numpy().view(np.uint32)
    if layout.chunk < layout.n or layout.chunk <= CHUNKS[1]:
        good = kernels.top_of_chunks(bits, layout.chunk, layout.each, layout.last, out.numpy())
    else:
        good = kernels.top_of_all(bits, layout.kept, out.numpy())
    if not good:
        raise CodecError("the weight difference has infinite or NaN elements")
    return out


@functools.lru_cache(maxsize=256)
def _positions_expected(topk: float, chunk: int, n: int) -> float:
    """Mean bytes of the positions of `n` values, from as many random messages as make up a sample."""
    whole = _SAMPLE // chunk * chunk if chunk else _SAMPLE
    size = min(n, whole)
    layout, generator = Layout.of(size, topk, chunk), torch.Generator().manual_seed(0)
    rounds = -(-whole // (4 * size)) if size < whole else 1
    nbytes = 0
    for _ in range(rounds):
        nbytes += len(encode_positions(_largest(torch.rand(size, generator=generator), layout), layout))
    return nbytes / rounds * Layout.of(n, topk, chunk).kept / layout.kept
