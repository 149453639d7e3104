"""What the road costs: committed tokens/s of 2 stages x 1 replica on loopback against the plain loop, in one run.

    python -m benchmarks.overhead            (from the checkout, with its worker extra installed)

All train the same GPT-J shape on the same samples with the same batch on the same cores. The plain loop is stock
transformers in one process with as many threads as there are workers. Ours are two worker processes of one thread
each, codecs on, plus the coordinator. The ceiling is two plain loops of one thread each, side by side, which exchange
nothing. They take turns, so that a machine that drifts drifts for all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from potluck.protocol.config import RunConfig, dump

STAGES = 2


def config(arguments: argparse.Namespace) -> RunConfig:
    raw = {
        "name": "overhead",
        "steps": arguments.warmup + arguments.steps,
        "model": {"d_model": arguments.d_model, "layers": 4},
        "pipeline": {
            "stages": STAGES,
            "microbatch_size": 4,
            "microbatches": arguments.microbatches,
            "recompute": arguments.recompute,
        },
        "eval": {"every": 10**6, "samples": 4},
        "coordinator": {"wait_for": STAGES},
    }
    return msgspec.convert(raw, RunConfig)


def plain(run: RunConfig, corpus: Path, warmup: int, *, processes: int, threads: int) -> float:
    """Tokens/s of ordinary loops side by side, in processes of their own, so that thread counts do not mix."""
    command = [sys.executable, "-m", "benchmarks.plain_loop", str(corpus), str(threads), str(warmup)]
    loops = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
        for _ in range(processes)
    ]
    for loop in loops:
        assert loop.stdin is not None
        loop.stdin.write(msgspec.json.encode(run))
        loop.stdin.close()
    return sum(float(loop.stdout.read()) for loop in loops if loop.stdout is not None and loop.wait() == 0)


def ours(run: RunConfig, folder: Path, warmup: int) -> tuple[float, dict[str, float]]:
    """Tokens/s over the steps after the warm-up, and where the workers' time went (seconds per step)."""
    path, ready = folder / "run.yaml", folder / "ready.json"
    path.write_text(dump(run))
    potluck = [sys.executable, "-m", "potluck"]
    options = {"stdout": subprocess.DEVNULL, "env": environment()}
    up = [*potluck, "coordinator", "up", str(path), "--data-dir", str(folder / "c"), "--ready-file", str(ready)]
    processes = [subprocess.Popen(up, **options)]
    try:
        while not ready.exists():
            if processes[0].poll() is not None:
                raise SystemExit("the coordinator ended")
            time.sleep(0.05)
        ticket = json.loads(ready.read_text())["ticket"]
        for i in range(STAGES):
            join = [*potluck, "worker", "join", ticket, "--threads", "1", "--data-dir", str(folder / f"w{i}")]
            processes.append(subprocess.Popen(join, **options))
        for process in reversed(processes):
            process.wait(timeout=600)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    database = sqlite3.connect(folder / "c" / "run.sqlite")
    rows = database.execute("SELECT step, time FROM points WHERE train IS NOT NULL ORDER BY step").fetchall()
    times = dict(rows)
    per_step = run.pipeline.microbatches * run.pipeline.microbatch_size * run.model.seq_len
    rate = (run.steps - warmup) * per_step / (times[run.steps] - times[warmup])
    sent = database.execute("SELECT purpose, SUM(nbytes) FROM traffic WHERE direction='out' GROUP BY purpose")
    return rate, dict(sent.fetchall())


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps (default 40)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (default 10)")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--recompute", action="store_true", help="ours recomputes activations in backward")
    arguments = parser.parse_args()
    run = config(arguments)
    rows: list[tuple[float, float, float]] = []
    for i in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rate, sent = ours(run, folder, arguments.warmup)
            corpus = folder / "c" / "corpus"
            loop = plain(run, corpus, arguments.warmup, processes=1, threads=STAGES)
            ceiling = plain(run, corpus, arguments.warmup, processes=STAGES, threads=1)
        rows.append((rate, loop, ceiling))
        print(f"{i + 1}: ours {rate:,.0f} tokens/s, plain loop {loop:,.0f}, ceiling {ceiling:,.0f}", flush=True)
    tokens = run.steps * run.pipeline.microbatches * run.pipeline.microbatch_size * run.model.seq_len
    print()
    print(f"machine:   {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"model:     d = {run.model.d_model}, {run.model.layers} layers, sequence {run.model.seq_len}, fp32")
    p = run.pipeline
    print(f"batch:     {p.microbatches} microbatches of {p.microbatch_size}, recompute {p.recompute}")
    print(f"codecs:    {run.activations.forward} forward, {run.activations.backward} backward")
    print(f"bytes:     {sum(sent.values()) / tokens:,.0f} per token sent, all channels")
    for name, column in (("the plain loop", 1), ("the ceiling", 2)):
        ratios = [row[0] / row[column] for row in rows]
        print(f"ratio to {name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
