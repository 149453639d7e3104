"""A whole run inside one process: the real state machine and real engines, joined by memory instead of sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from potluck.coordinator import corpus, events, run, service, state, views
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import RunConfig
from potluck.protocol.frames import Frame
from potluck.protocol.manifest import Manifest
from potluck.protocol.plan import Plan, Shape
from potluck.worker.checkpoint import SavePoints
from potluck.worker.control import view_from
from potluck.worker.engine import Engine
from potluck.worker.keeper import Keeper
from potluck.worker.links import STATES, Links
from potluck.worker.mailbox import Address, Mailbox
from potluck.worker.outside import EngineConfig, Views
from potluck.worker.states import States

RUN_NAME = b"testrun1"
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven"),
    *("wizards", "quietly", "bake", "bread", "for", "everyone", "in", "town"),
]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join(" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 60)) + f" {i}." for i in range(1, 300))
    source = folder / "text.txt"
    source.write_text(text, encoding="utf-8")
    target = folder / "prepared"
    return target, corpus.prepare(str(source), target, vocab_size=300, seq_len=16, seed=1)


class MemoryLinks(Links):
    """The peers' mailboxes, reached directly."""

    def __init__(self, peer: str, local: LocalRun, mailbox: Mailbox) -> None:
        self.peer, self.local, self.mailbox = peer, local, mailbox
        self.plan: Plan | None = None
        self._told = {}

    def follow(self, plan: Plan) -> None:
        self.plan = plan
        if plan.lost:
            self.mailbox.reroute(plan)
        self.mailbox.fence(plan.generation)

    def post(self, peer: str, frame: Frame) -> None:
        header = frame.header
        self.local.on_post(self.peer, frame)
        if header.kind in STATES:
            if peer in self.local.workers:
                self.local.workers[peer].states.put(self.peer, frame)
            return
        if self.plan is None or header.generation != self.plan.generation:
            return
        if peer in self.local.workers:
            self.local.workers[peer].mailbox.put(Address.of(header, self.peer), frame)
            self._arrived_there(frame)

    def take(self, wanted: Sequence[Address], attempt: int = 0) -> tuple[Address, Frame]:
        return self.mailbox.take(wanted, attempt, timeout_seconds=30.0)


class LocalWorker:
    """One engine in a thread; also its own headquarters."""

    def __init__(self, peer: str, local: LocalRun, folder: Path) -> None:
        self.peer, self.local = peer, local
        self.state = "loading"
        self.mailbox, self.views, self.points = Mailbox(), Views(), SavePoints(folder)
        self.links = MemoryLinks(peer, local, self.mailbox)
        self.states = States(RUN_NAME, self.points, self.links.post, 0.0)
        shape = Shape.of(local.config.model, local.manifest.vocab_size)
        self.states.prepare(local.config, shape, self.report)
        if local.config.checkpoint.keepers:
            self.states.keep(Keeper(local.config, shape, folder, self.report))
        config = EngineConfig(run=local.config, manifest=local.manifest, run_name=RUN_NAME, peer=peer)
        self.engine = Engine(config, self.views, self.links, self.mailbox, self.states, self)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=peer)

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self.error = error
            self.local.fail()

    def report(self, **body: object) -> None:
        self.local.put(state.Said(peer=self.peer, report=pb.Up(seq=1, **body)))

    def counterfactual(self, dense_nbytes: int) -> None:
        assert dense_nbytes >= 0

    def corpus(self) -> Path:
        return self.local.folder

    def fetch(self, name: str, nbytes: int) -> None:
        raise AssertionError(f"shard {name} is not there")

    def publish(self, step: int, stage: int, data: bytes, is_wanted: Callable[[], bool]) -> None:
        plan = self.links.plan
        assert plan is not None
        self.local.published.setdefault(step, {})[stage] = data[:]
        if len(self.local.published[step]) == len(plan.stages):
            self.local.put(state.Uploaded(step=step, path="memory"))


