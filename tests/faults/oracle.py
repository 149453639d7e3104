"""The run once more in one process, from its journal and the workers' records: no engine, no wire, no threads.

Every worker is a generator over its record (:mod:`.record`) that waits for the tensors of others; who does a lost
one's microbatches again, and with whose tensors, stands in the records as well. Only the layers,
AdamW and the weighted mean are the real ones. What comes out must be, bit for bit, the reference weights of every
committed round, and each committed sample must have been trained on exactly once at every stage.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potluck.compression.mean import weighted_mean
from potluck.compression.sync import Sparse
from potluck.protocol.config import RunConfig
from potluck.protocol.manifest import Manifest
from potluck.protocol.plan import SavePoint, Shape
from potluck.worker.data import Dataset
from potluck.worker.origin import divided
from potluck.worker.shards import layout
from potluck.worker.stage import Stage, State, digest

Op = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Round:
    """A committed one, from the journal."""

    generation: int
    step: int
    sample: int
    digests: tuple[bytes, ...]


def vector_of(state: State) -> Tensor:
    return state.g if state.x is None else state.x


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def read_record(path: Path) -> list[Op]:
    """The operations of a worker; a last line that a kill cut off is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass
class Seat:
    """What one worker did in one generation."""

    peer: str
    begin: Op
    ops: list[Op] = field(default_factory=list)

    @property
    def stage(self) -> int:
        return int(self.begin["stage"])

    @property
    def layers(self) -> tuple[int, int]:
        first, last, _ = self.begin["stages"][self.stage]
        return first, last


Key = tuple[int, int, int]  # of a round: stage, step, attempt


def seats(records: Mapping[str, Sequence[Op]]) -> dict[int, list[Seat]]:
    """By generation."""
    found: dict[int, list[Seat]] = {}
    for peer, ops in records.items():
        seat: Seat | None = None
        for op in ops:
            if op["op"] == "seat":
                assert op["peer"] == peer, "a record of somebody else"
                seat = Seat(peer, op)
                found.setdefault(op["generation"], []).append(seat)
            elif seat is not None:
                seat.ops.append(op)
    return found


@dataclass(frozen=True)
class Captured:
    """What a replica brings into a round."""

    state: State
    number: int  # of samples
    window: Counter[int]  # which they are


@dataclass
class Generation:
    """Tensors on their way, and rounds as they come in, while a generation is done again."""

    activations: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)  # by sender, step, lane
    gradients: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    captures: dict[Key, dict[str, Captured]] = field(default_factory=dict)
    outcomes: dict[Key, dict[str, State]] = field(default_factory=dict)

    def counts(self, stage: int, step: int) -> Key | None:
        """The round that counts, of all that were tried at a step: the last one, since one that counts is not tried
        again."""
        return max((key for key in self.outcomes if key[:2] == (stage, step)), default=None)


