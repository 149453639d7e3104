"""One history: everything that one seed decides, from an empty disk to a finished run."""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from manifests import MANIFEST

from potluck.coordinator.assignment import StageNeed
from potluck.coordinator.planning import known_marks
from potluck.coordinator.service import rules_of
from potluck.coordinator.state import Division, Mark
from potluck.protocol.config import (
    CheckpointConfig,
    CoordinatorConfig,
    EvalConfig,
    ModelConfig,
    PipelineConfig,
    RunConfig,
    StageRange,
    SyncConfig,
)

from . import engine
from .checks import Broken, Watch, hold
from .coordinator import Coordinator, patched
from .crew import Crew
from .faults import Faults
from .kernel import Kernel, Process
from .net import Network
from .worker import Machine, Worker

CALM_SECONDS = 3600.0  # within which a run must be finished once nothing goes wrong any more
MOST_EVENTS = 3_000_000
LAST_LINES = 60
MEMORY = Path("/dev/shm")


def a_config(rng: random.Random, size: int) -> RunConfig:
    sync = rng.choice([{"every": 1}, {"every": 2}, {"every": 5, "delay": 2}, {"coin": 0.4}, {"every": 2, "delay": 0}])
    stages = rng.choice([1, 2, 2, 3]) if size < 20 else rng.choice([2, 3, 4])
    return RunConfig(
        seed=rng.randrange(1000),
        steps=rng.randint(6, 20) if size < 50 else rng.randint(3, 6),
        model=ModelConfig(d_model=8, layers=4, heads=1, rotary_dim=2, seq_len=8),
        pipeline=PipelineConfig(
            stages=StageRange(min=1, max=4) if rng.random() < 0.5 else stages,
            microbatches=rng.choice([1, 2]),
            microbatch_size=rng.choice([1, 2]),
            quorum=rng.choice([1, 1, 2]),
        ),
        sync=SyncConfig(preset="cocktail", **sync),  # type: ignore[arg-type]
        eval=EvalConfig(every=5, samples=4),
        checkpoint=CheckpointConfig(
            save_rounds=rng.choice([1, 2, 5]), publish_rounds=rng.choice([1, 3, 50]), keepers=0
        ),
        coordinator=CoordinatorConfig(
            wait_for=rng.choice([0, size]),
            lease_seconds=rng.choice([30.0, 120.0]),
            patience_seconds=rng.choice([1.0, 1.0, 5.0, 60.0]),
            prepare_seconds=rng.choice([0.0, 30.0]),
        ),
    )


def evened(division: Division, layer_gb: float) -> Division:
    """As of a deep model: every layer asks for the same, the head for nothing; else it needs most peers."""
    layers = [last - first for first, last in division.layers]
    return replace(division, needs=tuple(StageNeed(work=1.0 * n, memory_gb=layer_gb * n) for n in layers))


def a_size(rng: random.Random) -> int:
    """Of a swarm: most are small."""
    chance = rng.random()
    if chance < 0.93:
        return rng.randint(5, 9)
    return rng.randint(10, 30) if chance < 0.99 else rng.randint(50, 150)


