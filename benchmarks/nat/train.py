"""Training whose every byte between workers goes through the coordinator's relay, and what cutting that costs.

A real coordinator on a public host, real workers behind routers, a tiny model, nothing compressed: so the published
weights of a run that was cut can be compared, bit for bit, with those of one that was not. A cut makes a worker's
router lose its mappings while the worker sends or receives: all of its connections, that to the coordinator and those
of calls through the relay, are dead at once, some in the middle of a frame.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.links.runs import Crew, Failed
from benchmarks.netlab.lab import Lab
from benchmarks.netlab.nat import NATS
from benchmarks.netlab.profiles import PROFILES, UNLIMITED
from potluck.coordinator.verify import verify

LAYOUTS = {"2x1": 2, "1x2": 1}  # stages x replicas, two workers in all
BUSY_NBYTES, BUSY_SECONDS = 20_000, 0.03  # of a host's line: it is in the middle of something
END_SECONDS = 120.0


@dataclass(kw_only=True)
class Training:
    """``relayed_mb``: received by the coordinator's host after the first step, 10^6 bytes of IP packets. ``pauses``:
    seconds from each cut to the next finished step. ``model``: hash of the published weights' files."""

    layout: str
    routers: str
    line: str
    steps: int
    cuts: int
    seconds: float = 0.0  # of training, from the first finished step to the last
    relayed_mb: float = 0.0
    pauses: list[float] = field(default_factory=list)
    samples: int = 0
    rollbacks: int = 0
    problems: list[str] = field(default_factory=list)
    model: str = ""


class Homes(Crew):
    """Workers as volunteers start them."""

    def join(self, host: int) -> None:
        argv = [sys.executable, "-m", "potluck", "worker", "join", self._ticket, "--threads", "1"]
        place = ["--host", self.lab.inside(host), "--name", f"w{host}", "--data-dir", str(self.folder / f"w{host}")]
        self._popen(f"w{host}", host, [*argv, *place])


def run_config(layout: str, *, steps: int, host: str) -> dict[str, Any]:
    """``run.yaml``, as plain data."""
    return {
        "name": "nat",
        "steps": steps,
        "model": {"d_model": 128, "layers": 2, "heads": 4, "rotary_dim": 16, "seq_len": 64},
        "data": {"vocab_size": 512},
        "pipeline": {"stages": LAYOUTS[layout], "microbatch_size": 2, "microbatches": 4},
        "activations": {"forward": "fp32", "backward": "fp32"},
        "sync": {"preset": "dense"},
        "zstd": False,
        "eval": {"every": 10**6, "samples": 8},
        "checkpoint": {"publish_rounds": 10**9},
        "coordinator": {"host": host, "wait_for": 2},
    }


def train(layout: str, routers: str, line: str, *, steps: int, cuts: int, folder: Path) -> Training:
    """Two workers behind ``routers`` train to the end; their paths are cut ``cuts`` times, one's and the other's in
    turn."""
    found = Training(layout=layout, routers=routers, line=line, steps=steps, cuts=cuts)
    nats = {host: NATS[routers] for host in (1, 2)}
    with Lab(PROFILES[line].after(UNLIMITED), hosts=3, nats=nats) as lab:
        crew = Homes(lab, run_config(layout, steps=steps, host=lab.address(0)), {}, 2, folder)
        try:
            crew.start()
            first = crew.wait(1)
            passed = lab.received(0)
            for k in range(cuts):
                crew.wait(first + 1 + k * (steps - first - 2) // cuts)
                cut_at = cut(lab, 1 + k % 2)
                done = max(crew.times())
                crew.wait(done + 1)
                found.pauses.append(crew.times()[done + 1] - cut_at)
            crew.wait(steps - 1)
            finish(crew)
            found.relayed_mb = (lab.received(0) - passed) / 1e6
            times = crew.times()
            found.rollbacks = crew.rows("SELECT COUNT(*) FROM events WHERE kind = 'RolledBack'")[0][0]
        finally:
            crew.stop()
    found.seconds = times[steps] - times[first]
    report = verify(folder / "coordinator" / "run.sqlite")
    found.samples, found.problems = report.samples, report.lines() if report.problems else []
    found.model = weights_of(folder / "coordinator" / "checkpoints" / f"step-{steps:08d}")
    return found


def cut(lab: Lab, host: int) -> float:
    """Waits until the host's line carries something, then its router forgets; returns when (Unix seconds)."""
    while True:
        before = lab.sent(host) + lab.received(host)
        time.sleep(BUSY_SECONDS)
        if lab.sent(host) + lab.received(host) - before > BUSY_NBYTES:
            lab.forget(host)
            return time.time()


def finish(crew: Crew) -> None:
    """Until all have ended by themselves, well."""
    for name, process in crew.processes.items():
        try:
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            raise Failed(f"{name} did not end well ({code}):\n{crew.tail(name)}")


def weights_of(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()
