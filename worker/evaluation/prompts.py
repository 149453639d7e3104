"""Few-shot prompts as HELM's RAFT scenario has them: instructions, possible labels, examples, the row, ``Label:``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

SEPARATOR = "\n\n"


class Row(NamedTuple):
    """``id`` is unique in its task; ``fields`` are shown as ``name: text`` in this order; ``label``: its number."""

    id: str
    fields: tuple[tuple[str, str], ...]
    label: int

    @property
    def text(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.fields)


class Task(NamedTuple):
    """A classification task: ``train`` is for examples and baselines, ``test`` is scored."""

    name: str
    instructions: str
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    test: tuple[Row, ...]


def key(*parts: object) -> str:
    """A hash that orders things at random, the same on every machine and under every library."""
    return hashlib.sha256("\x00".join(str(part) for part in parts).encode()).hexdigest()


def head(task: Task) -> str:
    listed = "\n".join(f"{i}. {label}" for i, label in enumerate(task.labels, start=1))
    return f"{task.instructions}\nPossible labels:\n{listed}"


def examples(task: Task, shots: int, seed: int) -> list[Row]:
    """Up to ``shots`` training rows, taken from the labels in turn (the commonest first), in a random order."""
    by_label: dict[int, list[Row]] = {}
    for row in sorted(task.train, key=lambda row: key(seed, task.name, row.id)):
        by_label.setdefault(row.label, []).append(row)
    queues = sorted(by_label.values(), key=lambda rows: (-len(rows), rows[0].label))
    depth = max((len(rows) for rows in queues), default=0)
    taken = [rows[turn] for turn in range(depth) for rows in queues if turn < len(rows)][:shots]
    return sorted(taken, key=lambda row: key(seed, "order", row.id))


class Prompt(NamedTuple):
    text: str
    shots: int
    is_cut: bool


def build(
    task: Task,
    row: Row,
    shown: Sequence[Row],
    budget: int,
    count: Callable[[str], int],
    shorten: Callable[[str, int], str],
) -> Prompt:
    """The prompt for ``row`` within ``budget`` tokens: as many of ``shown`` as fit, the last ones first to go.

    ``count``: tokens of a text. ``shorten``: a text's first tokens. If the row does not fit alone, its longest field
    loses its end, and if that is not enough the instructions lose theirs; ``is_cut`` says so.
    """
    top, is_cut = head(task), False
    ask = f"{row.text}\nLabel:"
    room = budget - count(top) - count(SEPARATOR + ask)
    if room < 0:
        is_cut = True
        longest = max(range(len(row.fields)), key=lambda i: len(row.fields[i][1]))
        fields = list(row.fields)
        name, value = fields[longest]
        fields[longest] = (name, shorten(value, max(32, count(value) + room - 4)))
        ask = f"{row._replace(fields=tuple(fields)).text}\nLabel:"
        left = budget - count(SEPARATOR + ask)
        if count(top) > left:
            top = shorten(top, max(0, left))
        return Prompt(top + SEPARATOR + ask, 0, is_cut)
    parts = []
    for example in shown:
        part = f"{example.text}\nLabel: {task.labels[example.label]}"
        room -= count(SEPARATOR + part)
        if room < 0:
            break
        parts.append(part)
    return Prompt(SEPARATOR.join([top, *parts, ask]), len(parts), is_cut)
