"""What a machine is at: programs by name, and its battery."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from potluck.worker.gate import Observed, Rules
from potluck.worker.memory import held, release
from potluck.worker.observe import observe, running

NAME = "Potluck-Game"


@pytest.mark.skipif(not Path("/bin/sleep").exists(), reason="no program to copy")
def test_a_program_is_found_by_its_name(tmp_path: Path) -> None:
    program = tmp_path / NAME
    shutil.copy("/bin/sleep", program)
    rules = Rules(yield_to=("potluck-game.exe", "another"), on_battery=True)
    with subprocess.Popen([program, "60"]) as game:
        try:
            assert observe(rules) == Observed(programs=("potluck-game.exe",))
        finally:
            game.kill()
    assert observe(rules) == Observed()


def test_a_worker_does_not_make_room_for_itself() -> None:
    own = psutil.Process().name()
    others = [p for p in psutil.process_iter(["name"]) if p.info["name"] == own and p.pid != psutil.Process().pid]
    assert running((own,)) == ((own,) if others else ())


@pytest.mark.parametrize(
    ("battery", "expected"),
    [
        (None, False),
        (SimpleNamespace(power_plugged=True), False),
        (SimpleNamespace(power_plugged=None), False),
        (SimpleNamespace(power_plugged=False), True),
        (OSError("no such file"), False),
    ],
)
def test_a_battery(monkeypatch: pytest.MonkeyPatch, battery: object, expected: bool) -> None:
    def sensors() -> object:
        if isinstance(battery, Exception):
            raise battery
        return battery

    monkeypatch.setattr(psutil, "sensors_battery", sensors, raising=False)
    assert observe(Rules()).on_battery is expected
    assert not observe(Rules(on_battery=True)).on_battery  # nobody asked


def test_memory_can_be_asked_for_and_given_back_while_torch_is_there_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.cuda", SimpleNamespace())
    assert held().gpu is None and held().ram > 0
    release()
