"""One core for everybody: pins the process before any library starts its threads, and says what it runs on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from importlib import metadata
from pathlib import Path

THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "QUANTIZATION_THREADS",  # hivemind's pool, 128 threads otherwise
)
LIBRARIES = ("numpy", "torch", "numba", "hivemind", "bitsandbytes", "constriction", "zstandard", "transformers")
_CLEAR_REFS, _STATUS, _CPUINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/cpuinfo")


def pin(core: int | None) -> str:
    """One thread for each library, all of them on one core; says how far that went. Call before importing torch."""
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    if not hasattr(os, "sched_setaffinity"):
        return "one thread each, not pinned to a core"
    core = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {core})
    return f"one thread each, all pinned to core {core}"


def conditions(pinned: str) -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    import torch

    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores ({platform.machine()}, {capability})",
        "threads": pinned,
        "load": _load(),
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, LIBRARIES)]),
    }


def start_peak() -> int | None:
    """Forgets the peak of resident memory; bytes resident now, or None where the kernel cannot say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before hides what is needed now
    except (AttributeError, OSError, TypeError):
        return None
    try:
        _CLEAR_REFS.write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def peak() -> int:
    """The most bytes that were resident since ``start_peak``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _cpu_model() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown processor")


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return f"{os.getloadavg()[0]:.1f} before the start; a machine of its own gives better numbers"


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"
