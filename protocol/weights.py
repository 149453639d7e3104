"""What a run begins from, when it begins from a checkpoint: its tensors by name, each with its SHA-256.

The coordinator writes it, workers check what they get against it. Bytes are those of the checkpoint's safetensors
files: little-endian, row by row.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .errors import ConfigError, StateError
from .manifest import is_sha256

StoredDtype = Literal["F32", "F16", "BF16"]
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """``file`` and ``start``: where its bytes lie in the checkpoint, below the folder or the hub's repository."""

    name: Annotated[str, msgspec.Meta(max_length=256)]
    dtype: StoredDtype
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)], ...], msgspec.Meta(max_length=4)]
    sha256: str
    file: Annotated[str, msgspec.Meta(max_length=256)]
    start: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]

    def __post_init__(self) -> None:
        if not is_sha256(self.sha256):
            raise ValueError("sha256 is not a lower-case SHA-256")

    @property
    def nbytes(self) -> int:
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``source``: the hub's id or the folder's name, for people. ``locations``: where the files are, too, and are tried
    before the coordinator."""

    source: _Text
    license: _Text
    locations: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=16)] = ()
    tensors: Annotated[tuple[StoredTensor, ...], msgspec.Meta(max_length=100_000)]

    @property
    def sha256(self) -> str:
        """Of all tensors' names and hashes: the same numbers, wherever they lie."""
        return hashlib.sha256(msgspec.json.encode([(t.name, t.dtype, t.sha256) for t in self.tensors])).hexdigest()

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> Weights:
        """Raises StateError for anything but such a list."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise StateError(f"the coordinator's list of weights is not usable: {error}", hint="Join again.") from None


def shards_of(folder: Path, single: str) -> list[Path]:
    """The files of a checkpoint that is one file called ``single``, or several with an index beside them; none if it is
    neither. ``ConfigError`` for an index that cannot be used, or that names files outside of its folder."""
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return [folder / single] if (folder / single).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} cannot be used: {error}", hint="Download it again.") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ConfigError(f"{index} names files outside of its folder", hint="Do not use it.")
    return [folder / name for name in names]
