"""Classification by log-probability: which label would the model write after ``Label:``?

A label is scored with the space before it and the line's end behind it. So no label is the beginning of another, and
the sum over its tokens is the probability that the model, asked to write, writes exactly this line: that sum decides
(HELM's exact match, kept to the possible labels). The choice by log-probability per byte, which
favours longer labels, is reported beside it: where the two differ much, the model is unsure of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import baselines, prompts, statistics
from .models import Opened, encode_pair
from .prompts import Row, Task
from .report import Guess, Score, TaskScore
from .scoring import Query, Scorer

SEED = 0
_ANSWER_ROOM = 8  # tokens kept free beside the longest label's own


def evaluate(
    opened: Opened,
    scorer: Scorer,
    task: Task,
    *,
    shots: int,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TaskScore:
    """``task``'s macro-F1 with up to ``shots`` examples, over at most ``limit`` test rows (the first ones)."""
    rows = task.test[:limit] if limit else task.test
    if not rows or not task.train:
        return TaskScore(name=task.name, metric="macro-f1", skipped="it has no labelled test rows")
    answers = [f" {label}\n" for label in task.labels]
    built = [_prompt(opened, scorer, task, row, shots, answers) for row in rows]
    queries = [_query(opened, prompt.text, answers) for prompt in built]
    say(f"{task.name}: {len(rows)} rows, {sum(len(q.context) for q in queries) // len(queries)} tokens each")
    totals = np.array([[score.total for score in found] for found in scorer.score(queries)])
    sizes = np.array([len(answer.encode()) for answer in answers])
    plain, per_byte = totals.argmax(1), (totals / sizes).argmax(1)
    truth = np.array([row.label for row in rows])
    train = np.array([row.label for row in task.train])
    linear = baselines.tfidf([row.text for row in task.train], train, [row.text for row in rows])
    return TaskScore(
        name=task.name,
        metric="macro-f1",
        score=_f1(truth, plain),
        score_per_byte=_f1(truth, per_byte),
        majority=statistics.macro_f1(truth, baselines.majority(train, len(rows))),
        tfidf=statistics.macro_f1(truth, linear),
        labels=task.labels,
        train_rows=len(task.train),
        shots=(min(prompt.shots for prompt in built), max(prompt.shots for prompt in built)),
        cut=sum(prompt.is_cut for prompt in built),
        rows=tuple(
            Guess(id=row.id, truth=row.label, guess=int(a), guess_per_byte=int(b))
            for row, a, b in zip(rows, plain, per_byte, strict=True)
        ),
    )


def mean(tasks: Sequence[TaskScore]) -> Score | None:
    """Of the classification tasks that have a score."""
    pairs = [
        (np.array([row.truth for row in t.rows]), np.array([row.guess for row in t.rows])) for t in tasks if t.rows
    ]
    if not pairs:
        return None
    value, low, high = statistics.mean_of_tasks(pairs)
    return Score(value=value, low=low, high=high, n=sum(len(truth) for truth, _ in pairs))


def _f1(truth: statistics.Labels, guess: statistics.Labels) -> Score:
    low, high = statistics.f1_interval(truth, guess)
    return Score(value=statistics.macro_f1(truth, guess), low=low, high=high, n=len(truth))


def _prompt(opened: Opened, scorer: Scorer, task: Task, row: Row, shots: int, answers: Sequence[str]) -> prompts.Prompt:
    tokenizer = opened.tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    def shorten(text: str, size: int) -> str:
        return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:size]))

    room = max(count(answer) for answer in answers) + _ANSWER_ROOM
    shown = prompts.examples(task, shots, SEED)
    return prompts.build(task, row, shown, scorer.max_length - room, count, shorten)


def _query(opened: Opened, text: str, answers: Sequence[str]) -> Query:
    pairs = [encode_pair(opened.tokenizer, text, answer) for answer in answers]
    return Query(pairs[0][0], [answer for _, answer in pairs])
