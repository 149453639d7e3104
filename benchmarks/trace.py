"""What it costs that workers tell the coordinator when they did what: bytes per step and per token, and time.

    python -m benchmarks.trace

Two stages train in one process, over memory, with and without traces in turn. What is compared is the process's CPU
time, which is less shaken than the clock by what else the machine does; beside it stands what the traces' own code
took, measured from inside. Every step is told here; of a run with short steps it is a share.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import msgspec
import torch

from potluck.coordinator import corpus
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import RunConfig
from potluck.protocol.frames import Frame, Kind
from potluck.worker import pipeline, tracing
from potluck.worker.data import Dataset

from .swarm import Swarm

STAGES = 2
WORDS = ["bread", "water", "salt", "flour", "the", "bakes", "carries", "a", "warm", "table", "for", "everyone"]


class Watched(tracing.Tracer):
    """Adds up what its own code takes, and how long what it says is."""

    seconds: list[float]
    nbytes: list[int]

    def begin(self, step: int) -> None:
        self._mark = time.thread_time()
        super().begin(step)
        self.spent = time.thread_time() - self._mark

    def start(self, step: int, m: int, frame: Frame | None, *, is_backward: bool) -> tracing.Operation:
        self._mark = time.thread_time()
        found = super().start(step, m, frame, is_backward=is_backward)
        self.spent += time.thread_time() - self._mark
        return found

    def end(self, operation: tracing.Operation) -> None:
        self._mark = time.thread_time()
        super().end(operation)
        self.spent += time.thread_time() - self._mark

    def done(self, updating: float, told: Mapping[tracing.Posted, float]) -> pb.Trace | None:
        later = time.perf_counter() + 0.5  # over lines, all acknowledgements are known, and as long as these
        told = {(kind, op.m): later for kind in (Kind.ACTIVATION, Kind.GRADIENT) for op in self._ops}
        self._mark = time.thread_time()
        found = super().done(updating, told)
        self.spent += time.thread_time() - self._mark
        type(self).seconds.append(self.spent)
        if found is not None:
            type(self).nbytes.append(pb.StepDone(trace=found).ByteSize())
        return found


class Silent(tracing.Tracer):
    """Notes nothing and says nothing."""

    _idle = tracing.Operation(lambda: 0.0, 0, 0, False, 0.0, 0.0, 0.0)

    def begin(self, step: int) -> None: ...

    def start(self, step: int, m: int, frame: Frame | None, *, is_backward: bool) -> tracing.Operation:
        return self._idle

    def end(self, operation: tracing.Operation) -> None: ...

    def done(self, updating: float, told: Mapping[tracing.Posted, float]) -> pb.Trace | None:
        return None


def config(arguments: argparse.Namespace) -> RunConfig:
    raw = {
        "name": "trace",
        "steps": arguments.steps,
        "model": {"d_model": arguments.d_model, "layers": 4, "seq_len": 128},
        "pipeline": {"stages": STAGES, "microbatch_size": 4, "microbatches": arguments.microbatches},
    }
    return msgspec.convert(raw, RunConfig)


def corpus_in(folder: Path, run: RunConfig) -> Dataset:
    rng = random.Random(1)
    source = folder / "text.txt"
    source.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=200)) for _ in range(600)), encoding="utf-8")
    corpus.prepare(str(source), folder / "corpus", vocab_size=300, seq_len=run.model.seq_len, seed=1)
    data = Dataset(folder / "corpus", lambda name, nbytes: None)
    data.prepare(0, run.seed, run.eval.samples)
    return data


def cpu_seconds(run: RunConfig, data: Dataset, tracer: type[tracing.Tracer]) -> float:
    """Of a step of both stages together."""
    with patch.object(pipeline, "Tracer", tracer), patch.object(tracing, "TOLD_SECONDS", 1e-6):
        started = time.process_time()
        Swarm(run, data, 1).run()
        return (time.process_time() - started) / run.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs with and runs without")
    parser.add_argument("--steps", type=int, default=6, help="of each run")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = config(arguments)
    Watched.seconds, Watched.nbytes = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = corpus_in(Path(folder), run)
        cpu_seconds(run, data, Silent)  # warms up
        pairs = [(cpu_seconds(run, data, Silent), cpu_seconds(run, data, Watched)) for _ in range(arguments.pairs)]
    ratios = sorted(traced / silent - 1 for silent, traced in pairs)
    plain = median(silent for silent, _ in pairs)
    tokens = arguments.microbatches * run.pipeline.microbatch_size * run.model.seq_len
    inside, nbytes = mean(Watched.seconds), mean(Watched.nbytes)
    said = pb.StepDone(
        generation=1, step=999, samples=32, loss_sum=1.5, targets=4096, compute_seconds=1, wait_seconds=1
    )
    print(f"{STAGES} stages, {arguments.microbatches} microbatches of {tokens // arguments.microbatches} tokens,")
    print(f"d = {run.model.d_model}, 4 layers, one thread; {platform.machine()}, Python {platform.python_version()}")
    print(f"a step: {1000 * plain:.0f} ms of CPU for both stages")
    print(f"with traces: {100 * ratios[len(ratios) // 2]:+.2f} % ({100 * ratios[0]:+.2f} to {100 * ratios[-1]:+.2f} %)")
    print(f"their own code: {1e6 * inside:.0f} us a step and stage, {100 * STAGES * inside / plain:.3f} % of the step")
    print(f"a report: {said.ByteSize()} bytes without, {nbytes:.0f} bytes more with a trace")
    print(f"{nbytes / tokens:.4f} bytes a token and stage if every step is told, as where a step takes over 2 s")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
