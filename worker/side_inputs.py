"""What goes with hidden states from stage to stage, as bytes: the targets, and where the documents lie.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocol.errors import WireError
from ..protocol.frames import TensorSpec
from .layout import Layout
from .packing import IGNORED

IDS = {"ids16": "<u2", "ids32": "<u4"}  # token ids plus one, so that 0 says IGNORED
LAYOUT = "layout"  # of every sequence: how many documents, and of each the length of its prefix and of the rest
_WORD = np.dtype("<u4")


def encode_ids(ids_BT: Tensor, vocab_size: int) -> tuple[str, bytes]:
    """Targets [B, T] as (codec, bytes): two bytes each if the vocabulary allows."""
    codec = ids_codec(vocab_size)
    return codec, (ids_BT.cpu().numpy() + 1).clip(min=0).astype(IDS[codec]).tobytes()


def decode_ids(payload: memoryview, spec: TensorSpec, vocab_size: int) -> Tensor:
    """Bytes to targets [B, T], int64; ``WireError`` for what is no token."""
    ids = torch.from_numpy(np.frombuffer(payload, dtype=IDS[spec.codec]).astype(np.int64)).view(*spec.shape)
    if int(ids.max()) > vocab_size:
        raise WireError(f"targets cannot be decoded: a token {int(ids.max()) - 1} of {vocab_size}")
    return torch.where(ids == 0, IGNORED, ids - 1)


def ids_codec(vocab_size: int) -> str:
    return "ids16" if vocab_size < 2**16 else "ids32"


def encode_layout(layout: Layout) -> bytes:
    """Some 8 bytes a document; of each, the prefix comes first."""
    out: list[NDArray[np.int64]] = []
    for segments, is_prefix in zip(layout.segments.cpu().numpy(), layout.is_prefix.cpu().numpy(), strict=True):
        lengths = np.bincount(segments[segments > 0].astype(np.int64))[1:]
        prefixes = np.bincount(segments[is_prefix].astype(np.int64), minlength=len(lengths) + 1)[1:]
        out += [np.array([len(lengths)]), np.stack([prefixes, lengths - prefixes], 1).ravel()]
    return np.concatenate(out).astype(_WORD).tobytes()


def decode_layout(payload: memoryview, shape: tuple[int, ...]) -> Layout:
    """Bytes to the layout of [B, T]. ``WireError`` for documents that are empty or do not fit."""
    size, length = shape
    segments, is_prefix = np.zeros(shape, np.int16), np.zeros(shape, np.bool_)
    words, at = np.frombuffer(payload, dtype=_WORD).astype(np.int64), 0
    for b in range(size):
        count = int(words[at]) if at < len(words) else -1
        runs = words[at + 1 : at + 1 + 2 * count]
        whole = runs[::2] + runs[1::2] if 0 <= count <= length and len(runs) == 2 * count else None
        if whole is None or (whole < 1).any() or whole.sum() > length:
            raise WireError(f"a layout that does not fit {length} positions")
        end, at = int(runs.sum()), at + 1 + 2 * count
        segments[b, :end] = np.repeat(np.arange(1, count + 1), whole)
        is_prefix[b, :end] = np.repeat(np.tile([True, False], count), runs)
    if at != len(words):
        raise WireError("a layout of more sequences than there are")
    return Layout(torch.from_numpy(segments), torch.from_numpy(is_prefix))


def layout_nbytes(shape: tuple[int, ...]) -> int:
    """At most: every position a document."""
    return _WORD.itemsize * shape[0] * (1 + 2 * shape[1])
