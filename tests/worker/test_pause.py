"""How long a pause is, and that it is kept."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from potluck.protocol.errors import ConfigError, StateError
from potluck.worker import pause as pauses
from potluck.worker.gate import Observed, Rules
from potluck.worker.pause import Pause, moment, span
from potluck.worker.switch import Switch

NOON = datetime(2026, 11, 23, 12, 0)


@pytest.mark.parametrize(
    ("text", "minutes"), [("2h", 120), ("90m", 90), ("1h30m", 90), ("1 d", 1440), ("45min", 45), ("1d2h", 1560)]
)
def test_lengths(text, minutes):
    assert span(text) == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["", "2", "h", "0h", "-1h", "2w", "1e9h", "999999999999999999999d", "2h until"])
def test_what_is_no_length(text):
    with pytest.raises(ConfigError):
        span(text)


def test_moments():
    assert moment("18:00", NOON) == NOON.replace(hour=18)
    assert moment("9:30", NOON) == datetime(2026, 11, 24, 9, 30)
    assert moment("12:00", NOON) == datetime(2026, 11, 24, 12, 0)
    assert moment("2026-12-01 08:00", NOON) == datetime(2026, 12, 1, 8, 0)
    for text in ("", "25:00", "2026-11-22 08:00", "2099-01-01 08:00", "soon"):
        with pytest.raises(ConfigError):
            moment(text, NOON)


def test_a_pause_is_kept_until_its_end(tmp_path):
    pauses.save(tmp_path, Pause(until=100.0))
    assert pauses.load(tmp_path, 99.0) == Pause(until=100.0)
    assert pauses.load(tmp_path, 101.0) is None
    pauses.save(tmp_path, Pause())
    assert pauses.load(tmp_path, 1e12) == Pause()
    pauses.save(tmp_path, None)
    assert pauses.load(tmp_path, 0.0) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"{", b'{"until": "soon"}', b'{"other": 1}', b"\xff" * 100])
def test_a_damaged_file_is_a_pause(tmp_path, data):
    (tmp_path / pauses.FILE).write_bytes(data)
    assert pauses.load(tmp_path, 0.0) == Pause()


async def test_a_switch_follows_the_time_and_the_machine(tmp_path):
    now, seen = [1000.0], [Observed()]
    switch = Switch(tmp_path, Rules(), observe=lambda rules: seen[0], clock=lambda: now[0])
    await switch.look()
    assert switch.hold is None
    switch.pause_until(1060.0)
    assert switch.hold is not None and switch.hold.at_once
    waiting = asyncio.create_task(switch.until(lambda hold: hold is None))
    now[0] = 1061.0
    await switch.look()
    await asyncio.wait_for(waiting, 5)
    assert switch.hold is None and pauses.load(tmp_path, 0.0) is None

    seen[0] = Observed(on_battery=True)
    await switch.look()
    assert switch.hold is not None and not switch.hold.at_once and switch.verdict.reason == "on battery"
    seen[0] = Observed()
    for _ in range(3):  # it may be back in a moment
        now[0] += 9.0
        assert not switch.verdict.may_run
        await switch.look()
    now[0] += 9.0
    await switch.look()
    assert switch.verdict.may_run
    switch.pause_until(None)
    again = Switch(tmp_path, Rules(), observe=lambda rules: Observed(), clock=lambda: 1e9)
    assert again.pause == Pause()
    again.resume()
    assert again.hold is None and Switch(tmp_path, Rules()).pause is None


def test_a_pause_that_cannot_be_kept_is_refused(tmp_path):
    switch = Switch(tmp_path / "not there", Rules())
    with pytest.raises(StateError):
        switch.pause_until(None)
    assert switch.pause is None
