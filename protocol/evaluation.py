"""What an evaluation says of one checkpoint of a run, and where that is written.

Whoever evaluates leaves a JSON file in the checkpoint's folder; the coordinator reads of it what is named here. Every
field is bounded: the file may come from elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .errors import StateError

FORMAT = 1
MOST_NBYTES = 8 << 20  # of a file in a checkpoint's folder
CHECKPOINTS = "checkpoints"  # folder of a run's published models, each in one named ``step-NNNNNNNN``
STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,14})")
FILE = re.compile(r"evaluation-[A-Za-z0-9._-]{1,64}\.json")
LONGEST_SUITE = 64  # in a file's name
NEEDED = ("config.json", "model.safetensors.index.json")  # in every published model's folder

Name = Annotated[str, Meta(max_length=200)]
Line = Annotated[str, Meta(max_length=2000)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]


class Score(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A number with its 95 % bootstrap interval over ``n`` rows."""

    value: Finite
    low: Finite
    high: Finite
    n: Count


class TaskSummary(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the table. ``metric``: macro-f1, bits-per-byte, prefix-gain, or lm-eval's name for it.

    ``majority`` and ``tfidf``: what the commonest label and a linear model score on the same rows. ``skipped`` says why
    there is no score.
    """

    name: Name
    metric: Name
    score: Score | None = None
    majority: Finite | None = None
    tfidf: Finite | None = None
    lower_is_better: bool = False
    skipped: Line = ""


class Summary(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model, one suite. ``step``: of the run whose checkpoint the model is, None for others. ``mean``: of the
    classification tasks' scores."""

    format: int = FORMAT
    suite: Annotated[str, Meta(min_length=1, max_length=2000)]
    step: Count | None = None
    tasks: Annotated[tuple[TaskSummary, ...], Meta(max_length=256)]
    mean: Score | None = None


def file_name(suite: str) -> str:
    """Of the file that holds a suite's result."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", suite)
    if len(name) > LONGEST_SUITE:
        name = f"{name[: LONGEST_SUITE - 9]}-{hashlib.sha256(suite.encode()).hexdigest()[:8]}"
    return f"evaluation-{name}.json"


def step_of(folder: Path) -> int | None:
    """The step of a run that ``folder`` is the published model of; None if it does not look like one."""
    place = folder.absolute()
    found = STEP.fullmatch(place.name)
    if not found or place.parent.name != CHECKPOINTS or not all((place / name).is_file() for name in NEEDED):
        return None
    return int(found[1])


def parse(data: bytes, file: str, step: int) -> Summary:
    """What is in ``file`` of the checkpoint of ``step``. Raises ``StateError`` if it is not a result of that step."""
    hint = "Evaluate the checkpoint again: potluck eval."
    try:
        found = msgspec.json.decode(data, type=Summary)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"it is no evaluation: {error}", hint=hint) from None
    if found.format != FORMAT:
        raise StateError(f"its format is {found.format}, not {FORMAT}", hint=hint)
    if found.step != step:
        raise StateError(f"it is of {'no step' if found.step is None else f'step {found.step}'}", hint=hint)
    if not all(
        text.isprintable() for text in (found.suite, *(t for task in found.tasks for t in (task.name, task.metric)))
    ):
        raise StateError("its names are not plain text", hint=hint)
    if file_name(found.suite) != file:
        raise StateError(f"it is of another suite and belongs into {file_name(found.suite)}", hint=hint)
    return found
