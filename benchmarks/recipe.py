"""GPT-JT's recipe in small, through potluck's own workers: does UL2R training teach a model to use its prefix?

    pip install 'potluck[worker]'
    python -m benchmarks.recipe                  (an hour on two cores; started again, it goes on)

A small GPT-J shape is pretrained causally, published, and from there trained on by two ways, as many steps each: UL2R,
and causally (the control). Every run is a coordinator and four workers (two stages, two replicas each) as processes,
with the default codecs and rounds. docs/RECIPE.md is made by this.

    python -m benchmarks.recipe --checkpoint     (an hour and a half more, with bitsandbytes, 15 GB of memory)

The two ways from a really pretrained model: SmolLM2-135M-Instruct, as benchmarks/pretrained.py has it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from potluck.protocol.model_config import Precision
from potluck.screen import Screen

from . import pretrained, recipe_data, recipe_report, recipe_scores

WORKERS = 4
SHAPE = ModelConfig(d_model=128, layers=4, heads=4, seq_len=recipe_data.SEQ_LEN)
PRETRAIN_LR = 3e-3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the two ways. ``examples``: held-out ones of a denoiser that every model is asked."""

    samples: int  # of a microbatch; a replica's step has two of them
    steps: int
    lr: float
    warmup: int
    dtype: Precision = "fp32"
    bits: Literal[8, 32] = 32  # of the optimizer's moments
    examples: int = recipe_scores.EXAMPLES

    @property
    def step_tokens(self) -> int:
        """Of two replicas of the first stage."""
        return 2 * 2 * self.samples * recipe_data.SEQ_LEN


OWN = Sizes(samples=4, steps=400, lr=1e-3, warmup=20)
CHECKPOINT = Sizes(samples=8, steps=60, lr=4e-4, warmup=8, dtype="mixed", bits=8, examples=64)


def config(name: str, corpus: Path, sizes: Sizes, *, seed: int, init: Path | None = None) -> RunConfig:
    """A run of the benchmark; with ``init`` it begins from that published model."""
    return RunConfig(
        name=name,
        seed=seed,
        steps=sizes.steps,
        model=ModelConfig(init=str(init.absolute()), seq_len=recipe_data.SEQ_LEN, dtype=sizes.dtype) if init else SHAPE,
        data=DataConfig(source=str(corpus.absolute())),
        pipeline=PipelineConfig(stages=2, microbatch_size=sizes.samples, microbatches=2, recompute=False),
        optimizer=OptimizerConfig(lr=sizes.lr, warmup_steps=sizes.warmup, schedule="cosine", bits=sizes.bits),
        eval=EvalConfig(every=max(1, sizes.steps // 4), samples=32),
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


def scored(folder: Path, model: Path, corpus: Path, count: int) -> Mapping[str, recipe_scores.Loss]:
    """Scores of ``model``, kept beside its run."""
    path = folder / "scores.json"
    if path.exists():
        return {name: recipe_scores.Loss(**loss) for name, loss in json.loads(path.read_text()).items()}
    found = recipe_scores.scores(model, corpus, count)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: asdict(loss) for name, loss in found.items()}), encoding="utf-8")
    return found


@dataclass(frozen=True, kw_only=True)
class Study:
    """Both ways of ``sizes`` at each seed, in ``folder``, scored on the corpora that they learn from."""

    folder: Path
    corpora: Mapping[str, Path]
    sizes: Sizes
    seeds: int

    def run(self, name: str, run: RunConfig) -> dict[str, Any]:
        """Trains, unless that was done; what it learned and the seconds that it took."""
        return self.score(name, train(self.folder / name, run))

    def score(self, name: str, model: Path) -> dict[str, Any]:
        """Of a model that may not have been trained here: then without seconds."""
        losses = scored(self.folder / name, model, self.corpora["ul2r"], self.sizes.examples)
        took = self.folder / name / "seconds.json"
        seconds = json.loads(took.read_text(encoding="utf-8")) if took.exists() else 0.0
        say = "  ".join(f"{what} {loss.prefix:.3f} ({loss.gain:+.4f})" for what, loss in losses.items())
        print(f"{name}: {seconds:.0f} s  {say}", flush=True)
        return {"losses": {what: asdict(loss) for what, loss in losses.items()}, "seconds": seconds}

    def ways(self, init: Path) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in recipe_report.WAYS}
        for seed in range(1, self.seeds + 1):
            for way, results in found.items():
                name = f"{way}-{seed}"
                results.append(self.run(name, config(name, self.corpora[way], self.sizes, seed=seed, init=init)))
        return found

    def report(self, docs: Path, part: str, about: Mapping[str, Any], start: Any, ways: Any) -> None:
        conditions = asdict(self.sizes) | {"seeds": self.seeds, "step_tokens": self.sizes.step_tokens, **about}
        found = {"conditions": conditions, "start": start, "ways": ways}
        recipe_report.update(docs, part, found)


def own(folder: Path, docs: Path, sizes: Sizes, seeds: int, pretrain: int) -> None:
    """From a small model that is pretrained here."""
    study = Study(folder=folder, corpora=recipe_data.corpora(folder / "data"), sizes=sizes, seeds=seeds)
    first = replace(OWN, steps=pretrain, lr=PRETRAIN_LR)
    start = study.run("start", config("start", study.corpora["causal"], first, seed=1000))
    ways = study.ways(folder / "start" / "coordinator" / "checkpoints" / f"step-{pretrain:08d}")
    parameters = weights(tensors(SHAPE, recipe_data.VOCABULARY, 0, SHAPE.layers))
    about = {"parameters": parameters, "pretrain": pretrain, "pretrain_lr": PRETRAIN_LR}
    study.report(docs, "training", about, start, ways)


def checkpoint(folder: Path, docs: Path, sizes: Sizes, seeds: int) -> None:
    """From a model that others have pretrained."""
    file = pretrained.installed()
    if file is None:
        sys.exit(pretrained.HINT)
    init = folder / "checkpoint" / "model"
    pretrained.write(file, init)
    corpora = recipe_data.corpora(folder / "data", init)
    study = Study(folder=folder / "checkpoint", corpora=corpora, sizes=sizes, seeds=seeds)
    study.report(docs, "checkpoint", {"model": pretrained.NAME}, study.score("start", init), study.ways(init))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/recipe"), help="texts, corpora and finished runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where RECIPE.md and recipe.json go")
    parser.add_argument("--checkpoint", action="store_true", help="begin from a really pretrained model")
    parser.add_argument("--pretrain", type=int, default=1000, help="steps of 2,048 tokens before the two ways part")
    parser.add_argument(
        "--steps", type=int, help=f"steps of each way ({OWN.steps}; of a checkpoint {CHECKPOINT.steps})"
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a waiting thread leaves its core to the other workers
    sizes = CHECKPOINT if arguments.checkpoint else OWN
    sizes = replace(sizes, steps=arguments.steps or sizes.steps)
    if arguments.checkpoint:
        checkpoint(arguments.folder, arguments.docs, sizes, arguments.seeds)
    else:
        own(arguments.folder, arguments.docs, sizes, arguments.seeds, arguments.pretrain)


if __name__ == "__main__":
    main()
