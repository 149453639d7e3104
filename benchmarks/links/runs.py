"""One run of potluck in a lab: a coordinator and workers as processes, each host behind its own line."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.netlab.lab import Lab
from benchmarks.netlab.profiles import UNLIMITED, Profile

from .scale import MICROBATCHES, Layout, run_config

ROOT = Path(__file__).parents[2]
START_SECONDS, STEP_SECONDS = 180.0, 300.0


@dataclass(kw_only=True)
class Cell:
    """What a run came to. Bytes are the kernel's, of whole IP packets, sent by all workers together."""

    profile: str
    layout: str
    setting: str
    steps: int
    seconds_per_step: float
    tokens_per_second: float
    sent_per_token: float
    most_sent_mbit: float  # of the host that sends most, over the measured time
    late_share: float  # of microbatches that computed for longer than they should
    late_packets: float  # share handed over more than 1 ms after their moment
    cpu_load: float  # of all cores, over the measured time
    how: str = ""
    steps_seen: list[float] = field(default_factory=list)  # seconds of each measured step


class Failed(Exception):
    """A run did not get where it should; the text has what its processes said."""


def pace(layout: Layout) -> dict[str, Any]:
    """Seconds a microbatch and block: a quarter forward, as much again recomputed, half backward."""
    block = layout.compute_seconds / (layout.layers / layout.stages)
    return {
        "forward": block / 4,
        "backward": block / 2,
        "head": layout.head,
        "compute": False,
        "bytes": layout.bytes_factor,
        "time": layout.time_factor,
    }


def plain_tokens_per_second(layout: Layout) -> float:
    """Of one such machine that trains the whole model by itself, no line anywhere: by calculation from the pace."""
    per_block = 2 * pace(layout)["forward"] + pace(layout)["backward"]
    return layout.seq_len / ((layout.layers + layout.head) * per_block)


def measure(profile: Profile, layout: Layout, setting: str, *, steps: int, warmup: int, folder: Path) -> Cell:
    """Trains ``warmup`` steps over the profile's lines, then ``steps`` more against the clock.

    The lines are unlimited until training starts, so that nobody waits for the corpus.
    """
    count = layout.stages * layout.replicas
    there = profile.scaled(rate=layout.rate_factor, time=layout.time_factor).after(UNLIMITED)
    with Lab(there, hosts=1 + count) as lab:
        for i in range(1, 1 + count):
            lab.set(i, UNLIMITED)
        config = run_config(layout, setting, steps=100_000, host=lab.address(0))
        crew = Crew(lab, config, pace(layout), count, folder)
        try:
            crew.start()
            first = crew.wait(1)
            for i in range(1, 1 + count):
                lab.set(i, there.line(i))
                quicken(lab, i, layout.time_factor)
            begin = crew.wait(first + warmup)
            sent, cpu, moved = [lab.sent(i) for i in range(1, 1 + count)], cpu_seconds(), lab.forwarded()
            started = time.monotonic()
            end = crew.wait(begin + steps)
            sent = [lab.sent(i) - before for i, before in enumerate(sent, 1)]
            busy = (cpu_seconds() - cpu) / (time.monotonic() - started) / (os.cpu_count() or 1)
            packets, late = (b - a for a, b in zip(moved, lab.forwarded(), strict=True))
            times = crew.times()
        finally:
            crew.stop()
    seen = [times[s + 1] - times[s] for s in range(begin, end)]
    tokens = MICROBATCHES * layout.replicas * layout.seq_len * len(seen)
    seconds = times[end] - times[begin]
    traces = [read_trace(path) for path in sorted(folder.glob("*.trace"))]
    forwards = sum(line["op"] == "forward" for trace in traces for line in trace)
    return Cell(
        profile=profile.name,
        layout=layout.name,
        setting=setting,
        steps=len(seen),
        seconds_per_step=seconds / len(seen),
        tokens_per_second=tokens / seconds,
        sent_per_token=sum(sent) / tokens,
        most_sent_mbit=max(sent) * 8e-6 / seconds,
        late_share=sum(line["op"] == "late" for trace in traces for line in trace) / max(1, 2 * forwards),
        late_packets=late / max(1, packets),
        cpu_load=busy,
        how=lab.how,
        steps_seen=[round(s, 3) for s in seen],
    )


