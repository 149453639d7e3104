"""The run's state machine: ``step(rules, state, input, now) -> (state, commands)``. No I/O, no clock, no chance.

::

    waiting --enough peers--> preparing --all ready--> training --last round--> finishing --published--> finished
       ^                          |                       |
       +------- a peer is lost ---+---- join or leave: close with a round, then a new plan
                                  +---- stop asked: save, then `stopped`

A generation is one plan's time. Joins and leaves end it in order: the steps already leased are done, a closing
round commits them, the next plan starts there. A loss ends it at once: everybody goes back to the last committed
round and the samples since then are leased again. So the committed samples are always a prefix of the index range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..protocol import control_pb2 as pb
from ..protocol.failpoints import failpoint
from ..protocol.plan import Plan
from . import events as ev
from .losses import short_of_quorum
from .operating import Operating
from .planning import Start, Wait, choose, make_plan
from .sharing import shared
from .state import (
    Command,
    Commit,
    Gone,
    Input,
    Joined,
    Lease,
    Mark,
    Noted,
    Order,
    Remember,
    ReturnLeases,
    Rules,
    RunState,
    Said,
    StopAsked,
    Tick,
    Uncommit,
    Unpublished,
    Uploaded,
)
from .turn import TRANSFER_LEASES
from .verdict import judge, parts_of
from .views import keeping

KEPT_MARKS = 50


def step(rules: Rules, state: RunState, what: Input, now: float) -> tuple[RunState, list[Command]]:
    """The next state and what must be done about it."""
    turn = Machine(rules, state, now)
    match what:
        case Joined(member=member):
            turn.joined(member)
        case Gone(peer=peer, session=session):
            turn.gone(peer, session)
        case Said(peer=peer, report=report):
            turn.said(peer, report)
        case Tick():
            turn.tick()
        case StopAsked():
            turn.stop_asked()
        case Order() as order:
            turn.order(order)
        case Uploaded(step=at, path=path):
            turn.uploaded(at, path)
        case Unpublished(step=at, why=why):
            turn.unpublished(at, why)
        case Noted(event=event):
            turn.journal(event)
    turn.advance()
    return turn.state, turn.commands


class Machine(Operating):
    """Decides what follows from the state."""

    def advance(self) -> None:
        """Moves the phase on as far as the state allows."""
        phase = self.state.phase
        complete = self.state.published >= self.rules.steps <= self.state.evaluated
        if phase == "waiting":
            if complete and self.state.committed.step >= self.rules.steps:  # opened again after its end
                self.finished()
            elif self.state.stop_asked:
                self.stopped()
            else:
                self.try_plan()
        elif phase == "preparing":
            self.advance_preparing()
        elif phase == "training":
            self.advance_training()
        elif phase == "finishing" and complete:
            self.finished()
        elif phase == "finishing" and self.state.stop_asked:
            self.stopped()

    def advance_preparing(self) -> None:
        plan = self.state.plan
        assert plan is not None
        if self.state.stop_asked:
            self.stopped()
        elif any(self.state.members[p].leaving for p in plan.peers if p in self.state.members):
            self.abort("a worker leaves before it began")
        elif all(self.state.members[p].ready == plan.generation for p in plan.peers) and self.is_agreed(plan):
            self.go_back(plan)
            self.found(plan)
            self.journal(ev.TrainingStarted(generation=plan.generation, step=plan.first_step))
            self.forget_stop()  # what is leased from here on goes beyond it
            self.set(publish=0 if self.state.published < 0 and plan.origin == "init" else self.state.publish)
            if plan.first_step >= self.rules.steps:
                self.set(publish=self.rules.steps)
                self.enter("finishing", "the last round is committed: publishing")
            else:
                self.enter("training", "")
                self.grant()
                self.publish_asked()

    def go_back(self, plan: Plan) -> None:
        """A plan from an older round begins: everybody in it has proved to hold that one, so newer ones are given up.

        Until then their holders may come back.
        """
        state = self.state
        if plan.first_step >= state.committed.step:
            return
        older = (*state.marks, Mark(kind="init", generation=0, step=0, sample=0))
        mark = next(m for m in older if m.step == plan.first_step)
        self.commands.append(Uncommit(step=mark.step))
        self.journal(ev.RolledBack(step=mark.step, why="nobody holds a newer state of every stage"))
        self.set(
            committed=mark,
            undivided=None,
            marks=tuple(m for m in state.marks if m.step < mark.step),
            publish=None if (state.publish or 0) > mark.step else state.publish,
            evaluated=min(state.evaluated, mark.step),  # what is trained anew is evaluated and charted anew
            charted=min(state.charted, mark.step),
        )

    def advance_training(self) -> None:
        state, plan = self.state, self.state.plan
        assert plan is not None
        for at in sorted(state.rounds_done):
            if state.rounds_done[at].keys() >= plan.peers and not self.close_round(at):
                return
        if self.state.phase != "training":
            return
        if not self.state.closing:
            members = self.state.members
            if self.state.stop_asked:
                self.close("save")
            else:
                leaves = any(members[p].leaving for p in plan.peers if p in members)
                wish = self.state.redivide
                if (
                    leaves
                    or self.wants_a_round()
                    or (wish is not None and wish.begun)
                    or self.is_uneven()
                    or (self.settled() and self.are_due())
                ):
                    self.close("round")
        self.grant()
        self.publish_asked()
        if self.state.closing == "save" and all(self.has_stop(p, plan) for p in plan.peers):
            assert self.state.end is not None
            mark = Mark(
                kind="step",
                generation=plan.generation,
                step=self.state.end,
                sample=plan.first_sample_of(self.state.end),
                holders=tuple(tuple(r.peer for r in replicas) for replicas in plan.replicas),
            )
            self.set(stop=mark)
            self.commands.append(Remember(generation=self.state.generation, stop=mark))
            self.stopped()

    def close(self, how: str) -> None:
        """Ends the generation in order, where its leases end."""
        plan = self.state.plan
        assert plan is not None
        end = self.state.until
        if end == self.state.committed.step:  # nothing has been leased since
            if how == "round":
                self.replan("the crew changes")
            else:
                self.stopped()
            return
        self.set(closing=how, end=end)
        if how == "save":
            self.journal(ev.Stopping(step=end))

    def grant(self) -> None:
        """Leases the steps that the slowest peer is close to."""
        plan = self.state.plan
        if plan is None or self.state.phase != "training" or self.state.plan is not plan:
            return
        done = min(max(self.state.members[p].step, plan.first_step) for p in plan.peers)
        self.set(pace=self.state.pace.reached(done, self.now, learn=done > plan.first_step + 1))
        limit = self.rules.steps if self.state.end is None else self.state.end
        leased = {s: t for s, t in self.state.leased_at.items() if s >= done}
        until = max(self.state.until, min(limit, done + self.rules.lease_ahead))
        if self.state.paused is not None or self.is_held():
            until = self.state.until
        for at in range(self.state.until, until):
            expires = self.now + self.rules.lease_seconds * (1 + at - done)
            leased[at] = expires
            for seat in plan.seats:
                self.commands.append(
                    Lease(
                        generation=plan.generation,
                        step=at,
                        peer=plan.peer_of(0, seat.start),
                        first=plan.samples(at, seat.start).start,
                        count=len(seat) * plan.microbatch_size,
                        expires=expires,
                    )
                )
        if self.state.closing and done == self.state.end:  # the closing has its time, too: its round may be a large one
            leased[done] = self.state.leased_at.get(done, self.now + TRANSFER_LEASES * self.rules.lease_seconds)
        self.set(until=until, leased_at=leased)
        if until == self.rules.steps and self.state.end is None:
            self.set(end=until, closing="round")

    def close_round(self, at: int) -> bool:
        """Commits a round that everybody reported, if it counts. False if the generation ended over it."""
        plan, reports = self.state.plan, self.state.rounds_done[at]
        assert plan is not None
        failpoint("coordinator.round.verdict")
        verdict = judge(plan, self.state.committed, at, reports)
        if verdict.wrong:
            names = tuple(sorted(self.state.members[p].name for p in verdict.wrong))
            self.journal(ev.RoundRefused(step=at, peers=names, why=verdict.why))
            for replicas in plan.replicas:
                peers = {r.peer for r in replicas}
                # If nobody of a stage is right, there is nobody to take it over from: each checks its own by digest.
                for peer in verdict.wrong & peers if peers - verdict.wrong else ():
                    self.member(replace(self.state.members[peer], savepoints=frozenset()))
            self.abort(verdict.why)
            return False
        self.commit(verdict.mark, reports)
        if self.state.closing == "round" and at == self.state.end:
            if at >= self.rules.steps:
                self.set(publish=at)
                self.enter("finishing", "the last round is committed: evaluating and publishing")
            else:
                self.replan("the crew changes")
            return False
        return True

    def commit(self, mark: Mark, reports: Mapping[str, pb.RoundDone]) -> None:
        state, plan = self.state, self.state.plan
        assert plan is not None
        command = Commit(
            mark=mark,
            round=state.rounds + 1,
            replicas=len(reports),
            samples=mark.sample - state.committed.sample,
            nbytes=min(sum(r.nbytes for r in reports.values()), 2**63 - 1),
            seconds=max([0.0, *(r.seconds for r in reports.values() if math.isfinite(r.seconds))]),
            degraded=bool(short_of_quorum(self.rules, state)),
            parts=parts_of(self.rules, plan, reports),
        )
        self.commands.append(command)
        for i, replicas in enumerate(plan.replicas):
            point = mark.savepoint(i, plan.layers[i])
            for replica in replicas:
                if member := self.state.members.get(replica.peer):
                    rounds = {s for s in member.savepoints if s.kind == "round" and s.step < mark.step}
                    newest = sorted(rounds, key=lambda s: (s.step, s.generation))[-KEPT_MARKS:]
                    # A faster stage may have saved its stop before this round came in.
                    stops = {s for s in member.savepoints if s.kind == "step" and s.generation == plan.generation}
                    self.member(replace(member, savepoints=frozenset({*newest, *stops, point})))
        last = state.undivided or state.committed  # as it is on the disk
        older = (last, *state.marks) if last.step else state.marks
        self.set(
            committed=mark,
            undivided=None,
            marks=older[:KEPT_MARKS],
            rounds=state.rounds + 1,
            leased_at={at: max(t, self.now + self.rules.lease_seconds) for at, t in state.leased_at.items()},
            broken=(),
            rounds_done={s: r for s, r in state.rounds_done.items() if s > mark.step},
        )
        self.journal(
            ev.RoundCommitted(
                round=command.round,
                step=mark.step,
                replicas=command.replicas,
                samples=command.samples,
                nbytes=command.nbytes,
                seconds=command.seconds,
                degraded=command.degraded,
            )
        )
        if self.state.rounds % self.rules.publish_rounds == 0 and self.state.publish is None:
            self.set(publish=mark.step)

    # Ends and beginnings of a generation.

    def abort(self, why: str) -> None:
        """Everybody back to the last committed round, at once."""
        if self.state.phase in ("finished", "stopped"):
            return
        if self.state.phase == "training":
            self.journal(ev.RolledBack(step=self.state.committed.step, why=why))
        self.undivide(why)
        self.commands.append(ReturnLeases(reason=why))
        self.forget_stop()
        self.replan(why)

    def replan(self, why: str) -> None:
        """Leaves the generation for ``waiting``; a plan follows in the same turn if one is possible."""
        self.set(
            plan=None,
            until=0,
            end=None,
            closing="",
            leased_at={},
            losses={},
            rounds_done={},
            evals={},
            publish=self.state.publish if self.state.publish == self.state.committed.step else None,
        )
        self.enter("waiting", why)
        if not self.state.stop_asked:
            self.try_plan()

    def forget_stop(self) -> None:
        """A stop is gone on from once: afterwards its leases are committed or returned with the others."""
        if self.state.stop:
            self.commands.append(Remember(generation=self.state.generation, stop=None))
            self.set(stop=None)

    def finished(self) -> None:
        self.journal(ev.Finished(step=self.rules.steps))
        self.enter("finished", "the run is complete")

    def try_plan(self) -> None:
        """From ``waiting``: a new generation, if one can begin."""
        match choose(self.rules, self.state, self.now):
            case Wait(why=why):
                if self.state.note != why:
                    self.journal(ev.Waiting(why=why))
                    self.set(note=why)
            case Start() as start:
                self.begin(start)

    def begin(self, start: Start) -> None:
        """Starts a generation."""
        state, mark = self.state, start.mark
        if mark.kind != "step" and state.generation:
            self.commands.append(ReturnLeases(reason="a new plan starts from the last committed round"))
            self.set(stop=None)
        plan = shared(self.state, make_plan(self.rules, self.state, start))
        self.commands.append(Remember(generation=plan.generation, stop=self.state.stop))
        for member in list(self.state.members.values()):
            prepared = None if member.peer in plan.peers else member.prepared
            self.member(replace(member, step=mark.step, ready=0, prepared=prepared, missed=""))
        self.set(generation=plan.generation, plan=plan, until=mark.step, end=None, closing="", leased_at={})
        self.set(keeping=keeping(self.rules, plan))
        self.planned(plan)
        # What is trained anew is evaluated and charted anew; an older mark counts once everybody is ready.
        kept = max(mark.step, state.committed.step)
        self.set(evaluated=min(state.evaluated, kept), charted=min(state.charted, kept))
        failpoint("coordinator.plan.issued")
        names = tuple(tuple(self.state.members[p].name for p in peers) for peers in start.seats)
        self.journal(
            ev.PlanIssued(
                generation=plan.generation,
                step=mark.step,
                origin=mark.kind,
                stages=names,
                shares=tuple(stage.shares for stage in plan.stages),
                peers=tuple(tuple(peers) for peers in start.seats),
                layers=plan.layers,
            )
        )
        self.enter("preparing", "workers take over their stages")
