"""What a worker computes, by the real rules on real views (``next_action``); training is replaced by counters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan, SavePoint
from potluck.protocol.schedule import is_applied, is_round
from potluck.worker import plan as rules
from potluck.worker.plan import Local, View, next_action

from .crew import Meeting
from .kernel import Task, sleep
from .weights import Content, State

if TYPE_CHECKING:
    from .worker import Worker

GIVE_UP_SECONDS = 10.0  # a path to a peer that stays broken for so long is a fault
PUBLISH_PAUSE_SECONDS = 0.5


class FencedError(Exception):
    """The generation is over: look at the view again."""


class FaultError(Exception):
    """All go back to the last committed round; ``holder`` has not what it should."""

    def __init__(self, text: str, holder: str = "") -> None:
        super().__init__(text)
        self.holder = holder


class Engine:
    """The computing thread of one worker, and its rounds' thread."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.world, self.kernel = worker, worker.world, worker.kernel
        self.peer = worker.peer
        self.local = Local(peer=self.peer)
        self.doing = "loading"
        self.plan: Plan | None = None
        self.stage = 0
        self.content = Content()  # g
        self.delta = 0  # x beyond g and beyond what a round on its way has captured
        self.since = 0  # samples since the last capture
        self.captured = 0
        self.round: Task | None = None
        self.outcome: State | FaultError | None = None
        self._committed = self._count = 0

    @property
    def layers(self) -> tuple[int, int]:
        return self.world.rules.layers[self.stage]

    async def run(self) -> None:
        worker, world = self.worker, self.world
        while True:
            view, version = worker.view, worker.version
            self._note_committed(view)
            action = next_action(view, self.local, world.config)
            if action is None:
                if worker.version == version:
                    await worker.bell.wait()
                continue
            if isinstance(action, rules.Exit):
                await self._leave(view)
                return
            try:
                await self._do(action, view)
                if world.faulty and self.worker.machine.hang_until > self.kernel.now:
                    await sleep(self.worker.machine.hang_until - self.kernel.now)
            except FencedError:
                await self._wait_for_newer(version)
            except FaultError as error:
                world.trace(self.peer, f"fault: {error}")
                worker.report(fault=pb.Fault(generation=self.local.generation, text=str(error), peer=error.holder))
                await self._wait_for_newer(version)

    async def _wait_for_newer(self, version: int) -> None:
        while self.worker.version == version:
            await self.worker.bell.wait()

    async def _do(self, action: rules.Action, view: View) -> None:
        match action:
            case rules.TakeSeat(plan=plan):
                await self._take_seat(plan)
            case rules.Evaluate(position=position):
                if position == self.world.config.steps or (view.closing and position == view.end):
                    await self._finish_round()
                await self._evaluate(position)
            case rules.Train(step=step):
                await self._train(step)
            case rules.CloseRound(step=step):
                await self._finish_round()
                if self.local.round < step:
                    self._begin_round(step)
                    await self._finish_round()
            case rules.Save(step=step):
                await self._save(step, view)
            case rules.Publish(step=step):
                await self._publish(step)

    # A generation begins.

    async def _take_seat(self, plan: Plan) -> None:
        self.doing = "loading"
        self._drop_round()
        self.worker.points.drop_after(plan.first_step)
        self.plan = plan
        if self.peer not in plan.places:
            self.local = replace(self.local, generation=plan.generation, seated=False)
            return
        self.stage, _ = plan.places[self.peer]
        await sleep(self.worker.rng.uniform(0.05, 0.5))
        try:
            state = await self._origin(plan)
        except FaultError as error:
            self.local = replace(self.local, generation=plan.generation, seated=False)
            self.worker.report(fault=pb.Fault(generation=plan.generation, text=str(error), peer=error.holder))
            return
        self.worker.points.keep(state)
        self.content, self.delta, self.since = state.content, state.delta, state.pending
        by_round = plan.origin != "step"
        self.captured = plan.first_step if by_round else -1
        self.local = Local(
            peer=self.peer,
            generation=plan.generation,
            seated=True,
            step=plan.first_step,
            round=plan.first_step if by_round else 0,
        )
        self.worker.report(ready=pb.Ready(generation=plan.generation, digest=self.content.name))
        self.doing = "training"

    async def _origin(self, plan: Plan) -> State:
        """The state a plan starts from: our own, or a donor's."""
        kind, generation, step = plan.origin, plan.origin_generation, plan.first_step
        if kind == "init":
            return State(point=self._point("round", 0, 0), content=Content(0, b"init-%d" % self.stage))
        donors = [d.peer for d in plan.stages[self.stage].donors]
        if self.peer in donors:
            state = self.worker.points.find(kind, generation, step, self.layers)
            if state is None:
                raise FaultError(f"our own state of step {step} is damaged or gone", self.peer)
            return state
        for donor in donors:
            asked = self.kernel.now
            while (found := self.world.crew.fetch(self.peer, donor, plan, self.stage)) is None:
                await self.worker.bell.wait(0.5)
                self._fenced(plan)
                if self.kernel.now - asked > GIVE_UP_SECONDS:
                    self._give_up(plan, donor)
            if isinstance(found, State):
                await sleep(self.worker.rng.uniform(0.1, 2.0) * self.world.net.slow.get(self.peer, 1.0))
                self._fenced(plan)
                return found
        raise FaultError(f"the state of step {step} cannot be had", donors[0])

    # Steps and rounds.

    async def _train(self, step: int) -> None:
        plan, world = self.plan, self.world
        assert plan
        self.doing = "training"
        await sleep(world.step_seconds * self.worker.rng.uniform(0.5, 1.5) / self.worker.machine.speed)
        await self._meet(plan, ("train", step), None, plan.places, world.crew.neighbours(plan))
        counters, count = world.crew.lanes(plan).of(self.peer, step)
        self.delta += counters
        self.since += count
        done = step + 1
        self.local = replace(self.local, step=done)
        self.worker.report(
            step_done=pb.StepDone(
                generation=self.local.generation, step=step, samples=count, loss_sum=1.0 * count, targets=count
            )
        )
        sync, seed = world.rules.sync, world.rules.seed
        if isinstance(self.outcome, FaultError) or is_applied(sync, seed, self.captured, done):
            await self._finish_round()
        if is_round(sync, seed, step):
            self._begin_round(done)
            if sync.delay == 0:
                await self._finish_round()

    def _begin_round(self, done: int) -> None:
        """Captures a round, which runs beside the next steps."""
        assert self.plan and self.round is None
        captured, self.delta = self.delta, 0
        count, self.since = self.since, 0
        self.captured = done
        self.local = replace(self.local, round=done)
        self.round = self.kernel.spawn(self._exchange(self.plan, done, self.content, captured, count), self.worker.process)

    async def _exchange(self, plan: Plan, done: int, base: Content, captured: int, count: int) -> None:
        stage, world = plan.stages[self.stage], self.world
        peers = [r.peer for r in stage.replicas]
        await sleep(world.step_seconds * self.worker.rng.uniform(0.05, 1.0))
        partners = {p: [o for o in peers if o != p] for p in peers}
        try:
            meeting = await self._meet(plan, ("round", self.stage, done), captured, peers, partners)
        except FencedError:
            return
        content = base.trained(plan.generation, done, meeting.came)
        state = State(point=self._point("round", plan.generation, done, content), content=content)
        world.watch.made(content)
        self.worker.points.keep(state)
        self.worker.report(
            round_done=pb.RoundDone(
                generation=plan.generation, step=done, samples=count, digest=content.name, base_digest=base.name
            )
        )
        self.outcome = state
        self.worker.bell.ring()

    async def _finish_round(self) -> None:
        """Waits for the round on its way, if there is one, and applies it."""
        while self.round is not None and self.outcome is None:
            assert self.plan
            self._fenced(self.plan)
            await self.worker.bell.wait()
        outcome, self.round, self.outcome = self.outcome, None, None
        if isinstance(outcome, FaultError):
            raise outcome
        if outcome is not None:
            self.content = outcome.content

    def _drop_round(self) -> None:
        if self.round:
            self.round.cancel()
        self.round = self.outcome = None

    async def _evaluate(self, position: int) -> None:
        plan = self.plan
        assert plan
        await sleep(self.world.step_seconds * 0.3 * self.worker.rng.random())
        await self._meet(plan, ("eval", position), None, plan.places, self.world.crew.neighbours(plan))
        self.local = replace(self.local, evaluated=position)
        if self.stage == len(plan.stages) - 1:
            done = pb.EvalDone(generation=self.local.generation, step=position, loss_sum=1.0, targets=1)
            self.worker.report(eval_done=done)

    # Together with others.

    async def _meet(
        self, plan: Plan, what: tuple[object, ...], brings: object, needed: object, partners: dict[str, list[str]]
    ) -> Meeting:
        """Until everybody is there; ``FencedError`` if the generation ends meanwhile."""
        self._fenced(plan)
        key = (plan.generation, *what)
        meeting = self.world.crew.come(key, self.peer, brings, needed, partners)  # type: ignore[arg-type]
        gave_up = False
        while not (meeting.over and meeting.over[self.peer] <= self.kernel.now):
            await self.worker.bell.wait(GIVE_UP_SECONDS)
            self._fenced(plan)
            if not meeting.over and not gave_up:
                gave_up = any(self._give_up(plan, other) for other in partners[self.peer])
        return meeting

    def _fenced(self, plan: Plan) -> None:
        if plan.generation < self.worker.fence:
            raise FencedError

    def _give_up(self, plan: Plan, other: str) -> bool:
        """Says that a path has been broken for too long."""
        since = self.world.crew.unreachable_since(self.peer, other)
        if since is None or self.kernel.now - since < GIVE_UP_SECONDS:
            return False
        self.worker.report(fault=pb.Fault(generation=plan.generation, text="no path", peer=other))
        return True

    # Ends.

    def _note_committed(self, view: View) -> None:
        """Older rounds are let go; of the committed ones, one in ``save_rounds`` goes to disk."""
        if view.committed == self._committed:
            return
        self._committed = view.committed
        self.worker.points.forget(view.committed, view.publish)
        self._count += 1
        if self._count % self.world.config.checkpoint.save_rounds == 0 and (state := self._committed_state(view)):
            self.kernel.spawn(self._save_round(state), self.worker.process)

    def _committed_state(self, view: View) -> State | None:
        points = self.worker.points.points()
        made = [p.generation for p in points if p.kind == "round" and p.step == view.committed]
        return self.worker.points.find("round", max(made), view.committed, self.layers) if made else None

    async def _save_round(self, state: State) -> None:
        await sleep(self.worker.rng.uniform(0.01, 1.0))
        self.worker.points.save(state)

    async def _save(self, step: int, view: View) -> None:
        """A stop: the last committed round and the very state of now, both to disk."""
        self.doing = "saving"
        await self._finish_round()
        if state := self._committed_state(view):
            await self._save_round(state)
        await sleep(self.worker.rng.uniform(0.01, 1.0))
        point = self._point("step", self.local.generation, step, self.content)
        self.worker.points.save(State(point=point, content=self.content, delta=self.delta, pending=self.since))
        self.local = replace(self.local, saved=step)
        self.worker.report(saved=pb.Saved(generation=self.local.generation, savepoint=point.to_proto()))

    async def _publish(self, step: int) -> None:
        points = self.worker.points
        made = [p.generation for p in points.points() if p.kind == "round" and p.step == step]
        if not made or points.find("round", made[-1], step, self.layers) is None:
            raise FaultError(f"the round of step {step} is not here any more")
        coordinator, plan = self.world.coordinator, self.plan
        assert plan
        if not coordinator.upload(self.peer, step, self.stage):
            await sleep(PUBLISH_PAUSE_SECONDS)
            return
        await sleep(self.worker.rng.uniform(0.1, 3.0) * self.world.net.slow.get(self.peer, 1.0))
        if not coordinator.upload(self.peer, step, self.stage, plan):
            await sleep(PUBLISH_PAUSE_SECONDS)
            return
        self.local = replace(self.local, published=step)

    async def _leave(self, view: View) -> None:
        self.doing = "leaving"
        self._drop_round()
        if view.phase != "finished" and self.plan and (state := self._committed_state(view)):
            await self._save_round(state)
        await self.worker.close()

    def _point(self, kind: str, generation: int, step: int, content: Content | None = None) -> SavePoint:
        first, last = self.layers
        return SavePoint(
            kind="round" if kind == "round" else "step",
            generation=generation,
            step=step,
            first_layer=first,
            last_layer=last,
            digest=content.name if content else b"",
        )
