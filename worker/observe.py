"""What the machine is at, for the gate: its power supply, and programs that the owner wants to have it."""

from __future__ import annotations

import contextlib
import os

import psutil

from .gate import Observed, Rules


def observe(rules: Rules) -> Observed:
    """Looks only at what the rules ask for. A machine that says nothing of a battery has none."""
    return Observed(
        on_battery=not rules.on_battery and is_on_battery(),
        programs=running(rules.yield_to) if rules.yield_to else (),
    )


def is_on_battery() -> bool:
    battery = None
    with contextlib.suppress(Exception):  # a driver's nonsense stops nobody
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is not None and battery.power_plugged is False


def running(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that a process beside this one has, whatever the case, with or without ``.exe``."""
    wanted = {plain(name): name for name in names}
    found = set()
    for process in psutil.process_iter(["name"]):
        name = plain(process.info["name"] or "")
        if name in wanted and process.pid != os.getpid():
            found.add(wanted[name])
    return tuple(sorted(found))


def plain(name: str) -> str:
    return name.lower().removesuffix(".exe")
