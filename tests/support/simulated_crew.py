"""Workers of a simulated run: they follow the real rules on views; training is replaced by counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from simulated_disk import Broken, hold
from simulated_world import (
    CALM_EVENTS,
    FAULTY_EVENTS,
    Content,
    Worker,
    World,
    digest_of,
)

from potluck.coordinator.state import (
    Gone,
    Uploaded,
)
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan, SavePoint
from potluck.protocol.schedule import is_round
from potluck.worker import plan as rules_of_worker
from potluck.worker.plan import Action, Local, View, next_action


class Crew(World):
    """The world with its workers at work."""

    def act(self, worker: Worker) -> None:
        if not worker.alive:
            return
        view = worker.view
        for point in [p for p in worker.memory if p.step < view.committed and p.step != view.publish]:
            del worker.memory[point]
        if worker.pending is not None and self.exchange(worker):
            return
        action = next_action(view, worker.local, self.config)
        if action is not None:
            self.do(worker, action, view)

    def do(self, worker: Worker, action: Action, view: View) -> None:
        plan = view.plan
        match action:
            case rules_of_worker.Exit():
                if not worker.reports or not worker.connected:
                    self.end(worker)
                    self.feed(Gone(peer=worker.peer, session=worker.session))
            case rules_of_worker.TakeSeat(plan=new):
                self.take_seat(worker, new)
            case rules_of_worker.Publish(step=at):
                self.publish(worker, at)
            case rules_of_worker.Evaluate(position=at):
                assert plan
                worker.local = replace(worker.local, evaluated=at)
                if plan.places[worker.peer][0] == len(plan.stages) - 1:
                    done = pb.EvalDone(generation=plan.generation, step=at, loss_sum=1.0, targets=1)
                    worker.report(eval_done=done)
            case rules_of_worker.Train(step=at):
                self.train(worker, at)
            case rules_of_worker.CloseRound(step=at):
                if worker.pending is None:
                    self.capture(worker, at)
            case rules_of_worker.Save(step=at):
                self.save(worker, at)

    def take_seat(self, worker: Worker, plan: Plan) -> None:
        worker.pending = None
        if worker.peer not in plan.places:
            worker.local = replace(worker.local, generation=plan.generation, seated=False)
            return
        number = plan.places[worker.peer][0]
        stage, layers = plan.stages[number], self.rules.layers[number]
        donors = [worker.peer] if any(d.peer == worker.peer for d in stage.donors) else [d.peer for d in stage.donors]
        content, since, by_round = (), 0, plan.origin != "step"
        if plan.origin != "init":
            name = (plan.origin, plan.origin_generation, plan.first_step, layers)
            states = [s for d in donors if self.workers[d].alive and (s := self.workers[d].find(*name))]
            if not states:
                if self.rng.random() < 0.1:
                    worker.report(fault=pb.Fault(generation=plan.generation, text="no donor answers"))
                return
            content, since = states[0]
        worker.content, worker.since = content, since
        if by_round:
            point = self.point("round", plan.origin_generation, plan.first_step, number, content)
            worker.memory[point] = (content, 0)
        worker.local = Local(
            peer=worker.peer,
            generation=plan.generation,
            seated=True,
            step=plan.first_step,
            round=plan.first_step if by_round else 0,
        )
        worker.report(ready=pb.Ready(generation=plan.generation, digest=digest_of(number, content)))

    def train(self, worker: Worker, at: int) -> None:
        """A step needs everybody of the plan; nobody is more than the pipeline's one step ahead."""
        plan = worker.view.plan
        assert plan
        crew = [self.workers[p] for p in plan.peers]
        if any(not w.alive or w.local.generation != plan.generation or w.local.step < at for w in crew):
            if not all(w.alive for w in crew) and self.rng.random() < 0.1:
                worker.report(fault=pb.Fault(generation=plan.generation, text="a neighbour does not answer"))
            return
        round_due = is_round(self.rules.sync, self.rules.seed, at)
        if worker.pending is not None and (round_due or worker.local.step > worker.pending):
            return
        stage, replica = plan.places[worker.peer]
        samples = len(plan.served(stage, replica)) * plan.microbatch_size
        worker.since += samples
        worker.local = replace(worker.local, step=at + 1)
        worker.report(
            step_done=pb.StepDone(generation=plan.generation, step=at, samples=samples, loss_sum=1.0, targets=1)
        )
        if round_due:
            self.capture(worker, at + 1)

    def capture(self, worker: Worker, at: int) -> None:
        plan = worker.view.plan
        assert plan
        worker.pending = at
        worker.local = replace(worker.local, round=at)
        key = (worker.local.generation, plan.places[worker.peer][0], at)
        self.captured.setdefault(key, set()).add(worker.peer)
        worker.counted, worker.since = worker.since, 0

    def exchange(self, worker: Worker) -> bool:
        """Finishes the pending round if all replicas of the stage have captured it."""
        plan = worker.view.plan
        if plan is None or plan.generation != worker.local.generation or worker.pending is None:
            return False
        number, at = plan.places[worker.peer][0], worker.pending
        if self.captured[plan.generation, number, at] != {r.peer for r in plan.stages[number].replicas}:
            return False
        base, worker.content = worker.content, (worker.content, plan.generation, at)
        point = self.point("round", plan.generation, at, number, worker.content)
        worker.memory[point] = worker.disk[point] = (worker.content, 0)
        worker.pending = None
        worker.report(
            round_done=pb.RoundDone(
                generation=plan.generation,
                step=at,
                samples=worker.counted,
                digest=point.digest,
                base_digest=digest_of(number, base),
            )
        )
        return True

    def save(self, worker: Worker, at: int) -> None:
        plan = worker.view.plan
        assert plan
        if worker.pending is None:
            point = self.point("step", plan.generation, at, plan.places[worker.peer][0], worker.content)
            worker.disk[point] = (worker.content, worker.since)
            worker.local = replace(worker.local, saved=at)
            worker.report(saved=pb.Saved(generation=plan.generation, savepoint=point.to_proto()))

    def publish(self, worker: Worker, at: int) -> None:
        plan = worker.view.plan
        assert plan
        stage = plan.places[worker.peer][0]
        layers = self.rules.layers[stage]
        mine = [p for p in worker.states if (p.kind, p.step, (p.first_layer, p.last_layer)) == ("round", at, layers)]
        hold(mine, f"{worker.peer} is to publish step {at}, which it does not hold")
        here = self.state.plan
        if not here or here.places.get(worker.peer) != (stage, 0) or self.state.publish != at:
            return  # refused: it tries again with a newer view
        worker.local = replace(worker.local, published=at)
        self.uploads.setdefault(at, set()).add(stage)
        if len(self.uploads[at]) == len(self.rules.layers):
            path = self.store.path.parent / "checkpoints" / f"step-{at}"
            path.mkdir(parents=True, exist_ok=True)
            self.feed(Uploaded(step=at, path=str(path)))

    def point(self, kind: str, generation: int, at: int, stage: int, content: Content) -> SavePoint:
        first, last = self.rules.layers[stage]
        return SavePoint(
            kind="round" if kind == "round" else "step",
            generation=generation,
            step=at,
            first_layer=first,
            last_layer=last,
            digest=digest_of(stage, content),
        )

    def can_go_on(self) -> bool:
        """Whether some point of the run is still held by somebody for every stage."""
        if self.state.committed.kind == "init":
            return True
        holders = [w.states for w in self.workers.values()]
        return any(
            all(any(m.savepoint(i, layers) in h for h in holders) for i, layers in enumerate(self.rules.layers))
            for m in (self.state.committed, *self.state.marks)
        )


def simulate(seed: int, folder: Path, watch: Callable[[World], None] = lambda world: None) -> World:
    """A history with faults, then without: the run must finish, unless every copy of a stage was destroyed.

    ``watch`` sees the world after each of the faulty events.
    """
    world = Crew(seed, folder)
    try:
        for _ in range(FAULTY_EVENTS):
            world.happen()
            watch(world)
        world.faulty = False
        if world.wiped and not world.can_go_on():
            return world
        for _ in range(CALM_EVENTS):
            if world.state.phase == "finished":
                break
            world.happen()
        state = world.state
        hold(state.phase == "finished", f"the run hangs: {state.phase}, {state.note!r}")
        hold(state.committed.step == world.rules.steps, "finished before its last step")
        steps = {s for (s,) in world.store.rows("SELECT step FROM points WHERE heldout IS NOT NULL")}
        hold(world.rules.steps in steps, "finished without a held-out loss")
        hold((folder / "checkpoints" / f"step-{world.rules.steps}").exists(), "finished, not published")
        return world
    except Exception as error:
        raise Broken(f"seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        world.store.close()
