"""What of a source repeats evaluation texts, and what is left when that is taken out.

N-grams are of the recipe's tokens, so a repetition with other spelling, case or line breaks is another text. A document
of up to 512 tokens that has an overlap is left out whole. Of a longer one the overlap goes, with a margin of 50 tokens
at either side, and what remains are documents of their own; remains of less than 50 tokens go too, and a document that
would be cut into more than ten goes whole (the rules of Brown et al., 2020, appendix C, in tokens instead of
characters). Of examples to render, those with an overlap are left out whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError
from ...protocol.recipe import DecontaminateConfig
from ..decontaminate import Protected, merged
from .evaluations import EvaluationText
from .examples import Example, Task
from .words import Words

T = TypeVar("T")
SHORT = 512  # tokens of a document that is left out whole
MARGIN = 50  # tokens beside an overlap
REMAINS = 50  # tokens that are worth keeping
MAX_PIECES = 10
_BATCH = 1024  # texts that are tokenized together


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """Document or example ``number`` of a source, from 0, of ``size`` tokens, repeats ``texts``: places in the list of
    evaluation texts, each with the first n-gram of it. ``dropped`` tokens are left out for it."""

    number: int
    size: int
    dropped: int
    texts: tuple[tuple[int, str], ...]


class Seen(msgspec.Struct, frozen=True):
    """``looked_at``: documents or examples of a source, which have ``tokens``."""

    looked_at: int
    tokens: int
    findings: tuple[Finding, ...]


class _Hit(NamedTuple):
    overlaps: list[tuple[int, int]]  # start and length, ascending
    texts: tuple[tuple[int, str], ...]


class Guard:
    """``texts`` protected by the n-grams of their tokens. ConfigError if all of them are shorter."""

    def __init__(self, config: DecontaminateConfig, texts: list[EvaluationText], words: Words) -> None:
        self.config, self.texts, self._words = config, texts, words
        self._n, self._is_dropping = config.ngram, config.action == "drop"
        plain: list[NDArray[np.uint32]] = []
        spaced: list[NDArray[np.uint32]] = []
        for batch in _batches(one.text for one in texts):
            # Behind a space a text begins with other tokens than where nothing is before it.
            behind = words.encode([" " + text for text in batch])
            for alone, other in zip(words.encode(batch), behind, strict=True):
                differ = len(other) - _common_end(alone, other)
                plain.append(np.array(alone, np.uint32))
                spaced.append(np.array(other[: differ + self._n - 1] if differ else [], np.uint32))
        self.is_short = [max(len(a), len(b)) < self._n for a, b in zip(plain, spaced, strict=True)]
        if all(self.is_short):
            raise ConfigError(
                f"decontaminate: none of {len(texts)} evaluation texts has {self._n} tokens",
                hint="Lower decontaminate.ngram, or name other texts.",
            )
        self._protected = Protected([*plain, *spaced], self._n)

    def document(self, number: int, ids: list[int]) -> tuple[list[list[int]], Finding | None]:
        """What remains of document ``number`` with tokens ``ids``: itself, pieces of it or nothing."""
        hit = self._hit(ids)
        if hit is None:
            return [ids], None
        pieces = remains(ids, hit.overlaps) if self._is_dropping else [ids]
        return pieces, Finding(number, len(ids), len(ids) - sum(map(len, pieces)), hit.texts)

    def tasks(self, tasks: list[Task]) -> tuple[list[Task], Seen]:
        """Without the examples that have an overlap: in the prompt, in an answer, or across both. A task whose
        definition has one loses all of its examples. Examples are numbered through all tasks."""
        flat = [(place, example) for place, task in enumerate(tasks) for example in task.examples]
        definitions = [self._hit(ids) for ids in self._words.encode([task.definition for task in tasks])]
        shown = ([f"{example.prompt}\n{answer}" for answer in example.answers] for _, example in flat)
        is_left, seen = self._examples(shown, (definitions[place] for place, _ in flat))
        kept: list[list[Example]] = [[] for _ in tasks]
        for (place, example), left in zip(flat, is_left, strict=True):
            if left:
                kept[place].append(example)
        found = [replace(task, examples=examples) for task, examples in zip(tasks, kept, strict=True)]
        return [task for task in found if task.examples], seen

    def blocks(self, texts: list[str]) -> tuple[list[str], Seen]:
        """Without the texts that have an overlap."""
        is_left, seen = self._examples(([text] for text in texts), (None for _ in texts))
        return [text for text, left in zip(texts, is_left, strict=True) if left], seen

    def _examples(self, shown: Iterable[list[str]], known: Iterable[_Hit | None]) -> tuple[list[bool], Seen]:
        """Of examples, each the texts that it may be shown as and what is known to be found in it already: which are
        left, and what is to be said. Their tokens are those of their first text."""
        is_left: list[bool] = []
        findings: list[Finding] = []
        n_tokens = 0
        known = iter(known)
        for batch in _batches(shown):
            encoded = iter(self._words.encode([text for texts in batch for text in texts]))
            for texts in batch:
                tokens = list(islice(encoded, len(texts)))
                hit = next(known) or next((found for ids in tokens if (found := self._hit(ids))), None)
                if hit is not None:
                    dropped = len(tokens[0]) if self._is_dropping else 0
                    findings.append(Finding(len(is_left), len(tokens[0]), dropped, hit.texts))
                is_left.append(hit is None or not self._is_dropping)
                n_tokens += len(tokens[0])
        return is_left, Seen(len(is_left), n_tokens, tuple(findings))

    def _hit(self, ids: list[int]) -> _Hit | None:
        tokens = np.array(ids, np.uint32)
        starts = self._protected.matches(tokens)
        if not len(starts):
            return None
        first: dict[int, int] = {}  # text to where it begins
        for start in starts.tolist():
            for owner in self._protected.owners(tokens[start : start + self._n]):
                first.setdefault(owner % len(self.texts), start)
        excerpts = self._words.tokenizer.decode_batch(
            [ids[start : start + self._n] for _, start in sorted(first.items())], skip_special_tokens=False
        )
        return _Hit(merged(starts, self._n), tuple(zip(sorted(first), excerpts, strict=True)))


def remains(ids: list[int], overlaps: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Pieces of a document that has ``overlaps`` (start, length), ascending."""
    if len(ids) <= SHORT:
        return []
    pieces, begin = [], 0
    for start, length in overlaps:
        pieces.append(ids[begin : max(begin, start - MARGIN)])
        begin = start + length + MARGIN
    pieces.append(ids[begin:])
    kept = [piece for piece in pieces if len(piece) >= REMAINS]
    return kept if len(kept) <= MAX_PIECES else []


def _batches(values: Iterable[T]) -> Iterator[list[T]]:
    left = iter(values)
    while batch := list(islice(left, _BATCH)):
        yield batch


def _common_end(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
