"""Coordinator, network and disks of a simulated run, from one seed; what its workers do is in simulated_crew."""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manifests import manifest
from simulated_disk import LEDGER, SHIFT, FailingDisk, hold, same

from potluck.coordinator.resume import keep
from potluck.coordinator.run import step, view_of
from potluck.coordinator.service import open_run, rules_of
from potluck.coordinator.standstill import Standstill, shifted
from potluck.coordinator.state import (
    Commit,
    Dismiss,
    Gone,
    Input,
    Joined,
    Journal,
    Mark,
    Member,
    Rules,
    RunState,
    Said,
    StopAsked,
    Tick,
    Uncommit,
)
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
from potluck.protocol.plan import Plan, SavePoint
from potluck.worker.control import view_from
from potluck.worker.plan import Local, View
from potluck.worker.reports import Reports

SEEDS = 150
FAULTY_EVENTS = 500
CALM_EVENTS = 6000
Content = tuple[Any, ...]  # of a reference: () at the run's beginning, then (what it was made from, generation, step)
MANIFEST = manifest(10**5, 100, 8)


def digest_of(stage: int, content: Content) -> bytes:
    return hashlib.blake2b(repr((stage, content)).encode(), digest_size=8).digest() if content else b""


def a_config(rng: random.Random) -> RunConfig:
    sync = rng.choice([{"every": 1}, {"every": 2}, {"every": 5}, {"coin": 0.4}])
    return RunConfig(
        seed=rng.randrange(1000),
        steps=rng.randint(6, 16),
        model=ModelConfig(d_model=8, layers=4, heads=1, rotary_dim=2, seq_len=8),
        pipeline=PipelineConfig(stages=rng.choice([1, 2, 2, 3]), microbatches=2, microbatch_size=1),
        sync=SyncConfig(preset="cocktail", **sync),  # type: ignore[arg-type]
        eval=EvalConfig(every=5),
        checkpoint=CheckpointConfig(publish_rounds=rng.choice([1, 3, 50])),
        coordinator=CoordinatorConfig(wait_for=rng.choice([0, 3]), lease_seconds=60.0, patience_seconds=5.0),
    )


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
    reports: Reports = field(default_factory=Reports)
    sent: int = 0
    content: Content = ()
    since: int = 0
    pending: int | None = None  # the step at which a round was captured that is not exchanged yet
    counted: int = 0  # its samples

    @property
    def states(self) -> dict[SavePoint, tuple[Content, int]]:
        return {**self.disk, **(self.memory if self.alive else {})}

    def report(self, **body: Any) -> None:
        self.reports.add(**body)

    def start(self, session: bytes) -> None:
        self.alive, self.connected, self.leaving, self.session = True, False, False, session
        self.memory, self.local, self.view, self.news = {}, Local(peer=self.peer), View(), None
        self.reports, self.sent, self.pending = Reports(), 0, None

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
        self.rules = replace(self.rules, away_seconds=self.rng.choice([0.0, 1.0]))
        self.now = 1000.0
        self.store = FailingDisk(folder / "run.sqlite")
        self.store._db.execute("PRAGMA synchronous=OFF")
        self.state = RunState()
        self.acked: dict[bytes, int] = {}
        self.uploads: dict[int, set[int]] = {}
        self.captured: dict[tuple[int, int, int], set[str]] = {}
        self.generation = 0
        self.wiped = False
        self.faulty = True
        self.standing: Standstill | None = None
        self.backlog: list[tuple[Input, Worker | None, bytes, int]] = []
        self.open()
        count = max(len(self.rules.layers), self.rules.wait_for) + self.rng.randint(0, 2)
        self.workers = {f"p{i}": Worker(f"p{i}", self.rng.choice([0.5, 1.0, 2.0])) for i in range(count)}

    # The coordinator's shell.

    def open(self) -> None:
        """A coordinator starts on what is on the disk: every line is new."""
        state = open_run(self.store, self.config, MANIFEST)[2]
        self.state, self.acked = shifted(state, self.now - state.since), {}
        self.standing, self.backlog = None, []
        for worker in getattr(self, "workers", {}).values():
            worker.connected, worker.news = False, None

    def feed(self, what: Input, worker: Worker | None = None, seq: int = 0) -> None:
        """Something happens; while the disk refuses, it waits. Ticks and heartbeats are left out meanwhile."""
        fleeting = isinstance(what, Tick) or (isinstance(what, Said) and what.report.HasField("heartbeat"))
        if not (self.standing and fleeting):
            self.backlog.append((what, worker, worker.session if worker else b"", seq))
        if self.standing and self.faulty and self.rng.random() < 0.9:
            self.refuse()
            return
        if self.standing:
            state, event = self.standing.resumed(self.state, self.now)
            self.store.write([Journal(event=event)], self.now)
            self.state, self.standing = state, None
        while self.backlog:
            self.take(*self.backlog[0])
            if self.standing:
                return
            del self.backlog[:1]  # after a crash there is none

    def refuse(self) -> None:
        """The disk fills up, or is still full."""
        state = self.standing.resumed(self.state, self.now)[0] if self.standing else self.state
        _, commands = step(self.rules, state, self.backlog[0][0] if self.backlog else Tick(), self.now)
        code = self.rng.choice([sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_FSYNC])
        error = self.store.refused_write([c for c in commands if not isinstance(c, Dismiss)], self.now, code)
        self.standing = self.standing.again(error) if self.standing else Standstill(since=self.now, error=error)

    def take(self, what: Input, worker: Worker | None, session: bytes, seq: int) -> None:
        if self.faulty and self.rng.random() < 0.004:
            self.refuse()
            return
        state, commands = step(self.rules, self.state, what, self.now)
        later = step(self.rules, shifted(self.state, SHIFT), what, self.now + SHIFT)[0]
        hold(same(later, shifted(state, SHIFT)), "a standstill makes a difference")
        crash = self.rng.random() if self.faulty else 1.0
        if crash < 0.003:
            self.open()
            return
        before = self.state
        durable = [c for c in commands if not isinstance(c, Dismiss)]
        self.store.write([*durable, *keep(self.state, state)], self.now)
        self.state = state
        self.check(before, commands)
        if crash < 0.006:
            self.open()
            return
        if worker and seq and session == worker.session:
            self.acked[session] = max(seq, self.acked.get(session, 0))
            if self.faulty and self.rng.random() < 0.03:  # the line breaks, and the acknowledgement is lost with it
                worker.connected, worker.news = False, None
            if worker.connected:
                worker.reports.acknowledged(seq)
        for command in commands:
            if isinstance(command, Dismiss):
                for other in self.workers.values():
                    if other.session == command.session and other.connected:
                        other.connected = False
        for other in self.workers.values():
            member = state.members.get(other.peer)
            if other.connected and member and member.session == other.session:
                other.news = view_from(view_of(self.rules, state, other.peer))

    # What must hold whatever happens.

    def check(self, before: RunState, commands: list[Any]) -> None:
        state = self.state
        rows = self.store.rows(f"{LEDGER} WHERE state IN ('leased', 'committed') ORDER BY first, state")
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
        if worker.connected or self.standing:  # then it waits at the door
            return
        worker.connected, worker.sent = True, 0
        worker.reports.welcomed(self.acked.get(worker.session, 0))
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
        waiting = worker.reports.after(worker.sent)
        if not (worker.alive and worker.connected):
            return
        if self.faulty and worker.reports and self.rng.random() < 0.1:
            waiting = worker.reports.after(0)[:1]
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
