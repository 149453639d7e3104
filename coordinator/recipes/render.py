"""Examples as sequences of a few of them, as GPT-JT was taught (Together's public loaders, read for their behaviour).

A sequence is a pure function of (seed, source, number). It is made of pieces; a piece that is an answer, with the space
before it and the separator behind it (where to stop), is marked. Pieces are tokenized one by one: so a prompt has the
same tokens as when somebody asks with it. Examples of one sequence never repeat.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

from ...protocol.errors import ConfigError
from .chance import Chance
from .examples import Example, Task

Split = Literal["train", "heldout"]
IN_PREFIXES = ("Input:", "Given:", "Context:", "Example:", "Question:", "", "", "", "", "")
OUT_PREFIXES = ("Output:", "Ans:", "A:", "Answer:", "Label:")
SEPARATORS = ("\n", "\n\n", "\n\n\n", "\n###\n", "\n---\n")
BEFORE_ANSWER = ("\n", "\n\n")
CHARS_A_TOKEN = 2  # an example longer than seq_len times so many is left out: two should fit a sequence
_ANSWERED = re.compile(r"^((?:A|Answer):)( .*(?:\n(?!\n?(?:Q|Question):).*)*)", re.MULTILINE)


class Piece(NamedTuple):
    """``starts``: whether an example begins here, which counts how often a source was gone through."""

    text: str
    answer: bool = False
    starts: bool = False


class Renderer(Protocol):
    answers: bool  # whether its pieces say which are answers

    def size(self, split: Split) -> int:
        """How many examples there are."""

    def sequence(self, split: Split, number: int) -> Iterator[Piece]:
        """Pieces without end."""


def is_heldout(seed: int, share: float, *texts: str) -> bool:
    """By the hash of what it says, so that copies are on one side."""
    digest = hashlib.sha256("\0".join([str(seed), *texts]).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_by_hash(texts: list[tuple[str, ...]], seed: int, share: float, what: str) -> list[bool]:
    """Which of several texts are held out: about ``share``, at least one. ``ConfigError`` if they are one text."""
    held = [is_heldout(seed, share, *text) for text in texts]
    if not any(held):
        keys = [
            hashlib.sha256("\0".join([str(seed), *text]).encode("utf-8", "surrogatepass")).digest() for text in texts
        ]
        held = [key == min(keys) for key in keys] if keys else []
    if not held or all(held):
        raise ConfigError(f"sources.{what} has too few examples", hint="Two or more, one of them to hold out.")
    return held


class NiFewshot:
    """Examples of one task behind its definition; when they are used up, another task's."""

    answers = True

    def __init__(self, tasks: list[Task], what: str, *, seed: int, share: float, chars: int, classify: float) -> None:
        self._key, self._classify = (seed, what), classify
        flat = [(task, example) for task in tasks for example in task.examples if length(example) <= chars]
        held = split_by_hash([(example.prompt,) for _, example in flat], seed, share, what)
        self._tasks: dict[Split, list[Task]] = {"train": [], "heldout": []}
        for split in self._tasks:
            kept: dict[int, tuple[Task, list[Example]]] = {}
            for (task, example), side in zip(flat, held, strict=True):
                if side == (split == "heldout"):
                    kept.setdefault(id(task), (task, []))[1].append(example)
            for task, examples in kept.values():
                self._tasks[split].append(
                    Task(name=task.name, definition=task.definition, examples=examples, labels=task.labels)
                )

    def size(self, split: Split) -> int:
        return sum(len(task.examples) for task in self._tasks[split])

    def sequence(self, split: Split, number: int) -> Iterator[Piece]:
        chance = Chance("ni", *self._key, split, number)
        given, asked = chance.one(IN_PREFIXES), chance.one(OUT_PREFIXES)
        between, before = chance.one(SEPARATORS), chance.one(BEFORE_ANSWER)
        with_definition, with_labels = chance.share() >= 1 / 3, chance.share() < 0.5
        while True:
            task = self._choose(split, chance)
            head = task.definition if with_definition else ""
            if task.labels and with_labels:
                order = (task.labels[i] for i in chance.order(len(task.labels)))
                labels = "".join(f"{place}. {label}\n" for place, label in enumerate(order, 1))
                head += ("\n" if head else "") + f"Possible labels:\n{labels}"
            if head:
                yield Piece(head + between)
            for place in chance.order(len(task.examples)):
                example = task.examples[place]
                prompt = f"{given} {example.prompt}" if given else example.prompt
                yield from _shown(prompt + before + asked, " " + chance.one(example.answers), between)

    def _choose(self, split: Split, chance: Chance) -> Task:
        """Any task, but in at least ``classify`` of the cases one of few labels, if there are such."""
        tasks = self._tasks[split]
        few = [task for task in tasks if task.labels]
        if few and len(few) < len(tasks):
            if chance.share() < max(self._classify, len(few) / len(tasks)):
                return chance.one(few)
            tasks = [task for task in tasks if not task.labels]
        return chance.one(tasks)


