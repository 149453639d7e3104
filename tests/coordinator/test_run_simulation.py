"""The whole control plane under random faults: the real state machine and store, workers that follow their real rules.

Training is replaced by bookkeeping: a stage's reference is named by the chain of rounds that made it, so a digest says
exactly which samples are in it. One seed is one history; a failure names its seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from potluck.coordinator import planning, run
from potluck.coordinator.run import step, view_of
from potluck.coordinator.service import open_run, rules_of
from potluck.coordinator.state import (
    Commit,
    Dismiss,
    Gone,
    Input,
    Joined,
    Mark,
    Member,
    Rules,
    RunState,
    Said,
    StopAsked,
    Tick,
    Uncommit,
    Uploaded,
)
from potluck.coordinator.store import Store
from potluck.coordinator.verdict import Verdict
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import (
    CheckpointConfig,
    CoordinatorConfig,
    EvalConfig,
    ModelConfig,
    PipelineConfig,
    RunConfig,
    SyncConfig,
)
from potluck.protocol.manifest import Manifest
from potluck.protocol.plan import Plan, SavePoint
from potluck.protocol.schedule import is_round
from potluck.worker import plan as rules_of_worker
from potluck.worker.plan import Action, Local, View, next_action

SEEDS = 200
FAULTY_EVENTS = 500
CALM_EVENTS = 6000
Content = tuple[Any, ...]  # of a reference: () at the run's beginning, then (what it was made from, generation, step)
MANIFEST = Manifest(
    source="test",
    tokens_sha256="0" * 64,
    n_tokens=8 * (10**5 + 100) + 2,
    dtype="uint16",
    vocab_size=300,
    seq_len=8,
    n_train=10**5,
    n_heldout=100,
    tokenizer_sha256="0" * 64,
    eos_id=0,
    license="unknown",
)


def digest_of(stage: int, content: Content) -> bytes:
    return hashlib.blake2b(repr((stage, content)).encode(), digest_size=8).digest() if content else b""


def a_config(rng: random.Random) -> RunConfig:
    sync = rng.choice([{"every": 1}, {"every": 2}, {"every": 5}, {"coin": 0.4}])
    return RunConfig(
        seed=rng.randrange(1000),
        steps=rng.randint(6, 16),
        model=ModelConfig(d_model=8, layers=4, heads=1, rotary_dim=2, seq_len=8),
        pipeline=PipelineConfig(stages=rng.choice([1, 2, 2, 3]), microbatches=2, microbatch_size=1),
        sync=SyncConfig(preset="potluck", **sync),  # type: ignore[arg-type]
        eval=EvalConfig(every=5),
        checkpoint=CheckpointConfig(publish_rounds=rng.choice([1, 3, 50])),
        coordinator=CoordinatorConfig(wait_for=rng.choice([0, 3]), lease_seconds=60.0, patience_seconds=5.0),
    )


class Broken(AssertionError):
    """An invariant does not hold."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


@dataclass
class Worker:
    """What a volunteer's machine is: a disk that outlives the process, and a process that does not."""

    peer: str
    speed: float
    disk: dict[SavePoint, tuple[Content, int]] = field(default_factory=dict)  # to its reference and pending samples
    alive: bool = False
    connected: bool = False
    leaving: bool = False
    session: bytes = b""
    memory: dict[SavePoint, tuple[Content, int]] = field(default_factory=dict)
    local: Local = field(default_factory=lambda: Local(peer=""))
    view: View = field(default_factory=View)
    news: View | None = None  # sent, not yet read
    unacked: list[pb.Up] = field(default_factory=list)
    sent: int = 0
    seq: int = 0
    content: Content = ()
    since: int = 0
    pending: int | None = None  # the step at which a round was captured that is not exchanged yet
    counted: int = 0  # its samples

    @property
    def states(self) -> dict[SavePoint, tuple[Content, int]]:
        return {**self.disk, **(self.memory if self.alive else {})}

    def report(self, **body: Any) -> None:
        self.seq += 1
        self.unacked.append(pb.Up(seq=self.seq, **body))

    def start(self, session: bytes) -> None:
        self.alive, self.connected, self.leaving, self.session = True, False, False, session
        self.memory, self.local, self.view, self.news = {}, Local(peer=self.peer), View(), None
        self.unacked, self.sent, self.seq, self.pending = [], 0, 0, None

    def find(self, kind: str, generation: int, at: int, layers: tuple[int, int]) -> tuple[Content, int] | None:
        for point, state in self.states.items():
            if (point.kind, point.generation, point.step) == (kind, generation, at) and layers == (
                point.first_layer,
                point.last_layer,
            ):
                return state
        return None


