"""Evaluations of published models without any model, and folders that look like a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from potluck.protocol.evaluation import CHECKPOINTS, NEEDED, Score, Summary, TaskSummary, file_name


def summary(step: int | None, suite: str = "offline", value: float = 0.5) -> Summary:
    mean = Score(value=value, low=value - 0.1, high=value + 0.1, n=60)
    return Summary(
        suite=suite,
        step=step,
        tasks=(
            TaskSummary(name="spam", metric="macro-f1", score=mean, majority=0.33, tfidf=0.8),
            TaskSummary(name="brown", metric="macro-f1", skipped="its texts are missing"),
        ),
        mean=mean,
    )


def checkpoint(run: Path, step: int) -> Path:
    """A folder with the names of a published model."""
    folder = run / CHECKPOINTS / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_text("{}")
    return folder


def leave(folder: Path, found: Any, file: str | None = None) -> Path:
    """Writes what ``found`` is, or these bytes, into a checkpoint's folder."""
    target = folder / (file or file_name(found.suite))
    target.write_bytes(found if isinstance(found, bytes) else msgspec.json.encode(found))
    return target
