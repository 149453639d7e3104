"""The five words an owner reads."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.worker.condition import WORDS, Here, clock, condition
from potluck.worker.gate import Verdict
from potluck.worker.pause import Pause
from potluck.worker.plan import View

NOON = datetime(2026, 11, 23, 12, 0)
PLAN = Plan(
    generation=3,
    first_step=0,
    first_sample=0,
    origin="init",
    origin_generation=0,
    stages=(
        StagePlan(first_layer=0, last_layer=2, replicas=(Replica(peer="a"),)),
        StagePlan(first_layer=2, last_layer=6, replicas=(Replica(peer="me"),)),
    ),
    microbatches=1,
    microbatch_size=1,
)
TRAINING = View(phase="training", plan=PLAN)
ME = Here(peer="me", connected=True, step=12, steps=100)


def said(view: View | None = TRAINING, here: Here = ME, pause: Pause | None = None, verdict: Verdict | None = None):
    return condition(view, here, pause, verdict or Verdict(may_run=True)).text(NOON)


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("running: step 12 of 100, stage 1 (layers 2-5)", {}),
        ("paused until 18:00, by you", {"pause": Pause(until=(NOON + timedelta(hours=6)).timestamp())}),
        ("paused, by you", {"pause": Pause()}),
        ("yielding: on battery", {"verdict": Verdict(may_run=False, reason="on battery")}),
        (
            "yielding until tomorrow 08:00: outside its hours",
            {"verdict": Verdict(may_run=False, reason="outside its hours", until=NOON + timedelta(hours=20))},
        ),
        ("waiting: 2 more workers must join", {"view": View(phase="waiting", note="2 more workers must join")}),
        ("waiting: for the coordinator", {"view": None, "here": Here(peer="me")}),
        ("waiting: the coordinator does not answer; dialling again", {"here": Here(peer="me")}),
        ("waiting: for a place in the run", {"here": Here(peer="other", connected=True)}),
        (
            "waiting: held: stage 0 has 1 of 2 replicas",
            {"view": View(phase="training", plan=PLAN, note="held: stage 0 has 1 of 2 replicas")},
        ),
        ("waiting: its stage 1 is got ready, then all begin together", {"view": View(phase="preparing", plan=PLAN)}),
        (
            "needs you: the disk is full. Free some space.",
            {"here": Here(peer="me", connected=True, trouble="the disk is full. Free some space.")},
        ),
    ],
)
def test_what_is_said(text, how):
    assert said(**how) == text


views = st.builds(
    View,
    phase=st.sampled_from(["waiting", "preparing", "training", "finishing", "finished", "stopped", "from the future"]),
    note=st.sampled_from(["", "held: a", "degraded: b", "something"]),
    plan=st.sampled_from([None, PLAN]),
)
heres = st.builds(
    Here, peer=st.sampled_from(["me", "other"]), connected=st.booleans(), trouble=st.sampled_from(["", "x"])
)


@given(
    view=st.none() | views,
    here=heres,
    pause=st.none() | st.builds(Pause, until=st.none() | st.floats(0, 4e9)),
    verdict=st.builds(Verdict, may_run=st.booleans(), reason=st.just("because")),
)
def test_every_state_has_one_of_five_words_and_all_but_running_say_why(view, here, pause, verdict):
    found = condition(view, here, pause, verdict)
    assert found.word in WORDS
    assert found.why
    assert "\n" not in found.text(NOON)
    if found.word == "running":
        assert pause is None and verdict.may_run and not here.trouble and view is not None and here.connected


def test_a_moment_in_words():
    assert clock(NOON + timedelta(hours=3), NOON) == "15:00"
    assert clock(NOON + timedelta(days=1), NOON) == "tomorrow 12:00"
    assert clock(NOON + timedelta(days=3), NOON) == "Thu 12:00"
    assert clock(NOON + timedelta(days=30), NOON) == "2026-12-23 12:00"
    assert clock(NOON - timedelta(days=1), NOON) == "2026-11-22 12:00"
