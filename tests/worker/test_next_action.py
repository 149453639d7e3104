"""What a worker does next, rule by rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck.protocol.config import EvalConfig, RunConfig
from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.worker import plan as rules
from potluck.worker.plan import Local, View, next_action

CONFIG = RunConfig(steps=100, eval=EvalConfig(every=10))
PLAN = Plan(
    generation=3,
    first_step=20,
    first_sample=320,
    origin="round",
    origin_generation=2,
    stages=(
        StagePlan(first_layer=0, last_layer=2, replicas=(Replica(peer="a"), Replica(peer="b"))),
        StagePlan(first_layer=2, last_layer=4, replicas=(Replica(peer="c"),)),
    ),
    microbatches=4,
    microbatch_size=2,
)
VIEW = View(phase="training", plan=PLAN, until=24, committed=20)
LOCAL = Local(peer="a", generation=3, seated=True, step=22, evaluated=20, round=20)


@pytest.mark.parametrize(
    ("view", "local", "expected"),
    [
        ({"released": True}, {}, rules.Exit()),
        ({"plan": None}, {}, None),
        ({}, {"generation": 2}, rules.TakeSeat(PLAN)),
        ({"phase": "preparing"}, {}, None),
        ({}, {}, rules.Train(22)),
        ({}, {"step": 24}, None),
        ({"until": 31}, {"step": 30}, rules.Evaluate(30)),
        ({"until": 31}, {"step": 30, "evaluated": 30}, rules.Train(30)),
        ({"publish": 20}, {}, rules.Publish(20)),
        ({"publish": 20}, {"published": 20}, rules.Train(22)),
        ({"publish": 20}, {"peer": "b"}, rules.Train(22)),
        ({"publish": 23}, {}, rules.Train(22)),
        ({"closing": "round", "end": 24}, {"step": 24}, rules.CloseRound(24)),
        ({"closing": "round", "end": 24}, {"step": 24, "round": 24}, None),
        ({"until": 30, "closing": "round", "end": 30}, {"step": 30}, rules.Evaluate(30)),
        ({"until": 30, "closing": "round", "end": 30}, {"step": 30, "evaluated": 30}, rules.CloseRound(30)),
        ({"until": 100}, {"step": 100}, None),
        ({"until": 100}, {"step": 100, "round": 100}, rules.Evaluate(100)),
        ({"until": 100, "closing": "round", "end": 100}, {"step": 100}, rules.CloseRound(100)),
        ({"closing": "save", "end": 24}, {"step": 24}, rules.Save(24)),
        ({"closing": "save", "end": 24}, {"step": 24, "saved": 24}, None),
        ({"phase": "finishing", "until": 100}, {"step": 100}, rules.Evaluate(100)),
    ],
)
def test_the_first_rule_that_applies(view, local, expected):
    assert next_action(replace(VIEW, **view), replace(LOCAL, **local), CONFIG) == expected


def test_a_plan_uses_every_sample_once():
    """Microbatches of a step tile its samples, every stage serves each microbatch once, steps follow on each other."""
    for step in (20, 21, 30):
        indices = [i for m in range(PLAN.microbatches_per_step) for i in PLAN.samples(step, m)]
        assert indices == list(range(PLAN.first_sample_of(step), PLAN.first_sample_of(step + 1)))
    for number, stage in enumerate(PLAN.stages):
        served = sorted(m for r in range(len(stage.replicas)) for m in PLAN.served(number, r))
        assert served == list(range(PLAN.microbatches_per_step))
