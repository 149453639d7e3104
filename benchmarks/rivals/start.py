"""Starts every host of a contestant, watches, stops at the target or the limit, and says what came of it."""

from __future__ import annotations

import itertools
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .record import lines
from .rounds import averaged_share, claimed_share, judged
from .task import Task, write

TICK = 0.25  # seconds
GRACE = 10.0  # seconds to end by oneself after SIGTERM, and for the judge to finish
SETUP = 120.0  # seconds for everybody to be ready
ROOT = Path(__file__).resolve().parents[2]


class Hosts(Protocol):
    """Machines with lines between them: a ``Lab``, or :class:`Loopback`."""

    def address(self, host: int) -> str: ...

    def popen(self, host: int, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]: ...

    def sent(self, host: int) -> int: ...  # bytes

    def received(self, host: int) -> int: ...


class Loopback:
    """This machine as every host, without lines to speak of and without counters."""

    def address(self, host: int) -> str:
        return "127.0.0.1"

    def popen(self, host: int, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(list(argv), **options)

    def sent(self, host: int) -> int:
        return 0

    def received(self, host: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one contestant did. Seconds are of training: without setup, evaluation or snapshots."""

    name: str
    commands: list[str]
    setup_seconds: float
    trained_seconds: float
    steps: int
    samples: int  # committed: those behind the last step, or those that ranks count as averaged
    seconds_per_step: float | None  # median of the time between steps
    seconds_to_target: float | None  # until the first judged weights at or below the target
    heldout: float | None  # nats per token, of the last judged weights
    points: list[dict[str, float]]  # {step, samples, trained, loss}
    sent: list[int]  # bytes by host, from the beginning of training to the end
    received: list[int]
    averaged: float | None  # share of rounds that really averaged
    claimed: float | None  # share of rounds of which ranks say that all took part
    spread: float | None  # the rounds' median, see rounds.py
    late: float | None  # seconds that hosts computed longer than their pace, relative to it
    cpu_seconds: float  # of all hosts and the judge, setup included, as far as their processes ended by themselves
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def bytes_per_sample(self) -> float | None:
        """Sent by all hosts together."""
        return sum(self.sent) / self.samples if self.samples else None


def start(hosts: Hosts, name: str, task: Task, folder: Path, options: Sequence[str] = (), port: int = 29500) -> Result:
    """Runs ``benchmarks.rivals.NAME`` with its own ``options`` on all hosts; ``folder`` gets everything it writes."""
    folder.mkdir(parents=True)
    write(task, folder / "task.json")
    return _Contest(hosts, name, task, folder.resolve(), options, port).result()


class _Contest:
    def __init__(self, hosts: Hosts, name: str, task: Task, folder: Path, options: Sequence[str], port: int) -> None:
        self.hosts, self.name, self.task, self.folder = hosts, name, task, folder
        self.ranks = range(task.workers)
        self.failures: list[str] = []
        self.events: dict[int, list[dict[str, Any]]] = {rank: [] for rank in self.ranks}
        self.points: list[dict[str, float]] = []
        self._offsets: dict[Path, int] = {}
        peers = ",".join(hosts.address(rank) for rank in self.ranks)
        python = [sys.executable, "-m"]
        self.commands = [
            [*python, f"benchmarks.rivals.{name}", *options, "--task", str(folder / "task.json"), "--rank", str(rank)]
            + ["--world", str(task.workers), "--address", hosts.address(rank), "--peers", peers]
            + ["--port", str(port), "--out", str(folder / f"rank-{rank}.jsonl")]
            for rank in self.ranks
        ]
        self.judge = [*python, "benchmarks.rivals.judge", str(folder / "task.json"), str(folder)]

    def result(self) -> Result:
        started, self.cpu_before = time.monotonic(), cpu_seconds()
        environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        plain: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True}
        processes: list[subprocess.Popen[bytes]] = []
        before, after = [(0, 0)] * len(self.ranks), [(0, 0)] * len(self.ranks)
        judge = subprocess.Popen(self.judge, **plain, stderr=(self.folder / "judge.err").open("wb"))
        try:
            for rank in self.ranks:
                err, out = ((self.folder / f"rank-{rank}.{kind}").open("wb") for kind in ("err", "out"))
                processes.append(self.hosts.popen(rank, self.commands[rank], **plain, stdout=out, stderr=err))
            ready = self._wait(processes, self._begun, started + SETUP)
            began = max((e["at"] for events in self.events.values() for e in events[:1]), default=started)
            before = self._counters()
            if ready:
                self._wait(processes, self._reached, began + self.task.seconds)
            elif not self.failures:
                self.failures.append(f"not ready after {SETUP:.0f} s")
            after = self._counters()
        finally:
            _stop(processes)
            (self.folder / "ended").touch()
            try:
                judge.wait(GRACE * 3)
            except subprocess.TimeoutExpired:
                self.failures.append("the judge did not finish")
                _stop([judge])
        self._read()
        return self._summary(began - started, before, after)

    def _wait(self, processes: Sequence[subprocess.Popen[bytes]], reached: Any, until: float) -> bool:
        """Until something is reached (True), a process failed, all have ended, or the time is over."""
        while time.monotonic() < until:
            self._read()
            if reached():
                return True
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes):
                if code:
                    tail = (self.folder / f"rank-{rank}.err").read_text(errors="replace").strip().splitlines()[-15:]
                    self.failures.append("\n".join([f"rank {rank} ended with code {code}:", *tail]))
            if any(codes) or None not in codes:
                return False
            time.sleep(TICK)
        return False

    def _read(self) -> None:
        for rank in self.ranks:
            self.events[rank] += self._new(self.folder / f"rank-{rank}.jsonl")
        self.points += self._new(self.folder / "points.jsonl")

    def _new(self, path: Path) -> list[dict[str, Any]]:
        new, self._offsets[path] = lines(path, self._offsets.get(path, 0))
        return new

    def _begun(self) -> bool:
        return all(self._of(rank, "begin") for rank in self.ranks)

    def _reached(self) -> bool:
        if any(point["loss"] <= self.task.target for point in self.points):
            return True
        return all(self._of(rank, "end") for rank in self.ranks)

    def _of(self, rank: int, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events[rank] if e["event"] == event]

    def _counters(self) -> list[tuple[int, int]]:
        return [(self.hosts.sent(rank), self.hosts.received(rank)) for rank in self.ranks]

    def _summary(self, setup: float, before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> Result:
        steps = max((self._of(rank, "step") for rank in self.ranks), key=len)
        gaps = sorted(b["time"] - a["time"] for a, b in itertools.pairwise(steps))
        target = min((p["trained"] for p in self.points if p["loss"] <= self.task.target), default=None)
        last = [events[-1] for events in self.events.values() if events]
        played = sum(e["played"] for e in last)
        found = sorted(judged(self.events), key=lambda r: r.spread)
        own = [[e["own"] for e in self._of(rank, "step") if "own" in e] for rank in self.ranks]
        samples = sum(counts[-1] for counts in own if counts) if any(own) else steps[-1]["samples"] if steps else 0
        return Result(
            name=self.name,
            commands=[shlex.join(command) for command in self.commands],
            setup_seconds=setup,
            trained_seconds=steps[-1]["time"] if steps else 0.0,
            steps=steps[-1]["step"] if steps else 0,
            samples=samples,
            seconds_per_step=gaps[len(gaps) // 2] if gaps else None,
            seconds_to_target=target,
            heldout=self.points[-1]["loss"] if self.points else None,
            points=self.points,
            sent=[b[0] - a[0] for a, b in zip(before, after, strict=True)],
            received=[b[1] - a[1] for a, b in zip(before, after, strict=True)],
            averaged=averaged_share(found),
            claimed=claimed_share(self.events, len(self.ranks)),
            spread=found[len(found) // 2].spread if found else None,
            late=sum(e["late"] for e in last) / played if played else None,
            cpu_seconds=cpu_seconds() - self.cpu_before,
            notes=[f"rank {r}: {e['text']}" for r in self.ranks for e in self._of(r, "note")],
            failures=self.failures,
        )


def cpu_seconds() -> float:
    """Of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes and all their children: each was started in a session of its own."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        until = time.monotonic() + patience
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
