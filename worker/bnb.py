"""bitsandbytes, which is optional: the arithmetic of 8-bit moments, and kernels that unpack 4 bits."""

from __future__ import annotations

import importlib
import logging
from typing import Any


def functions() -> Any:
    """``bitsandbytes.functional``; ``ImportError`` without it."""
    # On a CPU it advises to install kernels that nothing here calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes.functional")
