"""Log-probabilities of continuations, under a mask that is always given: nothing depends on how a model was exported.

A prefix model (GPT-JT style, ``"is_causal": false``) looks at its context in both directions and writes causally. Run
over context and continuation at once with its own default, it would look at the answer it is scored on. So the
mask is made here, for every sequence: additive and floating (a boolean one is *added* to the scores of eager GPT-J and
hides nothing), with ``use_cache=False``, which GPT-J needs for positions that begin anew.

All continuations of one context go through the model together, behind one copy of the context: each looks at the
context and at itself, and its positions go on from the context. This equals scoring them one by one.

Shapes: B sequences, T positions, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...protocol.errors import ConfigError

KINDS = ("gptj", "llama")  # their logits are the head's output and nothing more
_HEAD_ROWS = 512  # positions whose logits are in memory at once


class Query(NamedTuple):
    """Token ids: ``context`` (at least one) and what may follow it (each at least one)."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Scored(NamedTuple):
    """``logprobs``: float32 [n] on the CPU, natural logarithms, one per token of the continuation.
    ``is_greedy``: whether every token is the likeliest one."""

    logprobs: Tensor
    is_greedy: bool

    @property
    def total(self) -> float:
        return float(self.logprobs.double().sum())


class _Piece(NamedTuple):
    """One sequence for the model: a query's context (cut on the left) with some of its continuations."""

    query: int
    first: int
    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


class Scorer:
    """Scores with ``model`` (GPT-J or Llama, for causal language modelling, in eval mode) on the device it is on.

    ``prefix``: whether contexts are read in both directions. ``max_length``: positions the model knows; longer
    contexts lose their beginning. ``batch_size``: sequences at once.
    """

    def __init__(self, model: Any, *, prefix: bool, max_length: int, batch_size: int = 8) -> None:
        if model.config.model_type not in KINDS:
            raise ConfigError(
                f"a model of type {model.config.model_type!r} cannot be scored", hint=f"Known are {', '.join(KINDS)}."
            )
        self.model, self.prefix, self.max_length, self.batch_size = model, prefix, max_length, batch_size

    def score(self, queries: Sequence[Query], *, prefix: bool | None = None) -> list[list[Scored]]:
        """For every query its continuations' scores, in the order given. ``prefix`` None: as the model is."""
        both = self.prefix if prefix is None else prefix
        out: list[list[Scored]] = [[] for _ in queries]
        found: dict[tuple[int, int], Scored] = {}
        pieces = [piece for i, query in enumerate(queries) for piece in self._pieces(i, query)]
        pieces.sort(key=lambda piece: -piece.length)
        for start in range(0, len(pieces), self.batch_size):
            batch = pieces[start : start + self.batch_size]
            for piece, scores in zip(batch, self._run(batch, both), strict=True):
                found |= {(piece.query, piece.first + i): score for i, score in enumerate(scores)}
        for i, query in enumerate(queries):
            out[i] = [found[i, j] for j in range(len(query.continuations))]
        return out

    def _pieces(self, number: int, query: Query) -> Iterator[_Piece]:
        """``query`` cut so that no piece has more than ``max_length`` tokens beside its context."""
        if not query.context or not query.continuations or not all(query.continuations):
            raise ValueError("a query needs a context and continuations of at least one token each")
        longest = max(len(c) for c in query.continuations)
        if longest > self.max_length:
            raise ConfigError(
                f"an answer has {longest} tokens, the model knows {self.max_length} positions",
                hint="Take a task with shorter answers or a model with more positions.",
            )
        context = query.context[-(self.max_length - longest + 1) :]
        first = 0
        while first < len(query.continuations):
            last, extra = first, 0
            while last < len(query.continuations) and (last == first or extra <= self.max_length):
                extra += len(query.continuations[last]) - 1
                last += 1
            yield _Piece(number, first, context, query.continuations[first:last])
            first = last

    def _run(self, pieces: Sequence[_Piece], prefix: bool) -> list[list[Scored]]:
        shape = len(pieces), max(piece.length for piece in pieces)
        tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        owner = torch.full(shape, -1)  # 0: context, i: continuation i, -1: padding
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, piece in enumerate(pieces):
            size = len(piece.context)
            tokens[row, :size] = torch.tensor(piece.context)
            positions[row, :size] = torch.arange(size)
            owner[row, :size] = 0
            at = size
            for number, answer in enumerate(piece.continuations, start=1):
                here = slice(at, at + len(answer) - 1)
                tokens[row, here] = torch.tensor(answer[:-1], dtype=torch.long)
                positions[row, here] = torch.arange(size, size + len(answer) - 1)
                owner[row, here] = number
                columns += [size - 1, *range(here.start, here.stop)]
                rows += [row] * len(answer)
                targets += answer
                at = here.stop
        logprobs, greedy = selected(
            self.model, tokens, allowed(owner, prefix), positions, torch.tensor([rows, columns]), torch.tensor(targets)
        )
        sizes = [len(answer) for piece in pieces for answer in piece.continuations]
        scores = iter(
            Scored(values, bool(best.all()))
            for values, best in zip(logprobs.split(sizes), greedy.split(sizes), strict=True)
        )
        return [[next(scores) for _ in piece.continuations] for piece in pieces]


def allowed(owner: Tensor, prefix: bool) -> Tensor:
    """Bool [B, 1, T, T]: whether position q (third axis) may look at position k (fourth).

    ``owner``: int64 [B, T], 0 for the context (first), i for continuation i, -1 for padding (last).
    """
    length = owner.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    context = owner == 0
    may = before & ((owner[:, :, None] == owner[:, None, :]) | context[:, None, :])
    if prefix:
        may |= context[:, :, None] & context[:, None, :]
    return may[:, None]


@torch.inference_mode()
def selected(
    model: Any, tokens: Tensor, may: Tensor, positions: Tensor, where: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(log-probabilities float32 [N], whether likeliest bool [N]) of ``targets`` int64 [N], on the CPU.

    ``tokens`` and ``positions``: int64 [B, T]. ``may``: bool [B, 1, T, T]. ``where``: int64 [2, N], sequence and
    position that each target is the next token of.
    """
    device = model.device
    weights = model.get_output_embeddings().weight
    lowest = torch.finfo(weights.dtype).min
    mask = torch.zeros(may.shape, dtype=weights.dtype).masked_fill_(~may, lowest).to(device)
    hidden = model.base_model(
        input_ids=tokens.to(device), attention_mask=mask, position_ids=positions.to(device), use_cache=False
    ).last_hidden_state
    wanted = hidden[where[0].to(device), where[1].to(device)]
    logprobs, greedy = [], []
    for rows, goal in zip(wanted.split(_HEAD_ROWS), targets.to(device).split(_HEAD_ROWS), strict=True):
        logits = model.get_output_embeddings()(rows).float()
        logprobs.append((logits.gather(1, goal[:, None])[:, 0] - logits.logsumexp(1)).cpu())
        greedy.append((logits.argmax(1) == goal).cpu())
    return torch.cat(logprobs), torch.cat(greedy)


def windows(tokens: Sequence[int], first: int, size: int) -> Iterable[tuple[list[int], list[int]]]:
    """``tokens`` as (context, continuation) pairs that score each token once, ``size`` of them at a time.

    The first window's context is the token ``first`` alone; later ones see one token of what went before, so no
    window has more than ``size`` + 1 tokens (lm-eval's rolling log-likelihood with a context of 1).
    """
    before = first
    for start in range(0, len(tokens), size):
        part = list(tokens[start : start + size])
        yield [before], part
        before = part[-1]
