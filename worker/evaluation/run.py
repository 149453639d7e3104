"""One model through one suite: what ``potluck eval`` does."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import msgspec

from ...protocol.errors import ConfigError
from . import baselines, classify, offline, raft, texts
from .models import Opened, open_model
from .prompts import Task
from .report import Evaluation, TaskScore
from .scoring import Scorer

LM_EVAL = "lm-eval:"
MOST_TOKENS = 2048
PACKAGES = ("potluck", "torch", "transformers", "tokenizers", "numpy", "scikit-learn", "lm-eval", "datasets")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """``suite``: offline, raft, lm-eval:TASK,TASK or text. ``data``: folder of assets or of RAFT. ``limit``: most test
    rows or documents. ``shots`` None: 5 examples, lm-eval's own number there. ``max_tokens``: longest sequence."""

    model: Path
    suite: str = "offline"
    data: Path | None = None
    include: Path | None = None
    texts: tuple[tuple[str, Path], ...] = ()
    limit: int | None = None
    shots: int | None = None
    device: str = "auto"
    batch_size: int = 8
    max_tokens: int = MOST_TOKENS
    date: str = ""


def check(plan: Plan) -> None:
    """Raises what :func:`evaluate` would, if its texts, its suite or a package is not there: before any model is."""
    for name, path in plan.texts:
        texts.read(name, path, plan.limit)
    if _tasks(plan)[0]:
        baselines.require()
    if plan.suite.startswith(LM_EVAL):
        from . import harness  # noqa: F401


def evaluate(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Evaluation:
    """Runs ``plan``. What is left out is in the result, with the reason."""
    sources = [texts.read(name, path, plan.limit) for name, path in plan.texts]
    tasks, skipped = _tasks(plan)
    if tasks:
        baselines.require()
    if plan.suite.startswith(LM_EVAL):
        from . import harness  # before the model is loaded: it may be missing
    opened = open_model(plan.model, plan.device)
    length = min(opened.max_length, plan.max_tokens)
    scorer = Scorer(opened.model, prefix=opened.prefix, max_length=length, batch_size=plan.batch_size)
    lines = [TaskScore(name=name, metric="macro-f1", skipped=why) for name, why in skipped.items()]
    for task in tasks:
        shots = 5 if plan.shots is None else plan.shots
        lines.append(classify.evaluate(opened, scorer, task, shots=shots, limit=plan.limit, say=say))
    if plan.suite.startswith(LM_EVAL):
        names = [name for name in plan.suite.removeprefix(LM_EVAL).split(",") if name]
        lines += harness.evaluate(opened, scorer, names, include=plan.include, shots=plan.shots, limit=plan.limit)
    for source in sources:
        say(f"{source.name}: {len(source.documents)} documents")
        lines += _text_lines(opened, scorer, source)
    return Evaluation(
        model=str(plan.model),
        is_prefix=opened.prefix,
        suite=plan.suite,
        date=plan.date,
        versions=_versions(),
        settings={
            "limit": plan.limit,
            "shots": plan.shots,
            "max_tokens": length,
            "device": str(opened.model.device),
            "dtype": str(opened.model.dtype).removeprefix("torch."),
            "attention": str(opened.model.config._attn_implementation),
        },
        tasks=tuple(lines),
        mean=classify.mean(lines),
    )


def _tasks(plan: Plan) -> tuple[list[Task], dict[str, str]]:
    if plan.suite == "offline":
        if plan.data is None:
            raise ConfigError(
                "the offline suite needs its texts",
                hint="potluck eval --fetch-assets DIR downloads them; then name it with --data DIR.",
            )
        found, skipped = offline.build(plan.data)
        if not found:
            raise ConfigError(
                f"{plan.data} holds none of the offline suite's texts", hint=f"potluck eval --fetch-assets {plan.data}"
            )
        return found, skipped
    if plan.suite == "raft":
        return raft.build(plan.data)
    if plan.suite == "text":
        if not plan.texts:
            raise ConfigError("the suite text needs a text", hint="Name one with --text NAME=FILE.")
        return [], {}
    if plan.suite.startswith(LM_EVAL) and plan.suite != LM_EVAL:
        return [], {}
    raise ConfigError(f"no suite {plan.suite!r}", hint="Known are offline, raft, text and lm-eval:TASK,TASK.")


def _text_lines(opened: Opened, scorer: Scorer, source: texts.Source) -> list[TaskScore]:
    return [
        texts.bits_per_byte(opened, scorer, source),
        texts.split_gain(opened, scorer, source),
        *texts.denoising_gains(opened, scorer, source),
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
