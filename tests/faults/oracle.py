"""The run once more in one process, from its journal and the workers' records: no engine, no wire, no threads.

Every worker is a generator over its record (:mod:`.record`) that waits for the tensors of others. Only the layers,
AdamW and the weighted mean are the real ones. What comes out must be, bit for bit, the reference weights of every
committed round, and each committed sample must have been trained on exactly once at every stage.
"""

from __future__ import annotations

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
from potluck.protocol.plan import SavePoint
from potluck.worker.data import Dataset
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

    @property
    def replicas(self) -> list[str]:
        return list(self.begin["stages"][self.stage][2])


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


@dataclass
class Generation:
    """Tensors on their way, and rounds as they come in, while a generation is done again."""

    activations: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)  # by sender, step, lane
    gradients: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    captures: dict[tuple[int, int], dict[str, tuple[State, int, list[int]]]] = field(default_factory=dict)
    outcomes: dict[tuple[int, int], dict[str, State]] = field(default_factory=dict)  # by stage and step
    trained: dict[tuple[int, int], Counter[int]] = field(default_factory=dict)  # samples that went into a round


class Oracle:
    """``weights`` of each stage after ``replay``; ``problems`` say what is not as it must be."""

    def __init__(self, config: RunConfig, corpus: Path) -> None:
        self.config, self.data = config, Dataset(corpus)
        self.manifest: Manifest = self.data.manifest
        self.points: dict[tuple[str, str, int, int], State] = {}  # peer, kind, generation, step
        self.problems: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def replay(self, records: Mapping[str, Sequence[Op]], rounds: Sequence[Round]) -> None:
        torch.set_num_threads(1)
        by_generation, step, sample = seats(records), 0, 0
        for number in sorted(by_generation):
            crew, world = by_generation[number], Generation()
            committed = [r for r in rounds if r.generation == number]
            going = [self._work(seat, world) for seat in crew if self._knows_origin(seat)]
            while any([next(one, None) == "done" for one in going]):  # each as far as it can; again while one moves
                pass
            for one in committed:
                self._check(one, crew, world, step, sample)
                step, sample = one.step, one.sample
            self._keep(crew, world, committed)

    def _knows_origin(self, seat: Seat) -> bool:
        kind, generation, step = seat.begin["origin"]
        holder = seat.begin["donor"] or seat.peer
        return kind == "init" or (holder, kind, generation, step) in self.points

    def _state(self, seat: Seat, stage: Stage) -> State:
        kind, generation, step = seat.begin["origin"]
        first, last = seat.layers
        if kind == "init":
            return stage.state(SavePoint(kind="round", generation=0, step=0, first_layer=first, last_layer=last))
        state = self.points[seat.begin["donor"] or seat.peer, kind, generation, step]
        return state.shared() if seat.begin["donor"] else state

    def _work(self, seat: Seat, world: Generation) -> Iterator[str]:
        """Does a seat's record; yields ``done`` after each operation, ``wait`` while something is missing."""
        stage = Stage(self.config, self.manifest.vocab_size, *seat.layers)
        state = self._state(seat, stage)
        stage.load(state)
        self.points[seat.peer, state.point.kind, state.point.generation, state.point.step] = state
        begin, is_last = seat.begin, seat.stage == len(seat.begin["stages"]) - 1
        per_step = begin["microbatches"] * len(begin["stages"][0][2]) * begin["microbatch_size"]
        flights: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        targets, window, number = 0, Counter[int](), state.pending
        for op in seat.ops:
            what = op["op"]
            if what in ("forward", "backward"):
                step, m = op["step"], op["m"]
                start = begin["first_sample"] + (step - begin["origin"][2]) * per_step + m * begin["microbatch_size"]
                samples = range(start, start + begin["microbatch_size"])
            if what == "forward":
                source, wanted = self.data.batch(samples, self.config.seed)
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
                stage.update(targets)
                targets = 0
            elif what == "capture":
                if op["samples"] != number:
                    self.problems.append(
                        f"{seat.peer[:8]} says {op['samples']} samples at {op['step']}, it has {number}"
                    )
                key, (first, last) = (seat.stage, op["step"]), seat.layers
                point = SavePoint(
                    kind="round", generation=begin["generation"], step=op["step"], first_layer=first, last_layer=last
                )
                captured = stage.state(point), number, op["fragments"]
                world.captures.setdefault(key, {})[seat.peer] = captured
                world.trained.setdefault(key, Counter()).update(window)
                window, number = Counter(), 0
                if set(world.captures[key]) == set(seat.replicas):
                    world.outcomes[key] = self._exchange(seat, world.captures[key])
            elif what == "apply":
                while (outcomes := world.outcomes.get((seat.stage, op["step"]))) is None:
                    yield "wait"
                after, before = outcomes[seat.peer], world.captures[seat.stage, op["step"]][seat.peer][0]
                stage.g.copy_(after.g)
                if op["late"]:
                    stage.x.add_(vector_of(after) - vector_of(before))
                else:
                    stage.x.copy_(vector_of(after))
            elif what == "save":
                first, last = seat.layers
                point = SavePoint(
                    kind="step", generation=begin["generation"], step=op["step"], first_layer=first, last_layer=last
                )
                self.points[seat.peer, "step", begin["generation"], op["step"]] = stage.state(point, pending=number)
            yield "done"

    def _exchange(self, seat: Seat, captures: Mapping[str, tuple[State, int, list[int]]]) -> dict[str, State]:
        """A dense round in 32 bits: the mean of differences, weighted by samples, in the pieces of the wire."""
        sync, order = self.config.sync.resolved(), seat.replicas
        assert sync.bits == 32 and sync.density == sync.topk == sync.outer_lr == 1.0, "only what is exact is repeated"
        states = {peer: captures[peer][0] for peer in order}
        base = states[order[0]].g
        if not all(torch.equal(base, state.g) for state in states.values()):
            self.problems.append("replicas enter a round with different references")
        g, values = base.clone(), {peer: vector_of(state) for peer, state in states.items()}
        pieces = layout(g.numel(), sync.fragments, len(order))
        for piece in (p for f in captures[order[0]][2] for p in pieces[f]):
            for start, end in piece.shards:
                here = slice(start, end)
                if len(order) == 1:
                    g[here] = values[order[0]][here]
                else:
                    parts = [(Sparse(None, values[p][here] - base[here]), captures[p][1]) for p in order]
                    g[here].add_(weighted_mean(parts, end - start))
        outcomes = {}
        for peer, state in states.items():
            outcomes[peer] = replace(state, point=replace(state.point, digest=digest(g)), g=g, x=g.clone())
        return outcomes

    def _check(self, one: Round, crew: Sequence[Seat], world: Generation, after: int, since: int) -> None:
        """A committed round, against the same one done again; the one before was after ``after`` steps."""
        for stage, expected in enumerate(one.digests):
            outcomes = world.outcomes.get((stage, one.step))
            if not outcomes:
                self.problems.append(f"the round at step {one.step} cannot be repeated for stage {stage}")
                continue
            if {digest(state.g) for state in outcomes.values()} != {expected}:
                self.problems.append(f"stage {stage} has other weights after the round at step {one.step}")
            trained = Counter[int]()
            for (at, step), samples in world.trained.items():
                if at == stage and after < step <= one.step:
                    trained.update(samples)
            if trained != Counter(range(since, one.sample)):
                self.problems.append(f"stage {stage} trained on other samples than [{since}, {one.sample})")
            seat = next(s for s in crew if s.stage == stage)
            module = Stage(self.config, self.manifest.vocab_size, *seat.layers)
            self.weights.update(module.named(next(iter(outcomes.values())).g))

    def _keep(self, crew: Sequence[Seat], world: Generation, committed: Sequence[Round]) -> None:
        for one in committed:
            for seat in crew:
                if (state := world.outcomes.get((seat.stage, one.step), {}).get(seat.peer)) is not None:
                    self.points[seat.peer, "round", one.generation, one.step] = state
