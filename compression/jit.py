"""Compiled loops: numba without the interpreter's lock, kept on disk between runs where a folder can be written."""

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on its first call; its machine code is cached beside the source or in numba's folder."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no cache folder can be written: compile anew in each process
        return numba.njit(nogil=True)(function)
