"""What this process holds of the machine's memory and of the GPU's, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Any, NamedTuple

import psutil


class Held(NamedTuple):
    """Bytes. ``gpu``: what torch has of the GPU, used or kept for later; None without one. The driver's own part, some
    hundred megabytes for a process that has used the GPU, is not in it."""

    ram: int
    gpu: int | None


def held() -> Held:
    cuda = initialized()
    return Held(psutil.Process().memory_info().rss, None if cuda is None else int(cuda.memory_reserved()))


def release() -> None:
    """Gives back to the system what nobody refers to any more."""
    gc.collect()
    if (cuda := initialized()) is not None:
        cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)


def initialized() -> Any:
    """``torch.cuda`` if this process has used it. While torch is loaded it is there in part only."""
    cuda = sys.modules.get("torch.cuda")
    is_initialized = getattr(cuda, "is_initialized", None)
    return cuda if is_initialized is not None and is_initialized() else None
