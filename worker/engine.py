"""The computing thread: does what :func:`.plan.next_action` says, one action after the other.

Rounds run beside it on a thread of their own, unless they must be applied at once; so does publishing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from ..protocol import control_pb2 as pb
from ..protocol.errors import DivergedError, PotluckError, StateError, WireError
from ..protocol.failpoints import failpoint
from ..protocol.footprint import RECENT_NBYTES
from ..protocol.plan import Plan, SavePoint, Shape
from ..protocol.schedule import fragments, is_applied, is_round
from . import plan as rules
from .boundary import Boundary, Memory, Seat
from .data import Dataset
from .links import Links
from .mailbox import Fenced, Mailbox, Rerouted
from .origin import origin
from .outside import EngineConfig, Headquarters, MissingError, Views
from .pipeline import Pipeline
from .plan import Local, View, next_action
from .publishing import packing, upload
from .stage import Stage, State, digest, initial_state
from .states import States
from .sync import Outcome, Synchronizer, apply

log = logging.getLogger(__name__)


class Engine:
    """One worker's computing. ``run`` returns when nothing more is wanted, and raises what it cannot mend."""

    def __init__(
        self,
        config: EngineConfig,
        views: Views,
        links: Links,
        mailbox: Mailbox,
        states: States,
        hq: Headquarters,
    ) -> None:
        self.config, self.views, self.links, self.mailbox = config, views, links, mailbox
        self.states, self.points, self.hq = states, states.points, hq
        self.local = Local(peer=config.peer)
        self.sync_rule = config.run.sync.resolved()
        self.stage: Stage | None = None
        self.layers: tuple[int, int] | None = None  # of the newest stage
        self._seat: Seat | None = None
        self._pipeline: Pipeline | None = None
        self._synchronizer: Synchronizer | None = None
        self._data: Dataset | None = None
        run = config.run
        self.shape = Shape.of(run.model, config.manifest.vocab_size)
        self._memory = Memory(run, self.points.folder / "reuse") if run.activations.reuse else None
        self._rounds = ThreadPoolExecutor(1, thread_name_prefix="round")
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._pending: Future[Outcome] | None = None
        self._since = 0  # samples since the last capture
        self._captured = self._committed = 0
        self._in_capture = 0  # samples of the round on its way
        self._count = 0  # committed rounds seen
        self._diverged = -1  # the committed round after which it happened
        self.vacated: Callable[[], None] = lambda: None  # called once it computes no more, though a round may yet

    def run(self) -> None:
        try:
            while not self.views.closed:
                view, version = self.views.newest
                self._note_committed(view)
                if self._pipeline and view.plan and view.plan.attempt < self._pipeline.attempt_in(view.plan.generation):
                    self.views.wait(version)  # the pipeline has heard of a loss already: its view is on the way
                    continue
                action = next_action(view, self.local, self.config.run)
                if action is None:
                    self.hq.state = "waiting" if not self.local.seated else self.hq.state
                    self.views.wait(version)
                elif isinstance(action, rules.Exit):
                    self._leave(view)
                    return
                else:
                    try:
                        self._do(action, view)
                    except Fenced:
                        self._wait_for_newer(version)
                    except WireError as error:  # a peer sent what nobody can use: all go back to the last round
                        self._go_back(error, version)
                    except DivergedError as error:  # perhaps of what a peer sent: it counts if it happens again
                        if self._diverged == view.committed:
                            raise
                        self._diverged = view.committed
                        self._go_back(error, version)
        finally:
            self.mailbox.close()
            self.views.close()  # ends an upload
            self.vacated()
            for beside in (self._rounds, self._uploads):
                beside.shutdown(wait=True, cancel_futures=True)
            if self._memory is not None:
                self._memory.close()

    def _go_back(self, error: PotluckError, version: int) -> None:
        log.warning("%s", error)
        self.hq.report(fault=pb.Fault(generation=self.local.generation, text=str(error)))
        self._wait_for_newer(version)

    def _wait_for_newer(self, version: int) -> None:
        """The mailbox knows of a newer generation: its view is on the way."""
        if self.views.newest[1] == version:
            self.views.wait(version)

    def _do(self, action: rules.Action, view: View) -> None:
        match action:
            case rules.TakeSeat(plan=plan):
                self._take_seat(plan, view)
            case rules.Reroute(plan=plan):
                self._reroute(plan, view)
            case rules.Evaluate(position=position):
                ends = position == self.config.run.steps or (view.closing and position == view.end)
                # Where no step follows that a round on its way could wait for, it comes first.
                if not ends or self._finish_pending(late=self.local.step > self._captured):
                    self._evaluate(position)
            case rules.Train(step=step):
                self._train(step, view)
            case rules.CloseRound(step=step):
                if self._finish_pending(late=self.local.step > self._captured) and self.local.round < step:
                    self._round(step, wait=True)
            case rules.Save(step=step):
                self._save(step, view)
            case rules.Publish(step=step):
                self._publish(step)

    # A generation begins.

    def _take_seat(self, plan: Plan, view: View) -> None:
        self.hq.state = "loading"
        self._drop_pending()
        self.points.drop_after(max(plan.first_step, view.committed))
        peer = self.config.peer
        if peer not in plan.places:
            self.local = replace(self.local, generation=plan.generation, seated=False)
            return
        number, replica = plan.places[peer]
        layers = plan.layers[number]
        if self.stage is None or (self.stage.first, self.stage.last) != layers:
            self.stage = self._pipeline = self._synchronizer = None  # who moves makes room first
            self.stage = self._build(layers)
        self.layers = layers
        try:
            failpoint("worker.seat.fetch")
            state = origin(self.states, plan, peer, self.shape, lambda: self._is_over(plan))
        except MissingError as error:
            log.warning("%s", error)
            self.local = replace(self.local, generation=plan.generation, seated=False)
            self.hq.report(fault=pb.Fault(generation=plan.generation, text=str(error), peer=error.holder, missing=True))
            return
        failpoint("worker.seat.fetched")
        if state is None:
            point = SavePoint(kind="round", generation=0, step=0, first_layer=layers[0], last_layer=layers[1])
            state = initial_state(self.config.run, self.shape.vocab_size, point, self.config.beginning)
        self.stage.load(state)
        self.points.keep(state)
        self.states.recent.most_nbytes = RECENT_NBYTES * self.stage.size
        if number == 0 and self._data is None:
            self._data = Dataset(self.hq.corpus(), self.hq.fetch)
            run = self.config.run
            self._data.prepare(plan.first_sample_of(plan.first_step), run.seed, run.eval.samples)
        seat = self._seat = Seat(plan=plan, stage=number, replica=replica, run=self.config.run_name)
        boundary = Boundary(self.config.run, seat, self.config.manifest, self._memory)
        self._pipeline = Pipeline(boundary, self.stage, self._data, self.links)
        self._synchronizer = Synchronizer(self.config.run, seat, self.stage, state, self.links)
        self._since = state.pending
        self._captured = plan.first_step if plan.origin != "step" else -1
        self.local = Local(
            peer=peer,
            generation=plan.generation,
            seated=True,
            step=plan.first_step,
            round=plan.first_step if plan.origin != "step" else 0,
        )
        failpoint("worker.seat.taken")
        self.hq.report(ready=pb.Ready(generation=plan.generation, digest=digest(self.stage.g)))
        self.hq.state = "training"

    def _is_over(self, plan: Plan) -> bool:
        view, _ = self.views.newest
        return self.views.closed or view.plan is None or view.plan.generation != plan.generation

    def _build(self, layers: tuple[int, int]) -> Stage:
        config = self.config
        return Stage(config.run, self.shape.vocab_size, *layers, device=config.device, beginning=config.beginning)

    def _reroute(self, plan: Plan, view: View) -> None:
        """Somebody is lost and the generation goes on: a round on its way is void, its samples go into the next."""
        assert self._pipeline and self.stage
        if self._captured > view.committed:
            if self._pending is not None:
                self._since += self._in_capture
            self._drop_pending()
            self.points.drop_after(view.committed)
            self._captured = view.committed
        self._pipeline.reroute(plan)
        seat = self._seat = self._pipeline.seat
        self._synchronizer = Synchronizer(self.config.run, seat, self.stage, None, self.links)
        self.local = replace(self.local, attempt=plan.attempt, round=min(self.local.round, self._captured))
        if self._pipeline.owes:
            self._since += self._pipeline.catch_up().samples

    # Steps and rounds.

    def _train(self, step: int, view: View) -> None:
        assert self._pipeline and self._seat and self.stage
        self.hq.state = "training"
        result = self._pipeline.step(step)
        self._since += result.samples
        done = step + 1
        self.local = replace(self.local, step=done)
        self.hq.report(
            step_done=pb.StepDone(
                generation=self.local.generation,
                step=step,
                samples=result.samples,
                loss_sum=result.loss_sum,
                targets=result.loss_targets if self._seat.is_last else 0,
                compute_seconds=result.seconds - result.wait_seconds,
                wait_seconds=result.wait_seconds,
                trace=result.trace,
            )
        )
        plan = self._pipeline.seat.plan
        if plan.attempt > self.local.attempt:
            return  # somebody was lost meanwhile: what that means for rounds comes first
        replicas = len(plan.replicas[self._seat.stage])
        self.hq.counterfactual(round(2 * (replicas - 1) / replicas * 2 * self.stage.size))
        failed = self._pending is not None and self._pending.done() and self._pending.exception() is not None
        due = failed or is_applied(self.sync_rule, self.config.run.seed, self._captured, done)
        if due and not self._finish_pending(late=True):
            return
        if is_round(self.sync_rule, self.config.run.seed, step) and (done > plan.void or not plan.attempt):
            self._round(done, wait=self.sync_rule.delay == 0)

    def _round(self, done: int, *, wait: bool) -> None:
        """Captures a round; runs it beside the next step, or right now (``wait``)."""
        assert self._synchronizer and self.stage
        run = self.config.run
        last = done == run.steps
        which = fragments(self.sync_rule, run.seed, done - 1, last)
        capture = self._synchronizer.capture(self.stage, done, self._since, which, full=last, late=not (wait or last))
        failpoint("worker.round.captured")
        self._in_capture, self._since, self._captured = self._since, 0, done
        self.local = replace(self.local, round=done)
        synchronizer, layers = self._synchronizer, (self.stage.first, self.stage.last)

        def exchange() -> Outcome:
            outcome = synchronizer.exchange(capture)
            self.points.keep(outcome.state)
            failpoint("worker.round.done")
            if outcome.entry is not None:
                self.states.recent.add(layers, outcome.entry)
            self.hq.report(round_done=outcome.report(synchronizer.seat.plan.attempt))
            return outcome

        self._pending = self._rounds.submit(exchange)
        if wait:
            self._finish_pending(late=False)

    def _finish_pending(self, *, late: bool) -> bool:
        """Waits until the round on its way, if there is one, is committed, and applies it.

        False if it stays on its way, because somebody was lost before it was committed: then it is void.
        """
        if self._pending is None:
            return True
        assert self.stage is not None
        self.views.idle = True
        try:
            outcome = self._pending.result()
        except Rerouted:
            return False
        finally:
            self.views.idle = False
        if not self._is_committed(self._captured):
            return False
        self._pending = None
        failpoint("worker.round.apply")
        apply(self.stage, outcome, late=late)
        return True

    def _is_committed(self, step: int) -> bool:
        """Waits until the coordinator has decided: a round may not count, so nobody goes on from it before."""
        while True:
            view, version = self.views.newest
            plan = view.plan
            if self.views.closed or plan is None or plan.generation != self.local.generation:
                raise Fenced
            if self.config.peer not in plan.places:  # they go on without us: what is committed since is not ours
                raise Fenced
            if view.committed >= step:
                return True
            if plan.attempt > self.local.attempt:
                return False
            self.views.wait(version)

    def _note_committed(self, view: View) -> None:
        """Older rounds are let go; of the committed ones, one in ``save_rounds`` goes to disk."""
        if view.committed == self._committed:
            return
        self._committed = view.committed
        if self._pipeline and view.plan and view.plan.generation == self.local.generation:
            self._pipeline.kept.forget(view.committed)
            self.mailbox.forget(self.local.generation, view.committed)
        self.points.forget(view.committed, view.publish)
        self._count += 1
        if self._count % self.config.run.checkpoint.save_rounds == 0 and (state := self._round_of(view.committed)):
            self._rounds.submit(self._save_round, state)

    def _round_of(self, step: int) -> State | None:
        """As we hold it."""
        made = [p.generation for p in self.points.points() if p.kind == "round" and p.step == step]
        return self.points.find("round", max(made), step, self.layers) if made and self.layers else None

    def _save_round(self, state: State) -> None:
        try:
            self.points.save(state)
        except StateError as error:
            log.error("%s", error.one_line())  # training goes on: the others hold this round too

    def _drop_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()
            try:
                pending.result()
            except Exception as error:
                log.debug("a round of an older generation ended: %r", error)

    def _evaluate(self, position: int) -> None:
        assert self._pipeline and self._seat
        result = self._pipeline.evaluate(position)
        self.local = replace(self.local, evaluated=position)
        if self._seat.is_last and result is not None:
            generation, targets = self.local.generation, result.loss_targets
            done = pb.EvalDone(generation=generation, step=position, loss_sum=result.loss_sum, targets=targets)
            self.hq.report(eval_done=done)

    # Ends.

    def _save(self, step: int, view: View) -> None:
        """A stop: the last committed round and the very state of now, both to disk."""
        assert self.stage and self._synchronizer
        self.hq.state = "saving"
        if not self._finish_pending(late=self.local.step > self._captured):
            return
        self.save_committed(view)
        point = SavePoint(
            kind="step",
            generation=self.local.generation,
            step=step,
            first_layer=self.stage.first,
            last_layer=self.stage.last,
            digest=digest(self.stage.g),
        )
        state = self._synchronizer.owing(self.stage.state(point, pending=self._since))
        self.points.save(state)
        self.local = replace(self.local, saved=step)
        self.hq.report(saved=pb.Saved(generation=self.local.generation, savepoint=point.to_proto()))

    def save_committed(self, view: View | None = None) -> None:
        """The last committed round to disk, of the newest view if none is given. ``StateError`` if that cannot be."""
        if state := self._round_of((view or self.views.newest[0]).committed):
            self.points.save(state)

    def let_go(self) -> None:
        """Drops what takes most memory, once it is ``vacated``; what was kept can still be saved."""
        self.stage = self._pipeline = self._synchronizer = self._data = self._pending = None

    def _publish(self, step: int) -> None:
        assert self.stage and self._seat
        state = self._round_of(step)
        if state is None:
            raise WireError(f"the round of step {step} is not here any more")
        self.local = replace(self.local, published=step)
        stage, generation = self._seat.stage, self._seat.plan.generation
        tensors = {name: t.contiguous() for name, t in self.stage.named(state.g).items()}
        make = packing(self.config, state.point, tensors, self.points.folder)
        failpoint("worker.publish")
        self._uploads.submit(upload, self.hq, self.views, step, stage, generation, make)

    def _leave(self, view: View) -> None:
        failpoint("worker.leave")
        self.hq.state = "leaving"
        self.vacated()  # what is saved is in the machine's memory
        self._drop_pending()
        if view.phase != "finished":
            self.save_committed(view)
