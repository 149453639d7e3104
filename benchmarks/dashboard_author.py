"""Who makes up a run for :mod:`.dashboard_run`: peers that come and go, steps, rounds, plans, and their rows."""

from __future__ import annotations

import base64
import math
import random
from dataclasses import dataclass
from typing import Any

import msgspec

from potluck.coordinator import events as ev
from potluck.coordinator.dashboard.rollups import NONE, SLOT_SECONDS, SPANS, Book, Statement, kept, traffic_point
from potluck.coordinator.state import Command, Commit, Journal, Mark, Part, Point, Uncommit
from potluck.coordinator.store import Store
from potluck.protocol.config import RunConfig
from potluck.protocol.evaluation import Score, TaskSummary
from potluck.protocol.plan import Shape

BEGAN = 1_750_000_000.0
LARGE = 50  # peers: from here on the model is a large one, on lines of homes
NAMES = "anna ben carl dora emil fay gus hana ivo jo kai lea max nia ola pia quin ron sue tom uma vic wes xia yan zoe"
REGIONS = ("eu-west", "eu-north", "us-east", "us-west", "br-south", "in-west", "jp-east", "")
DEVICES = ("RTX 3060", "RTX 3090", "RTX 4090", "RX 7900 XTX", "M2 Max", "cpu")
FAULTS = ("the line broke", "CUDA out of memory", "a frame of another generation", "no answer for 20 s")
WAYS = {  # bytes for a sample's value, and how many more they would be uncompressed
    ("activation", "out"): (0.5, 7.1),
    ("gradient", "out"): (0.5, 7.1),
    ("weights", "out"): (0.3, 12.6),
    ("control", "out"): (0.001, 1.0),
    ("activation", "in"): (0.5, 7.1),
    ("weights", "in"): (0.3, 12.6),
}
STAY_SECONDS = 16 * 3600.0  # for which a peer stays, on average
AWAY_SECONDS = 2 * 3600.0
PLAN_SECONDS = 1800.0  # between two plans for newcomers, in a large run


@dataclass(kw_only=True)
class Peer:
    id: str
    name: str
    speed: float
    event: ev.PeerJoined
    back: float = 0.0  # when it comes (again); while it is here, 0
    stage: int | None = None
    settled: tuple[float, ...] = (0.0,) * 4  # samples, whole samples, seconds and steps that are in its rows


