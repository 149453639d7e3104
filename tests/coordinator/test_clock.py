"""The machine's clock is set while a run goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from scripted_hub import CONFIG, Hand, a_hub, disk, finished

from potluck.coordinator.clock import Clock


def test_the_runs_time_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    before = clock()
    assert abs(before - time.time()) < 60.0
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0.0 <= clock() - before < 60.0


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_nobody_loses_a_lease_when_the_clock_is_set(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = a_hub(CONFIG, tmp_path)
    ahead, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])

    def set_clock(number: int, tries: int) -> None:
        ahead[0] += jump if number > 2 else 0.0  # the first writes open the run

    disk(hub).refuse = set_clock
    await hub.start()
    uploads: set[tuple[int, int]] = set()
    await finished(hub, [Hand(peer, hub, CONFIG, uploads) for peer in ("a", "b")])
    kinds = [kind for (kind,) in await hub.read(hub.store.rows, "SELECT kind FROM events ORDER BY id")]
    times = [at for (at,) in await hub.read(hub.store.rows, "SELECT time FROM events ORDER BY id")]
    await hub.close()
    assert abs(ahead[0]) > 3600.0 and times == sorted(times) and times[-1] - times[0] < 60.0
    assert "RolledBack" not in kinds and kinds.count("PlanIssued") == 1
