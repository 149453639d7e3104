"""When a machine may work: hours, battery, programs; against a rule of the minutes of a week."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.protocol.errors import ConfigError
from potluck.worker.gate import Observed, Rules, Window, decide

WEEK = 7 * 1440
MONDAY = datetime(2026, 11, 23)
MINUTE = timedelta(minutes=1)

windows = st.builds(
    Window,
    start=st.integers(0, 1439),
    end=st.integers(0, 1440),
    days=st.frozensets(st.integers(0, 6), min_size=1),
)
moments = st.datetimes(datetime(2025, 1, 1), datetime(2030, 1, 1)).map(lambda d: d.replace(second=0, microsecond=0))


def open_minutes(hours: tuple[Window, ...]) -> set[int]:
    """Minutes of the week, from Monday on, that are within."""
    found = set()
    for window in hours:
        for day in window.days:
            length = (window.end - window.start) % 1440 or 1440
            found |= {(day * 1440 + window.start + i) % WEEK for i in range(length)}
    return found


def minute_of(at: datetime) -> int:
    return at.weekday() * 1440 + at.hour * 60 + at.minute


@given(hours=st.lists(windows, min_size=1, max_size=3).map(tuple), now=moments)
def test_hours_are_those_of_the_week(hours, now):
    verdict, within = decide(Rules(hours=hours), Observed(), now), open_minutes(hours)
    assert verdict.may_run == (minute_of(now) in within)
    if not verdict.may_run:
        assert verdict.reason == "outside its hours" and not verdict.at_once and verdict.until is not None
    if verdict.until is not None:  # the first minute at which the answer is another
        assert (minute_of(verdict.until) in within) != verdict.may_run
        first, minutes = minute_of(now), int((verdict.until - now) / MINUTE)
        assert all(((first + i) % WEEK in within) == verdict.may_run for i in range(minutes))
    elif len(within) < 5 * 1440:
        pytest.fail("a time that ends has an end")


@given(windows)
def test_a_window_is_read_as_it_is_written(window):
    assert open_minutes((Window.parse(str(window)),)) == open_minutes((window,))


@given(st.text(max_size=30))
def test_what_is_no_window_is_refused_with_a_hint(text):
    with contextlib.suppress(ConfigError):  # and nothing else is raised
        assert Window.parse(text).days


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-08:00", "2026-11-23 07:59", "2026-11-23 08:00"),
        ("22:00-08:00", "2026-11-23 22:00", "2026-11-23 21:59"),
        ("sat,sun 00:00-24:00", "2026-11-22 23:59", "2026-11-23 00:00"),
        ("mon-fri 18:00 - 23:30", "2026-11-27 18:00", "2026-11-28 18:00"),
        ("fri 22:00-06:00", "2026-11-28 05:59", "2026-11-27 05:59"),  # a night belongs to the day it begins on
        ("sat-mon 9:00-10:00", "2026-11-23 09:30", "2026-11-24 09:30"),
    ],
)
def test_examples(text, inside, outside):
    rules = Rules(hours=(Window.parse(text),))
    assert decide(rules, Observed(), datetime.fromisoformat(inside)).may_run
    assert not decide(rules, Observed(), datetime.fromisoformat(outside)).may_run


@pytest.mark.parametrize("text", ["", "22-08", "25:00-08:00", "22:60-08:00", "xyz 22:00-08:00", "22:00-08:00 mon"])
def test_what_is_no_time(text):
    with pytest.raises(ConfigError):
        Window.parse(text)


def test_programs_come_before_the_battery_and_the_battery_before_the_hours():
    rules = Rules(hours=(Window.parse("00:00-00:01"),), yield_to=("game",))
    noon = MONDAY + timedelta(hours=12)
    both = Observed(on_battery=True, programs=("game",))
    first = decide(rules, both, noon)
    assert (first.may_run, first.reason, first.at_once, first.until) == (False, "game is running", True, None)
    assert decide(rules, Observed(on_battery=True), noon).reason == "on battery"
    assert decide(rules, Observed(), noon).reason == "outside its hours"
    assert decide(Rules(on_battery=True), Observed(on_battery=True), noon).may_run
    assert decide(Rules(), Observed(), noon).may_run
