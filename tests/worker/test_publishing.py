"""A model on its way to the coordinator holds nobody up, and is given up when nobody wants it."""

from __future__ import annotations

import threading
from functools import partial

import torch

from potluck.protocol.errors import UnreachableError
from potluck.protocol.plan import Plan, Replica, StagePlan
from potluck.worker import publishing
from potluck.worker.outside import Views
from potluck.worker.plan import View


def test_training_goes_on_while_a_model_is_uploaded(local_run, make_config, monkeypatch):
    ours = local_run(make_config(steps=4))
    way, worker_class = threading.Event(), ours.worker_class
    publish = worker_class.publish

    def slow(self, step, stage, data, is_wanted):
        assert step != 0 or way.wait(30), "nothing was trained meanwhile"
        publish(self, step, stage, data, is_wanted)

    monkeypatch.setattr(worker_class, "publish", slow)
    ours.join("a", "b")
    ours.wait(lambda: ours.machine.committed.step >= 2)
    assert 0 not in ours.published
    way.set()
    ours.finish()
    assert set(ours.published) >= {4}
    assert all(torch.isfinite(t).all() for t in ours.weights().values())


MADE = partial(publishing.packed, {"x": torch.ones(3)})


class Refusing:
    """A coordinator to whom nothing gets through."""

    def __init__(self, views: Views) -> None:
        self.views, self.tries = views, 0

    def publish(self, step, stage, data, is_wanted):
        self.tries += 1
        assert is_wanted()
        if self.tries == 3:
            self.views.put(plan_of(2))
        raise UnreachableError("the upload broke")


def plan_of(generation: int) -> View:
    stage = StagePlan(first_layer=0, last_layer=2, replicas=(Replica(peer="a", addresses=()),))
    plan = Plan(
        generation=generation,
        first_step=0,
        first_sample=0,
        origin="init",
        origin_generation=0,
        microbatches=1,
        microbatch_size=1,
        stages=(stage,),
    )
    return View(phase="training", plan=plan, publish=7)


def test_an_upload_is_tried_again_until_another_generation_begins(monkeypatch):
    monkeypatch.setattr(publishing, "PAUSE_SECONDS", 0.0)
    views = Views()
    views.put(plan_of(1))
    hq = Refusing(views)
    publishing.upload(hq, views, 7, 0, 1, MADE)
    assert hq.tries == 3
    publishing.upload(hq, views, 7, 0, 1, MADE)  # of a generation that is over: not even tried
    publishing.upload(hq, views, 8, 0, 2, MADE)  # of a step that nobody asked for
    assert hq.tries == 3
    views.close()
    publishing.upload(hq, views, 7, 0, 2, MADE)
    assert hq.tries == 3
