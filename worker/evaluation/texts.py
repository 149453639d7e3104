"""Bits per byte of texts, and what reading the given part in both directions is worth (prefix gain).

Bits per byte do not depend on the tokenizer: all of a text's log-probability over its UTF-8 bytes. Scored causally,
whatever the model; windows of the model's length, each token once (a window sees nothing of the one before but its
last token), so a longer context is worth something here too.

Prefix gain is the target loss with a causal mask minus that with the prefix mask, same weights, same targets, in nats
per target: above 0, the model uses what a causal one cannot see.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from ...protocol.errors import ConfigError, StateError
from ...protocol.objective import Objective, Special
from ..layout import Layout
from . import statistics
from .models import Opened, first_token
from .prompts import key
from .report import Score, TaskScore
from .scoring import Query, Scorer, selected, windows

SEED = 20260101
SPLIT_TOKENS = 256  # of an example for the S split
_MOST_BYTES = 1 << 30
_AGAIN = "Name a text file, or a .jsonl whose lines have a field text."


class Source(NamedTuple):
    name: str
    documents: tuple[str, ...]


def read(name: str, path: Path, limit: int | None) -> Source:
    """A text file as one document, cut at blank lines into pieces of 4 kB or more, or a .jsonl's ``text`` fields."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise StateError(f"{path} is over 1 GiB", hint="Cut it.")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            documents = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
        else:
            documents = _pieces(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    documents = [document for document in documents if isinstance(document, str) and document.strip()]
    if not documents:
        raise StateError(f"{path} holds no text", hint=_AGAIN)
    return Source(name, tuple(documents[:limit] if limit else documents))


def _pieces(text: str, size: int = 4096) -> list[str]:
    out = [""]
    for paragraph in text.split("\n\n"):
        out[-1] += paragraph + "\n\n"
        if len(out[-1]) >= size:
            out.append("")
    return [piece for piece in out if piece]


def bits_per_byte(opened: Opened, scorer: Scorer, source: Source) -> TaskScore:
    """Of ``source``, with an interval over its documents."""
    begin = first_token(opened.tokenizer)
    queries, owner = [], []
    for i, document in enumerate(source.documents):
        tokens = opened.tokenizer(document, add_special_tokens=False).input_ids
        for context, part in windows(tokens, begin, scorer.max_length):
            queries.append(Query(context, [part]))
            owner.append(i)
    bits = np.zeros(len(source.documents))
    for i, found in zip(owner, scorer.score(queries, prefix=False), strict=True):
        bits[i] -= found[0].total / np.log(2)
    sizes = [float(len(document.encode())) for document in source.documents]
    value, low, high = statistics.ratio_interval(list(bits), sizes)
    return TaskScore(
        name=source.name,
        metric="bits-per-byte",
        score=Score(value=value, low=low, high=high, n=len(sizes)),
        ids=_ids(source),
        values=tuple(bits.tolist()),
        weights=tuple(sizes),
        lower_is_better=True,
    )


def split_gain(opened: Opened, scorer: Scorer, source: Source) -> TaskScore:
    """Prefix gain when a document's first ``SPLIT_TOKENS`` are split at a point between a quarter and three quarters,
    fixed by its text and ``SEED``: half of it on average."""
    queries, ids = [], []
    size = min(SPLIT_TOKENS, scorer.max_length)
    for name, document in zip(_ids(source), source.documents, strict=True):
        tokens = opened.tokenizer(document, add_special_tokens=False).input_ids[:size]
        if len(tokens) < 16:
            continue
        quarter = len(tokens) // 4
        at = quarter + int(key(SEED, name)[:8], 16) % (2 * quarter)
        queries.append(Query(tokens[:at], [tokens[at:]]))
        ids.append(name)
    if not queries:
        return TaskScore(name=f"{source.name} S", metric="prefix-gain", skipped="no document has 16 tokens")
    causal = [found[0].total for found in scorer.score(queries, prefix=False)]
    prefix = [found[0].total for found in scorer.score(queries, prefix=True)]
    gains = [b - a for a, b in zip(causal, prefix, strict=True)]
    counts = [float(len(query.continuations[0])) for query in queries]
    return _gain(f"{source.name} S", ids, gains, counts, -sum(prefix) / sum(counts))


def denoising_gains(opened: Opened, scorer: Scorer, source: Source) -> list[TaskScore]:
    """Prefix gain of the UL2R denoisers, one score per mode, if the model knows their tokens; else why not."""
    if opened.special is None:
        why = "the model's config has no potluck_special: it was not trained with denoisers"
        return [TaskScore(name=f"{source.name} R/X", metric="prefix-gain", skipped=why)]
    try:
        special = msgspec.convert(opened.special, Special)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"potluck_special of the model's config: {error}", hint="Export the model again, or take the entry out."
        ) from error
    objectives: Any = importlib.import_module("..objectives", __package__)
    size = min(2 * SPLIT_TOKENS, scorer.max_length)
    per_mode: dict[str, list[tuple[str, float, float, float]]] = {}
    for i, (name, document) in enumerate(zip(_ids(source), source.documents, strict=True)):
        tokens = opened.tokenizer(document, add_special_tokens=False).input_ids[: size // 2]
        if len(tokens) < 64:
            continue
        row = np.full(size + 1, special.pad, np.int64)
        row[: len(tokens)] = tokens
        packed = objectives.make_sample(row, None, Objective(kind="ul2r"), special, (SEED, i))
        for mode, found in _packed_losses(scorer, packed).items():
            per_mode.setdefault(mode, []).append((name, *found))
    return [
        _gain(
            f"{source.name} {mode}",
            [row[0] for row in rows],
            [row[1] - row[2] for row in rows],
            [row[3] for row in rows],
            sum(row[2] for row in rows) / sum(row[3] for row in rows),
        )
        for mode, rows in sorted(per_mode.items())
    ]


def _packed_losses(scorer: Scorer, packed: Any) -> dict[str, tuple[float, float, float]]:
    """Per mode: summed loss with the causal mask, with the prefix mask, and the targets' number."""
    tokens, targets, segments, is_prefix = (torch.as_tensor(np.asarray(part))[None] for part in packed[:4])
    where = (targets >= 0).nonzero().T
    if not where.shape[1]:
        return {}
    losses = []
    for seen in (torch.zeros_like(is_prefix), is_prefix):
        layout = Layout(segments, seen)
        logprobs, _ = selected(
            scorer.model, tokens, layout.mask(), layout.positions(), where, targets[where[0], where[1]]
        )
        losses.append(-logprobs.double().numpy())
    of = segments[where[0], where[1]].numpy()
    out: dict[str, tuple[float, float, float]] = {}
    for number, mode in enumerate(packed.modes, start=1):
        here = of == number
        if here.any():
            before = out.get(mode, (0.0, 0.0, 0.0))
            add = float(losses[0][here].sum()), float(losses[1][here].sum()), float(here.sum())
            out[mode] = before[0] + add[0], before[1] + add[1], before[2] + add[2]
    return out


def _gain(name: str, ids: Sequence[str], gains: Sequence[float], counts: Sequence[float], loss: float) -> TaskScore:
    value, low, high = statistics.ratio_interval(gains, counts)
    return TaskScore(
        name=name,
        metric="prefix-gain",
        score=Score(value=value, low=low, high=high, n=len(ids)),
        ids=tuple(ids),
        values=tuple(gains),
        weights=tuple(counts),
        note=f"loss {loss:.4f} nats with the prefix mask",
    )


def _ids(source: Source) -> tuple[str, ...]:
    return tuple(f"{i}-{key(document)[:12]}" for i, document in enumerate(source.documents))