class World:
    """A coordinator, its workers, the lines between them, and chance."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.config = a_config(self.rng)
        self.rules: Rules = replace(rules_of(self.config, MANIFEST), silence_seconds=6.0, settle_seconds=0.3)
        self.now = 1000.0
        self.store = Store(folder / "run.sqlite")
        self.store._db.execute("PRAGMA synchronous=OFF")
        self.state = RunState()
        self.acked: dict[bytes, int] = {}
        self.uploads: dict[int, set[int]] = {}
        self.captured: dict[tuple[int, int, int], set[str]] = {}
        self.generation = 0
        self.wiped = False
        self.faulty = True
        self.open()
        count = max(len(self.rules.layers), self.rules.wait_for) + self.rng.randint(0, 2)
        self.workers = {f"p{i}": Worker(f"p{i}", self.rng.choice([0.5, 1.0, 2.0])) for i in range(count)}

    # The coordinator's shell.

    def open(self) -> None:
        """A coordinator starts on what is on the disk: every line is new."""
        self.state = replace(open_run(self.store, self.config, MANIFEST)[2], since=self.now)
        self.acked, self.uploads = {}, {}
        for worker in getattr(self, "workers", {}).values():
            worker.connected, worker.news = False, None

    def feed(self, what: Input, worker: Worker | None = None, seq: int = 0) -> None:
        state, commands = step(self.rules, self.state, what, self.now)
        crash = self.rng.random() if self.faulty else 1.0
        if crash < 0.003:
            self.open()
            return
        before = self.state
        self.store.write([c for c in commands if not isinstance(c, Dismiss)], self.now)
        self.state = state
        self.check(before, commands)
        if crash < 0.006:
            self.open()
            return
        if worker and seq:
            self.acked[worker.session] = max(seq, self.acked.get(worker.session, 0))
            if self.faulty and self.rng.random() < 0.03:  # the line breaks, and the acknowledgement is lost with it
                worker.connected, worker.news = False, None
            worker.unacked = [u for u in worker.unacked if u.seq > seq or not worker.connected]
        for command in commands:
            if isinstance(command, Dismiss):
                for other in self.workers.values():
                    if other.session == command.session and other.connected:
                        other.connected = False
        for other in self.workers.values():
            member = state.members.get(other.peer)
            if other.connected and member and member.session == other.session:
                other.news = unpacked(view_of(self.rules, state, other.peer))

    # What must hold whatever happens.

    def check(self, before: RunState, commands: list[Any]) -> None:
        state = self.state
        rows = self.store.rows(
            "SELECT first, count, state, step FROM ledger WHERE state IN ('leased', 'committed') ORDER BY first, state"
        )
        end = committed = 0
        for first, count, what, _ in rows:
            hold(first == end, f"sample {first} is out twice, or samples from {end} are skipped")
            end = first + count
            if what == "committed":
                hold(committed == first, "the committed samples are no prefix")
                committed = end
        hold(committed == state.committed.sample, f"{committed} samples committed, {state.committed.sample} claimed")
        if state.plan and state.phase == "training":
            hold(end == state.plan.first_sample_of(state.until), f"{end} samples leased, but steps to {state.until}")
        if state.plan and state.plan is not before.plan:
            hold(state.plan.generation > self.generation, "a generation is used twice")
            self.generation = state.plan.generation
            self.check_plan(state.plan)
        for command in commands:
            if isinstance(command, Commit):
                assert before.plan
                for stage, digest in enumerate(command.mark.digests):
                    seats = [self.workers[r.peer] for r in before.plan.stages[stage].replicas]
                    here = [w for w in seats if w.alive and w.local.generation == command.mark.generation]
                    known = [self.prefix(w, stage, digest, command.mark) for w in here]
                    hold(all(known), f"a replica of stage {stage} does not hold what is committed")
            if isinstance(command, Uncommit):
                held = [self.present_holders(i, before.committed) for i in range(len(self.rules.layers))]
                hold(not all(held), f"a committed round is dropped though {held} hold it")

    def prefix(self, worker: Worker, stage: int, digest: bytes, mark: Mark) -> bool:
        """Whether a worker holds this committed state, made without a gap from the run's beginning."""
        found = worker.states.get(mark.savepoint(stage, self.rules.layers[stage]))
        if found is None or digest_of(stage, found[0]) != digest:
            return False
        content = found[0]
        while content:
            if content[0] == "rotten":
                return False
            content = content[0]
        return True

    def present_holders(self, stage: int, mark: Mark) -> list[str]:
        point = mark.savepoint(stage, self.rules.layers[stage])
        members = self.state.members
        return [
            p
            for p, w in self.workers.items()
            if w.alive and p in members and members[p].session == w.session and point in w.states
        ]

    def check_plan(self, plan: Plan) -> None:
        hold(sorted(plan.places) == sorted(p for s in plan.stages for p in (r.peer for r in s.replicas)), "two seats")
        for stage in plan.stages:
            if plan.origin == "init":
                continue
            hold(stage.donors, "a stage without donors")
            for donor in stage.donors:
                worker, member = self.workers[donor.peer], self.state.members[donor.peer]
                layers = (stage.first_layer, stage.last_layer)
                if worker.alive and worker.session == member.session:
                    found = worker.find(plan.origin, plan.origin_generation, plan.first_step, layers)
                    hold(found is not None, f"{donor.peer} is a donor of what it does not hold")

    # What happens.

    def happen(self) -> None:
        """One event."""
        self.now += self.rng.expovariate(20.0)
        if self.state.phase == "stopped":
            self.open()
        kinds: list[tuple[float, Callable[[Worker], None]]] = [
            (6, self.act),
            (5, self.deliver),
            (3, self.read),
            (1, self.connect),
            (0.5, lambda _: self.tick()),
        ]
        if self.faulty:
            kinds += [
                (0.1, self.kill),
                (0.1, self.leave),
                (0.08, self.break_line),
                (0.1, self.rot),
                (0.06, lambda _: self.feed(StopAsked())),
                (0.15, self.wipe),
            ]
        worker = self.rng.choice(list(self.workers.values()))
        self.rng.choices([k for _, k in kinds], [w for w, _ in kinds])[0](worker)

    def tick(self) -> None:
        for worker in list(self.workers.values()):
            if worker.connected and worker.alive and (self.rng.random() < 0.9 or not self.faulty):
                self.feed(Said(peer=worker.peer, report=pb.Up(heartbeat=pb.Heartbeat(state="training"))))
        self.feed(Tick())

    def connect(self, worker: Worker) -> None:
        if not worker.alive:
            if self.faulty and self.rng.random() < 0.6:
                return
            worker.start(self.rng.randbytes(8))
        if worker.connected:
            return
        worker.connected, worker.sent = True, 0
        acked = self.acked.get(worker.session, 0)
        worker.unacked = [u for u in worker.unacked if u.seq > acked]
        self.feed(
            Joined(
                member=Member(
                    peer=worker.peer,
                    name=worker.peer,
                    speed=worker.speed,
                    session=worker.session,
                    savepoints=frozenset(worker.states),
                )
            )
        )

    def deliver(self, worker: Worker) -> None:
        """The next report arrives; now and then one that was there already arrives again."""
        waiting = [u for u in worker.unacked if u.seq > worker.sent]
        if not (worker.alive and worker.connected):
            return
        if self.faulty and worker.unacked and self.rng.random() < 0.1:
            waiting = worker.unacked[:1]
            self.feed(Said(peer=worker.peer, report=waiting[0]))  # it was queued twice
        if waiting and worker.connected:
            worker.sent = max(worker.sent, waiting[0].seq)
            if waiting[0].seq > self.acked.get(worker.session, 0):
                self.feed(Said(peer=worker.peer, report=waiting[0]), worker, waiting[0].seq)

    def read(self, worker: Worker) -> None:
        if worker.alive and worker.news is not None:
            worker.view, worker.news = worker.news, None

    def kill(self, worker: Worker) -> None:
        if worker.alive:
            self.end(worker)
            if self.rng.random() < 0.7:  # else only its silence tells
                self.feed(Gone(peer=worker.peer, session=worker.session))

    def end(self, worker: Worker) -> None:
        worker.alive = worker.connected = False
        worker.memory, worker.news = {}, None

    def wipe(self, worker: Worker) -> None:
        """A machine that is off loses its disk."""
        if not worker.alive and worker.disk:
            worker.disk, self.wiped = {}, True

    def leave(self, worker: Worker) -> None:
        if worker.alive and not worker.leaving:
            worker.leaving = True
            worker.report(leaving=pb.Leaving())

    def break_line(self, worker: Worker) -> None:
        """The line breaks; the coordinator hears of it, or the same process dials again before that."""
        if worker.connected:
            worker.connected, worker.news = False, None
            if self.rng.random() < 0.5:
                self.feed(Gone(peer=worker.peer, session=worker.session))

    def rot(self, worker: Worker) -> None:
        """Memory goes bad: the reference is not what it was."""
        if worker.content:
            worker.content = ("rotten", self.rng.random())

    # A worker's moves.

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
                if not worker.unacked or not worker.connected:
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


def unpacked(message: pb.View) -> View:
    return View(
        phase=message.phase,
        note=message.note,
        plan=Plan.from_proto(message.plan) if message.HasField("plan") else None,
        until=message.until,
        end=message.end,
        closing=message.closing,
        committed=message.committed,
        publish=message.publish if message.publishing else None,
        released=message.released,
    )


def simulate(seed: int, folder: Path) -> World:
    """A history with faults, then without: the run must finish, unless every copy of a stage was destroyed."""
    world = World(seed, folder)
    try:
        for _ in range(FAULTY_EVENTS):
            world.happen()
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
