"""The one codec interface: a tensor to bytes and back. Codecs are found by their text in :mod:`.registry`.

The shape travels beside the payload, in the frame's header. Multi-byte numbers are little-endian. A payload
comes from a stranger: its length is held against the shape before anything is allocated.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_DIMS = 8
MAX_ELEMENTS = 1 << 48
_LITTLE_INT = {1: "<u1", 2: "<i2", 4: "<i4"}


class CodecError(ValueError):
    """A spec, shape, tensor or payload that a codec refuses."""

    code = "codec"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.hint = hint


class Codec(ABC):
    """A stateless pair of functions between a tensor and its bytes.

    `spec` is the canonical text that `build` turns into an equal codec on the other side.
    """

    spec: str

    @abstractmethod
    def encode(self, x: Tensor, seed: int = 0) -> bytes:
        """The payload of `x` (any shape, strides, device, real dtype). `seed` is for rounding by chance."""

    @abstractmethod
    def decode(self, payload: bytes | memoryview, shape: Sequence[int]) -> Tensor:
        """The float32 CPU tensor of `shape`; CodecError if the payload cannot be one."""

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """The exact length of the payload for `shape`, without running."""


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple of plain ints that torch can hold, or CodecError."""
    try:
        dims = tuple(operator.index(d) for d in shape)
    except TypeError:
        raise CodecError("a shape is a sequence of whole numbers") from None
    if len(dims) > MAX_DIMS or any(d < 0 for d in dims) or math.prod(max(d, 1) for d in dims) > MAX_ELEMENTS:
        raise CodecError(f"impossible shape with {len(dims)} dimensions")
    return dims


def checked_payload(payload: bytes | memoryview, expected: int, what: str) -> memoryview:
    """The payload as flat bytes if it is exactly `expected` long, or CodecError."""
    view = memoryview(payload)
    if view.nbytes != expected:
        raise CodecError(f"{what}: payload of {view.nbytes} bytes, expected {expected}")
    if not view.contiguous:
        raise CodecError(f"{what}: payload is not one run of bytes")
    return view.cast("B")


def to_bytes(x: Tensor) -> bytes:
    """The elements of `x` in order, little-endian, bit for bit."""
    size = x.element_size()
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    flat = x.detach().cpu().contiguous().view(-1).view(ints)
    return flat.numpy().astype(_LITTLE_INT[size], copy=False).tobytes()


def from_bytes(payload: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """The flat tensor whose `to_bytes` is `payload` (a copy, so it can be written to)."""
    if not len(payload):
        return torch.empty(0, dtype=dtype)
    little = np.dtype(_LITTLE_INT[dtype.itemsize])
    return torch.from_numpy(np.frombuffer(payload, little).astype(little.newbyteorder("="))).view(dtype)
