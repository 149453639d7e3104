"""The common task, read from one JSON file, and what one host of a contestant is told on its command line."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from potluck.protocol.config import RunConfig
from potluck.worker.data import Dataset

from .pace import Pace
from .record import Progress, interface_of


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What everybody trains. A step's samples are those of a potluck run with ``workers`` machines."""

    run: RunConfig
    corpus: str  # folder that potluck's coordinator made
    workers: int
    steps: int  # at most
    seconds: float = 600.0  # of the clock, at most
    target: float = 0.0  # held-out nats per token to stop at; 0: none
    pace: float = 0.0  # seconds of compute per microbatch of the whole model; 0: as fast as it goes

    def __post_init__(self) -> None:
        if self.workers < 1 or self.steps < 1 or self.seconds <= 0 or self.pace < 0:
            raise ValueError("workers and steps must be at least 1, seconds above 0, pace not below 0")
        if self.workers % self.run.pipeline.stages:
            raise ValueError(f"{self.workers} workers cannot be shared by {self.run.pipeline.stages} stages")

    @property
    def replicas(self) -> int:
        """Of each stage of the pipeline."""
        return self.workers // self.run.pipeline.stages

    @property
    def microbatches_per_step(self) -> int:
        return self.replicas * self.run.pipeline.microbatches

    @property
    def samples_per_step(self) -> int:
        return self.microbatches_per_step * self.run.pipeline.microbatch_size

    def microbatches(self, step: int) -> list[range]:
        """The sample indices of every microbatch of ``step``, in potluck's order."""
        size, start = self.run.pipeline.microbatch_size, step * self.samples_per_step
        return [range(i, i + size) for i in range(start, start + self.samples_per_step, size)]

    def share(self, step: int, part: int, parts: int) -> list[range]:
        """The microbatches of ``step`` that one of ``parts`` equal replicas trains on: as potluck's plan divides them.

        Raises ValueError if there are not equally many for each.
        """
        count = self.microbatches_per_step
        if count % parts:
            raise ValueError(f"{count} microbatches a step cannot be shared by {parts}")
        return self.microbatches(step)[part * count // parts : (part + 1) * count // parts]


def read(path: Path) -> Task:
    """Raises ``msgspec.ValidationError`` for what is no task."""
    return msgspec.json.decode(path.read_bytes(), type=Task)


def write(task: Task, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(task), indent=1) + b"\n")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the machines that a contestant runs on, as seen by itself."""

    task: Task
    rank: int
    world: int
    address: str
    peers: tuple[str, ...]  # addresses by rank
    port: int  # the first of 100 that the contestant may use
    out: Path
    data: Dataset
    pace: Pace
    progress: Progress
    options: argparse.Namespace

    @property
    def run(self) -> RunConfig:
        return self.task.run

    @property
    def vocab_size(self) -> int:
        return self.data.manifest.vocab_size

    def is_snapshot(self, done: int) -> bool:
        """Whether the weights after ``done`` steps are judged: as often as potluck evaluates."""
        return done % self.run.eval.every == 0 or done == self.task.steps


def arrive(name: str, parser: argparse.ArgumentParser | None = None, argv: Sequence[str] | None = None) -> Host:
    """Reads the command line; ``parser`` may have options of the contestant's own."""
    parser = parser or argparse.ArgumentParser()
    parser.prog = f"python -m benchmarks.rivals.{name}"
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--address", required=True, help="this host's own")
    parser.add_argument("--peers", required=True, help="everybody's addresses by rank, with commas between")
    parser.add_argument("--port", type=int, default=29500, help="first of 100 ports to use (default 29500)")
    parser.add_argument("--out", type=Path, required=True, help="file for the lines of progress")
    options = parser.parse_args(argv)
    task, peers = read(options.task), tuple(options.peers.split(","))
    if not 0 <= options.rank < options.world == len(peers) == task.workers:
        parser.error("rank, world, the number of peers and the task's workers do not go together")
    print(f"{name}: rank {options.rank} of {options.world} at {options.address}", file=sys.stderr, flush=True)
    pace = Pace(task.pace)
    return Host(
        task=task,
        rank=options.rank,
        world=options.world,
        address=options.address,
        peers=peers,
        port=options.port,
        out=options.out,
        data=Dataset(Path(task.corpus)),
        pace=pace,
        progress=Progress(options.out, interface_of(options.address), pace.figures),
        options=options,
    )


def to_the_end(main: Callable[[], None]) -> None:
    """A program's ``main``. Whatever it raises ends the process, even if a library's threads would go on."""
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
