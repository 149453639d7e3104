"""Internet lines on one machine: hosts in network namespaces, and between them rates, delays, jitter and loss.

``Line`` and ``Profile`` say what a line is like (``profiles.py``), ``sessions`` and ``daylight`` who is there when
(``traces.py``), ``Lab`` makes the hosts (``lab.py``). ``python -m benchmarks.netlab check`` measures whether the lines
are what they should be. Linux only.
"""

from __future__ import annotations

from .lab import Lab, LabError
from .profiles import PROFILES, UNLIMITED, Line, Pair, Profile
from .traces import Turn, daylight, sessions

__all__ = ["PROFILES", "UNLIMITED", "Lab", "LabError", "Line", "Pair", "Profile", "Turn", "daylight", "sessions"]
