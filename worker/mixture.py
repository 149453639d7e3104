"""Which row of which source a sample is: a pure function of manifest, seed and index.

Sources take turns so that their shares hold everywhere. Shares are whole numbers; with their common divisor taken out,
their sum is the period. Inside a period Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32,
1980) picks the source: of k sources, after any number of samples, each has had what its share promises but for less
than one. Every period is turned by an amount of its own, so that who takes every fourth sample does not always meet
the same sources. So over any window from a stage's start a source is off by less than two samples, and by none after
whole periods.

A source's own samples are counted, and the count says where in the source it is: all its rows once in an epoch, shard
by shard in a shuffled order, shuffled inside each shard, so that few shards are needed at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property, lru_cache
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..protocol.manifest import Manifest
from .permutation import epoch_key, mix64, permute

_ODD = 0xBF58476D1CE4E5B9  # so that keys of shards and epochs do not meet
_ORDER_KEY = 0x94D049BB133111EB
HELDOUT_KEY = 1_000_000  # added to a stage's number: held-out samples draw their own chances


class Place(NamedTuple):
    """``position``: how many samples of the source came before. ``number``: the row's own among all rows of the corpus,
    the same in every epoch."""

    stage: int
    source: int
    position: int
    shard: int
    row: int
    number: int


class Turns(NamedTuple):
    """Whose turn it is in one period. ``before[n]``: how often each source was among the first n."""

    order: NDArray[np.int32]
    before: NDArray[np.int64]

    def counts(self, start: int, n: int) -> NDArray[np.int64]:
        """How often each source comes in ``n`` turns (n at most a period) that begin at ``start``."""
        end, period = start + n, len(self.order)
        if end <= period:
            return self.before[end] - self.before[start]
        return self.before[period] - self.before[start] + self.before[end - period]


@lru_cache(maxsize=64)
def turns(weights: tuple[int, ...]) -> Turns:
    """One period for whole-number shares, each at least 1."""
    divisor = gcd(*weights)
    shares = np.array(weights, dtype=np.int64) // divisor
    period, k = int(shares.sum()), len(weights)
    order = np.zeros(period, dtype=np.int32)
    before = np.zeros((period + 1, k), dtype=np.int64)
    for n in range(period):
        owed = (n + 1) * shares - period * before[n]  # in 1 / period of a sample
        if k > 1:
            slack = (2 * k - 3) * period - (2 * k - 2) * owed  # division rounds the same way on every machine
            urgency = np.where((2 * k - 2) * owed >= period, slack / shares, np.inf)
            order[n] = int(urgency.argmin())
        before[n + 1] = before[n]
        before[n + 1, order[n]] += 1
    return Turns(order, before)


class Mixture:
    """The order of one run's samples. Raises nothing: a manifest is consistent when it is made."""

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self.manifest, self.seed = manifest, seed
        self._index = {source.name: number for number, source in enumerate(manifest.sources)}
        self._first = [0, *accumulate(stage.rows for stage in manifest.stages)][:-1]  # sample of each stage
        self._rows = [source.rows for source in manifest.sources]
        numbers = iter([0, *accumulate(shard.rows for source in manifest.sources for shard in source.train)])
        self._numbers = [[next(numbers) for _ in source.train] for source in manifest.sources]
        self._sources = [[self._index[name] for name in stage.mix] for stage in manifest.stages]
        self._turns = [turns(tuple(stage.mix.values())) for stage in manifest.stages]
        self._epoch = lru_cache(maxsize=4 * len(self._rows))(self._make_epoch)

    def place(self, index: int) -> Place:
        """Where training sample ``index`` >= 0 is."""
        if index < 0:
            raise IndexError(f"training index {index} is negative")
        stage = bisect_right(self._first, index) - 1
        lane, counts = self._turn(stage, index - self._first[stage])
        source = self._sources[stage][lane]
        return self.at(source, self._begun[stage].get(source, 0) + int(counts[lane]), stage)

    def at(self, source: int, position: int, stage: int = 0) -> Place:
        """The sample of ``source`` that comes after ``position`` others of it."""
        epoch, place = divmod(position, self._rows[source])
        order, ends = self._epoch(source, epoch)
        slot = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[slot])
        rows = self.manifest.sources[source].train[shard].rows
        row = permute(place - int(ends[slot]) + rows, rows, self._key(source, epoch, shard))
        return Place(stage, source, position, shard, row, self._numbers[source][shard] + row)

    def next_shard(self, place: Place) -> int:
        """The shard that the source needs after the one of ``place``."""
        epoch, inside = divmod(place.position, self._rows[place.source])
        _, ends = self._epoch(place.source, epoch)
        end = int(ends[np.searchsorted(ends, inside, side="right")])
        return self.at(place.source, epoch * self._rows[place.source] + end).shard

    def heldout(self, index: int, stage: int) -> Place:
        """Where held-out sample ``index`` of a stage is: sources at the stage's shares, each in the order of its files,
        again from the start where it has too few. Independent of the seed."""
        stage %= len(self.manifest.stages)
        having = [i for i, source in enumerate(self._sources[stage]) if self.manifest.sources[source].heldout]
        weights = tuple(self.manifest.stages[stage].mix.values())
        order = turns(tuple(weights[i] for i in having))
        block, turn = divmod(index, len(order.order))
        lane = int(order.order[turn])
        source = self._sources[stage][having[lane]]
        position = int(block * order.before[-1][lane] + order.before[turn][lane])
        shards = self.manifest.sources[source].heldout
        row = number = position % self.manifest.sources[source].heldout_rows
        for place, shard in enumerate(shards):
            if row < shard.rows:
                return Place(stage, source, position, place, row, number)
            row -= shard.rows
        raise AssertionError("a place beyond the held-out rows")

    def counts(self, stage: int, n: int) -> dict[int, int]:
        """How many of a stage's first ``n`` samples each of its sources has."""
        return dict(zip(self._sources[stage], map(int, self._turn(stage, n)[1]), strict=True))

    @cached_property
    def _begun(self) -> list[dict[int, int]]:
        """For each stage, how many samples of each source the stages before it had."""
        found: list[dict[int, int]] = [{}]
        for number, stage in enumerate(self.manifest.stages[:-1]):
            ends = dict(found[-1])
            for source, count in self.counts(number, stage.rows).items():
                ends[source] = ends.get(source, 0) + count
            found.append(ends)
        return found

    def _turn(self, stage: int, n: int) -> tuple[int, NDArray[np.int64]]:
        """Whose turn a stage's sample ``n`` is, and how often each had its own before."""
        order = self._turns[stage]
        period = len(order.order)
        block, turn = divmod(n, period)
        start = mix64(epoch_key(self.seed, stage) + block) % period
        return int(order.order[(start + turn) % period]), block * order.before[-1] + order.counts(start, turn)

    def _make_epoch(self, source: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of a source's shards in an epoch, and how many rows are done after each."""
        shards = self.manifest.sources[source].train
        key = mix64(self._key(source, epoch, 0) ^ _ORDER_KEY)
        order = np.array([permute(place, len(shards), key) for place in range(len(shards))])
        return order, np.cumsum([shards[shard].rows for shard in order])

    def _key(self, source: int, epoch: int, shard: int) -> int:
        return epoch_key(self.seed, epoch) + ((source << 32) + shard) * _ODD
