"""Questions and answers by their scores: the file that ``potluck data score`` writes, and what a recipe keeps by it.

The file is JSONL: a header, which names the model, then a row for each pair, keyed by the pair's SHA-256. So it may be
made of several sources, and of more pairs than a recipe has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from ...protocol.errors import ConfigError
from ...protocol.recipe import KeepConfig
from .examples import Example, Task

_EXAMPLES = 3  # of each kind in a report
_SHOWN = 200  # characters of a text in it
_HINT = "Write it with `potluck data score`, or delete it."


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model``: its folder's name; ``model_sha256``: of its files."""

    model: str
    model_sha256: str
    unit: str = "nats per token"


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``pmi`` is (given - alone) / y_tokens; ``given`` and ``alone`` are log likelihoods of the answer in nats."""

    key: str
    pmi: float
    given: float
    alone: float
    x_tokens: int
    y_tokens: int


class Shown(msgspec.Struct, frozen=True):
    x: str
    y: str
    pmi: float


class Kept(msgspec.Struct, frozen=True):
    """What was kept of a source's different pairs. ``best`` and ``worst``: of those that were dropped."""

    scores: str
    model: str
    pairs: int
    kept: int
    too_long: int  # of those that were dropped, those whose answer is too long for the question
    lowest_kept: float
    best: tuple[Shown, ...]
    worst: tuple[Shown, ...]


def question(task: Task, example: Example) -> str:
    """What an answer is scored against: the definition of the task belongs to it."""
    return f"{task.definition}\n{example.prompt}" if task.definition else example.prompt


def key(x: str, y: str) -> str:
    """SHA-256 of a pair."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (x, y)]
    return hashlib.sha256(len(parts[0]).to_bytes(8, "little") + parts[0] + parts[1]).hexdigest()


def pairs(tasks: list[Task]) -> dict[str, tuple[str, str]]:
    """Every different pair of question and answer, by its key."""
    found = ((question(task, one), answer) for task in tasks for one in task.examples for answer in one.answers)
    return {key(x, y): (x, y) for x, y in found}


def read(path: Path) -> tuple[Header, dict[str, Row]]:
    """What is in ``path``; of a last line that was cut off, nothing. ConfigError if it has no scores."""
    try:
        lines = path.read_bytes().split(b"\n")
        header = msgspec.json.decode(lines[0], type=Header)
        rows = [msgspec.json.decode(line, type=Row) for line in lines[1:-1]]
    except FileNotFoundError:
        hint = "Write it with `potluck data score RECIPE --model FOLDER`."
        raise ConfigError(f"{path} does not exist: there are no scores", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=_HINT) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path} has no scores ({error})", hint=_HINT) from error
    if any(not math.isfinite(row.pmi) or row.y_tokens < 1 for row in rows):
        raise ConfigError(f"{path} has scores that are no numbers", hint=_HINT)
    return header, {row.key: row for row in rows}


def keep(tasks: list[Task], config: KeepConfig, what: str, here: Path) -> tuple[list[Task], Kept]:
    """The pairs that ``config`` keeps: an answer that is dropped is none of its example's any more, an example without
    answers is gone. Of pairs with equal scores at the limit those with the smaller key are kept. ConfigError if one has
    no score."""
    path = here / config.pmi
    header, scores = read(path)
    known = pairs(tasks)
    if missing := sum(one not in scores for one in known):
        raise ConfigError(
            f"{missing} of {len(known)} pairs of sources.{what} have no score in {path}",
            hint=f"Score them: potluck data score RECIPE --model FOLDER --source {what} --out {path}",
        )
    best_first = sorted(known, key=lambda one: (-scores[one].pmi, one))
    limit = config.max_ratio
    long = {one for one in known if limit is not None and scores[one].y_tokens > limit * max(1, scores[one].x_tokens)}
    left = [one for one in best_first if one not in long]
    if config.share is not None:
        left = left[: math.ceil(config.share * len(known))]
    else:
        assert config.above is not None
        left = [one for one in left if scores[one].pmi > config.above]
    if not left:
        raise ConfigError(f"sources.{what}.keep keeps none of {len(known)} pairs", hint="Keep a larger share.")
    kept = set(left)
    dropped = [one for one in best_first if one not in kept]

    def shown(keys: list[str]) -> tuple[Shown, ...]:
        return tuple(Shown(known[k][0][:_SHOWN], known[k][1][:_SHOWN], round(scores[k].pmi, 4)) for k in keys)

    report = Kept(
        scores=Path(config.pmi).name,
        model=header.model,
        pairs=len(known),
        kept=len(left),
        too_long=len(long),
        lowest_kept=round(scores[left[-1]].pmi, 4),
        best=shown(dropped[:_EXAMPLES]),
        worst=shown(dropped[::-1][:_EXAMPLES]),
    )
    found = [replace(task, examples=list(_examples(task, kept))) for task in tasks]
    return [task for task in found if task.examples], report


def _examples(task: Task, kept: set[str]) -> Iterator[Example]:
    for example in task.examples:
        x = question(task, example)
        if answers := tuple(answer for answer in example.answers if key(x, answer) in kept):
            yield example if answers == example.answers else replace(example, answers=answers)
