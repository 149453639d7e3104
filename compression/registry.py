"""Codecs by their text, and a tensor packed together with what decodes it."""

import functools
from dataclasses import dataclass

from torch import Tensor

from . import cast, tile, tile_format
from .codec import Codec


@dataclass(frozen=True)
class Packed:
    """A payload together with what is needed to decode it."""

    spec: str
    shape: tuple[int, ...]
    payload: bytes

    @property
    def nbytes(self) -> int:
        return len(self.payload)


def pack(codec: Codec, x: Tensor, seed: int = 0) -> Packed:
    """Encode `x` and keep its codec and shape beside the bytes."""
    return Packed(codec.spec, tuple(x.shape), codec.encode(x, seed))


def unpack(packed: Packed) -> Tensor:
    """Decode what `pack` made; float32."""
    return build(packed.spec).decode(packed.payload, packed.shape)


@functools.lru_cache(maxsize=64)
def build(spec: str) -> Codec:
    """The codec named by `spec`; CodecError for anything unknown.

    A cast (`fp32`, `fp16`, `bf16`), or integers in tiles: `int4` is short for `int4:tile=64`, and options
    follow, as in `int3:tile=128,hadamard,random`; see :func:`.tile_format.parse`. `spec` of the codec is the
    canonical text.
    """
    if spec in cast.DTYPES:
        return cast.CastCodec(spec)
    return tile.TileCodec(tile_format.parse(spec))
