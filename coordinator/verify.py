"""Proves that every sample of a run is committed exactly once, or says where not: ``potluck ledger verify``.

Reads what :mod:`.store` wrote and shares nothing with the code that decided it. Three accounts of the run must tell
the same story: the *journal* (events) gives the plans, the rounds that were committed, and those that were lost; the
*rounds* are those that were not lost; the *ledger* holds every lease ever made.

Leases are made in order, so their ids are: whatever is leased or committed now forms, by id, one range of samples
without gap or overlap from 0 on. A lease that was returned begins where the range of those before it ends, or later;
so what was returned was leased again afterwards, or lies beyond. Inside a generation, the plan says which samples
every row must hold. An *epoch* is a generation with those that went on from its stop: its leases end together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path

import msgspec
from msgspec import Struct

from ..protocol.errors import StateError
from . import events as ev
from .history import CLIP, History, Report, follow
from .leases import Ledger, Stop, Window
from .snapshot import FILE, HINT, EventRow, LedgerRow, RoundRow, Row, Snapshot, look

__all__ = ["FILE", "Report", "examine", "verify"]
EVENTS = msgspec.json.Decoder(reduce(or_, ev.Event.__subclasses__()))


class Pipeline(Struct, frozen=True):
    microbatches: int
    microbatch_size: int


class Config(Struct, frozen=True):
    name: str
    pipeline: Pipeline


def verify(path: Path) -> Report:
    """Looks at a run's file. Raises ``StateError`` if it is missing, foreign or damaged."""
    return look(path, examine)


def examine(snapshot: Snapshot) -> Report:
    config = snapshot.meta("config", Config | None, None)  # type: ignore[arg-type]
    if config is None:
        raise StateError(f"{snapshot.path}: no run was ever opened in it", hint=HINT, code="foreign")
    report = Report(name=config.name)
    history = History()
    for event_id, event in events(snapshot, report):
        follow(history, event_id, event, report)
    report.generations, report.lost_rounds = history.generation, len(history.lost)
    if (last := snapshot.meta("generation", int, 0)) != history.generation:
        report.found("meta", None, f"generation {last} is stored, the journal's newest is {history.generation}")
    rounds = check_rounds(snapshot, history, report)
    ledger = Ledger(history, rounds, config.pipeline.microbatches, config.pipeline.microbatch_size, report)
    for row in readable(snapshot, LedgerRow, report):
        ledger.follow(row)
    ledger.finish(snapshot.meta("stop", Stop | None, None))  # type: ignore[arg-type]
    return report


def readable(snapshot: Snapshot, kind: type[Row], report: Report) -> Iterator[Row]:
    """The rows that are well formed; the others are found. Ids are 1, 2, 3 ...: nothing is ever deleted."""
    last = 0
    for key, row in snapshot.rows(kind):
        if kind is not RoundRow and isinstance(key, int) and key != last + 1:
            gap = f"row {last + 1} is" if key == last + 2 else f"rows {last + 1} to {key - 1} are"
            report.found(kind.TABLE, key, f"{gap} missing before it" if key > last else "an id that is never given")
        last = key if isinstance(key, int) else last
        if isinstance(row, str):
            report.found(kind.TABLE, key, row)
        else:
            yield row
    given = None if kind is RoundRow else snapshot.last_id(kind.TABLE)
    if given is not None and given != last:
        report.found(kind.TABLE, None, f"the last id is {last}, but {given} was the last one given")


def events(snapshot: Snapshot, report: Report) -> Iterator[tuple[int, ev.Event]]:
    for row in readable(snapshot, EventRow, report):
        try:
            event = EVENTS.decode(row.data)
        except (msgspec.DecodeError, RecursionError) as error:
            report.found("events", row.id, f"{row.kind[:CLIP]} cannot be read: {error}")
            continue
        if event.kind != row.kind:
            report.found("events", row.id, f"it is called {row.kind[:CLIP]} and holds {event.kind}")
        yield row.id, event


def check_rounds(snapshot: Snapshot, past: History, report: Report) -> dict[int, Window]:
    """Compares the rounds with one another and with the journal; returns them by number."""
    told = {event.step: (event_id, generation, event) for event_id, generation, event, _ in past.rounds}
    windows: dict[int, Window] = {}
    number = step = sample = 0
    for row in readable(snapshot, RoundRow, report):

        def wrong(text: str, at: int = row.step) -> None:
            report.found("rounds", at, text)

        event_id, generation, event = told.pop(row.step, (0, 0, None))
        if event is None:
            wrong(f"the journal knows no such round {row.round}")
        elif (generation, event.round, event.replicas, event.samples, event.nbytes, event.seconds) != (
            *(row.generation, row.round, row.replicas, row.samples, row.nbytes, row.seconds),
        ):
            wrong(f"it is not what event {event_id} tells of it")
        if row.round <= number:
            wrong(f"round {row.round} follows round {number}")
        if row.sample - sample != row.samples:
            wrong(f"{row.samples} samples from sample {sample} do not end at sample {row.sample}")
        plan = past.plans.get(row.generation)
        if plan is None:
            wrong(f"no plan of generation {row.generation} was issued")
        elif past.replicas.get(row.round, row.replicas) != row.replicas:
            wrong(f"{row.replicas} replicas took part, there were {past.replicas[row.round]}")
        stages = len(plan.stages) if plan else 0
        if plan and not well_formed(row.digests, stages):
            wrong(f"its digests are not one of every stage ({stages})")
        windows[row.round] = Window(first=step, last=row.step, epoch=plan.epoch if plan else -1, samples=row.samples)
        number, step, sample = row.round, row.step, row.sample
        report.rounds += 1
    for at, (event_id, _, event) in told.items():
        report.found("rounds", None, f"round {event.round} at step {at} is missing, which event {event_id} tells of")
    report.samples = sample
    return windows


def well_formed(digests: str, stages: int) -> bool:
    try:
        found = [bytes.fromhex(d) for d in msgspec.json.decode(digests, type=list[str])]
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False
    return len(found) == stages and all(found)
