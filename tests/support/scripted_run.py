"""A run of the state machine, driven by hand: what peers would say, said for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from potluck.coordinator import events as ev
from potluck.coordinator.assignment import StageNeed
from potluck.coordinator.run import step
from potluck.coordinator.state import (
    Division,
    Input,
    Joined,
    Journal,
    Lease,
    Mark,
    Member,
    Rules,
    RunState,
    Said,
)
from potluck.coordinator.views import view_of
from potluck.protocol import control_pb2 as pb
from potluck.protocol.config import EvalConfig, Sync
from potluck.protocol.plan import Plan, SavePoint

LAYERS = ((0, 2), (2, 4))
RULES = Rules(
    name="test",
    seed=1,
    steps=20,
    divisions=(
        Division(layers=LAYERS, needs=(StageNeed(work=1.0, memory_gb=1.0), StageNeed(work=1.0, memory_gb=2.0))),
    ),
    microbatches=2,
    microbatch_size=3,
    sync=Sync(every=4),
    eval=EvalConfig(every=10),
    publish_rounds=100,
    wait_for=2,
    lease_seconds=60.0,
    patience_seconds=30.0,
    away_seconds=0.0,  # whose line breaks is lost at once, unless a test is about that
)
ROLLING = replace(RULES, reroutes=False)  # as with activations.reuse: a lost replica costs its generation
SAMPLES = 6  # of a step, with one replica of the first stage


class Run:
    """A run and what it ordered so far; peers are named by their letter."""

    def __init__(self, rules: Rules = RULES, state: RunState | None = None) -> None:
        self.rules, self.state, self.now = rules, state or RunState(since=100.0), 100.0
        self.commands: list[Any] = []

    def do(self, what: Input, later: float = 0.0) -> list[Any]:
        self.now += later
        self.state, commands = step(self.rules, self.state, what, self.now)
        self.commands += commands
        return commands

    def join(self, *peers: str, points: tuple[SavePoint, ...] = (), memory_gb: float = 9.0, **more: Any) -> list[Any]:
        commands = []
        for peer in peers:
            member = Member(
                peer=peer,
                name=peer.upper(),
                memory_gb=memory_gb,
                session=more.get("session", peer.encode()),
                savepoints=frozenset(points),
            )
            commands += self.do(Joined(member=member))
        return commands

    def say(self, peer: str, **body: Any) -> list[Any]:
        return self.do(Said(peer=peer, report=pb.Up(seq=1, **body)))

    def ready(self) -> list[Any]:
        commands = []
        for peer in sorted(self.plan.peers):
            stage = self.plan.places[peer][0]
            digest = self.state.committed.digests[stage] if self.state.committed.digests else b""
            commands += self.say(peer, ready=pb.Ready(generation=self.plan.generation, digest=digest))
        return commands

    def train(self, to: int) -> list[Any]:
        """Every peer reports its steps below ``to``."""
        commands = []
        for at in range(self.plan.first_step, to):
            for peer in sorted(self.plan.peers):
                done = pb.StepDone(generation=self.plan.generation, step=at, loss_sum=2.0, targets=1)
                commands += self.say(peer, step_done=done)
        return commands

    def round(self, at: int, **odd: dict[str, Any]) -> list[Any]:
        """Every peer reports the round after ``at`` steps; ``odd`` changes what some say (None: nothing)."""
        commands, plan, committed = [], self.plan, self.state.committed
        since = plan.first_sample_of(at) - committed.sample
        for peer, (stage, replica) in sorted(plan.places.items()):
            report: dict[str, Any] = {
                "generation": plan.generation,
                "step": at,
                "samples": since * len(plan.served(stage, replica)) // plan.microbatches_per_step,
                "attempt": plan.attempt,
                "digest": f"{stage}@{at}".encode(),
                "base_digest": committed.digests[stage] if committed.digests else b"start",
            }
            if odd.get(peer, {}) is not None:
                commands += self.say(peer, round_done=pb.RoundDone(**{**report, **odd.get(peer, {})}))
        return commands

    @property
    def plan(self) -> Plan:
        assert self.state.plan is not None
        return self.state.plan

    @property
    def seats(self) -> list[list[str]]:
        return [[r.peer for r in s.replicas] for s in self.plan.stages]

    @property
    def donors(self) -> list[list[str]]:
        return [[d.peer for d in s.donors] for s in self.plan.stages]

    def released(self, peer: str) -> bool:
        return view_of(self.rules, self.state, peer).released


def training(*peers: str, rules: Rules = RULES) -> Run:
    """A run of these peers (two at least), past its first lease."""
    run = Run(replace(rules, wait_for=len(peers)))
    run.join(*peers)
    run.ready()
    assert run.state.phase == "training"
    run.now += 2.0  # nobody is joining any more
    return run


def committed(*peers: str, rules: Rules = RULES) -> Run:
    """The same, with a round committed at step 4."""
    run = training(*peers, rules=rules)
    run.train(4)
    run.round(4)
    assert run.state.committed.step == 4
    return run


def leases(commands: list[Any]) -> list[Lease]:
    return [c for c in commands if isinstance(c, Lease)]


def journaled(commands: list[Any], kind: type[ev.Event]) -> list[Any]:
    return [c.event for c in commands if isinstance(c, Journal) and isinstance(c.event, kind)]


def point(mark: Mark, stage: int) -> SavePoint:
    return mark.savepoint(stage, LAYERS[stage])


def stop_point(mark: Mark, stage: int) -> SavePoint:
    first, last = LAYERS[stage]
    return SavePoint(kind="step", generation=mark.generation, step=mark.step, first_layer=first, last_layer=last)


def saved(run: Run, *peers: str) -> list[Any]:
    assert run.state.end is not None
    commands = []
    for peer in peers:
        first, last = LAYERS[run.plan.places[peer][0]]
        message = pb.SavePoint(
            kind="step", generation=run.plan.generation, step=run.state.end, first_layer=first, last_layer=last
        )
        commands += run.say(peer, saved=pb.Saved(generation=run.plan.generation, savepoint=message))
    return commands
