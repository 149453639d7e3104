"""Bugs to plant, in the real code or in the simulated workers: the simulator must find each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from potluck.coordinator import planning, resume, run
from potluck.coordinator.hub import Hub, Item
from potluck.coordinator.losses import Losses
from potluck.coordinator.planning import Start
from potluck.coordinator.run import Machine
from potluck.coordinator.state import Command, Input, Mark, Member, Relet, ReturnLeases, Rules, RunState
from potluck.coordinator.store import Store
from potluck.coordinator.turn import Turn
from potluck.coordinator.verdict import Verdict
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import StateError
from potluck.protocol.plan import Plan
from potluck.worker.engine import Engine
from potluck.worker.pipeline import Lane, Pipeline
from potluck.worker.reports import Reports

from .weights import Content

REPORTS = ("ready", "step_done", "round_done", "eval_done", "saved", "fault")
real_take, real_tell, real_step, real_said = Hub._take, Hub._tell, run.step, Turn.said
real_round_done, real_store, real_plan = Turn.round_done, Store.__init__, planning.make_plan
real_meta, real_step_done, real_go_on, real_begin = Store.meta, Turn.step_done, Losses.go_on_without, Machine.begin
real_trained, real_backward, real_divided = Content.trained, Pipeline._backward, Content.divided
real_grant, real_joined = Machine.grant, Turn.joined
real_finish, real_is_committed = Engine._finish_pending, Engine._is_committed


async def acknowledged_first(self: Hub, batch: list[Item], now: float) -> None:
    """Workers are told before it is on the disk."""
    for _, line, seq in batch:
        if line is not None and seq:
            line.send(pb.Down(ack=pb.Ack(seq=seq)))
    await real_take(self, batch, now)


async def shown_first(self: Hub, batch: list[Item], now: float) -> None:
    """Workers see what follows before it is on the disk."""
    state = self.state
    for what, _, _ in batch:
        state, _ = real_step(self.rules, state, what, now)
    for line in self.lines.values():
        self._show(state, line)
    await real_take(self, batch, now)


async def goes_on_without_a_disk(self: Hub, batch: list[Item], now: float) -> None:
    """A refused batch takes effect nevertheless."""
    try:
        await real_take(self, batch, now)
    except StateError:
        for what, _, _ in batch:
            self.state, _ = real_step(self.rules, self.state, what, now)
        raise


def unfenced(self: Turn, peer: str, report: pb.Up) -> None:
    """A report of any generation is one of the present."""
    body = report.WhichOneof("body")
    if body in REPORTS and self.state.plan is not None:
        copy = pb.Up()
        copy.CopyFrom(report)
        getattr(copy, body).generation = self.state.plan.generation
        report = copy
    real_said(self, peer, report)


def added_up(self: Turn, member: Member, message: pb.StepDone) -> None:
    """Every report of a step counts as one more step, repeated ones, too."""
    now = self.state.until
    real_step_done(self, member, message)
    self.member(replace(self.state.members[member.peer], step=min(now, member.step + 1)))


def believed(plan: Plan, committed: Mark, at: int, reports: Mapping[str, pb.RoundDone]) -> Verdict:
    """A judge that believes everybody."""
    digests = tuple(bytes(reports[r[0].peer].digest) for r in plan.replicas)
    sample = plan.first_sample_of(at)
    return Verdict(mark=Mark(kind="round", generation=plan.generation, step=at, sample=sample, digests=digests))


def spoken_for(self: Turn, member: Member, message: pb.RoundDone) -> None:
    """One replica speaks for its stage: a round is committed before all have it."""
    plan = self.state.plan
    assert plan
    stage, _ = plan.places[member.peer]
    real_round_done(self, member, message)
    done = self.state.rounds_done.get(message.step)
    if done and len(plan.replicas[stage]) > 1:
        others = [r.peer for r in plan.replicas[stage] if r.peer not in done]
        rest = plan.first_sample_of(message.step) - self.state.committed.sample
        rest -= sum(done[r.peer].samples for r in plan.replicas[stage] if r.peer in done)
        for i, peer in enumerate(others):
            copy = pb.RoundDone()
            copy.CopyFrom(message)
            copy.samples = max(0, rest) if i == 0 else 0
            done = {**done, peer: copy}
        self.set(rounds_done={**self.state.rounds_done, message.step: done})


def any_holders(rules: Rules, state: RunState, mark: Mark) -> list[list[str]]:
    """Whoever holds a state of the right step is a holder, of whatever generation it is."""
    return [
        [
            p
            for p, m in sorted(state.members.items())
            if any((s.kind, s.step, s.first_layer) == ("round", mark.step, first) for s in m.savepoints)
        ]
        for first, _ in (rules.division(mark.stages).layers if mark.digests else ())
    ]


def same_generation(rules: Rules, state: RunState, start: Start) -> Plan:
    """The generation is not counted up when a plan starts from a committed round."""
    plan = real_plan(rules, state, start)
    return replace(plan, generation=max(1, state.generation)) if start.mark.kind == "round" else plan


def kept_leases(rules: Rules, state: RunState, what: Input, now: float) -> tuple[RunState, list[Command]]:
    """Leases are not returned."""
    state, commands = real_step(rules, state, what, now)
    return state, [c for c in commands if not isinstance(c, ReturnLeases)]


def unsynced(self: Store, path: Path) -> None:
    """A commit may be lost when the power fails."""
    real_store(self, path)
    self._db.execute("PRAGMA synchronous=NORMAL")


def forgotten_generation(self: Store, key: str, default: Any = None) -> Any:
    """After a restart generations are counted from the last committed round's."""
    found = real_meta(self, key, default)
    return max(0, found - 1) if key == "generation" else found


