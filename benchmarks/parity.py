"""What every compression costs in loss: docs/PARITY.md and its picture are made by this.

    pip install 'potluck[worker,bench]'
    python -m benchmarks.parity                  (hours on two cores; interrupted, it goes on where it was)

Fine-tuning: a small GPT-J shape is trained on corpus A until its loss flattens, then fine-tuned on corpus B by 4
replicas x 3 stages with the worker's own pipelines, codecs and rounds, joined by memory (``benchmarks/swarm.py``). All
settings see the same samples from the same start. Two gaps: to the dense synchronous run, every schedule at its own
best rates; and, what compression itself costs, to the same schedule uncompressed at the same rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch

from potluck.protocol.config import RunConfig
from potluck.worker.data import Dataset
from potluck.worker.stage import Stage

from . import parity_report, texts
from .parity_settings import (
    BASE_BATCH,
    BASE_LR,
    BASE_STEPS,
    OUTER,
    RATES,
    RAW,
    REPLICAS,
    SCHEDULES,
    SETTINGS,
    SHAPE,
    VOCABULARY,
    Setting,
)
from .swarm import Swarm, heldout_loss

Job = dict[str, Any]


def job(setting: Setting, lr: float, outer_lr: float, seed: int) -> Job:
    """Everything a run depends on, as plain data: its name in the cache."""
    sync = {**SCHEDULES[setting.schedule], **setting.sync, "outer_lr": outer_lr}
    optimizer = {"lr": lr, "warmup_steps": 10, "schedule": "cosine"}
    zstd = setting.group != "schedule"
    changes = {"seed": seed, "sync": sync, "activations": setting.activations, "optimizer": optimizer, "zstd": zstd}
    return SHAPE | changes


def train(folder: Path, wanted: Job) -> dict[str, Any]:
    """One run of the swarm, from the cache if it was made before."""
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / "runs" / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    started = time.monotonic()
    config = msgspec.convert(wanted, RunConfig)
    weights = safetensors.torch.load_file(folder / "base.safetensors")
    result = Swarm(config, Dataset(folder / "texts" / "b"), REPLICAS, weights).run()
    out = {
        "job": wanted,
        "heldout": result.heldout,
        "train": result.train,
        "nbytes": result.nbytes,
        "tokens": result.tokens,
        "seconds": time.monotonic() - started,
    }
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(out))
    path.with_suffix(".tmp").replace(path)
    return out


def pretrain(folder: Path) -> float:
    """Makes the weights that all start from, on corpus A; returns their held-out loss on B."""
    path = folder / "base.safetensors"
    raw = {**SHAPE, "steps": BASE_STEPS, "pipeline": {"stages": 1}, "optimizer": {"lr": BASE_LR, "schedule": "cosine"}}
    config = msgspec.convert(raw, RunConfig)
    if not path.exists():
        data = Dataset(folder / "texts" / "a")
        stage = Stage(config, data.manifest.vocab_size, 0, config.model.layers)
        mean = 0.0
        for step in range(BASE_STEPS):
            ids, targets, _ = data.batch(range(step * BASE_BATCH, (step + 1) * BASE_BATCH), config.seed)
            loss = stage.module.loss_sum(stage.module(ids), targets)
            loss.backward()
            stage.update(targets.numel())
            mean += loss.item() / targets.numel() / 100
            if (step + 1) % 100 == 0:
                print(f"base: step {step + 1} of {BASE_STEPS}, loss on A {mean:.3f}", flush=True)
                mean = 0.0
        safetensors.torch.save_file({k: v.clone() for k, v in stage.named(stage.x).items()}, path)
    return heldout_loss(config, Dataset(folder / "texts" / "b"), safetensors.torch.load_file(path))


def all_of(pool: ProcessPoolExecutor, folder: Path, jobs: list[Job]) -> list[dict[str, Any]]:
    """The results of ``jobs`` in their order, with a line for each that is done."""
    futures = {pool.submit(train, folder, j): i for i, j in enumerate(jobs)}
    results: list[dict[str, Any]] = [{}] * len(jobs)
    for n, future in enumerate(as_completed(futures), 1):
        results[futures[future]] = future.result()
        r = future.result()
        print(f"{n}/{len(jobs)}: {r['heldout']:.4f}, {r['seconds']:.0f} s: {r['job']['sync']}", flush=True)
    return results


def search(pool: ProcessPoolExecutor, folder: Path) -> dict[str, dict[str, Any]]:
    """The best local and outer rate of every schedule, uncompressed, at one seed; and all that were tried.

    A local rate is tried as long as the one before was the best so far, and the second in any case.
    """
    ways = [(name, outer) for name in SCHEDULES for outer in OUTER[name]]
    tried: dict[tuple[str, float], list[float]] = {way: [] for way in ways}
    for i, lr in enumerate(RATES):
        going = [w for w in ways if i < 2 or tried[w][-1] == min(tried[w])]
        blank = {n: Setting(name=n, schedule=n, group="schedule", activations=RAW) for n, _ in going}
        for way, r in zip(going, all_of(pool, folder, [job(blank[n], lr, o, 1) for n, o in going]), strict=True):
            tried[way].append(r["heldout"])
    best: dict[str, dict[str, Any]] = {}
    for name in SCHEDULES:
        each = [(lr, outer, loss) for outer in OUTER[name] for lr, loss in zip(RATES, tried[name, outer], strict=False)]
        lr, outer, _ = min(each, key=lambda entry: entry[2])
        best[name] = {"lr": lr, "outer_lr": outer, "tried": each}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("parity"), help="texts, weights and finished runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where PARITY.md and parity.png go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="a group, or part of a setting's name; writes no docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder
    texts.prepare(folder / "texts", VOCABULARY, SHAPE["model"]["seq_len"])
    start = pretrain(folder)
    print(f"start: {start:.4f} held-out nats per token on B")
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        best = search(pool, folder)
        for name, entry in best.items():
            print(f"{name}: lr {entry['lr']}, outer {entry['outer_lr']}: {entry['tried']}")
        settings = [s for s in SETTINGS if arguments.only in s.name or arguments.only == s.group]
        jobs = [
            job(s, best[s.schedule]["lr"], best[s.schedule]["outer_lr"], seed)
            for s in settings
            for seed in range(1, arguments.seeds + 1)
        ]
        results = all_of(pool, folder, jobs)
    runs = {s.name: results[i * arguments.seeds : (i + 1) * arguments.seeds] for i, s in enumerate(settings)}
    for name, rs in runs.items():
        print(f"{name}: {statistics.mean(r['heldout'] for r in rs):.4f}")
    if not arguments.only:
        parity_report.write(arguments.docs, runs, best, start)


if __name__ == "__main__":
    sys.exit(main())
