"""The whole control plane under random faults: the real state machine and store, workers that follow their real rules.

Training is replaced by bookkeeping: a stage's reference is named by the chain of rounds that made it, so a digest says
exactly which samples are in it. One seed is one history; a failure names its seed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_crew import simulate
from simulated_disk import Broken
from simulated_world import SEEDS

from potluck.coordinator import planning, run
from potluck.coordinator.state import (
    Mark,
    Rules,
    RunState,
)
from potluck.coordinator.verdict import Verdict
from potluck.protocol.plan import Plan


def test_the_run_survives_every_history(tmp_path: Path) -> None:
    for seed in range(SEEDS):
        simulate(seed, tmp_path / str(seed))


# Planted bugs: the simulation must find each.


def every_round_counts(plan: Plan, committed: Mark, at: int, reports: Any) -> Verdict:
    """A judge that believes everybody."""
    digests = tuple(bytes(reports[s.replicas[0].peer].digest) for s in plan.stages)
    sample = plan.first_sample_of(at)
    return Verdict(mark=Mark(kind="round", generation=plan.generation, step=at, sample=sample, digests=digests))


def blind_holders(rules: Rules, state: RunState, mark: Mark) -> list[list[str]]:
    """Takes everybody that holds a state of the right step for a holder, of whatever generation it is."""
    return [
        [
            p
            for p, m in sorted(state.members.items())
            if any((s.kind, s.step, s.first_layer) == ("round", mark.step, first) for s in m.savepoints)
        ]
        for first, _ in rules.layers
    ]


def same_generation(rules: Rules, state: RunState, start: Any) -> Plan:
    """Forgets to count the generation up after a restart from a committed round."""
    plan = planning.make_plan(rules, state, start)
    return replace(plan, generation=max(1, state.generation)) if start.mark.kind == "round" else plan


PLANTED = {
    "every round counts": (run, "judge", every_round_counts),
    "holders of another generation": (planning, "holders", blind_holders),
    "a generation is used twice": (run, "make_plan", same_generation),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_simulation_finds_a_planted_bug(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong = PLANTED[bug]
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(Broken):  # noqa: PT012
        for seed in range(100):
            simulate(seed, tmp_path / str(seed))
