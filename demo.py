"""``potluck demo``: a coordinator and workers as processes of this machine, watched in the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .chaos import Chaos
from .protocol.config import (
    CheckpointConfig,
    CoordinatorConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
    SyncConfig,
    dump,
    load,
)
from .protocol.errors import ConfigError, StateError
from .screen import Screen

STEPS = 240
MARKER = ".potluck-demo"
STOP_SECONDS = 60.0
PROMPT = "The "


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the command line says."""

    home: Path  # where the run is kept if nothing else is said
    workers: int = 4
    stages: int = 2
    steps: int | None = None
    preset: str = "potluck"
    data: str = "builtin"
    keep: Path | None = None
    resume: bool = False
    plain: bool = False
    chaos: bool = False
    seed: int | None = None  # of the chaos


def run_config(demo: DemoConfig) -> RunConfig:
    """The demo's run: 4.2 M parameters (with two stages and the built-in text), about two minutes on two cores."""
    return RunConfig(
        name="demo",
        steps=demo.steps or STEPS,
        model=ModelConfig(layers=max(4, demo.stages)),
        data=DataConfig(source=source_of(demo.data)),
        pipeline=PipelineConfig(stages=demo.stages, microbatch_size=2, microbatches=4, recompute=False),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=20, schedule="cosine"),
        sync=SyncConfig(preset=demo.preset),  # type: ignore[arg-type]
        eval=EvalConfig(every=30, samples=32),
        checkpoint=CheckpointConfig(save_rounds=1 if demo.chaos else 10, publish_rounds=1000),
        coordinator=CoordinatorConfig(wait_for=demo.workers, patience_seconds=30.0),
    )


def source_of(data: str) -> str:
    """A path as it is seen from anywhere; other sources as they are."""
    return data if data == "builtin" or data.startswith("hf:") else str(Path(data).absolute())


