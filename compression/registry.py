"""Codecs by their text, and a tensor packed together with what decodes it."""

import functools
from dataclasses import dataclass

from torch import Tensor

from . import cast, tile
from .codec import Codec, CodecError


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
    """The codec named by `spec`; `int4` is short for `int4:tile=64`. CodecError for anything unknown."""
    if spec in cast.DTYPES:
        return cast.CastCodec(spec)
    for bits in tile.TILE_BITS:
        for width in tile.TILES:
            if spec == f"int{bits}:tile={width}" or (spec == f"int{bits}" and width == tile.DEFAULT_TILE):
                return tile.TileCodec(bits, width)
    raise CodecError(
        f"unknown codec {str(spec)[:80]!r}",
        f"use one of {', '.join(cast.DTYPES)}, int{{2,4,8}}:tile={{32,64,128}}",
    )
