"""Codecs by their text."""

import functools

from . import cast, tile, tile_format
from .codec import Codec


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