def kept_stop(self: Machine) -> None:
    """A stop can be gone on from again and again."""


def trained_in_vain(self: Engine, *, late: bool) -> bool:
    """What was trained beside a round is lost when the round is applied."""
    return real_finish(self, late=False)


def left_out(self: Pipeline, lane: Lane, frame: Any) -> None:
    """A substitute counts a lost replica's microbatch, and leaves it out of its update."""
    before: Any = self.stage.grad
    is_first = lane in self._inherited and lane == min(self._inherited)
    real_backward(self, lane, frame)
    if is_first:
        self.stage.grad = before


def done_twice(self: Pipeline, lane: Lane, frame: Any) -> None:
    """A substitute takes a lost replica's microbatch into its update twice."""
    before: Any = self.stage.grad
    is_first = lane in self._inherited and lane == min(self._inherited)
    real_backward(self, lane, frame)
    if is_first:
        self.stage.grad = self.stage.grad + (self.stage.grad - before)


def void_and_applied(self: Engine, step: int) -> bool:
    """A round that somebody's loss has made void is applied."""
    view, _ = self.views.newest
    plan = view.plan
    going_on = plan and plan.generation == self.local.generation and plan.attempt > self.local.attempt
    return bool(going_on and self.config.peer in plan.peers) or real_is_committed(self, step)  # type: ignore[union-attr]


def of_any_attempt(self: Turn, member: Member, message: pb.RoundDone) -> None:
    """A report of a round that is void counts for the one that is done again."""
    copy = pb.RoundDone()
    copy.CopyFrom(message)
    assert self.state.plan
    copy.attempt = self.state.plan.attempt
    real_round_done(self, member, copy)


def waited_for_ever(self: Turn) -> None:
    """Who is away has no deadline."""


def said_once(self: Reports, acked: int) -> None:
    """A coordinator that began anew is not told again what another one acknowledged."""
    self.acknowledged(acked)


def not_let_again(self: Machine, member: Member) -> bool:
    """A lost replica keeps its leases."""
    done = real_go_on(self, member)
    self.commands[:] = [c for c in self.commands if not isinstance(c, Relet)]
    return done


def made_by_chance(self: Content, generation: int, step: int, deltas: Mapping[str, int]) -> Content:
    """A round leaves out the replica whose piece came last."""
    return real_trained(self, generation, step, dict(list(deltas.items())[: max(1, len(deltas) - 1)]))


def taken_twice(parts: Any, layers: tuple[int, int]) -> Content:
    """Where the layers are divided anew, a stage's last one is made of the one before it."""
    found = real_divided(parts, layers)
    return replace(found, layers=(*found.layers[:-1], found.layers[0]))


def forgotten_division(state: RunState) -> None:
    """A restart forgets in what stages the last round is held since the layers were divided anew."""


def led_on(self: Machine) -> None:
    """A pause is forgotten when steps are leased."""
    paused = self.state.paused
    self.set(paused=None)
    real_grant(self)
    self.set(paused=paused)


def forgotten_orders(state: RunState, store: Store) -> RunState:
    """A restart forgets what the operator ordered."""
    return state


def let_in_again(self: Turn, member: Member) -> None:
    """Who is banned may come back."""
    bans = self.state.bans
    self.set(bans={})
    real_joined(self, member)
    self.set(bans=bans)


def plant(*where: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def planted() -> Iterator[None]:
        with ExitStack() as stack:
            for place, name, wrong in where:
                stack.enter_context(patch.object(place, name, wrong))
            yield

    return planted


PLANTED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "acknowledged before it is written": plant((Hub, "_take", acknowledged_first)),
    "shown before it is written": plant((Hub, "_take", shown_first)),
    "a lease while the disk refuses": plant((Hub, "_take", goes_on_without_a_disk)),
    "reports of an old generation count": plant((Turn, "said", unfenced)),
    "a repeated report counts twice": plant((Turn, "step_done", added_up)),
    "every round counts": plant((run, "judge", believed)),
    "a round counts before all replicas have it": plant((Turn, "round_done", spoken_for)),
    "holders of another generation": plant((planning, "holders", any_holders)),
    "a generation is used twice": plant((run, "make_plan", same_generation)),
    "leases are not returned": plant((run, "step", kept_leases)),
    "the newest commit is lost with the power": plant((Store, "__init__", unsynced)),
    "a restart forgets the generation": plant((Store, "meta", forgotten_generation)),
    "a stop is kept after it was gone on from": plant((Machine, "forget_stop", kept_stop)),
    "what is trained beside a round is lost": plant((Engine, "_finish_pending", trained_in_vain)),
    "a replica is left out of a round": plant((Content, "trained", made_by_chance)),
    "a substitute forgets a lane": plant((Pipeline, "_backward", left_out)),
    "a substitute does a lane twice": plant((Pipeline, "_backward", done_twice)),
    "a void round is applied": plant((Engine, "_is_committed", void_and_applied)),
    "a round of any attempt counts": plant((Turn, "round_done", of_any_attempt)),
    "a lost replica keeps its leases": plant((Losses, "go_on_without", not_let_again)),
    "who is away has no deadline": plant((Turn, "give_up", waited_for_ever)),
    "a layer is taken twice": plant((Content, "divided", taken_twice)),
    "a restart forgets the division": plant((resume, "divided_of", forgotten_division)),
    "a pause leases on": plant((Machine, "grant", led_on)),
    "a restart forgets the operator's orders": plant((resume, "as_operated", forgotten_orders)),
    "who is banned comes back": plant((Turn, "joined", let_in_again)),
    "reports are said only once": plant((Reports, "welcomed", said_once)),
}
