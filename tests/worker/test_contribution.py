"""What a worker has given: samples that count once, bytes by day, kept over restarts."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from potluck.protocol import control_pb2 as pb
from potluck.protocol.frames import Purpose
from potluck.protocol.meter import Traffic
from potluck.protocol.plan import Lost, Plan, Replica, StagePlan
from potluck.worker.contribution import FILE, Contribution
from potluck.worker.energy import Energy
from potluck.worker.plan import View

PLAN = Plan(
    generation=1,
    first_step=0,
    first_sample=0,
    origin="init",
    origin_generation=0,
    stages=(StagePlan(first_layer=0, last_layer=2, replicas=(Replica(peer="a"), Replica(peer="b"))),),
    microbatches=1,
    microbatch_size=1,
)
DAY = date(2026, 11, 23)


def at_round(given: Contribution, step: int, samples: int, *, generation: int = 1, attempt: int = 0) -> None:
    done = pb.RoundDone(generation=generation, attempt=attempt, step=step, samples=samples)
    given.reported({"round_done": done}, 0.5)


def view(committed: int, plan: Plan | None = PLAN) -> View:
    return View(phase="training", plan=plan, committed=committed)


def test_only_rounds_that_are_committed_count(tmp_path: Path) -> None:
    given = Contribution(tmp_path)
    given.follow(view(0))
    given.reported({"step_done": pb.StepDone(samples=8)}, 0.5)
    at_round(given, 4, 16)
    at_round(given, 8, 20)
    given.follow(view(4))
    given.follow(view(4))
    assert (given.totals.computed, given.totals.committed, given.totals.work) == (8, 16, 8.0)
    given.follow(view(8))
    assert given.totals.committed == 36


def test_a_round_that_was_on_its_way_when_somebody_was_lost_counts_only_as_it_comes_again(tmp_path: Path) -> None:
    given = Contribution(tmp_path)
    given.follow(view(0))
    at_round(given, 4, 16)
    at_round(given, 8, 20)
    after = replace(PLAN, lost=(Lost(peer="b", since=4),), void=9)
    given.follow(view(4, after))
    at_round(given, 12, 40, attempt=1)
    given.follow(view(12, after))
    assert given.totals.committed == 16 + 40


def test_the_closing_round_counts_in_the_next_generation_and_what_was_given_up_does_not(tmp_path: Path) -> None:
    given = Contribution(tmp_path)
    given.follow(view(0))
    at_round(given, 4, 16)
    at_round(given, 8, 99)
    second = replace(PLAN, generation=2, origin="round", origin_generation=1, first_step=4)
    given.follow(view(4, second))
    assert given.totals.committed == 16
    third = replace(second, generation=3, first_step=8)  # that step is another's: the generation was given up
    given.follow(view(8, third))
    assert given.totals.committed == 16


def test_while_there_is_no_plan_the_last_one_says_what_counts(tmp_path: Path) -> None:
    given = Contribution(tmp_path)
    given.follow(view(0))
    at_round(given, 4, 16)
    given.follow(view(4, None))
    assert given.totals.committed == 16


def test_bytes_and_hours_add_up_over_sessions_days_and_restarts(tmp_path: Path) -> None:
    def traffic(sent: int, received: int) -> list[Traffic]:
        return [
            Traffic("a", "out", Purpose.ACTIVATION, sent, 0, 1),
            Traffic("a", "in", Purpose.GRADIENT, received, 0, 1),
        ]

    given = Contribution(tmp_path)
    given.begin(None)
    assert given.spent(traffic(100, 10), 2.0, None, DAY) == (100, 10)
    assert given.spent(traffic(150, 30), 2.0, None, DAY) == (50, 20)
    given.begin(None)  # another session: its meter is new
    given.spent(traffic(7, 0), 1.0, None, date(2026, 11, 24))
    given.save()
    again = Contribution(tmp_path)
    assert again.totals == given.totals
    t = again.totals
    assert (t.sent, t.received, t.sent_today, t.received_today, t.seconds) == (157, 30, 7, 0, 5.0)
    assert (t.since, t.day, t.joules) == ("2026-11-23", "2026-11-24", None)


def test_energy_is_what_was_used_in_sessions_only(tmp_path: Path) -> None:
    given = Contribution(tmp_path)
    given.begin(1000.0)
    given.spent([], 1.0, 1300.0, DAY)
    given.begin(9000.0)
    given.spent([], 1.0, 9100.0, DAY)
    assert given.totals.joules == 400.0


@pytest.mark.parametrize("data", [b"", b"{", b'{"sent": "many"}', b"[]", b"\xff"])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    assert Contribution(tmp_path).totals.sent == 0


def test_counters_of_energy_that_begin_anew(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of it: not counted again
    (package / "max_energy_range_uj").write_text("10000000\n")
    (package / "energy_uj").write_text("9000000\n")
    energy = Energy(powercap=tmp_path)
    assert energy.joules() == pytest.approx(0.0)
    (package / "energy_uj").write_text("1000000\n")
    assert energy.joules() == pytest.approx(2.0)
    assert Energy(powercap=tmp_path / "none").joules() is None
