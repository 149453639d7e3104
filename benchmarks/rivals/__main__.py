"""Contestants on this machine, without lines: whether they run and learn, and how fast they are at best.

python -m benchmarks.rivals ddp "hivemind_dp --compression 8bit" torch_pipeline
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec

from potluck.coordinator import corpus
from potluck.protocol.config import RunConfig

from .start import Hosts, Loopback, Result, start
from .task import Task


def task(folder: Path, options: argparse.Namespace) -> Task:
    """A small task on the text that Python ships."""
    raw = {
        "steps": options.steps,
        "model": {"d_model": options.d_model, "layers": 4, "seq_len": 128},
        "pipeline": {"stages": 2, "microbatch_size": 4, "microbatches": options.microbatches, "recompute": False},
        "optimizer": {"lr": 2e-3, "schedule": "cosine"},
        "eval": {"every": max(1, options.steps // 4), "samples": 32},
    }
    run = msgspec.convert(raw, RunConfig)
    vocab_size = run.data.vocab_size
    corpus.prepare("builtin", folder, vocab_size=vocab_size, seq_len=run.model.seq_len, seed=run.seed)
    return Task(
        run=run,
        corpus=str(folder),
        workers=options.workers,
        steps=options.steps,
        seconds=options.seconds,
        target=options.target,
        pace=options.pace,
    )


def hosts(options: argparse.Namespace) -> AbstractContextManager[Hosts]:
    if options.up is None:
        return nullcontext(Loopback())
    from ..netlab.lab import Lab
    from ..netlab.profiles import Line

    line = Line(up_mbit=options.up, down_mbit=options.down, delay_ms=options.delay_ms)
    return Lab([line] * options.workers)


def show(result: Result) -> None:
    def said(value: float | None, form: str = ".3g") -> str:
        return "-" if value is None else format(value, form)

    print(f"\n{result.name}: {result.steps} steps, {result.samples} samples in {result.trained_seconds:.1f} s", end="")
    print(f" (setup {result.setup_seconds:.1f} s), {said(result.seconds_per_step)} s a step")
    print("  held out: " + ", ".join(f"{p['loss']:.3f} at {p['step']:.0f}" for p in result.points))
    print(f"  rounds averaged: {said(result.averaged, '.0%')} (said to be: {said(result.claimed, '.0%')})", end="")
    print(f", median spread {said(result.spread)}; to target {said(result.seconds_to_target)} s")
    print(f"  behind pace {said(result.late, '.1%')}, {result.cpu_seconds:.0f} s of CPU", end="; ")
    print(f"{said(result.bytes_per_sample, ',.0f')} bytes per sample")
    print("  " + result.commands[0])
    for line in (*result.notes, *result.failures):
        print("  !", line.replace("\n", "\n    "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="+", help="a program's name, with options of its own if any")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--target", type=float, default=0.0)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds per microbatch (default: none)")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=4, help="of every pipeline and step")
    parser.add_argument("--up", type=float, help="of every host's line, Mbit/s")
    parser.add_argument("--down", type=float, default=100.0, help="Mbit/s")
    parser.add_argument(
        "--delay-ms", type=float, default=10.0, help="a host's share, one way: a quarter of a round trip"
    )
    parser.add_argument("--folder", type=Path, help="keeps what the hosts write")
    parser.add_argument("--port", type=int, default=29500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, hosts(options) as where:
        folder = options.folder or Path(scratch)
        common = task(folder / "corpus", options)
        for number, contestant in enumerate(options.contestants):
            name, *own = shlex.split(contestant)
            show(start(where, name, common, folder / f"{number}-{name}", own, options.port + 100 * number))


if __name__ == "__main__":
    main()