class Author:
    """Makes up what happens and writes it down."""

    def __init__(self, store: Store, config: RunConfig, vocab_size: int, peers: int, seed: int) -> None:
        self.store, self.config, self.chance = store, config, random.Random(seed)
        self.is_large, self.shape = peers >= LARGE, Shape.of(config.model, vocab_size)
        self.now, self.step, self.sample = BEGAN, 0, 0
        self.generation = self.round = self.since = 0
        self.marks: list[tuple[int, int]] = [(0, 0)]  # step and sample of each committed round
        self.stages: list[list[Peer]] = []
        self.layers: list[tuple[int, int]] = []
        self.crew = [self.peer(i) for i in range(peers)]
        self.here: dict[str, Peer] = {}
        self.fresh: list[Peer] = []  # who is here and has no seat
        self.pace = 9.0 if self.is_large else 1.5  # seconds of a step
        self.book, self.flushed, self.clean = Book(), BEGAN, Book()
        self.row, self.passed = float(config.model.seq_len * config.model.d_model), 0.0
        self.units = {w: self.row * sum(u for (_, way), (u, _) in WAYS.items() if way == w) for w in ("in", "out")}
        self.tallies: list[list[float]] = []  # of each stage's replicas in this generation: see Peer.settled
        self.planned = BEGAN
        self.commands: list[Command] = []
        self.extra: list[Statement] = []

    def peer(self, number: int) -> Peer:
        names = NAMES.split()
        name = names[number % len(names)] + (f"-{number // len(names)}" if number >= len(names) else "")
        key = base64.b32encode(self.chance.randbytes(20)).decode().lower()[:26]
        device = self.chance.choice(DEVICES)
        joined = ev.PeerJoined(
            peer=key,
            name=name,
            device=device,
            region=self.chance.choice(REGIONS),
            memory_gb=self.chance.choice((8.0, 12.0, 24.0)),
            threads=self.chance.choice((None, 4, 8)),
            upload_mbps=self.chance.choice((None, 10.0, 20.0, 40.0)),
        )
        late = 0.0 if number < max(4, len(NAMES.split()) // 3) else self.chance.uniform(0, 6 * 3600.0)
        return Peer(id=key, name=name, speed=self.chance.uniform(0.6, 1.6), event=joined, back=BEGAN + late)

    # Writing.

    def say(self, *events: ev.Event) -> None:
        self.commands += [Journal(event=event) for event in events]

    def write(self) -> None:
        if self.commands or self.extra:
            self.store.write(self.commands, self.now, self.extra)
        self.commands, self.extra = [], []

    def flush(self, end: float) -> None:
        """The peers' rows, as fine as they still would be at ``end``."""
        span = next((span for age, span in reversed(SPANS) if end - self.now > age), SLOT_SECONDS)
        if self.now // span == self.flushed // span and self.now < end:
            return
        self.flushed = self.now
        for peer in self.here.values():
            self.settle(peer)
        self.extra += kept(self.clean, self.book)
        self.clean = self.book.copy()

    def settle(self, peer: Peer) -> None:
        """What a peer has done since its last row, by its stage's tally."""
        if peer.stage is None or (tally := self.tallies[peer.stage])[3] == peer.settled[3]:
            return
        samples, work, seconds, steps = (new - old for new, old in zip(tally, peer.settled, strict=True))
        peer.settled = tuple(tally)
        old, compute = self.book.peers.get(peer.id, NONE), min(0.95, 0.7 / peer.speed)
        whole = int(old.samples + samples)
        self.book.peers[peer.id] = msgspec.structs.replace(
            old,
            time=self.now,
            samples=whole,
            computed=old.computed + work,
            sent=int(whole * self.units["out"]),
            received=int(whole * self.units["in"]),
            compute_seconds=old.compute_seconds + seconds * compute,
            wait_seconds=old.wait_seconds + seconds * (1 - compute),
            pace=seconds / steps,
            generation=self.generation,
            step=self.step,
        )

    def sent(self, samples: float) -> dict[tuple[str, str], tuple[int, int]]:
        """Bytes for so many samples of replicas, by purpose and direction."""
        sizes = {way: int(samples * self.row * share) for way, (share, _) in WAYS.items()}
        return {way: (nbytes, int(nbytes * WAYS[way][1])) for way, nbytes in sizes.items()}

    # What happens.

    def join(self, peer: Peer) -> None:
        peer.back = 0.0
        self.here[peer.id] = peer
        self.fresh.append(peer)
        self.say(peer.event)

    def leave(self, peer: Peer, *, graceful: bool) -> None:
        self.settle(peer)
        peer.stage = None
        del self.here[peer.id]
        peer.back = self.now + self.chance.expovariate(1 / AWAY_SECONDS)
        if graceful:
            self.say(ev.PeerLeaving(peer=peer.id, name=peer.name))
        self.say(ev.PeerGone(peer=peer.id, name=peer.name, graceful=graceful))
        self.fresh = [other for other in self.fresh if other is not peer]
        for number, replicas in enumerate(self.stages):
            if peer in replicas:
                replicas.remove(peer)
                if replicas:
                    self.say(
                        ev.Rerouted(
                            generation=self.generation,
                            peer=peer.id,
                            name=peer.name,
                            stage=number,
                            since=self.marks[-1][0],
                            void=self.marks[-1][0],
                            left=len(replicas),
                        )
                    )

    def plan(self, stages: int | None = None, why: str = "") -> None:
        """A new generation: everybody here gets a seat."""
        before, count = self.layers, stages or len(self.layers)
        self.layers = self.shape.split(count)
        crew = sorted(self.here.values(), key=lambda p: p.id)
        for peer in crew:
            self.settle(peer)
        self.stages = [crew[i::count] for i in range(count)]
        self.tallies = [[0.0] * 4 for _ in range(count)]
        for i, peer in enumerate(crew):
            peer.stage, peer.settled = i % count, (0.0,) * 4
        self.fresh, self.planned = [], self.now
        self.generation += 1
        if before and len(before) != count:
            self.say(ev.Redivided(generation=self.generation, before=tuple(before), after=tuple(self.layers), why=why))
        self.say(
            ev.PlanIssued(
                generation=self.generation,
                step=self.step,
                origin="round" if self.step else "init",
                stages=tuple(tuple(p.name for p in peers) for peers in self.stages),
                peers=tuple(tuple(p.id for p in peers) for peers in self.stages),
                layers=tuple(self.layers),
            ),
            ev.PhaseChanged(phase="preparing", note="workers take over their stages"),
        )
        self.write()
        self.now += self.chance.uniform(2.0, 20.0) * (4 if self.is_large else 1)
        self.say(
            ev.TrainingStarted(generation=self.generation, step=self.step), ev.PhaseChanged(phase="training", note="")
        )
        self.write()

    def back(self, step: int, sample: int, why: str) -> None:
        """The steps since a round are done again."""
        if step < self.marks[-1][0]:
            self.commands.append(Uncommit(step=step))
            self.marks = [mark for mark in self.marks if mark[0] <= step]
        self.say(ev.RolledBack(step=step, why=why), ev.PhaseChanged(phase="waiting", note=why))
        self.book.follow(self.commands, self.now)
        self.write()
        self.step, self.sample, self.since = step, sample, 0
        self.now += self.chance.uniform(5.0, 60.0)
        self.plan()

    def train(self) -> None:
        """One step."""
        config = self.config.pipeline
        slow = 1.0 + 0.5 * max(0.0, math.sin(self.now / 9000.0)) + (2.0 if self.chance.random() < 0.01 else 0.0)
        seconds = self.pace * slow * self.chance.uniform(0.9, 1.2)
        self.now += seconds
        self.step += 1
        samples = len(self.stages[0]) * config.microbatches * config.microbatch_size
        self.sample += samples
        self.since += samples
        work = [self.shape.work(*layers) for layers in self.layers]
        for stage, replicas in enumerate(self.stages):
            own, tally = samples / len(replicas), self.tallies[stage]
            for i, amount in enumerate((own, own * work[stage] / sum(work), seconds, 1.0)):
                tally[i] += amount
        self.passed += samples * len(self.stages)
        loss = 2.4 + 8.4 / (1.0 + self.step / 60.0) ** 0.55 + self.chance.gauss(0.0, 0.05)
        self.commands.append(Point(step=self.step, tokens_samples=self.sample, train=loss))
        if self.step % self.config.eval.every == 0:
            held = loss + 0.06 + self.chance.gauss(0.0, 0.01)
            self.commands.append(Point(step=self.step, tokens_samples=self.sample, heldout=held))
            self.say(ev.HeldOut(step=self.step, loss=held))

    def commit(self) -> None:
        work = [self.shape.work(*layers) for layers in self.layers]
        digests = tuple(self.chance.randbytes(32) for _ in self.layers)
        parts = []
        for stage, replicas in enumerate(self.stages):
            own, more = divmod(self.since, len(replicas))
            for i, peer in enumerate(replicas):
                samples = own + (i < more)
                parts.append(
                    Part(
                        peer=peer.id,
                        stage=stage,
                        samples=samples,
                        work=samples * work[stage] / sum(work),
                        nbytes=self.shape.size(*self.layers[stage]) // 4 + self.chance.randrange(2000),
                        seconds=self.chance.uniform(0.5, 4.0),
                        digest=digests[stage],
                    )
                )
        self.round += 1
        told: dict[str, Any] = {
            "round": self.round,
            "replicas": len(parts),
            "samples": self.since,
            "nbytes": sum(part.nbytes for part in parts),
            "seconds": max(part.seconds for part in parts),
            "degraded": any(len(replicas) < self.config.pipeline.quorum for replicas in self.stages),
        }
        mark = Mark(kind="round", generation=self.generation, step=self.step, sample=self.sample, digests=digests)
        command = Commit(mark=mark, parts=tuple(parts), **told)
        self.commands += [command, Journal(event=ev.RoundCommitted(step=self.step, **told))]
        self.book.follow([command], self.now)
        self.book.traffic = {purpose: sums for (purpose, way), sums in self.sent(self.passed).items() if way == "out"}
        self.extra.append(traffic_point(self.book, command, self.now))
        self.marks, self.since = [*self.marks[-60:], (self.step, self.sample)], 0

    def publish(self) -> None:
        self.say(ev.Published(step=self.step, path=f"checkpoints/step-{self.step:08d}"))
        value = 0.3 + 0.4 * self.step / self.config.steps
        score = Score(value=value, low=value - 0.05, high=value + 0.05, n=400)
        tasks = (TaskSummary(name="emotion", metric="macro-f1", score=score, majority=0.17, tfidf=0.41),)
        self.say(ev.Evaluated(step=self.step, suite="offline", mean=score, tasks=tasks, digest=f"{self.step:064x}"))

    def churn(self, seconds: float) -> None:
        """Who comes and goes by chance, in a large run."""
        for peer in self.crew:
            if peer.back and peer.back <= self.now:
                self.join(peer)
        if not self.is_large:
            return
        for _ in range(self.count(len(self.here) * seconds / STAY_SECONDS)):
            peer = self.chance.choice(list(self.here.values()))
            if all(len(replicas) > 2 or peer not in replicas for replicas in self.stages):
                self.leave(peer, graceful=self.chance.random() < 0.5)
        if self.chance.random() < seconds / (6 * 3600.0):
            peer = self.chance.choice(list(self.here.values()))
            self.say(ev.Faulted(peer=peer.id, name=peer.name, what=self.chance.choice(FAULTS)))
        if self.fresh and self.now - self.planned > PLAN_SECONDS and self.step == self.marks[-1][0]:
            self.plan()

    def count(self, mean: float) -> int:
        """How often something happens that does so ``mean`` times on average."""
        return int(mean) + (self.chance.random() < mean % 1.0)
