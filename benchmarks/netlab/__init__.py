"""Internet lines on one machine: hosts in network namespaces, and between them rates, delays, jitter and loss.

``Line`` and ``Profile`` say what a line is like (``profiles.py``), ``Nat`` what a router does (``nat.py``),
``sessions`` and ``daylight`` who is there when (``traces.py``), ``Lab`` makes the hosts (``lab.py``). ``python -m
benchmarks.netlab check`` measures whether the lines are what they should be. Linux only.
"""

from __future__ import annotations

from .lab import Lab, LabError
from .nat import NATS, Nat
from .profiles import PROFILES, UNLIMITED, Line, Pair, Profile
from .traces import Turn, daylight, sessions

__all__ = [
    "NATS",
    "PROFILES",
    "UNLIMITED",
    "Lab",
    "LabError",
    "Line",
    "Nat",
    "Pair",
    "Profile",
    "Turn",
    "daylight",
    "sessions",
]