class LocalRun:
    """The coordinator of such a run: steps the state machine under a lock and hands out views."""

    worker_class = LocalWorker

    def __init__(self, config: RunConfig, data: tuple[Path, Manifest], folder: Path) -> None:
        self.config, (self.folder, self.manifest), self.home = config, data, folder
        self.rules = replace(service.rules_of(config, self.manifest), settle_seconds=0.0, away_seconds=0.0)
        self.machine = state.RunState()
        self.workers: dict[str, LocalWorker] = {}
        self.events: list[events.Event] = []
        self.points: list[state.Point] = []
        self.published: dict[int, dict[int, bytes]] = {}
        self.on_event: Callable[[events.Event], None] = lambda event: None
        self.on_post: Callable[[str, Frame], None] = lambda sender, frame: None
        self._lock = threading.RLock()
        self._moved = threading.Condition(self._lock)
        self._now = 0.0
        self._failed = False
        self._dead: list[LocalWorker] = []

    def put(self, what: state.Input) -> None:
        with self._lock:
            self._now += 1e-3
            self.machine, commands = run.step(self.rules, self.machine, what, self._now)
            for command in commands:
                if isinstance(command, state.Journal):
                    self.events.append(command.event)
                    self.on_event(command.event)
                elif isinstance(command, state.Point):
                    self.points.append(command)
            for peer, worker in list(self.workers.items()):
                if peer in self.machine.members:
                    view = view_from(views.view_of(self.rules, self.machine, peer))
                    if view != worker.views.newest[0]:
                        if view.plan is not None and peer in {x.peer for x in view.plan.lost}:
                            worker.mailbox.fence(view.plan.generation + 1)
                        elif view.plan is not None and view.plan != worker.links.plan:
                            worker.links.follow(view.plan)
                        elif view.plan is None and worker.links.plan is not None:
                            worker.mailbox.fence(worker.links.plan.generation + 1)
                        worker.states.follow(view)
                        worker.views.put(view)
            self._moved.notify_all()

    def join(self, *peers: str) -> None:
        for peer in peers:
            self.workers[peer] = self.worker_class(peer, self, self.home / peer)
        for peer in peers:
            points = frozenset(self.workers[peer].points.points())
            self.put(state.Joined(member=state.Member(peer=peer, name=peer, memory_gb=64.0, savepoints=points)))
        for peer in peers:
            self.workers[peer].thread.start()

    def fail(self) -> None:
        with self._lock:
            self._failed = True
            self._moved.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds; raises what a worker raised."""
        with self._lock:
            done = self._moved.wait_for(lambda: self._failed or condition(), timeout=60.0)
        for worker in self.workers.values():
            if worker.error:
                raise worker.error
        assert done, f"the run stands still\n{self.story()}"

    def story(self) -> str:
        """Where everybody is, for a failure's message."""
        now = self.machine
        lines = [e.text for e in self.events]
        lines.append(f"{now.phase}: until {now.until}, end {now.end} {now.closing}, committed {now.committed.step}")
        lines += [f"round {at}: {', '.join(sorted(said))}" for at, said in now.rounds_done.items()]
        lines += [f"{peer}: {worker.engine.local}" for peer, worker in self.workers.items()]
        return "\n".join(lines)

    def finish(self) -> LocalRun:
        self.wait(lambda: self.machine.phase in ("finished", "stopped"))
        self.close()
        return self

    def cut_off(self, peer: str) -> None:
        """Nothing of a worker gets to anybody any more."""
        with self._lock:
            gone = self.workers.pop(peer)
        self._dead.append(gone)
        gone.views.close()
        gone.mailbox.close()

    def kill(self, peer: str) -> None:
        self.cut_off(peer)
        self.put(state.Gone(peer=peer))

    def close(self) -> None:
        for worker in (*self.workers.values(), *self._dead):
            worker.views.close()
            worker.mailbox.close()
            worker.thread.join(10.0)
            worker.states.close()
            assert not worker.thread.is_alive()

    # What came of it.

    def losses(self) -> list[float]:
        return [p.train for p in self.points if p.train is not None]

    def weights(self) -> dict[str, torch.Tensor]:
        """The last published model, by checkpoint name."""
        import safetensors.torch

        parts = self.published[max(self.published)]
        return {k: v for stage in sorted(parts) for k, v in safetensors.torch.load(parts[stage]).items()}

    def seen(self, kind: type[events.Event]) -> list[events.Event]:
        return [e for e in self.events if isinstance(e, kind)]


@pytest.fixture
def local_run(corpus_folder: tuple[Path, Manifest], tmp_path: Path):
    """Makes runs of ``config`` and ends their threads whatever happens."""
    made: list[LocalRun] = []

    def make(config: RunConfig, home: str = "a", corpus: tuple[Path, Manifest] = corpus_folder) -> LocalRun:
        made.append(LocalRun(config, corpus, tmp_path / home))
        return made[-1]

    torch.set_num_threads(1)
    yield make
    for one in made:
        one.close()


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """A tiny run: four layers, everything uncompressed, a round after every step, unless changed by section."""
    base = RunConfig(name="test", steps=4)
    sections = {
        "model": {"d_model": 32, "layers": 4, "heads": 2, "rotary_dim": 8, "seq_len": 16},
        "pipeline": {"stages": 2, "microbatch_size": 2, "microbatches": 3, "recompute": True},
        "activations": {"forward": "fp32", "backward": "fp32"},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "sync": {"preset": "dense"},
        "eval": {"every": 100, "samples": 4},
        "checkpoint": {"publish_rounds": 10_000},
        "coordinator": {"lease_seconds": 1000.0, "wait_for": 2},
    }

    def make(steps: int = 4, **changes: dict[str, object]) -> RunConfig:
        raw = msgspec.to_builtins(base)
        for section, values in sections.items():
            raw[section] = {**raw[section], **values, **changes.get(section, {})}
        raw["steps"] = steps
        return msgspec.convert(raw, RunConfig)

    return make
