"""What takes the place of weights: counters of how often each sample is in them, and a name of how they were made.

A layer's content is a vector with one counter for each sample of the run, packed into one integer of 4 bits a sample,
so that "the mean of the differences is added to the reference" is an addition here as well. Two contents with the same
counters differ if they were made differently, as real weights would: their name is a hash of their history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from potluck.protocol.plan import SavePoint

BITS = 4
Counters = int


@lru_cache(maxsize=4096)
def once(count: int) -> Counters:
    """Samples [0, count), each once."""
    return ((1 << (BITS * count)) - 1) // ((1 << BITS) - 1)


def samples(indices: range) -> Counters:
    return once(len(indices)) << (BITS * indices.start)


def spell(counters: Counters, limit: int) -> str:
    """What is wrong with counters that should be 1 below ``limit`` and 0 from there on."""
    if counters < 0:
        return "less than nothing"
    found: dict[int, list[int]] = {}
    position = 0
    while counters or position < limit:
        count, want = counters & ((1 << BITS) - 1), int(position < limit)
        if count != want:
            found.setdefault(count, []).append(position)
        counters >>= BITS
        position += 1
    return "; ".join(f"{n} times: samples {at[:6]}{'...' if len(at) > 6 else ''}" for n, at in found.items())


class Layer(NamedTuple):
    """What one layer's weights are made of, and how."""

    counters: Counters
    name: bytes


@dataclass(frozen=True)
class Content:
    """Reference weights of a stage, layer by layer from ``first`` on."""

    first: int
    layers: tuple[Layer, ...]

    @classmethod
    def beginning(cls, first: int, last: int) -> Content:
        return cls(first, tuple(Layer(0, b"init-%d" % layer) for layer in range(first, last)))

    @cached_property
    def name(self) -> bytes:
        return hashlib.blake2b(b"".join(layer.name for layer in self.layers), digest_size=8).digest()

    @property
    def counters(self) -> Counters:
        return self.layers[0].counters

    def trained(self, generation: int, step: int, deltas: Mapping[str, Counters]) -> Content:
        """After a round to which the replicas brought ``deltas``."""
        how = repr((generation, step, sorted(deltas.items()))).encode()
        total = sum(deltas.values())
        names = (hashlib.blake2b(layer.name + how, digest_size=8).digest() for layer in self.layers)
        made = (Layer(layer.counters + total, name) for layer, name in zip(self.layers, names, strict=True))
        return replace(self, layers=tuple(made))

    def rotten(self, salt: int) -> Content:
        name = hashlib.blake2b(b"%d" % salt, digest_size=8).digest()
        layer = Layer(self.counters + (1 << (BITS * (salt % 64))), name)
        return replace(self, layers=(layer, *self.layers[1:]))

    @classmethod
    def divided(cls, parts: Sequence[Content], layers: tuple[int, int]) -> Content:
        """Of ``layers``, taken from stages that had them."""
        known = {part.first + i: layer for part in parts for i, layer in enumerate(part.layers)}
        return cls(layers[0], tuple(known[layer] for layer in range(*layers)))


@dataclass(frozen=True, kw_only=True)
class State:
    """A stage at rest: what a worker can start from."""

    point: SavePoint
    content: Content
    delta: Counters = 0  # of this replica alone, since the last round
    pending: int = 0  # samples it counts since then

    @property
    def g(self) -> Content:
        return self.content

    def shared(self) -> State:
        return replace(self, delta=0, pending=0)


class SavePoints:
    """A worker's states, by the rules of ``worker/checkpoint.py``; ``disk`` outlives the process."""

    KEPT_ROUNDS = 2
    folder = Path()

    def __init__(self, disk: dict[SavePoint, State]) -> None:
        self.disk = disk
        self.memory: dict[SavePoint, State] = {}

    def points(self) -> list[SavePoint]:
        return sorted({*self.memory, *self.disk}, key=lambda p: (p.step, p.generation, p.kind, p.first_layer))

    def keep(self, state: State) -> None:
        self.memory[state.point] = state

    def find(self, kind: str, generation: int, step: int, layers: tuple[int, int]) -> State | None:
        for point, state in {**self.disk, **self.memory}.items():
            name = point.kind, point.generation, point.step, point.first_layer, point.last_layer
            if name == (kind, generation, step, *layers) and state.content.name == (point.digest or state.content.name):
                return state
        return None

    def save(self, state: State) -> None:
        self.disk.pop(state.point, None)
        self.disk[state.point] = state
        same = [p for p in self.disk if p.kind == state.point.kind]
        for old in same[: -(self.KEPT_ROUNDS if state.point.kind == "round" else 1)]:
            del self.disk[old]

    def drop_after(self, step: int) -> None:
        for point in [p for p in self.memory if p.step > step]:
            del self.memory[point]

    def forget(self, before: int, but: int | None) -> None:
        for point in [p for p in self.memory if p.step < before and p.step != but]:
            del self.memory[point]


def begun(point: SavePoint) -> State:
    """What layers are before the first step."""
    return State(point=point, content=Content.beginning(point.first_layer, point.last_layer))
