"""What a run's journal tells (see :mod:`.verify`): plans, rounds, what was lost; and the report of what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec
from msgspec import Struct

from . import events as ev
from .snapshot import LedgerRow

KEPT = 1000  # findings, of all that are counted
SHOWN = 20  # of them, to people
CLIP = 200  # characters of somebody's text


class Finding(Struct, frozen=True, kw_only=True):
    """Something that must not be. ``id``: the row's id in ``table``, for a round its step; None: a row is missing."""

    table: str
    id: int | None
    text: str

    def __str__(self) -> str:
        key = "at step" if self.table == "rounds" else "row"
        return f"{self.table}{'' if self.id is None else f' {key} {self.id}'}: {self.text}"


def some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


class Tally(Struct, kw_only=True):
    samples: int = 0
    leases: int = 0

    def add(self, row: LedgerRow) -> None:
        self.samples, self.leases = self.samples + row.count, self.leases + 1

    def __str__(self) -> str:
        return f"{some(self.samples, 'sample')} in {some(self.leases, 'lease')}"


class Report(Struct, kw_only=True):
    """What the ledger says. ``samples``: N, as of the newest round. ``findings``: the first of ``problems``."""

    name: str
    samples: int = 0
    rounds: int = 0
    lost_rounds: int = 0
    generations: int = 0
    committed: Tally = msgspec.field(default_factory=Tally)
    leased: Tally = msgspec.field(default_factory=Tally)
    returned: dict[str, Tally] = msgspec.field(default_factory=dict)  # by reason
    problems: int = 0
    findings: list[Finding] = msgspec.field(default_factory=list)

    def found(self, table: str, id: object, text: str) -> None:
        self.problems += 1
        if len(self.findings) < KEPT:
            self.findings.append(Finding(table=table, id=id if isinstance(id, int) else None, text=text))

    def lines(self) -> list[str]:
        """For people: what there is, and either what is wrong or that nothing is."""
        lost = f" ({self.lost_rounds} more lost)" if self.lost_rounds else ""
        said = [
            f"{self.name}: {some(self.samples, 'sample')} in {some(self.rounds, 'round')}{lost},"
            f" {some(self.generations, 'generation')}",
            f"committed: {self.committed}",
            f"leased:    {self.leased}",
        ]
        returned = sorted(self.returned.items(), key=lambda item: -item[1].samples)
        said += [f"returned:  {tally}: {reason}" for reason, tally in returned[:SHOWN]]
        if len(returned) > SHOWN:
            said.append(f"and {len(returned) - SHOWN} more reasons")
        if self.problems:
            said.append(f"The ledger is wrong in {some(self.problems, 'place')}:")
            said += [f"  {finding}" for finding in self.findings[:SHOWN]]
            if self.problems > SHOWN:
                said.append(f"  and {self.problems - SHOWN} more")
        else:
            said.append(f"Every sample of [0, {self.samples}) is committed exactly once.")
        return ["".join(c if c.isprintable() else "?" for c in line) for line in said]


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A generation, as its plan's event tells."""

    epoch: int
    step: int
    sample: int | None  # None: where the leases before it end, after a stop
    stages: tuple[int, ...]  # replicas
    shares: tuple[int, ...] = ()  # microbatches of each first-stage replica; none: even
    lost: set[str] = field(default_factory=set)  # that the generation went on without


@dataclass
class History:
    """A fold of the journal."""

    generation: int = 0
    epoch: int = 0
    plans: dict[int, Issued] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    rounds: list[tuple[int, int, ev.RoundCommitted, int]] = field(default_factory=list)  # id, generation, it, sample
    replicas: dict[int, int] = field(default_factory=dict)  # that each round must have, by its number
    lost: dict[int, int] = field(default_factory=dict)  # round to its samples
    newest: int = 0  # round number ever given

    @property
    def step(self) -> int:
        return self.rounds[-1][2].step if self.rounds else 0

    def steps(self, origin: str) -> set[int]:
        """Where a plan may start: an older round counts once the newer ones are given up."""
        return {0} if origin == "init" else {event.step for _, _, event, _ in self.rounds}

    @property
    def sample(self) -> int:
        return self.rounds[-1][3] if self.rounds else 0


def follow(past: History, event_id: int, event: ev.Event, report: Report) -> None:
    """Takes one more event into the history."""

    def wrong(text: str) -> None:
        report.found("events", event_id, text)

    match event:
        case ev.PlanIssued(generation=generation, step=step, origin=origin):
            if generation != past.generation + 1:
                wrong(f"generation {generation} follows generation {past.generation}")
            if origin not in ("init", "round", "step") or (origin == "init" and step > 0):
                wrong(f"generation {generation} starts from {origin[:CLIP]!r}, with a round at {past.step}")
            if step not in past.steps(origin) if origin != "step" else step < past.step:
                wrong(f"generation {generation} starts at step {step}, the last round was at step {past.step}")
            past.epoch += origin != "step"
            past.generation = max(past.generation, generation)
            past.plans[generation] = Issued(
                epoch=past.epoch,
                step=step,
                sample=None if origin == "step" else past.sample,
                stages=tuple(map(len, event.stages)),
                shares=event.shares[0] if event.shares else (),
            )
        case ev.TrainingStarted(generation=generation, step=step):
            plan = past.plans.get(generation)
            if generation != past.generation or plan is None or plan.step != step:
                wrong(f"training starts in generation {generation} at step {step}, which is not what was planned")
            elif plan.sample is not None and step != past.step:
                wrong(f"training starts at step {step}, but the last round was at step {past.step}")
            past.started.add(generation)
        case ev.Rerouted(generation=generation, peer=peer, since=since):
            plan = past.plans.get(generation)
            if generation != past.generation or generation not in past.started or plan is None or peer in plan.lost:
                wrong(f"generation {generation} goes on without {peer[:CLIP]}, which it cannot")
            else:
                plan.lost.add(peer)
            if since != past.step:
                wrong(f"going on from step {since}, but the last round was at step {past.step}")
        case ev.RoundCommitted(round=number, step=step):
            if step <= past.step or number <= past.newest or event.samples < 1:
                what = f"round {number} at step {step} with {event.samples} samples"
                wrong(f"{what} follows round {past.newest} at step {past.step}")
            if past.generation not in past.started:
                wrong(f"round {number} is committed before its generation's training started")
            past.rounds.append((event_id, past.generation, event, past.sample + event.samples))
            if plan := past.plans.get(past.generation):
                past.replicas[number] = sum(plan.stages) - len(plan.lost)
            past.newest = max(past.newest, number)
        case ev.RolledBack(step=step):
            past.epoch += 1
            while past.rounds and past.step > step:
                lost = past.rounds.pop()[2]
                past.lost[lost.round] = lost.samples
            if step != past.step:
                wrong(f"back to step {step}, but the last round until there was at step {past.step}")
            plan = past.plans.get(past.generation)
            if plan and past.generation not in past.started:  # it starts from there, which counts from now on
                past.plans[past.generation] = replace(plan, epoch=past.epoch, sample=past.sample)
        case ev.Finished(step=step) if step > past.step:
            wrong(f"finished at step {step}, but the last round was at step {past.step}")
