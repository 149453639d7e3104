"""How many stages there may be, and where they are cut: one flat vector, in slices."""

from __future__ import annotations

import itertools

import pytest

from potluck.protocol.config import ModelConfig, RunConfig, dump, parse
from potluck.protocol.errors import ConfigError, WireError
from potluck.protocol.plan import Plan, Replica, Shape, StagePlan

SHAPE = Shape.of(ModelConfig(layers=7, d_model=16), 300)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("pipeline: {stages: 3}", range(3, 4)),
        ("pipeline: {stages: auto}", range(1, 5)),
        ("pipeline: {stages: {min: 2}}", range(2, 5)),
        ("pipeline: {stages: {min: 2, max: 3}}", range(2, 4)),
        ("{pipeline: {stages: auto}, model: {layers: 96}}", range(1, 33)),
    ],
)
def test_a_number_of_stages_or_a_range(text: str, counts: range) -> None:
    config = parse(text)
    assert config.pipeline.counts(config.model.layers) == counts
    assert parse(dump(config)) == config


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        ("5", "exceeds model.layers"),
        ("{min: 5, max: 6}", "exceeds model.layers"),
        ("{min: 3, max: 2}", "exceeds pipeline.stages.max"),
        ("many", "pipeline.stages"),
        ("{most: 3}", "pipeline.stages"),
        ("0", "pipeline.stages"),
    ],
)
def test_what_makes_no_sense_is_named(stages: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse(f"pipeline: {{stages: {stages}}}")


def test_a_fixed_number_is_the_default() -> None:
    assert RunConfig().pipeline.stages == 2


def test_all_cuts_are_those_of_each_number_by_itself() -> None:
    for count, cut in zip(range(1, 8), SHAPE.splits(range(1, 8)), strict=True):
        assert cut == SHAPE.split(count)
        assert [a for a, _ in cut] == [0, *(b for _, b in cut[:-1])] and cut[-1][1] == 7


def test_a_stage_is_a_slice_of_the_whole() -> None:
    for first, last in itertools.combinations(range(8), 2):
        assert SHAPE.size(first, last) == SHAPE.start(last) - SHAPE.start(first)


@pytest.mark.parametrize("parts", [((0, 1),), ((0, 1), (2, 4)), ((1, 4),), ((0, 3), (2, 4))])
def test_a_plan_whose_parts_leave_a_gap_is_refused(parts: tuple[tuple[int, int], ...]) -> None:
    stages = tuple(StagePlan(first_layer=a, last_layer=b, replicas=(Replica(peer="a"),)) for a, b in ((0, 2), (2, 4)))
    plan = Plan(
        generation=1,
        first_step=1,
        first_sample=1,
        origin="round",
        origin_generation=1,
        stages=stages,
        microbatches=1,
        microbatch_size=1,
        parts=tuple(StagePlan(first_layer=a, last_layer=b, replicas=()) for a, b in parts),
    )
    with pytest.raises(WireError):
        Plan.from_proto(plan.to_proto())
