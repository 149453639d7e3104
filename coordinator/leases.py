"""Whether the leases of a run, in the order in which they were made, are what they must be (see :mod:`.verify`)."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from .history import CLIP, KEPT, History, Issued, Report, Tally
from .snapshot import LedgerRow


class Stop(Struct, frozen=True):
    step: int
    sample: int


@dataclass(kw_only=True)
class Window:
    """A round's steps [first, last) and what the ledger gave to it so far."""

    first: int
    last: int
    epoch: int
    samples: int
    seen: int = 0


class Ledger:
    """Follows the leases in the order in which they were made."""

    def __init__(self, past: History, rounds: dict[int, Window], microbatches: int, size: int, report: Report) -> None:
        """``microbatches`` of each first-stage replica and step, on average, of ``size`` samples each."""
        self.past, self.rounds, self.report = past, rounds, report
        self.microbatches, self.size = microbatches, size
        self.end = 0  # of what is leased or committed, so far
        self.committed_end = 0
        self.lost: dict[int, int] = {}  # samples of lost rounds
        self.generation, self.epoch, self.next = 0, -1, 0  # where the leases so far end
        self.base, self.index = 0, 0  # of the generation: its first sample, and how many leases it must have made
        self.seats: list[str] = []

    def follow(self, row: LedgerRow) -> None:
        self.placed(row)
        if row.state == "returned":
            self.returned(row)
        else:
            self.live(row)

    def wrong(self, row: LedgerRow, text: str) -> None:
        self.report.found("ledger", row.id, text)

    def placed(self, row: LedgerRow) -> None:
        """Whether the row holds what its generation's plan makes it hold."""
        plan = self.past.plans.get(row.generation)
        if plan is None or row.generation not in self.past.started:
            self.wrong(row, f"generation {row.generation} has never trained")
            return
        if row.generation < self.generation:
            self.wrong(row, f"leased in generation {row.generation}, after generation {self.generation} had begun")
            return
        if row.generation != self.generation:
            self.whole()
            self.base = self.next if plan.sample is None else plan.sample
            if plan.sample is None and plan.epoch != self.epoch:
                self.wrong(row, f"generation {row.generation} goes on from a stop that nothing led to")
            self.generation, self.epoch, self.index, self.seats = row.generation, plan.epoch, 0, []
        counts = self.counts(plan)
        width = len(counts)
        step, first, share = plan.step + self.index // width, self.start(counts), counts[self.index % width]
        position, rest = self.position(counts, row.first)
        if (row.step, row.first, row.count) == (step, first, share):
            self.index += 1
            self.seated(row, position % width, width)
        else:
            self.wrong(
                row,
                f"step {row.step}, {spell(row.first, row.end)} in generation {row.generation}:"
                f" step {step}, {spell(first, first + share)} was next",
            )
            known = (rest, row.count, row.step) == (0, counts[position % width], plan.step + position // width)
            if not known:  # it stands for the one that was due; else leases are missing, or it is there twice
                self.index += 1
            elif position > self.index:
                self.index = position + 1
        self.next = self.start(counts)

    def counts(self, plan: Issued) -> list[int]:
        """Samples of each first-stage replica in every step."""
        width = max(1, plan.stages[0] if plan.stages else 1)
        whole = sum(plan.shares) == self.microbatches * width
        if len(plan.shares) == width and whole and min(plan.shares) > 0:
            return [share * self.size for share in plan.shares]
        return [self.microbatches * self.size] * width

    def start(self, counts: list[int]) -> int:
        """The first sample of the lease that is due."""
        steps, seat = divmod(self.index, len(counts))
        return self.base + steps * sum(counts) + sum(counts[:seat])

    def position(self, counts: list[int], first: int) -> tuple[int, int]:
        """How many leases come before the one that sample ``first`` is in, and how far it is into that one."""
        steps, rest = divmod(first - self.base, sum(counts))
        seat = 0
        while rest >= counts[seat]:
            rest -= counts[seat]
            seat += 1
        return steps * len(counts) + seat, rest

    def seated(self, row: LedgerRow, seat: int, width: int) -> None:
        """A generation's replicas take the same part of every step; a lost one's goes to others."""
        lost = self.past.plans[row.generation].lost
        if len(self.seats) < width and seat == len(self.seats):
            if row.peer in self.seats and not lost:
                self.wrong(row, f"{row.peer[:CLIP]} has two parts of step {row.step}")
            self.seats.append(row.peer)
        elif seat < len(self.seats) and self.seats[seat] != row.peer:
            if self.seats[seat] in lost:
                self.seats[seat] = row.peer
            else:
                self.wrong(row, f"leased to {row.peer[:CLIP]}, this part is {self.seats[seat][:CLIP]}'s")

    def whole(self) -> None:
        """A step is leased to all replicas of the first stage at once."""
        plan = self.past.plans.get(self.generation)
        if plan and plan.stages and plan.stages[0] and (rest := self.index % plan.stages[0]):
            step = plan.step + self.index // plan.stages[0]
            text = (
                f"only {rest} of {plan.stages[0]} replicas have a lease of step {step} in generation {self.generation}"
            )
            self.report.found("ledger", None, text)

    def returned(self, row: LedgerRow) -> None:
        if not row.reason:
            self.wrong(row, "returned without a reason")
        reasons, reason = self.report.returned, (row.reason or "no reason")[:CLIP]
        if reason not in reasons and len(reasons) >= KEPT:
            reason = "other reasons"
        reasons.setdefault(reason, Tally()).add(row)
        if row.first < self.end:
            self.wrong(row, f"{spell(row.first, min(row.end, self.end))} had been leased or committed before it")
        if row.round is not None:
            self.lost[row.round] = self.lost.get(row.round, 0) + row.count

    def live(self, row: LedgerRow) -> None:
        (self.report.leased if row.state == "leased" else self.report.committed).add(row)
        if row.reason is not None:
            self.wrong(row, f"{row.state}, and with a reason for its return")
        if row.first < self.end:
            self.wrong(row, f"{spell(row.first, min(row.end, self.end))} leased or committed a second time")
        elif row.first > self.end:
            self.wrong(row, f"{spell(self.end, row.first)} before it neither leased nor committed")
        self.end = max(self.end, row.end)
        if row.state == "committed":
            self.committed(row)
            return
        if row.round is not None:
            self.wrong(row, f"leased, and in round {row.round}")
        plan = self.past.plans.get(row.generation)
        if plan and plan.epoch != self.past.epoch:
            self.wrong(row, f"leased still, in generation {row.generation}, which is over")
        if row.step < self.past.step:
            self.wrong(row, f"leased still, though a round took all steps below {self.past.step}")

    def committed(self, row: LedgerRow) -> None:
        self.committed_end = max(self.committed_end, row.end)
        window = None if row.round is None else self.rounds.get(row.round)
        if window is None:
            self.wrong(row, f"committed to round {row.round}, which does not exist")
            return
        window.seen += row.count
        if not window.first <= row.step < window.last:
            self.wrong(row, f"step {row.step} is not one of round {row.round}, [{window.first}, {window.last})")
        plan = self.past.plans.get(row.generation)
        if plan and plan.epoch != window.epoch:
            self.wrong(row, f"generation {row.generation} was over when round {row.round} was committed")

    def finish(self, stop: Stop | None) -> None:
        self.whole()
        report = self.report
        for number, window in self.rounds.items():
            if window.seen != window.samples:
                text = f"round {number} has {window.samples} samples, its leases add up to {window.seen}"
                report.found("rounds", window.last, text)
        if self.committed_end != report.samples:
            text = f"the newest round ends at sample {report.samples}, the committed leases at {self.committed_end}"
            report.found("rounds", None, text)
        for number in sorted(self.lost.keys() | self.past.lost.keys()):
            told, seen = self.past.lost.get(number, 0), self.lost.get(number, 0)
            if told != seen:
                text = f"of lost round {number}, {told} samples went back by the journal and {seen} by the leases"
                report.found("ledger", None, text)
        if stop is not None and stop.sample != self.end:
            report.found("meta", None, f"stopped at sample {stop.sample}, but the leases end at {self.end}")


def spell(first: int, end: int) -> str:
    return f"samples [{first}, {end})"
