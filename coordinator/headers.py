"""The header of a safetensors file: what the coordinator knows of tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..protocol.errors import WireError

HEADER_LIMIT = 1 << 20  # of a safetensors file, in bytes


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries in a safetensors file's JSON header, and the bytes behind it; ``WireError`` if it is not one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= HEADER_LIMIT:
                raise WireError("not a safetensors file")
            header = json.loads(file.read(length))
            rest = os.fstat(file.fileno()).st_size - 8 - length
    except (OSError, ValueError):
        raise WireError("not a safetensors file") from None
    if not isinstance(header, dict):
        raise WireError("not a safetensors file")
    header.pop("__metadata__", None)
    return header, rest


def encoded(header: Mapping[str, Any], nbytes: int = 0) -> bytes:
    """A file's beginning with this header; ``nbytes``: how long it is to be, if that is more."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, nbytes - 8 - len(text))
    return len(text).to_bytes(8, "little") + text
