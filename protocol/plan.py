"""The plan of a generation: who holds which layers, and, as pure functions of it, who serves what in which step.

A *generation* is the fencing epoch: it changes whenever anybody joins, leaves or dies, and messages of another
generation are refused. Inside one, routes and sample indices depend on the plan alone, so nobody has to ask.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from . import architecture
from . import control_pb2 as pb
from .config import ModelConfig
from .errors import WireError

OriginKind = Literal["init", "round", "step"]
MOST_MICROBATCHES = 4096  # of a first-stage replica, and samples in one: what run.yaml allows


@dataclass(frozen=True, kw_only=True)
class SavePoint:
    """A state somebody can start from: after ``step`` steps, made in ``generation``, of layers [first, last)."""

    kind: Literal["round", "step"]
    generation: int
    step: int
    first_layer: int
    last_layer: int
    digest: bytes = b""

    def to_proto(self) -> pb.SavePoint:
        return pb.SavePoint(
            kind=self.kind,
            generation=self.generation,
            step=self.step,
            first_layer=self.first_layer,
            last_layer=self.last_layer,
            digest=self.digest,
        )

    @classmethod
    def from_proto(cls, message: pb.SavePoint) -> SavePoint:
        if message.kind not in ("round", "step"):
            raise WireError(f"a savepoint of unknown kind {message.kind!r}")
        return cls(
            kind="round" if message.kind == "round" else "step",
            generation=message.generation,
            step=message.step,
            first_layer=message.first_layer,
            last_layer=message.last_layer,
            digest=bytes(message.digest),
        )


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A peer holding a stage, and where it can be dialled."""

    peer: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Layers [first_layer, last_layer), the replicas that hold them, and the peers that hold the starting state.

    ``shares``: microbatches of a step that each replica serves; empty: as even as can be.
    """

    first_layer: int
    last_layer: int
    replicas: tuple[Replica, ...]
    donors: tuple[Replica, ...] = ()
    digest: bytes = b""  # of the starting reference weights, if they are a committed round's
    shares: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A replica that a generation goes on without; ``since``: steps done in the last round committed before."""

    peer: str
    since: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One generation's division of work. ``microbatches`` is per first-stage replica and step, on average.

    When a replica is lost while others of its stage live, the generation goes on: ``lost`` grows, what the lost one
    served moves to the others, and rounds up to ``void`` steps are left out (their samples go into the next). A
    *replica* is counted among the living ones of its stage.
    """

    generation: int
    first_step: int
    first_sample: int
    origin: OriginKind
    origin_generation: int
    stages: tuple[StagePlan, ...]
    microbatches: int
    microbatch_size: int
    lost: tuple[Lost, ...] = ()
    void: int = 0
    parts: tuple[StagePlan, ...] = ()  # the stages of the starting state where the layers were divided otherwise

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """[first, last) of every stage."""
        return tuple((s.first_layer, s.last_layer) for s in self.stages)

    @property
    def everybody(self) -> list[Replica]:
        """All that were seated, and who holds the state that the plan starts from."""
        return [r for s in (*self.stages, *self.parts) for r in (*s.replicas, *s.donors)]

    @property
    def attempt(self) -> int:
        """How often the generation had to go on without somebody: rounds of another attempt do not count."""
        return len(self.lost)

    @cached_property
    def replicas(self) -> tuple[tuple[Replica, ...], ...]:
        """Of each stage, those that live."""
        gone = {lost.peer for lost in self.lost}
        return tuple(tuple(r for r in stage.replicas if r.peer not in gone) for stage in self.stages)

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Peer id to (stage, replica index), of those that live."""
        return {r.peer: (s, i) for s, replicas in enumerate(self.replicas) for i, r in enumerate(replicas)}

    @cached_property
    def peers(self) -> frozenset[str]:
        return frozenset(self.places)

    @property
    def microbatches_per_step(self) -> int:
        return self.microbatches * len(self.stages[0].replicas)

    def shares(self, stage: int) -> tuple[int, ...]:
        """Microbatches of a step that each replica of a stage serves at the generation's beginning."""
        chosen = self.stages[stage]
        return chosen.shares or even_shares(self.microbatches_per_step, len(chosen.replicas))

    @property
    def samples_per_step(self) -> int:
        return self.microbatches_per_step * self.microbatch_size

    @cached_property
    def _servers(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """Of each stage and microbatch, who serves it, and from which step on.

        Neighbours stay on one chain. What a lost replica served goes, microbatch by microbatch, to whoever of the
        stage has the fewest for its share; what others serve stays with them.
        """
        out = []
        for i, stage in enumerate(self.stages):
            names = [r.peer for r in stage.replicas]
            share = dict(zip(names, self.shares(i), strict=True))
            server = [(peer, self.first_step) for peer in names for _ in range(share[peer])]
            for lost in self.lost:
                if lost.peer in names:
                    names.remove(lost.peer)
                    load = Counter(peer for peer, _ in server)
                    for m, (peer, _) in enumerate(server):
                        if peer == lost.peer:
                            least = min(names, key=lambda name: (load[name] + 1) / max(1, share[name]))
                            load[least] += 1  # of equals the first
                            server[m] = least, lost.since
            out.append(tuple(server))
        return tuple(out)

    @property
    def seats(self) -> list[range]:
        """The microbatches of each lease of a step: what a first-stage replica served at the generation's beginning."""
        ends = [0, *itertools.accumulate(self.shares(0))]
        return [range(start, end) for start, end in itertools.pairwise(ends)]

    @cached_property
    def _turns(self) -> list[int]:
        return [m - seat.start for seat in self.seats for m in seat]

    def turn(self, microbatch: int) -> int:
        """Which one of its first-stage replica's a microbatch is."""
        return self._turns[microbatch]

    def replica_of(self, stage: int, microbatch: int) -> int:
        """Index of the replica of ``stage`` that serves ``microbatch``."""
        return self.places[self.peer_of(stage, microbatch)][1]

    def peer_of(self, stage: int, microbatch: int) -> str:
        return self._servers[stage][microbatch][0]

    def since(self, stage: int, microbatch: int) -> int:
        """The first step that the replica of ``stage`` serving ``microbatch`` has to answer for."""
        return self._servers[stage][microbatch][1]

    def served(self, stage: int, replica: int) -> list[int]:
        """The microbatches of every step that this replica computes, in order."""
        peer = self.replicas[stage][replica].peer
        return [m for m, (server, _) in enumerate(self._servers[stage]) if server == peer]

    def without(self, peer: str, since: int, void: int) -> Plan:
        """The same generation, going on without ``peer``."""
        return replace(self, lost=(*self.lost, Lost(peer=peer, since=since)), void=void)

    def samples(self, step: int, microbatch: int) -> range:
        """Global sample indices of a microbatch; every index below a step's end is used exactly once."""
        start = self.first_sample_of(step) + microbatch * self.microbatch_size
        return range(start, start + self.microbatch_size)

    def first_sample_of(self, step: int) -> int:
        """How many samples all steps before ``step`` have used."""
        return self.first_sample + (step - self.first_step) * self.samples_per_step

    def to_proto(self) -> pb.Plan:
        def replicas(items: tuple[Replica, ...]) -> list[pb.Replica]:
            return [pb.Replica(peer=r.peer, addresses=r.addresses) for r in items]

        def stages(items: tuple[StagePlan, ...]) -> list[pb.Stage]:
            return [
                pb.Stage(
                    first_layer=s.first_layer,
                    last_layer=s.last_layer,
                    replicas=replicas(s.replicas),
                    donors=replicas(s.donors),
                    digest=s.digest,
                    shares=s.shares,
                )
                for s in items
            ]

        return pb.Plan(
            generation=self.generation,
            first_step=self.first_step,
            first_sample=self.first_sample,
            origin=self.origin,
            origin_generation=self.origin_generation,
            microbatches=self.microbatches,
            microbatch_size=self.microbatch_size,
            lost=[pb.Lost(peer=x.peer, since=x.since) for x in self.lost],
            void=self.void,
            stages=stages(self.stages),
            parts=stages(self.parts),
        )

    @classmethod
    def from_proto(cls, message: pb.Plan) -> Plan:
        """Raises ``WireError`` on a plan that nobody could follow."""
        if message.origin not in ("init", "round", "step"):
            raise WireError(f"a plan with unknown origin {message.origin!r}")
        if not message.stages or not all(s.replicas for s in message.stages):
            raise WireError("a plan with an empty stage")
        if not message.microbatches or not message.microbatch_size:
            raise WireError("a plan without microbatches")
        if max(message.microbatches, message.microbatch_size) > MOST_MICROBATCHES:
            raise WireError(f"a plan of {message.microbatches} microbatches of {message.microbatch_size} samples")

        def replicas(items: object) -> tuple[Replica, ...]:
            return tuple(Replica(peer=r.peer, addresses=tuple(r.addresses)) for r in items)  # type: ignore[attr-defined]

        def stages(items: Iterable[pb.Stage]) -> tuple[StagePlan, ...]:
            return tuple(
                StagePlan(
                    first_layer=s.first_layer,
                    last_layer=s.last_layer,
                    replicas=replicas(s.replicas),
                    donors=replicas(s.donors),
                    digest=bytes(s.digest),
                    shares=tuple(s.shares),
                )
                for s in items
            )

        plan = cls(
            generation=message.generation,
            first_step=message.first_step,
            first_sample=message.first_sample,
            origin=message.origin,  # type: ignore[arg-type]
            origin_generation=message.origin_generation,
            microbatches=message.microbatches,
            microbatch_size=message.microbatch_size,
            lost=tuple(Lost(peer=x.peer, since=x.since) for x in message.lost),
            void=message.void,
            stages=stages(message.stages),
            parts=stages(message.parts),
        )
        for stage in plan.stages:
            whole = sum(stage.shares) == plan.microbatches_per_step and len(stage.shares) == len(stage.replicas)
            if stage.shares and not (whole and all(stage.shares)):
                raise WireError("a plan whose shares are not those of its replicas")
        same_end = not plan.parts or plan.parts[-1].last_layer == plan.stages[-1].last_layer
        if plan.parts and not (same_end and is_whole(plan.parts) and is_whole(plan.stages)):
            raise WireError("a plan whose stages cannot be made of those before it")
        if not all(plan.replicas):
            raise WireError("a plan that has lost every replica of a stage")
        return plan


def even_shares(count: int, replicas: int) -> tuple[int, ...]:
    """``count`` microbatches among replicas, the first ones with one more if need be."""
    ends = [-(-i * count // replicas) for i in range(replicas + 1)]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def is_whole(stages: tuple[StagePlan, ...]) -> bool:
    """Whether the layers are divided without gap or overlap."""
    ends = [0, *(s.last_layer for s in stages)]
    return bool(stages) and all(s.first_layer == end < s.last_layer for s, end in zip(stages, ends, strict=False))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model as its stages see it: one flat vector of what is trained, the embedding first, layer after layer, the
    head last.

    A stage's weights are the slice from its first layer's start to its last one's end. Counts are of weights that are
    trained; *work*, of those and of frozen ones, is in multiply-adds per token.
    """

    layers: int
    vocab_size: int
    embedding: int
    block: int
    head: int
    block_work: int
    head_work: int

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> Shape:
        parts, trained = architecture.parts(model, vocab_size), architecture.trained(model, vocab_size)
        return cls(
            layers=model.layers,
            vocab_size=vocab_size,
            embedding=architecture.weights(trained.embedding),
            block=architecture.weights(trained.block),
            head=architecture.weights(trained.head),
            block_work=architecture.work(parts.block | trained.block),
            head_work=architecture.work(parts.head),
        )

    def size(self, first: int, last: int) -> int:
        """Weights of layers [first, last), with what the first and the last stage hold besides."""
        ends = (self.embedding if first == 0 else 0) + (self.head if last == self.layers else 0)
        return (last - first) * self.block + ends

    def start(self, layer: int) -> int:
        """Weights before a layer: the embedding is layer 0's, the head the last one's."""
        return self.size(0, layer) if layer else 0

    def work(self, first: int, last: int) -> int:
        """Of layers [first, last): the attention scores are left out, the embedding's look-up is none."""
        return (last - first) * self.block_work + (self.head_work if last == self.layers else 0)

    def split(self, stages: int) -> list[tuple[int, int]]:
        """Contiguous stages of nearly equal work, [first, last) of each: the largest is as small as it can be."""
        return self.splits(range(stages, stages + 1))[0]

    def splits(self, counts: range) -> list[list[tuple[int, int]]]:
        """The layers of every stage, for each number of stages."""
        layers, most = self.layers, counts[-1]
        extra = [0] * layers + [self.head_work]
        # best[s][n]: smallest possible maximum when the first n layers fill s stages.
        best = [[float("inf")] * (layers + 1) for _ in range(most + 1)]
        cut = [[0] * (layers + 1) for _ in range(most + 1)]
        best[0][0] = 0.0
        for s in range(1, most + 1):
            for n in range(s, layers + 1):
                for k in range(s - 1, n):
                    worst = max(best[s - 1][k], (n - k) * self.block_work + extra[n])
                    if worst < best[s][n]:
                        best[s][n], cut[s][n] = worst, k
        found = []
        for stages in counts:
            ends = [layers]
            for s in range(stages, 0, -1):
                ends.append(cut[s][ends[-1]])
            ends.reverse()
            found.append(list(itertools.pairwise(ends)))
        return found