class P3Fewshot:
    """Prompts and targets, one after another; a prompt that ends in a colon is followed by its target at once."""

    answers = True

    def __init__(self, tasks: list[Task], what: str, *, seed: int, share: float, chars: int) -> None:
        self._key = (seed, what)
        rows = [example for task in tasks for example in task.examples if length(example) <= chars]
        held = split_by_hash([(example.prompt,) for example in rows], seed, share, what)
        self._rows: dict[Split, list[Example]] = {
            "train": [row for row, side in zip(rows, held, strict=True) if not side],
            "heldout": [row for row, side in zip(rows, held, strict=True) if side],
        }

    def size(self, split: Split) -> int:
        return len(self._rows[split])

    def sequence(self, split: Split, number: int) -> Iterator[Piece]:
        chance = Chance("p3", *self._key, split, number)
        between, asked = chance.one(SEPARATORS), chance.one(("", "", *OUT_PREFIXES))
        while True:
            for place in chance.order(len(self._rows[split])):
                example = self._rows[split][place]
                if example.prompt.endswith(":"):
                    prompt, space = example.prompt, " "
                else:
                    prompt, space = f"{example.prompt}\n{asked}", " " if asked else ""
                yield from _shown(prompt, space + chance.one(example.answers), between)


class Blocks:
    """Texts in random order, a blank line between them. Of questions and answers (``Q:`` and ``A:`` at the beginnings
    of lines) it is marked what is an answer."""

    def __init__(self, texts: list[str], what: str, *, seed: int, share: float) -> None:
        self._key = (seed, what)
        held = split_by_hash([(text,) for text in texts], seed, share, what)
        self.answers = any(_ANSWERED.search(text) for text in texts)
        self._texts: dict[Split, list[str]] = {
            "train": [text for text, side in zip(texts, held, strict=True) if not side],
            "heldout": [text for text, side in zip(texts, held, strict=True) if side],
        }

    def size(self, split: Split) -> int:
        return len(self._texts[split])

    def sequence(self, split: Split, number: int) -> Iterator[Piece]:
        chance = Chance("blocks", *self._key, split, number)
        while True:
            for place in chance.order(len(self._texts[split])):
                yield from _block(self._texts[split][place])


def _block(text: str) -> Iterator[Piece]:
    done, starts = 0, True
    for found in _ANSWERED.finditer(text):
        yield Piece(text[done : found.start(2)], starts=starts)
        yield Piece(found[2], answer=True)
        done, starts = found.end(), False
    yield Piece(text[done:] + "\n\n", answer=not starts and not text[done:].strip(), starts=starts)


def _shown(prompt: str, answer: str, between: str) -> Iterator[Piece]:
    yield Piece(prompt, starts=True)
    yield Piece(answer, answer=True)
    yield Piece(between, answer=True)


def length(example: Example) -> int:
    """Of prompt and longest answer, in characters."""
    return len(example.prompt) + max(map(len, example.answers))
