"""A row of tokens made into a training sample, as a pure function of row, objective and key. Numpy only.

A row is a window of a token stream in which documents end with eos, or one rendered sequence padded at its end. The
piece of each document in it becomes one example, or several; none sees another. What they are is told in
``protocol/objective.py``. Shapes: L positions, rows of L + 1 tokens.

Denoising makes text longer, so the end of a row may stay unused. An example is never cut: one that would not fit is
made of less text. A denoised piece, R or X, ends with the eos that ends the list of its spans, whether or not its
document ended there; an S example ends with eos only where its document does, so that nobody learns to stop early.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..protocol.objective import Objective, Special
from ..protocol.special import check_denoising
from .denoise import MIN_NOISY, UL2, UL2R, Denoiser, most_raw, noise_mask, span_example, split_place
from .packing import Example, Packed, Packer, Segment, describe
from .randomness import Random

__all__ = ["Packed", "Segment", "describe", "make_sample"]

MIN_FREE = 8  # positions; with fewer left the rest of a sample is padding


def make_sample(
    row: NDArray[np.integer],
    answers: NDArray[np.bool_] | None,
    objective: Objective,
    special: Special,
    key: tuple[int, ...],
) -> Packed:
    """The sample of L positions that ``row``, [L + 1] tokens with L >= 1, teaches.

    ``answers``: bool [L + 1], tokens of a rendered row that are answers. All chance is a function of ``key``, small
    numbers >= 0 like (seed, stage, index). A sample may have no target at all: a row of nothing but padding.
    Raises ConfigError when ``special`` lacks what the objective's denoisers need.
    """
    if row.ndim != 1 or len(row) < 2 or (answers is not None and answers.shape != row.shape):
        raise ValueError(f"a row of shape {row.shape} with answers of {None if answers is None else answers.shape}")
    check_denoising(objective, special)
    random = Random(key)
    packer = Packer(len(row) - 1, special.pad)
    tokens = row.astype(np.int64)
    text = tokens[: _n_text(tokens, special)]
    kind = objective.kind
    if kind == "answers" and (answers is None or not answers[: len(text)].any()):
        kind = "prefix"
    if kind in ("ul2r", "ul2"):
        denoisers = UL2R if kind == "ul2r" else UL2
        for begin, end in _pieces(text, special.eos):
            _denoise(text[begin:end], denoisers, objective, special, random, packer)
        return packer.packed()
    for begin, end in _pieces(text, special.eos):
        if end - begin < 2 or not packer.free:
            continue  # nothing stands before its only token
        piece = text[begin:end]
        if kind == "causal":
            packer.add(Example(piece, 0, kind))
        elif kind == "prefix":
            packer.add(Example(piece, split_place(len(piece), objective.short_prefix, random), kind))
        elif answers is not None and answers[begin:end].any():
            packer.add(_answered(piece, answers[begin:end], special.eos))
    return packer.packed()


def _n_text(row: NDArray[np.int64], special: Special) -> int:
    """Tokens of a row before its padding. Where pad is eos, the first eos of those at the end ends the text."""
    other = np.flatnonzero(row != special.pad)
    n = int(other[-1]) + 1 if len(other) else 0
    return min(n + 1, len(row)) if special.pad == special.eos else n


def _pieces(text: NDArray[np.int64], eos: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of documents begin and end, each with its eos if it has one."""
    begin = 0
    for end in (np.flatnonzero(text == eos) + 1).tolist():
        yield begin, end
        begin = end
    if begin < len(text):
        yield begin, len(text)


def _answered(piece: NDArray[np.int64], answers: NDArray[np.bool_], eos: int) -> Example:
    """Answers, and an eos right behind one, are targets; what stands before the first of them is given."""
    learned = answers.copy()
    if piece[-1] == eos and answers[-2]:
        learned[-1] = True
    return Example(piece, int(np.argmax(answers)), "answers", learned)


def _denoise(
    piece: NDArray[np.int64],
    denoisers: tuple[Denoiser, ...],
    objective: Objective,
    special: Special,
    random: Random,
    packer: Packer,
) -> None:
    """Adds the examples of one document's piece, as far as there is room."""
    while packer.free >= MIN_FREE:
        n_text = len(piece) - int(len(piece) > 0 and piece[-1] == special.eos)
        if n_text == 0:
            return
        denoiser = denoisers[random.choose([one.rate for one in denoisers])]
        named = random.uniform() >= objective.mode_dropout
        mode_ids = special.modes[denoiser.mode] if named else ()
        room = packer.free - len(mode_ids)
        if denoiser.mode != "S":
            n = most_raw(denoiser, room, len(special.sentinels), n_text)
            if n >= MIN_NOISY:
                noise = noise_mask(n, denoiser, random)
                packer.add(span_example(piece[:n], noise, denoiser.mode, mode_ids, special.sentinels, special.eos))
                piece = piece[n if n < n_text else len(piece) :]
                continue
            mode_ids = special.modes["S"] if named else ()  # too little text or room to cut something out
        head = (*mode_ids, *special.sentinels[:1]) if objective.split_sentinel else mode_ids
        n = min(packer.free + 1 - len(head), len(piece))
        if n < 1:
            return
        place = split_place(n, objective.short_prefix, random)
        parts = (mode_ids, piece[:place], head[len(mode_ids) :], piece[place:n])
        tokens = np.concatenate([np.asarray(part, np.int64) for part in parts])
        packer.add(Example(tokens, len(head) + place, "S"))
        piece = piece[n:]