def run(demo: DemoConfig) -> int:
    """The whole demo; the process's exit code."""
    folder, config = prepare(demo)
    show = Screen(plain=demo.plain)
    crew = Crew(folder, config.coordinator.wait_for)
    chaos = Chaos(crew, show, demo.seed) if demo.chaos else None
    interrupted = threading.Event()
    handlers = {n: signal.signal(n, lambda *_: interrupted.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        show.say(
            f"potluck demo: {crew.workers} workers, {config.pipeline.stages} stages; everything is kept in {folder}"
        )
        ready = crew.start_coordinator(interrupted, show)
        if ready is None:
            show.say("Stopped before anything began.")
            return 130
        show.page = ready["page"]
        show.say(f"Dashboard: {ready['page']}")
        crew.start_workers(ready["ticket"])
        return watch(demo, crew, show, interrupted, chaos)
    finally:
        if chaos:
            chaos.end()
        crew.end()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def prepare(demo: DemoConfig) -> tuple[Path, RunConfig]:
    """The run's folder and configuration: new, or those of the run to go on with."""
    folder = demo.keep.absolute() if demo.keep else demo.home
    marker, path = folder / MARKER, folder / "run.yaml"
    if demo.resume:
        if not (marker.exists() and path.exists()):
            raise StateError(f"{folder} holds no run to go on with", hint="Start one: potluck demo")
        return folder, load(path)
    if demo.workers < demo.stages:
        raise ConfigError(
            f"--workers {demo.workers} is too few for --stages {demo.stages}",
            hint=f"Each stage needs a worker: --workers {demo.stages}",
        )
    config = run_config(demo)
    try:
        if folder.exists() and any(folder.iterdir()):
            if not marker.exists():
                raise ConfigError(f"{folder} is not empty and not a demo's", hint="Name another folder with --keep.")
            if demo.keep and (folder / "coordinator" / "run.sqlite").exists():
                raise ConfigError(
                    f"{folder} holds a run already",
                    hint="Go on with it: --resume. Or name another folder with --keep.",
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        path.write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}", hint="Name a writable folder with --keep.") from None
    return folder, config


@dataclass
class Crew:
    """The demo's processes. Each has a session of its own, so that Ctrl-C reaches us alone and we end them in order."""

    folder: Path
    workers: int
    coordinator: subprocess.Popen[bytes] | None = None
    members: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _command: list[str] = field(default_factory=list)
    _ticket: str = ""

    def start_coordinator(self, interrupted: threading.Event, show: Screen) -> dict[str, str] | None:
        """Starts it and waits until it is up; None if Ctrl-C came first."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        command = [
            "coordinator",
            "up",
            str(self.folder / "run.yaml"),
            "--data-dir",
            str(self.folder / "coordinator"),
        ]
        self._command = [*command, "--ready-file", str(ready)]
        self.restart_coordinator()
        assert self.coordinator is not None
        show.say("Preparing the corpus and tokenizer, starting the coordinator …")
        while not ready.exists():
            if interrupted.wait(0.1):
                return None
            if self.coordinator.poll() is not None:
                raise StateError(
                    f"the coordinator ended: {self.last_line('coordinator')}",
                    hint=f"Its log: {self.folder / 'logs' / 'coordinator.log'}",
                )
        return json.loads(ready.read_text(encoding="utf-8"))

    def restart_coordinator(self) -> None:
        """The same command again: it goes on where the last one was."""
        self.coordinator = self._spawn("coordinator", self._command)

    def start_workers(self, ticket: str) -> None:
        self._ticket = ticket
        for i in range(1, self.workers + 1):
            self.start_worker(f"worker-{i}")

    def start_worker(self, name: str) -> None:
        threads = str(max(1, (os.cpu_count() or 2) // self.workers))
        options = ["--name", name, "--threads", threads, "--device", "cpu", "--data-dir", str(self.folder / name)]
        self.members[name] = self._spawn(name, ["worker", "join", self._ticket, *options])

    def sample(self, model: Path) -> subprocess.Popen[bytes]:
        """A process that lets a published model write; its text goes to stdout."""
        command = [
            sys.executable,
            "-m",
            "potluck",
            "sample",
            str(model),
            "--prompt",
            PROMPT,
            "--tokens",
            "40",
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        self.helpers.append(process)
        return process

    def stop(self) -> None:
        """In order: the coordinator has everything saved, then the workers go."""
        if self.coordinator and self.coordinator.poll() is None:
            self.coordinator.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.coordinator.wait(STOP_SECONDS)

    def end(self) -> None:
        """Leaves no process behind."""
        everyone = [*self.members.values(), *self.helpers, *([self.coordinator] if self.coordinator else [])]
        deadline = time.monotonic() + 10.0
        for process in everyone:
            if process.poll() is None:
                process.terminate()
        for process in everyone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in everyone:
            if process.poll() is None:
                process.kill()
                process.wait()

    def failed(self) -> list[str]:
        """Names of the workers that ended with an error."""
        return [name for name, process in self.members.items() if process.poll() not in (None, 0)]

    def last_line(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / "logs" / f"{name}.log").read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1].removeprefix("potluck: ").removesuffix(".")
        return "without a word"

    def _spawn(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "potluck", "-v", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )


def environment() -> dict[str, str]:
    """For the demo's processes: nothing is looked up in the network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def die_with_parent() -> None:
    """Linux: SIGTERM to this process when the one that started it dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def watch(demo: DemoConfig, crew: Crew, show: Screen, interrupted: threading.Event, chaos: Chaos | None) -> int:
    """Follows the run to its end."""
    checkpoints = crew.folder / "coordinator" / "checkpoints"
    first: subprocess.Popen[bytes] | None = None
    reported: set[str] = set()
    steps = load(crew.folder / "run.yaml").steps
    with show.live():
        while True:
            assert crew.coordinator is not None
            state = fetch(show.page + "api/state")
            if state:
                show.update(state)
            if first is None and (checkpoints / "step-00000000" / "config.json").exists() and not demo.resume:
                first = crew.sample(checkpoints / "step-00000000")
            for name in crew.failed():
                if name not in reported:
                    reported.add(name)
                    show.say(f"{name} ended: {crew.last_line(name)}")
            if state and state["phase"] == "finished":
                break
            if chaos:
                chaos.tick(state)
            if crew.coordinator.poll() is not None and not (chaos and chaos.coordinator_is_down):
                if crew.coordinator.returncode == 0 and (checkpoints / f"step-{steps:08d}").exists():
                    break
                raise StateError(
                    f"the coordinator ended: {crew.last_line('coordinator')}",
                    hint=f"Its log is in {crew.folder / 'logs'}; go on with: potluck demo --resume",
                )
            if crew.members and all(p.poll() is not None for p in crew.members.values()):
                raise StateError(
                    f"all workers ended; the last said: {crew.last_line(list(crew.members)[-1])}",
                    hint=f"Their logs are in {crew.folder / 'logs'}.",
                )
            if interrupted.wait(0.5):
                break
    if interrupted.is_set():
        interrupted.clear()
        if chaos:
            chaos.end()
        show.say("Stopping: workers finish their step and save (Ctrl-C again to stop at once) …")
        stopping = threading.Thread(target=crew.stop, daemon=True)
        stopping.start()
        while stopping.is_alive() and not interrupted.wait(0.1):
            pass
        keep = f" --keep {crew.folder}" if demo.keep else ""
        show.say(f"Stopped. Go on with: potluck demo --resume{keep}")
        return 130
    model = max(checkpoints.glob("step-*"))
    show.say("Letting the trained model write …")
    after = text_of(crew.sample(model))
    show.summary(text_of(first) if first else None, after, model)
    with contextlib.suppress(subprocess.TimeoutExpired):
        crew.coordinator.wait(10.0)
    for line in chaos.proof() if chaos else ():
        show.say(line)
    return 0


def fetch(url: str) -> dict[str, Any] | None:
    """The dashboard's state; None while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def text_of(process: subprocess.Popen[bytes]) -> str:
    out, _ = process.communicate(timeout=120.0)
    return " ".join(out.decode(errors="replace").split())
