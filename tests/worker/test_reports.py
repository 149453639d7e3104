"""What a worker says again to a coordinator that was started anew, and when it dials."""

from __future__ import annotations

import pytest

from potluck.protocol import control_pb2 as pb
from potluck.worker.control import pause_seconds
from potluck.worker.reports import KEPT, Reports


def told(steps: int, generation: int = 1) -> Reports:
    reports = Reports()
    reports.add(ready=pb.Ready(generation=generation))
    for step in range(steps):
        reports.add(step_done=pb.StepDone(generation=generation, step=step))
    return reports


def kinds(reports: Reports, sent: int = 0) -> list[tuple[int, str]]:
    return [(up.seq, up.WhichOneof("body")) for up in reports.after(sent)]


def test_what_is_acknowledged_is_not_said_again_to_the_same_coordinator() -> None:
    reports = told(3)
    assert [seq for seq, _ in kinds(reports)] == [1, 2, 3, 4] and kinds(reports, sent=3) == [(4, "step_done")]
    reports.acknowledged(3)
    reports.welcomed(3)
    assert kinds(reports) == [(4, "step_done")]
    reports.welcomed(4)  # its acknowledgement was lost with the line
    assert not reports


def test_a_coordinator_that_begins_anew_hears_the_newest_of_each_kind_in_order() -> None:
    reports = told(20)
    reports.acknowledged(20)
    reports.add(round_done=pb.RoundDone(generation=1, step=20))
    reports.add(fault=pb.Fault(generation=1, text="line down"))
    reports.welcomed(0)
    steps = [(seq, "step_done") for seq in range(22 - KEPT, 22)]
    assert kinds(reports) == [(1, "ready"), *steps, (22, "round_done"), (23, "fault")]
    reports.acknowledged(23)
    reports.welcomed(0)  # and once more
    assert kinds(reports) == [(1, "ready"), *steps, (22, "round_done")]


def test_only_the_present_generation_is_said_again() -> None:
    reports = told(5)
    reports.acknowledged(6)
    reports.add(ready=pb.Ready(generation=2))
    reports.welcomed(0)
    assert kinds(reports) == [(7, "ready")]
    reports.add(round_done=pb.RoundDone(generation=1, step=4))  # it was on its way
    reports.acknowledged(8)
    reports.welcomed(0)
    assert kinds(reports) == [(7, "ready")]


@pytest.mark.parametrize(
    ("tries", "broken", "most"),
    [(0, 0.0, 0.5), (1, 0.3, 1.0), (2, 1.0, 2.0), (3, 3.0, 3.0), (500, 59.0, 3.0), (500, 61.0, 10.0)],
)
def test_dialling_again_begins_soon_and_stays_often_for_a_minute(tries: int, broken: float, most: float) -> None:
    assert pause_seconds(tries, broken) == most
