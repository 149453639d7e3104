"""GPT-JT's recipe in small, through potluck's own workers: does UL2R training teach a model to use its prefix?

    pip install 'potluck[worker]'
    python -m benchmarks.recipe                  (an hour on two cores; started again, it goes on)

A small GPT-J shape is pretrained causally, published, and from there trained on by two ways, as many steps each: UL2R,
and causally (the control). Every run is a coordinator and four workers (two stages, two replicas each) as processes,
with the default codecs and rounds. docs/RECIPE.md is made by this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potluck.demo import Crew
from potluck.protocol.architecture import tensors, weights
from potluck.protocol.config import (
    CheckpointConfig,
    CoordinatorConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
    dump,
)
from potluck.screen import Screen

from . import recipe_data, recipe_report, recipe_scores

WORKERS = 4
SHAPE = ModelConfig(d_model=128, layers=4, heads=4, seq_len=recipe_data.SEQ_LEN)
BATCH = PipelineConfig(stages=2, microbatch_size=4, microbatches=2, recompute=False)
PRETRAIN_LR, LR, WARMUP = 3e-3, 1e-3, 20
TOKENS_A_STEP = 2 * 8 * recipe_data.SEQ_LEN  # of two replicas of the first stage


def config(name: str, corpus: Path, *, steps: int, seed: int, lr: float, init: Path | None = None) -> RunConfig:
    """A run of the benchmark; with ``init`` it begins from that published model."""
    return RunConfig(
        name=name,
        seed=seed,
        steps=steps,
        model=ModelConfig(init=str(init.absolute()), seq_len=recipe_data.SEQ_LEN) if init else SHAPE,
        data=DataConfig(source=str(corpus.absolute())),
        pipeline=BATCH,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=WARMUP, schedule="cosine"),
        eval=EvalConfig(every=max(1, steps // 4), samples=32),
        checkpoint=CheckpointConfig(publish_rounds=100_000),
        coordinator=CoordinatorConfig(wait_for=WORKERS, patience_seconds=60.0),
    )


def train(folder: Path, run: RunConfig) -> Path:
    """The model that ``run`` publishes at its end, from ``folder`` if the same run ended there before."""
    model = folder / "coordinator" / "checkpoints" / f"step-{run.steps:08d}"
    path, seconds = folder / "run.yaml", folder / "seconds.json"
    if seconds.exists() and path.read_text(encoding="utf-8") == dump(run):
        return model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path.write_text(dump(run), encoding="utf-8")
    crew, started = Crew(folder, WORKERS), time.monotonic()
    try:
        ready = crew.start_coordinator(threading.Event(), Screen(plain=True))
        assert ready is not None
        crew.start_workers(ready["ticket"])
        assert crew.coordinator is not None
        while crew.coordinator.poll() is None:
            time.sleep(0.5)
            if failed := crew.failed():
                raise RuntimeError(f"{failed[0]} ended: {crew.last_line(failed[0])}")
        if crew.coordinator.returncode or not (model / "config.json").exists():
            raise RuntimeError(f"the coordinator ended: {crew.last_line('coordinator')}")
    finally:
        crew.end()
    seconds.write_text(json.dumps(time.monotonic() - started), encoding="utf-8")
    return model


def scored(folder: Path, model: Path, corpus: Path) -> Mapping[str, recipe_scores.Loss]:
    """Scores of ``model``, kept beside its run."""
    path = folder / "scores.json"
    if path.exists():
        return {name: recipe_scores.Loss(**loss) for name, loss in json.loads(path.read_text()).items()}
    found = recipe_scores.scores(model, corpus)
    path.write_text(json.dumps({name: asdict(loss) for name, loss in found.items()}), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/recipe"), help="texts, corpora and finished runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where RECIPE.md and recipe.json go")
    parser.add_argument("--pretrain", type=int, default=1000, help="steps of 2,048 tokens before the two ways part")
    parser.add_argument("--steps", type=int, default=400, help="steps of each way")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a waiting thread leaves its core to the other workers
    folder: Path = arguments.folder
    corpora = recipe_data.corpora(folder / "data")

    def result(name: str, run: RunConfig) -> dict[str, Any]:
        model = train(folder / name, run)
        losses = scored(folder / name, model, corpora["ul2r"])
        seconds = json.loads((folder / name / "seconds.json").read_text(encoding="utf-8"))
        say = "  ".join(f"{what} {loss.prefix:.3f} ({loss.gain:+.4f})" for what, loss in losses.items())
        print(f"{name}: {seconds:.0f} s  {say}", flush=True)
        return {"losses": {what: asdict(loss) for what, loss in losses.items()}, "seconds": seconds}

    steps = arguments.pretrain
    start = result("start", config("start", corpora["causal"], steps=steps, seed=1000, lr=PRETRAIN_LR))
    init = folder / "start" / "coordinator" / "checkpoints" / f"step-{steps:08d}"
    ways: dict[str, list[dict[str, Any]]] = {way: [] for way in recipe_report.WAYS}
    for seed in range(1, arguments.seeds + 1):
        for way, results in ways.items():
            name = f"{way}-{seed}"
            run = config(name, corpora[way], steps=arguments.steps, seed=seed, lr=LR, init=init)
            results.append(result(name, run))
    conditions = {
        "parameters": weights(tensors(SHAPE, recipe_data.VOCABULARY, 0, SHAPE.layers)),
        "pretrain": arguments.pretrain,
        "steps": arguments.steps,
        "tokens_a_step": TOKENS_A_STEP,
        "seq_len": recipe_data.SEQ_LEN,
        "pretrain_lr": PRETRAIN_LR,
        "lr": LR,
        "warmup": WARMUP,
        "seeds": arguments.seeds,
        "examples": recipe_scores.EXAMPLES,
    }
    recipe_report.update(arguments.docs, "training", {"conditions": conditions, "start": start, "ways": ways})


if __name__ == "__main__":
    main()
