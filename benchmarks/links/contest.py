"""potluck and what people would use instead: the same model, samples, pace and lines; time to the same held-out loss.

The task's ``T d`` and its weights are both the same share of GPT-J's (2,048 and 2,045 times less), so that a line that
is as hard for what exchanges weights is as hard for what exchanges activations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.netlab.lab import Lab
from benchmarks.netlab.profiles import PROFILES, UNLIMITED, Profile
from benchmarks.rivals.start import Result, start
from benchmarks.rivals.task import Task
from potluck.coordinator import corpus as source
from potluck.protocol.config import RunConfig

from .runs import Crew, quicken
from .scale import CARDS, GPTJ, MICROBATCHES, SEQ_LEN, Layout, gptj_weights

WORKERS = 4
PACE = 0.12  # seconds of one microbatch through the whole model
REAL = Layout(stages=2, replicas=2, card=CARDS["3090"], layers=12, vocab=2048, width=128, seq_len=32)
TIME_FACTOR = PACE / (2 * REAL.real_seconds)
BYTES_FACTOR = REAL.bytes_factor
RIVALS = (
    "ddp",
    "torch_pipeline",
    "hivemind_dp --compression 8bit",
    "hivemind_dp --compression powersgd",
    "hivemind_moe",
    "torchft_ddp",
    "torchft_diloco",
)
OURS: dict[str, dict[str, Any]] = {
    "potluck, default": {"sync": {"preset": "potluck"}},
    "potluck, uncompressed": {
        "sync": {"preset": "dense"},
        "activations": {"forward": "fp32", "backward": "fp32"},
        "checkpoint": {"keepers": 0},
        "zstd": False,
    },
    "potluck, CocktailSGD's settings": {"sync": {"preset": "cocktail"}, "checkpoint": {"keepers": 0}},
    "potluck, AQ-SGD's settings": {
        "sync": {"preset": "dense"},
        "activations": {"forward": "int4", "backward": "int8", "reuse": True},
        "checkpoint": {"keepers": 0},
    },
}


@dataclass(kw_only=True)
class Outcome:
    """``to_target``: seconds of training until the target was seen; ``loss``: the last held-out loss seen."""

    name: str
    line: str
    seconds: float
    steps: int
    seconds_per_step: float | None
    to_target: float | None
    loss: float | None
    sent_per_sample: float | None
    averaged: float | None = None  # share of rounds that really averaged
    late: float | None = None
    notes: list[str] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)  # seconds, held-out loss


def describe() -> str:
    rate = BYTES_FACTOR / TIME_FACTOR
    return (
        f"{WORKERS} machines like an {REAL.card.name} (here: {PACE:g} s for a microbatch through the whole model,"
        f" computed for real, then padded); d {REAL.width}, {REAL.layers} blocks, sequences of {REAL.seq_len},"
        f" {MICROBATCHES} microbatches a replica and step; rates x {rate:.4f}, latencies x {TIME_FACTOR:.4f};"
        f" GPT-J has {SEQ_LEN * GPTJ['d_model'] / (REAL.seq_len * REAL.width):,.0f} times its T d and"
        f" {gptj_weights() / small_weights():,.0f} times its weights"
    )


def small_weights() -> float:
    return REAL.layers * 12 * REAL.width**2 + 2 * REAL.vocab * REAL.width


def run_config(steps: int, every: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": "contest",
        "steps": steps,
        "model": {
            "d_model": REAL.width,
            "layers": REAL.layers,
            "heads": 4,
            "rotary_dim": 32,
            "seq_len": REAL.seq_len,
        },
        "data": {"vocab_size": REAL.vocab},
        "pipeline": {"stages": 2, "microbatch_size": 1, "microbatches": MICROBATCHES, "recompute": False},
        "optimizer": {"lr": 2e-3},
        "eval": {"every": every, "samples": 64},
        **changes,
    }


def line(name: str) -> Profile:
    return PROFILES[name].scaled(rate=BYTES_FACTOR / TIME_FACTOR, time=TIME_FACTOR)


def ours(name: str, line_name: str, *, steps: int, every: int, seconds: float, target: float, folder: Path) -> Outcome:
    """Trains until the target, the last step or the limit. The clock begins once the untrained model is evaluated and
    published, with the first steps, and does not stop for later evaluations."""
    config = run_config(steps, every, **OURS[name])
    there = line(line_name).after(UNLIMITED)
    block = PACE / (REAL.layers + 1)
    pace = {"forward": block / 3, "backward": 2 * block / 3, "head": 1.0, "compute": True}
    pace |= {"bytes": BYTES_FACTOR, "time": TIME_FACTOR}
    hosts = range(1, 1 + WORKERS)
    with Lab(there, hosts=1 + WORKERS) as lab:
        for i in hosts:
            lab.set(i, UNLIMITED)
        config["coordinator"] = {"host": lab.address(0), "wait_for": WORKERS, "lease_seconds": 600.0}
        crew = Crew(lab, config, pace, WORKERS, folder)
        try:
            crew.start()
            crew.until(lambda: crew.rows("SELECT 1 FROM points WHERE heldout IS NOT NULL"))
            for i in hosts:
                lab.set(i, there.line(i))
                quicken(lab, i, TIME_FACTOR)
            began = time.time()
            first = max(crew.times(), default=0)
            before = sum(lab.sent(i) for i in hosts)
            crew.until(lambda: is_over(crew, began, steps, seconds, target), patience=seconds + 60)
            sent = sum(lab.sent(i) for i in hosts) - before
            times = crew.times()
            heldout = crew.rows("SELECT time, step, heldout FROM points WHERE heldout IS NOT NULL ORDER BY time")
            what = crew.rows("SELECT text FROM events WHERE kind IN ('Rerouted', 'RolledBack', 'Faulted')")
        finally:
            crew.stop()
    done, last = max(times), max(times.values())
    points = [(t - began, loss) for t, _, loss in heldout]
    samples = (done - first) * MICROBATCHES * 2
    return Outcome(
        name=name,
        line=line_name,
        seconds=last - began,
        steps=done,
        seconds_per_step=(last - times[first + 2]) / (done - first - 2) if done > first + 2 else None,
        to_target=next((t for t, loss in points if loss <= target), None),
        loss=points[-1][1] if points else None,
        sent_per_sample=sent / samples,
        notes=[text for (text,) in what],
        points=points,
    )


def is_over(crew: Crew, began: float, steps: int, seconds: float, target: float) -> bool:
    points = crew.rows("SELECT time, step, heldout FROM points")
    return any(
        (loss is not None and loss <= target) or at >= steps or when - began > seconds for when, at, loss in points
    )


def theirs(name: str, line_name: str, task: Task, folder: Path) -> Outcome:
    """One rival, as ``benchmarks/rivals`` starts it."""
    program, *options = name.split()
    with Lab(line(line_name), hosts=WORKERS) as lab:
        for i in range(WORKERS):
            quicken(lab, i, TIME_FACTOR)
        found: Result = start(lab, program, task, folder, options)
    return Outcome(
        name=name,
        line=line_name,
        seconds=found.trained_seconds,
        steps=found.steps,
        seconds_per_step=found.seconds_per_step,
        to_target=found.seconds_to_target,
        loss=found.heldout,
        sent_per_sample=found.bytes_per_sample,
        averaged=found.averaged,
        late=found.late,
        notes=[*found.notes, *found.failures],
        points=[(p["trained"], p["loss"]) for p in found.points],
    )


def prepare(corpus: Path) -> None:
    """The same text and tokens that potluck's coordinator makes of this configuration."""
    run = msgspec.convert(run_config(1, 1), RunConfig)
    data = run.data
    source.prepare(data.source, corpus, vocab_size=data.vocab_size, seq_len=run.model.seq_len, seed=run.seed)


def task(corpus: Path, *, steps: int, every: int, seconds: float, target: float) -> Task:
    run = msgspec.convert(run_config(steps, every), RunConfig)
    return Task(run=run, corpus=str(corpus), workers=WORKERS, steps=steps, seconds=seconds, target=target, pace=PACE)
