"""Codecs that only change the number format: fp32, fp16, bf16."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .codec import Codec, CodecError, checked_payload, checked_shape, from_bytes, to_bytes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CastCodec(Codec):
    """Send elements as `spec`: fp32 bit for bit, fp16 and bf16 rounded to nearest.

    The narrow formats saturate at their largest finite value (65504 for fp16) instead of becoming infinite.
    A NaN goes through unchanged: a cast looks at no value.
    """

    def __init__(self, spec: str) -> None:
        if spec not in DTYPES:
            raise CodecError(f"unknown cast {spec!r}", f"use one of {', '.join(DTYPES)}")
        self.spec = spec
        self.dtype = DTYPES[spec]

    def encode(self, x: Tensor, seed: int = 0) -> bytes:
        x = x.detach().float()
        if self.dtype is not torch.float32:
            limit = torch.finfo(self.dtype).max
            x = x.clamp(-limit, limit).to(self.dtype)
        return to_bytes(x)

    def decode(self, payload: bytes | memoryview, shape: Sequence[int]) -> Tensor:
        dims = checked_shape(shape)
        view = checked_payload(payload, self.nbytes(dims), self.spec)
        return from_bytes(view, self.dtype).float().view(dims)

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(checked_shape(shape)) * self.dtype.itemsize