@dataclass
class World:
    """``trace_all``: every line is kept, not the last ones only."""

    seed: int
    folder: Path
    trace_all: bool = False
    look: Callable[[World], None] = lambda _: None
    kernel: Kernel = field(default_factory=Kernel)
    faulty: bool = True
    wiped: bool = False
    finished: bool = False
    lost: bool = False  # nobody holds any state of the run: it cannot go on

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.rng_checks = random.Random(self.seed + 1)
        self.lines: deque[tuple[float, str, str]] = deque(maxlen=None if self.trace_all else LAST_LINES)
        self.size = a_size(rng)
        self.config, self.manifest = a_config(rng, self.size), MANIFEST
        self.rules = replace(rules_of(self.config, MANIFEST), reroutes=rng.random() < 0.9)
        if len(self.rules.divisions) > 1 or self.rng_checks.random() < 0.5:
            divisions, layer_gb = self.rules.divisions, 1.0 if len(self.rules.divisions) > 1 else 0.1
            self.rules = replace(self.rules, divisions=tuple(evened(d, layer_gb) for d in divisions))
        self.rules = replace(self.rules, divide_seconds=self.rng_checks.choice([0.0, 0.0, 10.0]))
        self.rules = replace(self.rules, move_seconds=self.rng_checks.choice([0.0, 0.0, 10.0]))
        self.eagerness = self.rng_checks.choice([0.2, 0.02])  # of volunteers to start a worker again that was killed
        self.machines: dict[str, Machine] = {}
        self.net = Network(self.kernel, random.Random(rng.random()))
        self.crew = Crew(self)
        self.net.on_heal.append(self.crew.flush)
        self.watch = Watch(self)
        self.coordinator = Coordinator(self, self.folder, random.Random(rng.random()))
        self.faults = Faults(self, random.Random(rng.random()))
        self.faulty_seconds = rng.choice([40.0, 100.0, 200.0]) if self.size < 50 else 60.0
        wanted = self.faulty_seconds / self.config.steps * rng.choice([0.2, 0.5])
        self.step_seconds = min(wanted, self.rules.lease_seconds / 10)
        self.nature = Process("nature")
        self.deadline = self.faulty_seconds + 100.0

    def trace(self, who: str, what: str) -> None:
        self.lines.append((self.kernel.now, who, what))

    def add_machine(self) -> Machine:
        peer = f"p{len(self.machines):02}"
        self.machines[peer] = machine = Machine(self, peer, random.Random(self.rng.random()))
        self.net.latency[peer] = self.rng.choice([0.005, 0.02, 0.1])
        return machine

    def session(self, peer: str, address: str) -> Worker | None:
        """The process that listens there, if it still does."""
        machine = self.machines.get(peer)
        worker = machine.worker if machine else None
        return worker if worker and worker.process.alive and worker.session == address.encode() else None

    def ended(self, machine: Machine) -> None:
        """Its volunteer starts a worker again that ended by itself."""
        self.kernel.later(machine.rng.uniform(1, 20), machine.start)

    def mend_disk(self) -> None:
        self.coordinator.disk.refusing = None

    def quick_disk(self) -> None:
        self.coordinator.disk.slowness = 1.0

    # A history.

    def run(self) -> None:
        self.coordinator.start()
        for _ in range(self.size):
            self.kernel.later(self.rng.uniform(0, 10), self.add_machine().start)
        self.faults.begin(self.nature)
        self.kernel.later(self.faulty_seconds, self.calm)
        self.kernel.spawn(self._volunteers(), self.nature)
        while not self.finished and self.kernel.events < MOST_EVENTS:
            self.kernel.turn()
            if self.kernel.now > self.deadline:
                if not self.can_go_on():
                    self.trace("nobody", "holds any state of this run")
                    self.lost = True
                    hold(not self.held(self.watch.dropped), "the run was given up, though all it needs is there")
                    return
                if self.deadline >= self.faulty_seconds + CALM_SECONDS:
                    break
                self.deadline += 100.0
        self.over()

    async def _volunteers(self) -> None:
        """Who was killed is started again, sooner or later."""
        from .kernel import sleep

        while True:
            await sleep(5.0)
            if not self.faulty:
                self.faults.tidy()
            for machine in self.machines.values():
                if not machine.alive and (not self.faulty or self.rng.random() < self.eagerness):
                    machine.start()

    def calm(self) -> None:
        """From here on nothing goes wrong."""
        self.trace("everybody", "nothing goes wrong any more")
        self.faulty = False
        self.mend_disk()
        self.quick_disk()
        self.coordinator.crash_at = ""
        self.net.heal_all()
        for machine in self.machines.values():
            machine.hang_until = 0.0

    def can_go_on(self) -> bool:
        """Whether some point of the run is still held by somebody for every stage."""
        state = self.coordinator.state
        if state.committed.kind == "init":
            return True
        return self.held(known_marks(state))

    def held(self, marks: Iterable[Mark]) -> bool:
        """Whether somebody holds one of ``marks`` for every stage."""
        held = [{*m.disk, *(m.worker.points.memory if m.worker and m.alive else ())} for m in self.machines.values()]
        return any(
            all(any(point in h for h in held) for point in mark.savepoints(self.rules.division(mark.stages)))
            for mark in marks
        )

    def over(self) -> None:
        """The run is finished, and all of it is there."""
        state, config = self.coordinator.state, self.config
        since = self.kernel.now - self.faulty_seconds
        hold(self.finished, f"the run hangs, {since:.0f} s after the last fault: {state.phase}, {state.note!r}")
        hold(state.committed.step == config.steps, "finished before its last step")
        self.watch.finished()
        path = self.coordinator.disk.path.parent / "checkpoints" / f"step-{config.steps:08d}"
        hold(path.exists(), "finished, and not published")

    def last_lines(self) -> str:
        return "\n".join(f"{when:9.3f}  {who:12} {what}" for when, who, what in self.lines)


def simulate(seed: int, *, trace: bool = False, look: Callable[[World], None] = lambda _: None) -> World:
    """The history of ``seed``; ``Broken`` (with ``world``) if something is wrong in it.

    ``look`` is called after each commit, and at the end.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"potluck-sim-{seed}-", dir=MEMORY if MEMORY.is_dir() else None))
    world = World(seed, folder, trace_all=trace, look=look)
    try:
        with patched(world), engine.patched(world):
            logging.disable(logging.CRITICAL)
            try:
                world.run()
                look(world)
            except Exception as error:
                what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
                broken = Broken(what)
                broken.world = world  # type: ignore[attr-defined]
                raise broken from error
            finally:
                logging.disable(logging.NOTSET)
                for machine in world.machines.values():
                    if machine.worker:
                        machine.worker.process.kill()
                world.coordinator.process.kill()
                world.nature.kill()
                if world.coordinator.hub:
                    world.coordinator.hub.store.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return world
