"""Bugs to plant, in the real code or in the simulated workers: the simulator must find each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from potluck.coordinator import planning, run
from potluck.coordinator.hub import Hub, Item, Line
from potluck.coordinator.planning import Start
from potluck.coordinator.run import Machine
from potluck.coordinator.state import Command, Input, Mark, Member, ReturnLeases, Rules, RunState
from potluck.coordinator.store import Store
from potluck.coordinator.turn import Turn
from potluck.coordinator.verdict import Verdict
from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import StateError
from potluck.protocol.plan import Plan, SavePoint

from .engine import Engine
from .weights import Content

REPORTS = ("ready", "step_done", "round_done", "eval_done", "saved", "fault")
real_take, real_tell, real_step, real_said = Hub._take, Hub._tell, run.step, Turn.said
real_round_done, real_store, real_plan = Turn.round_done, Store.__init__, planning.make_plan
real_begin_round, real_meta, real_step_done = Engine._begin_round, Store.meta, Turn.step_done
real_trained, real_hub = Content.trained, Hub.__init__


async def acknowledged_first(self: Hub, batch: list[Item], now: float) -> None:
    """Workers are told before it is on the disk."""
    for what, line, seq in batch:
        if line is not None and seq:
            line.send(pb.Down(ack=pb.Ack(seq=seq)))
    await real_take(self, batch, now)


async def shown_first(self: Hub, batch: list[Item], now: float) -> None:
    """Workers see what follows before it is on the disk."""
    state = self.state
    for what, _, _ in batch:
        state, _ = real_step(self.rules, state, what, now)
    for line in self.lines.values():
        self._show(state, line)
    await real_take(self, batch, now)


async def goes_on_without_a_disk(self: Hub, batch: list[Item], now: float) -> None:
    """A refused batch takes effect nevertheless."""
    try:
        await real_take(self, batch, now)
    except StateError:
        for what, _, _ in batch:
            self.state, _ = real_step(self.rules, self.state, what, now)
        raise


def unfenced(self: Turn, peer: str, report: pb.Up) -> None:
    """A report of any generation is one of the present."""
    body = report.WhichOneof("body")
    if body in REPORTS and self.state.plan is not None:
        copy = pb.Up()
        copy.CopyFrom(report)
        getattr(copy, body).generation = self.state.plan.generation
        report = copy
    real_said(self, peer, report)


def counted_twice(self: Turn, member: Member, message: pb.StepDone) -> None:
    """A step counts as often as it is reported."""
    real_step_done(self, replace(member, step=min(member.step, message.step)), message)
    now = self.state.members[member.peer]
    self.member(replace(now, step=max(now.step, member.step)))


class Forgetful(dict[bytes, int]):
    """What a hub has acknowledged, if it does not remember."""

    def get(self, key: bytes, default: int = 0) -> int:  # type: ignore[override]
        return default


def without_memory(self: Hub, *arguments: Any) -> None:
    real_hub(self, *arguments)
    self.acked = Forgetful()


def believed(plan: Plan, committed: Mark, at: int, reports: Mapping[str, pb.RoundDone]) -> Verdict:
    """A judge that believes everybody."""
    digests = tuple(bytes(reports[s.replicas[0].peer].digest) for s in plan.stages)
    sample = plan.first_sample_of(at)
    return Verdict(mark=Mark(kind="round", generation=plan.generation, step=at, sample=sample, digests=digests))


def spoken_for(self: Turn, member: Member, message: pb.RoundDone) -> None:
    """One replica speaks for its stage: a round is committed before all have it."""
    plan = self.state.plan
    assert plan
    stage, _ = plan.places[member.peer]
    real_round_done(self, member, message)
    done = self.state.rounds_done.get(message.step)
    if done and len(plan.stages[stage].replicas) > 1:
        others = [r.peer for r in plan.stages[stage].replicas if r.peer not in done]
        rest = plan.first_sample_of(message.step) - self.state.committed.sample
        rest -= sum(done[r.peer].samples for r in plan.stages[stage].replicas if r.peer in done)
        for i, peer in enumerate(others):
            copy = pb.RoundDone()
            copy.CopyFrom(message)
            copy.samples = max(0, rest) if i == 0 else 0
            done = {**done, peer: copy}
        self.set(rounds_done={**self.state.rounds_done, message.step: done})


def any_holders(rules: Rules, state: RunState, mark: Mark) -> list[list[str]]:
    """Whoever holds a state of the right step is a holder, of whatever generation it is."""
    return [
        [
            p
            for p, m in sorted(state.members.items())
            if any((s.kind, s.step, s.first_layer) == ("round", mark.step, first) for s in m.savepoints)
        ]
        for first, _ in rules.layers
    ]


def same_generation(rules: Rules, state: RunState, start: Start) -> Plan:
    """The generation is not counted up when a plan starts from a committed round."""
    plan = real_plan(rules, state, start)
    return replace(plan, generation=max(1, state.generation)) if start.mark.kind == "round" else plan


def kept_leases(rules: Rules, state: RunState, what: Input, now: float) -> tuple[RunState, list[Command]]:
    """Leases are not returned."""
    state, commands = real_step(rules, state, what, now)
    return state, [c for c in commands if not isinstance(c, ReturnLeases)]


def unsynced(self: Store, path: Path) -> None:
    """A commit may be lost when the power fails."""
    real_store(self, path)
    self._db.execute("PRAGMA synchronous=NORMAL")


def forgotten_generation(self: Store, key: str, default: Any = None) -> Any:
    """After a restart generations are counted from the last committed round's."""
    found = real_meta(self, key, default)
    return max(0, found - 1) if key == "generation" else found


def kept_stop(self: Machine) -> None:
    """A stop can be gone on from again and again."""


def captured_and_kept(self: Engine, done: int) -> None:
    """What a round has captured stays in the weights as well."""
    delta = self.delta
    real_begin_round(self, done)
    self.delta = delta


def made_by_chance(self: Content, generation: int, step: int, deltas: Mapping[str, int]) -> Content:
    """A round leaves out the replica whose piece came last."""
    return real_trained(self, generation, step, dict(list(deltas.items())[: max(1, len(deltas) - 1)]))


def plant(*where: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def planted() -> Iterator[None]:
        with ExitStack() as stack:
            for place, name, wrong in where:
                stack.enter_context(patch.object(place, name, wrong))
            yield

    return planted


PLANTED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "acknowledged before it is written": plant((Hub, "_take", acknowledged_first)),
    "shown before it is written": plant((Hub, "_take", shown_first)),
    "a lease while the disk refuses": plant((Hub, "_take", goes_on_without_a_disk)),
    "reports of an old generation count": plant((Turn, "said", unfenced)),
    "a repeated report counts twice": plant((Turn, "step_done", counted_twice), (Hub, "__init__", without_memory)),
    "every round counts": plant((run, "judge", believed)),
    "a round counts before all replicas have it": plant((Turn, "round_done", spoken_for)),
    "holders of another generation": plant((planning, "holders", any_holders)),
    "a generation is used twice": plant((run, "make_plan", same_generation)),
    "leases are not returned": plant((run, "step", kept_leases)),
    "the newest commit is lost with the power": plant((Store, "__init__", unsynced)),
    "a restart forgets the generation": plant((Store, "meta", forgotten_generation)),
    "a stop is kept after it was gone on from": plant((Machine, "forget_stop", kept_stop)),
    "captured twice": plant((Engine, "_begin_round", captured_and_kept)),
    "a replica is left out of a round": plant((Content, "trained", made_by_chance)),
}