class Oracle:
    """``weights`` of each stage after ``replay``; ``problems`` say what is not as it must be."""

    def __init__(self, config: RunConfig, corpus: Path) -> None:
        self.config, self.data = config, Dataset(corpus)
        self.manifest: Manifest = self.data.manifest
        self.points: dict[
            tuple[str, str, int, int, tuple[int, int]], State
        ] = {}  # peer, kind, generation, step, layers
        self.problems: list[str] = []
        self.moments_lost = False  # a stage went on from a redo log, which has the weights alone
        self.weights: dict[str, Tensor] = {}

    def replay(self, records: Mapping[str, Sequence[Op]], rounds: Sequence[Round]) -> None:
        torch.set_num_threads(1)
        by_generation, sample = seats(records), 0
        for number in sorted(by_generation):
            crew, world = by_generation[number], Generation()
            committed = [r for r in rounds if r.generation == number]
            going = [self._work(seat, world) for seat in crew if self._knows_origin(seat)]
            while any([next(one, None) == "done" for one in going]):  # each as far as it can; again while one moves
                pass
            for one in committed:
                self._check(one, crew, world, sample)
                sample = one.sample
            self._keep(crew, world, committed)

    def _knows_origin(self, seat: Seat) -> bool:
        return seat.begin["origin"][0] == "init" or self._holder(seat) is not None

    def _holder(self, seat: Seat) -> State | None:
        """Its own state, or anybody's of the same layers with the moments that it got."""
        kind, generation, step = seat.begin["origin"]
        if kind == "step":
            return self.points.get((seat.peer, kind, generation, step, seat.layers))
        states = [s for (_, k, g, at, _), s in self.points.items() if (k, g, at) == (kind, generation, step)]
        found = [s for s in states if (s.point.first_layer, s.point.last_layer) == seat.layers]
        found = found or self._divided(seat, states)
        return self._given(seat, found[0], [*found, *self.points.values()]) if found else None

    def _divided(self, seat: Seat, states: Sequence[State]) -> list[State]:
        """The layers were divided otherwise before: the same, made of whatever states of those stages there are."""
        first, last = seat.layers
        parts: dict[tuple[int, int], list[State]] = {}
        for state in states:
            if (point := state.point).first_layer < last and first < point.last_layer:
                parts.setdefault((point.first_layer, point.last_layer), []).append(state)
        if sum(min(last, b) - max(first, a) for a, b in parts) != last - first:
            return []
        shape = Shape.of(self.config.model, self.manifest.vocab_size)
        return [divided(one, seat.layers, shape) for one in itertools.product(*(parts[key] for key in sorted(parts)))]

    def _given(self, seat: Seat, holder: State, givers: Sequence[State]) -> State:
        """The weights are known here; the moments must be somebody's, or begin anew."""
        m, v, updates = torch.load(seat.begin["taken"], weights_only=True)  # noqa: TID251
        known = [s for s in givers if s.g.shape == holder.g.shape]
        if m is None:
            self.moments_lost = True
        elif not any(same(s.m, m) and same(s.v, v) and s.updates == updates for s in known) and not self._is_of_pieces(
            seat, replace(holder, m=m, v=v)
        ):
            self.problems.append(f"{seat.peer[:8]} starts with moments that nobody had")
        return replace(holder.shared(), m=m, v=v, updates=updates)

    def _is_of_pieces(self, seat: Seat, given: State) -> bool:
        """Whether each part's moments are somebody's: who had got ready for one of the old stages has its weights as of
        the last round, and its moments as of an earlier one."""
        kind, generation, step = seat.begin["origin"]
        shape = Shape.of(self.config.model, self.manifest.vocab_size)
        first, last = seat.layers
        states = list(self.points.values())
        spans = {
            (a, b)
            for k, g, at, (a, b) in [(k, g, at, layers) for _, k, g, at, layers in self.points]
            if (k, g, at) == (kind, generation, step) and a < last and first < b
        }
        for span in spans:
            layers = max(span[0], first), min(span[1], last)
            wanted = divided([given], layers, shape)
            had = [divided([s], layers, shape) for s in states if (s.point.first_layer, s.point.last_layer) == span]
            if not any(same(s.m, wanted.m) and same(s.v, wanted.v) for s in had):
                return False
        return bool(spans)

    def _state(self, seat: Seat, stage: Stage) -> State:
        first, last = seat.layers
        if seat.begin["origin"][0] == "init":
            return stage.state(SavePoint(kind="round", generation=0, step=0, first_layer=first, last_layer=last))
        state = self._holder(seat)
        assert state is not None
        return state

    def _work(self, seat: Seat, world: Generation) -> Iterator[str]:
        """Does a seat's record; yields ``done`` after each operation, ``wait`` while something is missing."""
        stage = Stage(self.config, self.manifest.vocab_size, *seat.layers)
        state = self._state(seat, stage)
        stage.load(state)
        self.points[seat.peer, state.point.kind, state.point.generation, state.point.step, seat.layers] = state
        begin, is_last = seat.begin, seat.stage == len(seat.begin["stages"]) - 1
        per_step = begin["microbatches"] * len(begin["stages"][0][2]) * begin["microbatch_size"]
        flights: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        targets, window, number = 0, Counter[int](), state.pending
        captured: Captured | None = None
        for op in seat.ops:
            what = op["op"]
            if what in ("forward", "backward"):
                step, m = op["step"], op["m"]
                start = begin["first_sample"] + (step - begin["origin"][2]) * per_step + m * begin["microbatch_size"]
                samples = range(start, start + begin["microbatch_size"])
            if what == "forward":
                source, wanted, _ = self.data.batch(samples, self.config.seed)
                if seat.stage:
                    while (op["by"], step, m) not in world.activations:
                        yield "wait"
                    source = world.activations[op["by"], step, m].clone().requires_grad_()
                output = stage.module(source)
                flights[step, m] = source, stage.module.loss_sum(output, wanted) if is_last else output
                world.activations[seat.peer, step, m] = output.detach()
                targets += int((wanted >= 0).sum())
            elif what == "backward":
                source, output = flights.pop((step, m))
                if is_last:
                    output.backward()
                else:
                    while (op["by"], step, m) not in world.gradients:
                        yield "wait"
                    output.backward(world.gradients[op["by"], step, m])
                if seat.stage:
                    assert source.grad is not None
                    world.gradients[seat.peer, step, m] = source.grad
                window.update(samples)
                number += len(samples)
            elif what == "update":
                if op["targets"] != targets:
                    self.problems.append(f"{seat.peer[:8]} divides by {op['targets']} targets, it has {targets}")
                for what, vector in (("x", stage.x), ("grad", stage.grad)):
                    if (
                        op[what] != digest(vector).hex() and not self.problems
                    ):  # the first one: what it leads to follows
                        self.problems.append(f"{seat.peer[:8]} has another {what} before update {stage.updates}")
                stage.update(targets)
                targets = 0
            elif what == "capture":
                if op["samples"] != number:
                    self.problems.append(
                        f"{seat.peer[:8]} says {op['samples']} samples at {op['step']}, it has {number}"
                    )
                key, (first, last) = (seat.stage, op["step"], op["attempt"]), seat.layers
                point = SavePoint(
                    kind="round", generation=begin["generation"], step=op["step"], first_layer=first, last_layer=last
                )
                captured = Captured(stage.state(point), number, window)
                world.captures.setdefault(key, {})[seat.peer] = captured
                window, number = Counter(), 0
                if set(world.captures[key]) == set(op["replicas"]):
                    world.outcomes[key] = self._exchange(op, world.captures[key])
            elif what == "void":
                assert captured is not None
                window.update(captured.window)
                number += captured.number
            elif what == "apply":
                while (outcomes := world.outcomes.get(key)) is None:
                    yield "wait"
                assert captured is not None
                after, before = outcomes[seat.peer], captured.state
                stage.g = after.g
                if op["late"]:
                    stage.x.add_(vector_of(after) - vector_of(before))
                else:
                    stage.x.copy_(vector_of(after))
            elif what == "save":
                first, last = seat.layers
                point = SavePoint(
                    kind="step", generation=begin["generation"], step=op["step"], first_layer=first, last_layer=last
                )
                self.points[seat.peer, "step", begin["generation"], op["step"], seat.layers] = stage.state(
                    point, pending=number
                )
            yield "done"

    def _exchange(self, op: Op, captures: Mapping[str, Captured]) -> dict[str, State]:
        """A dense round in 32 bits: the mean of differences, weighted by samples, in the pieces of the wire."""
        sync, order = self.config.sync.resolved(), op["replicas"]
        assert sync.bits == 32 and sync.density == sync.topk == sync.outer_lr == 1.0, "only what is exact is repeated"
        states = {peer: captures[peer].state for peer in order}
        base = states[order[0]].g
        if not all(torch.equal(base, state.g) for state in states.values()):
            self.problems.append("replicas enter a round with different references")
        g, values = base.clone(), {peer: vector_of(state) for peer, state in states.items()}
        pieces = layout(g.numel(), sync.fragments, len(order))
        for piece in (p for f in op["fragments"] for p in pieces[f]):
            for start, end in piece.shards:
                here = slice(start, end)
                if len(order) == 1:
                    g[here] = values[order[0]][here]
                else:
                    parts = [(Sparse(None, values[p][here] - base[here]), captures[p].number) for p in order]
                    g[here].add_(weighted_mean(parts, end - start))
        outcomes = {}
        for peer, state in states.items():
            outcomes[peer] = replace(state, point=replace(state.point, digest=digest(g)), g=g, x=g.clone())
        return outcomes

    def _check(self, one: Round, crew: Sequence[Seat], world: Generation, since: int) -> None:
        """A committed round, against the same one done again."""
        for stage, expected in enumerate(one.digests):
            key = world.counts(stage, one.step)
            if key is None:
                self.problems.append(f"the round at step {one.step} cannot be repeated for stage {stage}")
                continue
            outcomes = world.outcomes[key]
            if {digest(state.g) for state in outcomes.values()} != {expected}:
                self.problems.append(f"stage {stage} has other weights after the round at step {one.step}")
            trained = sum((captured.window for captured in world.captures[key].values()), Counter[int]())
            if trained != Counter(range(since, one.sample)):
                self.problems.append(f"stage {stage} trained on other samples than [{since}, {one.sample})")
            seat = next(s for s in crew if s.stage == stage)
            module = Stage(self.config, self.manifest.vocab_size, *seat.layers)
            self.weights.update(module.named(next(iter(outcomes.values())).g))

    def _keep(self, crew: Sequence[Seat], world: Generation, committed: Sequence[Round]) -> None:
        for one in committed:
            for seat in crew:
                key = world.counts(seat.stage, one.step)
                if key is not None and (state := world.outcomes[key].get(seat.peer)) is not None:
                    self.points[seat.peer, "round", one.generation, one.step, seat.layers] = state
