"""What the machine's GPU and processors have used, where their own counters can be read.

NVML: ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded, from Volta on), the whole GPU's, whoever
uses it. RAPL: Linux's ``powercap`` (uJ, of the processor packages; most systems let only root read it).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


class Energy:
    """``joules`` since this was made, None where no counter can be read."""

    def __init__(self, uuid: str = "", powercap: Path = POWERCAP) -> None:
        """``uuid``: the GPU's, as the driver knows it; empty: none is used."""
        self._nvml = None
        self._handle = ctypes.c_void_p()
        if uuid:
            with contextlib.suppress(OSError, AttributeError):
                nvml, handle = ctypes.CDLL(LIBRARY), ctypes.byref(self._handle)
                if not nvml.nvmlInit_v2() and not nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), handle):
                    self._nvml = nvml
        packages = sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []
        self._packages = [p for p in packages if p.name.count(":") == 1]  # those below a package are parts of it
        self._last: dict[str, float] = {}
        self._joules: float | None = None
        self.joules()

    def joules(self) -> float | None:
        """Must be asked now and then: RAPL's counter begins anew after some minutes."""
        for name, (now, most) in self._read().items():
            if name in self._last:
                used = now - self._last[name]
                self._joules = (self._joules or 0.0) + (used if used >= 0 else used + most)
            self._last[name] = now
        return self._joules

    def _read(self) -> dict[str, tuple[float, float]]:
        """Joules by counter, and after how many each begins anew."""
        found: dict[str, tuple[float, float]] = {}
        if self._nvml is not None:
            millijoules = ctypes.c_ulonglong()
            if not self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules)):
                found["gpu"] = (millijoules.value / 1e3, 0.0)
        for package in self._packages:
            with contextlib.suppress(OSError, ValueError):
                uj, most = (int((package / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
                found[package.name] = (uj / 1e6, most / 1e6)
        return found
