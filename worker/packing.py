"""Examples laid one after the other into one training sample of fixed length. Numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # target that no loss is taken on
MAX_SEGMENTS = 32767  # their numbers are int16


class Packed(NamedTuple):
    """One training sample of L positions.

    ``tokens``: int64 [L], inputs. ``targets``: int64 [L], what position t should say, ``IGNORED`` where no loss is
    taken. ``segments``: int16 [L], number of the document, from 1, never falling; 0 is padding, which comes last.
    ``is_prefix``: bool [L], positions that their whole document may look at. ``modes``: for people, one per segment.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int16]
    is_prefix: NDArray[np.bool_]
    modes: tuple[str, ...]


class Example(NamedTuple):
    """E tokens, of which the first ``n_given`` are given and seen whole.

    ``learned``: bool [E], tokens that are targets; None: all that are not given. The first token never is one, as
    nothing stands before it.
    """

    tokens: NDArray[np.int64]
    n_given: int
    mode: str
    learned: NDArray[np.bool_] | None = None


class Segment(NamedTuple):
    """Where one document of a sample lies. ``targets`` reaches from the first position with a loss to the last."""

    number: int
    mode: str
    prefix: slice
    targets: slice


class Packer:
    """Fills one sample of ``length`` positions, from the left. An example of E tokens takes E - 1 of them."""

    def __init__(self, length: int, pad: int) -> None:
        self._tokens = np.full(length, pad, np.int64)
        self._targets = np.full(length, IGNORED, np.int64)
        self._segments = np.zeros(length, np.int16)
        self._is_prefix = np.zeros(length, np.bool_)
        self._modes: list[str] = []
        self._used = 0

    @property
    def free(self) -> int:
        """Positions that an example may still take."""
        return len(self._tokens) - self._used if len(self._modes) < MAX_SEGMENTS else 0

    def add(self, example: Example) -> None:
        """Lays ``example``, which must fit, behind the others. One without any target is left out."""
        tokens, n_given, mode, learned = example
        size = len(tokens) - 1
        if size > self.free:
            raise ValueError(f"an example of {size} positions does not fit into {self.free}")
        begin, end = self._used, self._used + size
        if learned is None:
            first = max(n_given, 1)
            if first > size:
                return
            self._targets[begin + first - 1 : end] = tokens[first:]
        else:
            if not learned[1:].any():
                return
            self._targets[begin:end] = np.where(learned[1:], tokens[1:], IGNORED)
        self._tokens[begin:end] = tokens[:-1]
        self._is_prefix[begin : min(begin + n_given, end)] = True
        self._modes.append(mode)
        self._segments[begin:end] = len(self._modes)
        self._used = end

    def packed(self) -> Packed:
        return Packed(self._tokens, self._targets, self._segments, self._is_prefix, tuple(self._modes))


def describe(packed: Packed) -> list[Segment]:
    """The documents of a sample, for people: places are positions of the sample."""
    found = []
    for number, mode in enumerate(packed.modes, 1):
        begin, end = np.searchsorted(packed.segments[: np.count_nonzero(packed.segments)], [number, number + 1])
        learned = begin + np.flatnonzero(packed.targets[begin:end] != IGNORED)
        given = begin + int(np.count_nonzero(packed.is_prefix[begin:end]))
        found.append(Segment(number, mode, slice(int(begin), int(given)), slice(int(learned[0]), int(learned[-1]) + 1)))
    return found
