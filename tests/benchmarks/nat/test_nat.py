"""Real peers and a real run behind routers. Nothing here asserts a speed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.nat import pairs, punch, report, train
from benchmarks.netlab.lab import LabError
from benchmarks.netlab.nat import NATS
from potluck.protocol.p2pd import is_installed

LINE = "100m"


@pytest.mark.timeout(180)
def test_two_with_routers_meet_at_the_relay_and_one_without_is_dialled(tmp_path: Path) -> None:
    kinds = ("none", "symmetric")
    try:
        found = list(pairs.measure(LINE, seconds=0.5, hold=0.0, folder=tmp_path, kinds=kinds))
    except LabError as error:
        pytest.skip(f"no lab here: {error}")
    assert [(p.dialler, p.listener) for p in found] == [(a, b) for a in kinds for b in kinds]
    for pair in found:
        assert not pair.failed and pair.rate and pair.first_seconds, pair
        direct = "none" in (pair.dialler, pair.listener)
        assert pair.path == pair.later == ("direct" if direct else "relayed"), pair


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not is_installed() or os.geteuid() != 0, reason="needs hivemind, and root")
def test_a_hole_is_punched_unless_a_router_takes_another_port_for_everybody(tmp_path: Path) -> None:
    """Both kinds of the home's router, and a channel that is relayed at first and moves."""
    wanted = {("port-restricted", "port-restricted"): "punched", ("symmetric", "symmetric"): "relayed"}
    try:
        found = punch.measure(LINE, seconds=0.5, hold=30.0, folder=tmp_path, pairs=tuple(wanted))
    except LabError as error:
        pytest.skip(f"no lab here: {error}")
    assert {(pair.dialler, pair.listener): pair.later for pair in found} == wanted, found


def trained(folder: Path, routers: str, cuts: int) -> train.Training:
    folder.mkdir()
    try:
        return train.train("2x1", routers, LINE, steps=12, cuts=cuts, folder=folder)
    except LabError as error:
        pytest.skip(f"no lab here: {error}")


@pytest.mark.timeout(180)
def test_two_behind_symmetric_routers_train_to_the_end_though_their_routers_restart(tmp_path: Path) -> None:
    found = trained(tmp_path / "cut", "symmetric", 2)
    assert found.problems == [] and found.samples == 12 * 8
    assert len(found.pauses) == 2 and found.rollbacks == 0, found
    assert found.relayed_mb > 5, "activations of fp32 crossed the coordinator's host"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_paths_were_cut_has_the_weights_of_one_without_routers(tmp_path: Path) -> None:
    assert trained(tmp_path / "cut", "symmetric", 4).model == trained(tmp_path / "plain", "none", 0).model


def test_the_report_names_every_pair_and_says_what_failed() -> None:
    made = [
        {"dialler": a, "listener": b, "path": "direct", "later": "direct", "failed": ""}
        | {"first_seconds": 0.25, "rate": 2.0, "share": 0.8}
        for a in NATS
        for b in NATS
    ]
    made[1] |= {"failed": "silent: nobody answers", "path": "", "later": "", "share": None}
    made[2] |= {"path": "relayed", "later": "direct"}
    text = report.paths({"rows": made, "line": "home-cable", "hold": 60.0, "seconds": 4.0})
    assert "| none | direct, 0.25 s, 80% | none: silent | relayed, then direct, 0.25 s, 80% |" in text
    assert "looked at again: 1 had changed" in text and all(f"*{kind}*" in text for kind in NATS)
