"""What counts as wrong, and the limits the check asks for."""

from __future__ import annotations

import math

import pytest

from potluck.benchmarks.netlab import PROFILES, UNLIMITED, Line, Pair, Profile
from potluck.benchmarks.netlab.check import Measure, Report, Row


def a_row(asked: float, measured: float) -> Row:
    return Row(what="rate", asked=asked, measured=measured, unit="Mbit/s", allowed=0.05 * asked)


def test_what_is_off_by_more_than_allowed_or_was_not_measured_is_wrong():
    good = [a_row(10, 9.6), a_row(10, 10.4), a_row(math.inf, 700)]
    assert Report(profile="p", how="h", rows=good).ok
    for bad in (a_row(10, 9.4), a_row(10, 10.6), a_row(10, 0.0), a_row(10, math.nan)):
        report = Report(profile="p", how="h", rows=[*good, bad])
        assert not report.ok
        assert str(report).startswith("p: WRONG") and str(report).count("WRONG") == 2


def test_what_is_asked_follows_from_both_lines_and_the_way():
    lines = (
        Line(up_mbit=8, down_mbit=50, delay_ms=10, jitter_ms=2, loss=0.1),
        Line(up_mbit=20, down_mbit=4, queue_ms=50),
    )
    profile = Profile(name="p", about="", lines=lines, pairs={(0, 1): Pair(mbit=6, delay_ms=30, queue_ms=70)})
    measure = Measure(None, profile.after(UNLIMITED), None)  # type: ignore[arg-type]
    assert (measure.mbit(1, 2), measure.mbit(2, 1), measure.mbit(1, 0), measure.mbit(0, 1)) == (4, 6, 8, 50)
    assert measure.lost(1, 2) == pytest.approx(0.1)
    rates = (8, 6, 4, 20, 6, 50)
    assert measure.trip_ms(1, 2, 1000) == pytest.approx(2 * (10 + 1 + 30) + sum(8 / rate for rate in rates))


def test_round_trips_of_the_named_profiles_are_what_they_say():
    for name, asked in {"datacenter": 0.5, "1g": 5, "100m": 15, "home-cable": 25, "home-dsl": 40}.items():
        line = PROFILES[name].line(0)
        assert 4 * line.delay_ms == pytest.approx(asked) and f"{asked:g} ms" in PROFILES[name].about
