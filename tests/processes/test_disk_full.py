"""The coordinator's disk fills up under a real run: it stands still, says why, and goes on when there is room."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SAMPLES_PER_STEP = 4
STEPS = 150
NOTE = "nothing new is given out until it is mended"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prlimit or tmpfs")


def standing(state: dict[str, Any]) -> bool:
    return NOTE in state["note"]


def nothing_new(network: Any) -> None:
    """While the disk is full, the ledger on it does not change, whatever is tried."""
    ledger = network.rows("SELECT COUNT(*), MAX(step), MAX(changed) FROM ledger")
    tries = network.state()["now"]
    network.until(lambda s: s["now"] > tries + 2.0 and standing(s))  # three tries or so
    assert network.rows("SELECT COUNT(*), MAX(step), MAX(changed) FROM ledger") == ledger


@pytest.mark.timeout(120)
def test_a_disk_that_refuses_for_a_while_costs_nothing_but_time(network: Any) -> None:
    """No file of the coordinator may grow beyond a limit: needs no rights, and SQLite meets a real error."""
    import resource

    network.configure(steps=STEPS)
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    network.until(lambda s: s["round"] > 1, 60.0)
    _, hard = resource.prlimit(coordinator.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(coordinator.popen.pid, resource.RLIMIT_FSIZE, (64 * 1024, hard))
    stuck = network.until(standing)
    assert stuck["phase"] == "training" and stuck["note"].startswith("the coordinator's disk refuses to write")
    nothing_new(network)
    assert network.state()["round"] == stuck["round"]
    resource.prlimit(coordinator.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))
    network.event(r"The disk refused to write for \d+ s; nothing is lost")
    assert [p.wait(40.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    assert network.committed_samples() == STEPS * SAMPLES_PER_STEP
    assert network.rows("SELECT COUNT(*) FROM ledger WHERE state != 'committed'") == [(0,)]
    assert network.rows("SELECT COUNT(*) FROM events WHERE kind = 'RolledBack'") == [(0,)]
    assert network.rows("SELECT COUNT(*) FROM events WHERE kind = 'StoodStill'") == [(1,)]
    assert coordinator.output.count("refuses to write") <= 1 and "Traceback" not in coordinator.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Mounts 8 MiB at a folder; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.mark.timeout(120)
def test_a_run_is_left_while_its_disk_is_full_and_goes_on(network: Any, small_disk: Callable[[Path], None]) -> None:
    small_disk(network.data_dir)
    network.configure(steps=STEPS)
    coordinator = network.coordinator()
    crew = [network.worker(name) for name in ("anna", "ben")]
    network.until(lambda s: s["round"] > 1, 60.0)
    ballast = fill(network.data_dir)
    stuck = network.until(standing)
    assert stuck["note"].startswith("the coordinator's disk is full")
    nothing_new(network)
    coordinator.interrupt()
    assert coordinator.wait(25.0) == 1, network.story([])
    last = coordinator.output.strip().splitlines()[-1]
    assert "the disk is full; " in last and "nothing acknowledged is lost" in last and "Traceback" not in last
    assert network.committed_samples() >= stuck["tokens"] / 16

    ballast.unlink()
    coordinator = network.coordinator()
    assert [p.wait(45.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    assert network.committed_samples() == STEPS * SAMPLES_PER_STEP