def quicken(lab: Lab, host: int, time_factor: float) -> None:
    """TCP's least wait before it sends again, 200 ms, is shorter by as much as everything else."""
    routes = lab.run(host, ["ip", "-4", "route", "show"]).stdout.strip().splitlines()
    for route in routes:
        least = f"{max(2, round(200 * time_factor))}ms"
        lab.run(host, ["ip", "route", "change", *route.split(), "rto_min", least]).check_returncode()


class Crew:
    """Its coordinator on host 0, its workers on those after it; ``config`` is run.yaml, ``pace`` host.py's.

    ``slow``: hosts that take so many times as long to compute.
    """

    slow: Mapping[int, float] = {}

    def __init__(self, lab: Lab, config: dict[str, Any], pace: dict[str, Any], count: int, folder: Path) -> None:
        self.lab, self.config, self.pace, self.count, self.folder = lab, config, pace, count, folder
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        self._database: sqlite3.Connection | None = None
        self._ticket = ""

    def start(self) -> None:
        path, ready, place = self.folder / "run.yaml", self.folder / "ready.json", self.folder / "coordinator"
        path.write_text(yaml.safe_dump(self.config))
        potluck = [sys.executable, "-m", "potluck"]
        up = [*potluck, "coordinator", "up", str(path), "--data-dir", str(place), "--ready-file", str(ready)]
        self._popen("coordinator", 0, up)
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            self._look(deadline)
        self._ticket = json.loads(ready.read_text())["ticket"]
        for i in range(1, 1 + self.count):
            self.join(i)

    def join(self, host: int) -> None:
        """Starts the worker of a host, or starts it again."""
        trace, home = self.folder / f"w{host}.trace", self.folder / f"w{host}"
        times = self.slow.get(host, 1.0)
        pace = self.pace | {way: times * self.pace[way] for way in ("forward", "backward")}
        start = [sys.executable, "-m", "benchmarks.links.host", json.dumps(pace), str(trace), "--"]
        join = [
            "worker",
            "join",
            self._ticket,
            "--threads",
            "1",
            "--host",
            self.lab.address(host),
            "--name",
            f"w{host}",
        ]
        self._popen(f"w{host}", host, [*start, *join, "--data-dir", str(home), "--state-mbps", "0"])

    def kill(self, host: int) -> None:
        process = self.processes.pop(f"w{host}")
        process.kill()
        process.wait()

    def _popen(self, name: str, host: int, argv: list[str]) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = self.lab.popen(
                host, argv, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )

    def _look(self, deadline: float) -> None:
        time.sleep(0.05)
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise Failed(f"{name} ended with {process.returncode}:\n{self.tail(name)}")
        if time.monotonic() > deadline:
            raise Failed("\n".join(f"--- {name}\n{self.tail(name)}" for name in self.processes))

    def tail(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Of the run's own file, read only."""
        if self._database is None:
            self._database = sqlite3.connect(f"file:{self.folder}/coordinator/run.sqlite?mode=ro", uri=True)
        with contextlib.suppress(sqlite3.OperationalError):  # just being made
            return self._database.execute(query).fetchall()
        return []

    def times(self) -> dict[int, float]:
        """When the coordinator heard of each step's loss."""
        return dict(self.rows("SELECT step, time FROM points WHERE train IS NOT NULL"))  # type: ignore[arg-type]

    def wait(self, step: int) -> int:
        """Until so many steps are done; returns how many are."""
        left = step - max(self.times(), default=0) if step > 1 else 0
        self.until(lambda: max(self.times(), default=0) >= step, START_SECONDS + STEP_SECONDS * max(0, left))
        return max(self.times())

    def until(self, ready: Callable[[], Any], patience: float = START_SECONDS) -> None:
        deadline = time.monotonic() + patience
        while not ((self.folder / "coordinator" / "run.sqlite").exists() and ready()):
            self._look(deadline)

    def stop(self) -> None:
        if self._database is not None:
            self._database.close()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()


def read_trace(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cpu_seconds() -> float:
    """Of the whole machine since it started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(f) for i, f in enumerate(fields) if i not in (3, 4)) / os.sysconf("SC_CLK_TCK")


def to_json(cell: Cell) -> dict[str, Any]:
    return asdict(cell)
