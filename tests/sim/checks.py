"""What must hold whatever happens: looked at with every input, every commit, every message, every start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from potluck.coordinator import run
from potluck.coordinator.events import PlanIssued, Rerouted, RolledBack
from potluck.coordinator.planning import known_marks
from potluck.coordinator.standstill import shifted
from potluck.coordinator.state import (
    Command,
    Commit,
    Dismiss,
    Input,
    Journal,
    Keep,
    Lease,
    Mark,
    Point,
    Relet,
    Remember,
    ReturnLeases,
    Rules,
    RunState,
    Said,
    Tick,
    Uncommit,
)
from potluck.coordinator.store import Store
from potluck.coordinator.verify import verify
from potluck.protocol import control_pb2 as pb
from potluck.protocol.plan import Plan

from .broken import Broken as Broken
from .broken import hold as hold
from .operated import opened_again, operated
from .same import same
from .weights import Content, once, spell

if TYPE_CHECKING:
    from .coordinator import SimLine
    from .world import World

SHIFT = 4096.0  # seconds
FENCED = ("step_done", "round_done", "eval_done", "saved", "fault")
BEAT = pb.Up(heartbeat=pb.Heartbeat(state="training"))


@dataclass(frozen=True)
class Durable:
    """What of a state is on the disk."""

    generation: int
    committed: tuple[int, int, int]  # generation, step, sample
    stop: tuple[int, int] | None

    @classmethod
    def of(cls, generation: int, mark: Mark, stop: Mark | None) -> Durable:
        committed = (mark.generation, mark.step, mark.sample)
        return cls(generation, committed, (stop.generation, stop.step) if stop else None)


@dataclass(frozen=True)
class Row:
    """A lease that is not returned."""

    generation: int
    step: int
    peer: str
    mask: int
    is_committed: bool = False


@dataclass
class Batch:
    """What the hub takes at once: nothing of it may be acknowledged before it is in the state and on the disk."""

    numbers: set[tuple[bytes, int]]  # session and number of every report
    size: int
    steps: int = 0
    is_durable: bool = True  # nothing of it waits to be written


class Watch:
    """Follows what becomes durable with a ledger of its own, and holds everything else to it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.last_state = RunState()
        self.rows: list[Row] = []
        self.leased_until: dict[int, int] = {}  # steps leased, of each generation
        self.contents: dict[bytes, Content] = {}
        self.plans: dict[int, Plan] = {}  # durable ones
        self.drafts: dict[int, Plan] = {}  # made by the state machine, perhaps never written
        self.committed: set[bytes] = set()  # digests of every stage's committed rounds
        self.now = self.before = Durable(0, (0, 0, 0), None)
        self.batch: Batch | None = None
        self.belief_is_old = False  # of who holds the older rounds: workers let them go without a word
        self.points: set[tuple[int, bool]] = set()  # of the generation: step, and whether held-out
        self.operated: object = None  # the operator's orders, if there was ever one
        self.dropped: list[Mark] = []  # committed rounds that were given up
        self.heard: dict[bytes, int] = {}  # newest report of each session
        self.reached: dict[str, int] = {}
        self.commits = 0

    def reach(self, what: str) -> None:
        """Counts a situation that histories must come to."""
        self.reached[what] = self.reached.get(what, 0) + 1

    # With every input.

    def step(self, rules: Rules, state: RunState, what: Input, now: float) -> tuple[RunState, list[Command]]:
        """The real ``step``, looked at."""
        new, commands = run.step(rules, state, what, now)
        if self.batch:
            self.batch.steps += 1
            self.batch.is_durable &= all(isinstance(c, Dismiss) for c in commands)
        if new.plan is not state.plan and new.plan is not None:
            goes_on = state.plan and new.plan.generation == state.plan.generation
            if goes_on:
                hold(new.plan.attempt > state.plan.attempt, "a plan changed that has lost nobody")  # type: ignore[union-attr]
            else:
                hold(new.plan.generation > self.now.generation, f"generation {new.plan.generation} is used twice")
                self.drafts[new.plan.generation] = new.plan
        if new.undivided is not None and state.undivided is None:
            self._divided(new.undivided, new.committed)
        if isinstance(what, Said):
            if what.report.seq and what.peer in state.members:
                session = state.members[what.peer].session
                if what.report.seq <= self.heard.get(session, 0):
                    self.reach("a report is taken twice")
                self.heard[session] = max(what.report.seq, self.heard.get(session, 0))
            self._fenced(rules, state, what, now, new, commands)
        if self.world.rng_checks.random() < 0.02:
            later, ordered = run.step(rules, shifted(state, SHIFT), what, now + SHIFT)
            hold(same(later, shifted(new, SHIFT)) and len(ordered) == len(commands), "a standstill makes a difference")
        if isinstance(what, Tick):
            late = [p for p, m in new.members.items() if m.away is not None and m.away <= now]
            hold(not late, f"{late} are waited for, though their time is over")
        for situation in operated(state, new, commands):
            self.reach(situation)
        self._bounded(rules, new)
        return new, commands

    def _fenced(
        self, rules: Rules, state: RunState, what: Said, now: float, new: RunState, commands: list[Command]
    ) -> None:
        """A report of another generation changes nothing."""
        body = what.report.WhichOneof("body")
        if body not in FENCED:
            return
        message = getattr(what.report, body)
        generation = message.generation
        if state.plan is not None and generation == state.plan.generation:
            fenced = what.peer not in state.plan.peers
            late = body == "round_done" and message.attempt != state.plan.attempt
            if not fenced and not late:
                return
            self.reach(f"a {body} of who is lost" if fenced else "a round_done of another attempt")
        else:
            self.reach(f"a {body} of another generation")
        other, ordered = run.step(rules, state, Said(peer=what.peer, report=BEAT), now)
        if what.peer in other.members and what.peer in state.members:
            before = state.members[what.peer]
            was = replace(other.members[what.peer], state=before.state, busy=before.busy)
            other = replace(other, members={**other.members, what.peer: was})
        hold(new == other, f"a {body} of generation {generation} changed the state")
        hold(commands == ordered, f"a {body} of generation {generation} had consequences: {commands[:3]}")

    def _bounded(self, rules: Rules, state: RunState) -> None:
        """Nothing piles up."""
        most = rules.lease_ahead + 2
        attempts = state.plan.attempt if state.plan else 0  # a lost one's steps stay until a later one is complete
        hold(len(state.losses) <= most + rules.lease_ahead * attempts, f"{len(state.losses)} losses wait")
        hold(len(state.evals) <= most, f"{len(state.evals)} evaluations wait")
        hold(len(state.leased_at) <= most, f"{len(state.leased_at)} leases run")
        hold(len(state.rounds_done) <= most, f"{len(state.rounds_done)} rounds wait")
        hold(len(state.marks) <= run.KEPT_MARKS, "too many marks")

    # With every commit of the store.

    def written(self, commands: list[Command]) -> None:
        if self.batch:
            self.batch.is_durable = True
        if not commands:
            return
        now, touched = self.now, False
        for command in commands:
            self.reach(type(command).__name__ if not isinstance(command, Journal) else command.event.kind)
            match command:
                case Lease():
                    self._leased(command)
                    touched = True
                case Journal(event=RolledBack(why=why)):
                    hold(not self.world.faults.is_alone, f"work is lost, though no worker has failed: {why}")
                case Keep(values=values):
                    self.operated = values.get("operated", self.operated)
                case Relet():
                    self._relet(command)
                case ReturnLeases():
                    self.rows = [r for r in self.rows if r.is_committed]
                case Commit(mark=mark):
                    self._committed(mark)
                    now = Durable.of(now.generation, mark, None)
                    self.belief_is_old = False
                    touched = True
                case Uncommit(step=step):
                    self._uncommitted(step)
                    sample = sum(r.mask.bit_count() for r in self.rows)
                    generation = self._generation_at(step)
                    now = Durable(now.generation, (generation, step, sample), now.stop)
                case Remember(generation=generation, stop=stop):
                    hold(generation >= now.generation, f"generation {generation} follows {now.generation}")
                    now = Durable(generation, now.committed, (stop.generation, stop.step) if stop else None)
                case Journal(event=Rerouted(generation=generation, peer=peer, since=since, void=void)):
                    self.plans[generation] = self.plans[generation].without(peer, since, void)
                    if self.plans[generation].attempt > 1:
                        self.reach("a generation loses a second one")
                case Journal(event=PlanIssued(generation=generation)) if generation in self.drafts:
                    hold(generation not in self.plans, f"generation {generation} is planned twice")
                    self.plans[generation] = plan = self.drafts.pop(generation)
                    if any(stage.shares for stage in plan.stages):
                        self.reach("a plan of uneven shares")
                    if plan.origin == "step":
                        self.reach("an orderly stop is gone on from")
                    if plan.first_step < self.now.committed[1]:
                        self.reach("a plan from an older round")
                    elif not self.belief_is_old:
                        self._donors(plan)
                    self.points.clear()
                    if plan.parts and plan.origin != "init":
                        self.reach(f"from {len(plan.parts)} stages to {len(plan.stages)}")
                case Point(step=step, train=train):
                    hold((step, train is None) not in self.points, f"a second point of step {step} in one generation")
                    self.points.add((step, train is None))
        self.commits += 1
        if now != self.now:
            self.before, self.now = self.now, now
        if touched:
            live = 0
            for row in self.rows:
                live |= row.mask
                if not row.is_committed and row.generation == self.now.generation and row.generation in self.plans:
                    hold(row.peer in self.plans[row.generation].peers, f"{row.peer} holds leases, and is lost")
            hold(live & (live + 1) == 0, "samples are skipped: neither leased nor committed")

    def _divided(self, before: Mark, after: Mark) -> None:
        """The same round in other stages: every layer is what it was."""
        old, new = ([self.contents[d].layers for d in mark.digests] for mark in (before, after))
        hold(sum(old, ()) == sum(new, ()), f"step {after.step}: the new stages hold other layers than were committed")

    def _donors(self, plan: Plan) -> None:
        """Who is to give a state has it."""
        members = self.world.coordinator.state.members
        for stage in (plan.parts or plan.stages) if plan.origin != "init" else ():
            hold(stage.donors, "a stage without donors")
            for donor in stage.donors:
                worker, member = self.world.machines[donor.peer].worker, members.get(donor.peer)
                if worker and worker.process.alive and member and worker.session == member.session:
                    name = (plan.origin, plan.origin_generation, plan.first_step, (stage.first_layer, stage.last_layer))
                    found = worker.points.find(*name)
                    hold(found is not None, f"{donor.peer} is a donor of what it does not hold")

    def _relet(self, relet: Relet) -> None:
        """A lost one's leases have new holders: all of them, and living ones."""
        for i, row in enumerate(self.rows):
            if row.is_committed or row.generation != relet.generation or row.peer != relet.peer:
                continue
            first = (row.mask & -row.mask).bit_length() - 1
            hold(first in relet.holders, f"{relet.peer} is lost, and keeps samples from {first}")
            self.rows[i] = replace(row, peer=relet.holders[first])

    def _leased(self, lease: Lease) -> None:
        mask = ((1 << lease.count) - 1) << lease.first
        for row in self.rows:
            hold(not row.mask & mask, f"samples from {lease.first} of step {lease.step} are leased twice")
        hold(lease.generation in self.plans, f"a lease of generation {lease.generation}, which has no plan")
        hold(lease.peer in self.plans[lease.generation].peers, f"a lease for {lease.peer}, who has no seat")
        machines = [self.world.machines[peer] for peer in self.plans[lease.generation].peers]
        seen = [m.worker.engine.local for m in machines if m.worker]
        slowest = min((local.step for local in seen if local.generation == lease.generation), default=lease.step)
        most = slowest + self.world.rules.lease_ahead
        hold(lease.step < most, f"step {lease.step} is leased, but somebody has done {slowest} only")
        self.rows.append(Row(lease.generation, lease.step, lease.peer, mask))
        until = self.leased_until.get(lease.generation, 0)
        self.leased_until[lease.generation] = max(until, lease.step + 1)

    def _committed(self, mark: Mark) -> None:
        done = 0
        for i, row in enumerate(self.rows):
            if row.step < mark.step:
                self.rows[i] = replace(row, is_committed=True)
                done |= row.mask
        hold(done == (1 << mark.sample) - 1, f"step {mark.step}: the committed samples are not [0, {mark.sample})")
        plan = self.plans[mark.generation]
        self.committed |= set(mark.digests)
        for stage, digest in enumerate(mark.digests):
            content = self.contents.get(digest)
            hold(content, f"step {mark.step}: nobody ever made what stage {stage} commits")
            assert content
            hold((content.first, content.first + len(content.layers)) == plan.layers[stage], "another stage's layers")
            for layer in content.layers:
                wrong = "" if layer.counters == once(mark.sample) else spell(layer.counters, mark.sample)
                hold(not wrong, f"step {mark.step}, stage {stage}: {wrong}")
            for replica in plan.replicas[stage]:
                worker = self.world.machines[replica.peer].worker
                local = worker.engine.local if worker else None
                if worker and local and worker.process.alive and local.generation == plan.generation:
                    point = mark.savepoint(stage, plan.layers[stage])
                    held = worker.points.memory.get(point)
                    what = f"step {mark.step}: {replica.peer} of stage {stage} does not hold what is committed"
                    hold(held and held.content.name == digest, what)
        self.world.trace("ledger", f"step {mark.step} committed: {mark.sample} samples")

    def _uncommitted(self, step: int) -> None:
        state = self.world.coordinator.state
        older = [m for m in known_marks(state) if m.step == step]
        hold(not step or (older and self.world.held(older)), f"back to step {step}, which nobody holds")
        if not state.bans:  # else the operator may have wished it: what a banned one holds counts for nothing
            self.dropped += [m for m in known_marks(state) if m.step > step]
        self.belief_is_old = True
        self.rows = [r for r in self.rows if r.is_committed and r.step < step]
        self.world.trace("ledger", f"back to step {step}")

    def _generation_at(self, step: int) -> int:
        state = self.world.coordinator.state
        return next((m.generation for m in (state.committed, *state.marks) if m.step == step), 0)

    # With every message to a worker.

    def sent(self, line: SimLine, message: pb.Down) -> None:
        body = message.WhichOneof("body")
        if body not in ("ack", "view"):
            return
        hub = self.world.coordinator.hub
        assert hub
        state = hub.state
        told = Durable.of(state.generation, state.committed, state.stop)
        hold(told in (self.now, self.before), f"{line.peer} is told of {told}, on the disk is {self.now}")
        if body == "ack":
            batch = self.batch
            if batch and (line.session, message.ack.seq) in batch.numbers:
                hold(batch.steps >= batch.size, "acknowledged before it is in the state")
                hold(batch.is_durable, "acknowledged before it is on the disk")
            return
        view = message.view
        if view.HasField("plan"):
            generation = view.plan.generation
            attempt = len(view.plan.lost)
            hold(generation in self.plans, f"{line.peer} is sent plan {generation}, which is not on the disk")
            known = self.plans[generation].attempt
            hold(attempt <= known, f"{line.peer} is sent attempt {attempt} of plan {generation}, durable is {known}")
            if view.until > view.plan.first_step:
                leased = self.leased_until.get(generation, 0)
                hold(view.until <= leased, f"{line.peer} is given steps to {view.until}, leased are those to {leased}")

    # With every start and end.

    def opened(self, state: RunState, store: Store) -> None:
        """A coordinator starts on what is on the disk."""
        found = Durable.of(state.generation, state.committed, state.stop)
        self.reach("a coordinator starts")
        hold(found == self.now, f"after a restart there is {found}, but {self.now} was on the disk")
        for situation in opened_again(state, self.operated):
            self.reach(situation)
        self.ledger(store)

    def ledger(self, store: Store) -> None:
        """The file says what was written."""
        masks = {"leased": 0, "committed": 0}
        holders = {(row.mask & -row.mask).bit_length() - 1: row.peer for row in self.rows}
        found = store.rows("SELECT first, count, state, peer FROM ledger WHERE state != 'returned'")
        for first, count, what, peer in found:
            hold(holders.get(first) == peer, f"the file says that {peer} has the samples from {first}")
            mask = ((1 << count) - 1) << first
            hold(not masks[what] & mask, f"the file has samples from {first} twice")
            masks[what] |= mask
        for what, mask in masks.items():
            mine = 0
            for row in self.rows:
                mine |= row.mask if row.is_committed == (what == "committed") else 0
            hold(mine == mask, f"the file has other {what} samples than were written")

    def finished(self) -> None:
        path = self.world.coordinator.disk.path
        report = verify(path)
        hold(not report.problems, "\n".join(report.lines()))
        hold(report.samples == self.now.committed[2], f"{report.samples} samples verified, {self.now} committed")

    def applied(self, peer: str, content: Content) -> None:
        """Somebody goes on from a round."""
        hold(content.name in self.committed, f"{peer} applies a round that is not committed")

    def made(self, content: Content) -> None:
        self.contents[content.name] = content
