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

from collections.abc import Sequence
from dataclasses import replace

from ..protocol import control_pb2 as pb
from ..protocol.errors import WireError
from ..protocol.plan import Plan, SavePoint, StagePlan
from . import events as ev
from .assignment import Offer, assign
from .state import (
    Command,
    Commit,
    Dismiss,
    Gone,
    Input,
    Joined,
    Journal,
    Lease,
    Mark,
    Member,
    Point,
    Remember,
    ReturnLeases,
    Rules,
    RunState,
    Said,
    StopAsked,
    Tick,
    Uncommit,
    Uploaded,
)

KEPT_MARKS = 50


def step(rules: Rules, state: RunState, what: Input, now: float) -> tuple[RunState, list[Command]]:
    """The next state and what must be done about it."""
    turn = Turn(rules, state, now)
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
        case Uploaded(step=at, path=path):
            turn.uploaded(at, path)
    turn.advance()
    return turn.state, turn.commands


def view_of(rules: Rules, state: RunState, peer: str) -> pb.View:
    """What this peer should know now; everything it does follows from its newest view."""
    member, plan = state.members[peer], state.plan
    seated = plan is not None and peer in plan.peers
    donor = (
        plan is not None and state.phase == "preparing" and any(peer == d.peer for s in plan.stages for d in s.donors)
    )
    return pb.View(
        phase=state.phase,
        note=state.note,
        plan=plan.to_proto() if plan else None,
        until=state.until,
        end=state.end or 0,
        closing=state.closing,
        committed=state.committed.step,
        publish=state.publish or 0,
        publishing=state.publish is not None,
        released=state.phase in ("finished", "stopped") or (member.leaving and not seated and not donor),
    )


class Turn:
    """One input's effect: collects the new state and the commands."""

    def __init__(self, rules: Rules, state: RunState, now: float) -> None:
        self.rules, self.state, self.now = rules, state, now
        self.commands: list[Command] = []

    # What comes in.

    def joined(self, member: Member) -> None:
        present = self.state.members.get(member.peer)
        if present and present.session != member.session:
            self.dismiss(
                member,
                "duplicate",
                "another worker with this key is connected",
                "Give this one a key of its own: --data-dir",
            )
            return
        smallest = min(need.memory_gb for need in self.rules.needs)
        if member.memory_gb < smallest:
            self.dismiss(
                member,
                "capacity",
                f"the smallest stage of this run needs {smallest:.3g} GB, this worker offers {member.memory_gb:.3g} GB",
                "Offer more with --memory-gb, or ask the operator for more pipeline.stages.",
            )
            return
        if self.state.phase in ("finished", "stopped"):
            self.dismiss(member, self.state.phase, f"the run is {self.state.phase}", "There is nothing to do here.")
            return
        if present is None:
            self.journal(ev.PeerJoined(peer=member.peer, name=member.name, device=member.device))
        self.member(replace(member, joined=self.now, last_seen=self.now))
        self.set(last_join=self.now)

    def gone(self, peer: str, session: bytes) -> None:
        member = self.state.members.get(peer)
        if member is None or (session and session != member.session):
            return
        released = view_of(self.rules, self.state, peer).released
        self.journal(ev.PeerGone(peer=peer, name=member.name, graceful=released))
        self.set(members={p: m for p, m in self.state.members.items() if p != peer})
        plan = self.state.plan
        if released or plan is None or self.state.phase in ("finished", "stopped", "waiting"):
            return
        donors = {d.peer for s in plan.stages for d in s.donors}
        if peer in plan.peers or (self.state.phase == "preparing" and peer in donors):
            self.abort(f"{member.name} is gone")

    def said(self, peer: str, report: pb.Up) -> None:
        member = self.state.members.get(peer)
        if member is None:
            return
        self.member(replace(member, last_seen=self.now))
        body = report.WhichOneof("body")
        if body == "heartbeat":
            self.member(replace(self.state.members[peer], state=report.heartbeat.state or "training"))
        elif body == "leaving":
            if not member.leaving:
                self.journal(ev.PeerLeaving(peer=peer, name=member.name))
                self.member(replace(self.state.members[peer], leaving=True))
        elif body in ("ready", "step_done", "round_done", "eval_done", "saved", "fault"):
            message = getattr(report, body)
            if self.state.plan is None or message.generation != self.state.plan.generation:
                return  # of a generation that is over
            if peer in self.state.plan.peers:
                getattr(self, body)(self.state.members[peer], message)

    def ready(self, member: Member, message: pb.Ready) -> None:
        self.member(replace(member, ready=message.generation))

    def step_done(self, member: Member, message: pb.StepDone) -> None:
        if message.step != member.step or message.step >= self.state.until:
            return
        self.member(replace(member, step=message.step + 1))
        plan = self.state.plan
        assert plan is not None
        last = {r.peer for r in plan.stages[-1].replicas}
        if member.peer in last:
            losses = {**self.state.losses.get(message.step, {}), member.peer: message}
            kept = {**self.state.losses, message.step: losses}
            if losses.keys() == last:
                targets = sum(m.targets for m in losses.values())
                loss = sum(m.loss_sum for m in losses.values()) / max(1, targets)
                samples = plan.first_sample_of(message.step + 1)
                self.commands.append(Point(step=message.step + 1, tokens_samples=samples, train=loss))
                del kept[message.step]
            self.set(losses=kept)

    def round_done(self, member: Member, message: pb.RoundDone) -> None:
        plan = self.state.plan
        assert plan is not None
        done = {**self.state.rounds_done.get(message.step, {}), member.peer: message}
        self.set(rounds_done={**self.state.rounds_done, message.step: done})

    def eval_done(self, member: Member, message: pb.EvalDone) -> None:
        plan = self.state.plan
        assert plan is not None
        last = {r.peer for r in plan.stages[-1].replicas}
        if member.peer not in last or message.step <= self.state.evaluated:
            return
        done = {**self.state.evals.get(message.step, {}), member.peer: message}
        self.set(evals={**self.state.evals, message.step: done})
        if done.keys() == last:
            loss = sum(m.loss_sum for m in done.values()) / max(1, sum(m.targets for m in done.values()))
            samples = plan.first_sample_of(message.step)
            self.commands.append(Point(step=message.step, tokens_samples=samples, heldout=loss))
            self.journal(ev.HeldOut(step=message.step, loss=loss))
            self.set(evaluated=message.step, evals={})

    def saved(self, member: Member, message: pb.Saved) -> None:
        try:
            point = SavePoint.from_proto(message.savepoint)
        except WireError:
            return
        self.member(replace(member, savepoints=member.savepoints | {point}))

    def fault(self, member: Member, message: pb.Fault) -> None:
        self.journal(ev.Faulted(peer=member.peer, name=member.name, what=message.text))
        self.abort(f"{member.name}: {message.text}")

    def uploaded(self, at: int, path: str) -> None:
        self.journal(ev.Published(step=at, path=path))
        self.set(published=max(self.state.published, at))
        if self.state.publish is not None and self.state.publish <= at:
            self.set(publish=None)

    def stop_asked(self) -> None:
        self.set(stop_asked=True)

    def tick(self) -> None:
        for member in list(self.state.members.values()):
            if self.now - member.last_seen > self.rules.silence_seconds:
                self.dismiss(
                    member,
                    "silent",
                    "no word for too long",
                    "Check the line; the worker dials again by itself.",
                )
                self.gone(member.peer, member.session)
        if self.state.phase == "training":
            late = [s for s, expires in self.state.leased_at.items() if expires < self.now]
            if late:
                self.abort(f"the lease of step {min(late)} expired")

    # What follows.

    def advance(self) -> None:
        """Moves the phase on as far as the state allows."""
        phase = self.state.phase
        if phase == "waiting":
            if self.state.stop_asked:
                self.stopped()
            else:
                self.try_plan()
        elif phase == "preparing":
            self.advance_preparing()
        elif phase == "training":
            self.advance_training()
        elif phase == "finishing" and self.state.published >= self.rules.steps <= self.state.evaluated:
            self.journal(ev.Finished(step=self.rules.steps))
            self.enter("finished", "the run is complete")
        elif phase == "finishing" and self.state.stop_asked:
            self.stopped()

    def advance_preparing(self) -> None:
        plan = self.state.plan
        assert plan is not None
        if self.state.stop_asked:
            self.stopped()
        elif any(self.state.members[p].leaving for p in plan.peers if p in self.state.members):
            self.abort("a worker leaves before it began")
        elif all(self.state.members[p].ready == plan.generation for p in plan.peers):
            self.journal(ev.TrainingStarted(generation=plan.generation, step=plan.first_step))
            self.set(publish=0 if self.state.published < 0 and plan.origin == "init" else self.state.publish)
            if plan.first_step >= self.rules.steps:
                self.set(publish=self.rules.steps)
                self.enter("finishing", "the last round is committed: publishing")
            else:
                self.enter("training", "")
                self.grant()

    def advance_training(self) -> None:
        state, plan = self.state, self.state.plan
        assert plan is not None
        for at in sorted(state.rounds_done):
            if state.rounds_done[at].keys() == plan.peers and not self.close_round(at):
                return
        if self.state.phase != "training":
            return
        if not self.state.closing:
            members = self.state.members
            if self.state.stop_asked:
                self.close("save")
            elif any(members[p].leaving for p in plan.peers if p in members) or (self.settled() and self.newcomers()):
                self.close("round")
        self.grant()
        if self.state.closing == "save" and all(self.has_stop(p) for p in plan.peers):
            assert self.state.end is not None
            mark = Mark(
                kind="step",
                generation=plan.generation,
                step=self.state.end,
                sample=plan.first_sample_of(self.state.end),
                holders=tuple(tuple(r.peer for r in s.replicas) for s in plan.stages),
            )
            self.set(stop=mark)
            self.commands.append(Remember(generation=self.state.generation, stop=mark))
            self.stopped()

    def close(self, how: str) -> None:
        """Ends the generation in order, where its leases end."""
        plan = self.state.plan
        assert plan is not None
        end = self.state.until
        if how == "round" and end == self.state.committed.step:
            self.replan("the crew changes")
            return
        self.set(closing=how, end=end)
        if how == "save":
            self.journal(ev.Stopping(step=end))

    def newcomers(self) -> bool:
        """Whether somebody could be seated who is not."""
        assert self.state.plan is not None
        smallest = min(need.memory_gb for need in self.rules.needs)
        return any(
            p not in self.state.plan.peers and not m.leaving and m.memory_gb >= smallest
            for p, m in self.state.members.items()
        )

    def settled(self) -> bool:
        return self.now - self.state.last_join >= self.rules.settle_seconds

    def has_stop(self, peer: str) -> bool:
        plan, member = self.state.plan, self.state.members.get(peer)
        assert plan is not None
        if member is None:
            return False
        return any(
            s.kind == "step" and s.generation == plan.generation and s.step == self.state.end for s in member.savepoints
        )

    def grant(self) -> None:
        """Leases the steps that the slowest peer is close to."""
        plan = self.state.plan
        if plan is None or self.state.phase != "training" or self.state.plan is not plan:
            return
        done = min(max(self.state.members[p].step, plan.first_step) for p in plan.peers)
        limit = self.rules.steps if self.state.end is None else self.state.end
        leased = {s: t for s, t in self.state.leased_at.items() if s >= done}
        until = max(self.state.until, min(limit, done + self.rules.lease_ahead))
        for at in range(self.state.until, until):
            expires = self.now + self.rules.lease_seconds * (1 + at - done)
            leased[at] = expires
            for replica in plan.stages[0].replicas:
                mine = [m for m in range(plan.microbatches_per_step) if plan.peer_of(0, m) == replica.peer]
                self.commands.append(
                    Lease(
                        generation=plan.generation,
                        step=at,
                        peer=replica.peer,
                        first=plan.samples(at, mine[0]).start,
                        count=len(mine) * plan.microbatch_size,
                        expires=expires,
                    )
                )
        self.set(until=until, leased_at=leased)
        if until == self.rules.steps and self.state.end is None:
            self.set(end=until, closing="round")

    def close_round(self, at: int) -> bool:
        """Decides whether a round that everybody reported counts. False if the generation ended over it."""
        state, plan = self.state, self.state.plan
        assert plan is not None
        reports = state.rounds_done[at]
        sample = plan.first_sample_of(at)
        since = sample - state.committed.sample
        digests, wrong, why = [], set[str](), ""
        for i, stage in enumerate(plan.stages):
            said = {r.peer: reports[r.peer] for r in stage.replicas}
            known = state.committed.digests[i] if state.committed.digests else None
            odd = {p for p, r in said.items() if known and r.base_digest != known}
            if odd:
                wrong, why = wrong | odd, "a replica came with other reference weights"
            elif len({r.digest for r in said.values()}) > 1:
                wrong, why = wrong | minority({p: r.digest for p, r in said.items()}), "the digests differ"
            elif sum(r.samples for r in said.values()) != since:
                wrong, why = wrong | set(said), f"stage {i} counts other samples than were leased"
            digests.append(reports[stage.replicas[0].peer].digest)
        if wrong:
            names = tuple(sorted(state.members[p].name for p in wrong if p in state.members))
            self.journal(ev.RoundRefused(step=at, peers=names, why=why))
            for peer in wrong & state.members.keys():
                self.member(replace(self.state.members[peer], savepoints=frozenset()))
            self.abort(why)
            return False
        mark = Mark(kind="round", generation=plan.generation, step=at, sample=sample, digests=tuple(digests))
        self.commit(mark, reports)
        if self.state.closing == "round" and at == self.state.end:
            if at >= self.rules.steps:
                self.set(publish=at)
                self.enter("finishing", "the last round is committed: evaluating and publishing")
            else:
                self.replan("the crew changes")
            return False
        return True

    def commit(self, mark: Mark, reports: dict[str, pb.RoundDone] | object) -> None:
        assert isinstance(reports, dict)
        state, plan = self.state, self.state.plan
        assert plan is not None
        command = Commit(
            mark=mark,
            round=state.rounds + 1,
            replicas=len(reports),
            samples=mark.sample - state.committed.sample,
            nbytes=sum(r.nbytes for r in reports.values()),
            seconds=max(r.seconds for r in reports.values()),
        )
        self.commands.append(command)
        for i, stage in enumerate(plan.stages):
            point = SavePoint(
                kind="round",
                generation=mark.generation,
                step=mark.step,
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                digest=mark.digests[i],
            )
            for replica in stage.replicas:
                if member := self.state.members.get(replica.peer):
                    kept = {s for s in member.savepoints if s.kind == "round"}
                    newest = sorted(kept, key=lambda s: (s.step, s.generation))[-4:]
                    self.member(replace(member, savepoints=frozenset({*newest, point})))
        older = (state.committed, *state.marks) if state.committed.step else state.marks
        self.set(
            committed=mark,
            marks=older[:KEPT_MARKS],
            rounds=state.rounds + 1,
            rounds_done={s: r for s, r in state.rounds_done.items() if s > mark.step},
            stop=None,
        )
        if state.stop:
            self.commands.append(Remember(generation=state.generation, stop=None))
        self.journal(
            ev.RoundCommitted(
                round=command.round,
                step=mark.step,
                replicas=command.replicas,
                samples=command.samples,
                nbytes=command.nbytes,
                seconds=command.seconds,
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
        self.commands.append(ReturnLeases(reason=why))
        self.set(stop=None)
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

    def stopped(self) -> None:
        at = self.state.stop or self.state.committed
        if at.kind != "step":
            self.commands.append(ReturnLeases(reason="the run was stopped"))
        self.journal(ev.Stopped(step=at.step))
        self.enter("stopped", "the operator stopped the run")

    def try_plan(self) -> None:
        """From ``waiting``: a plan, if there are peers for every stage and somebody holds every stage's state."""
        rules, state = self.rules, self.state
        free = {p: m for p, m in state.members.items() if not m.leaving}
        wanted = max(len(rules.layers), rules.wait_for if state.generation == 0 else 0)
        if len(free) < len(rules.layers) or (len(free) < wanted and state.generation == 0):
            missing = wanted - len(free)
            self.wait(f"{missing} more worker{'s' if missing > 1 else ''} must join")
            return
        if not self.settled() and not (rules.wait_for and len(free) >= rules.wait_for):
            self.wait("workers are joining")
            return
        if state.stop and self.holds_stop(state.stop):
            self.issue(state.stop, [list(peers) for peers in state.stop.holders])
            return
        candidates: Sequence[Mark] = (state.committed, *state.marks)
        patient = state.stop is None or self.now - max(state.since, state.last_join) > rules.patience_seconds
        if not patient and state.stop:
            self.wait("the workers that saved the run's last steps must come back")
            return
        for mark in candidates:
            holders = self.holders(mark)
            if all(holders) or mark.kind == "init":
                offers = {
                    p: Offer(
                        speed=m.speed,
                        memory_gb=m.memory_gb,
                        home=next((i for i, h in enumerate(holders) if p in h), None),
                    )
                    for p, m in free.items()
                }
                seats = assign(rules.needs, offers)
                if seats is None:
                    worst = max(need.memory_gb for need in rules.needs)
                    offered = max(m.memory_gb for m in free.values())
                    self.wait(
                        f"a stage needs {worst:.3g} GB and the largest worker offers {offered:.3g} GB:"
                        " more or larger workers, or more pipeline.stages"
                    )
                    return
                self.issue(mark, seats)
                return
            if self.now - max(state.since, state.last_join) <= rules.patience_seconds:
                gap = next(i for i, h in enumerate(holders) if not h)
                self.wait(f"nobody here holds stage {gap} as of step {mark.step}: its workers must come back")
                return
        self.wait("nobody here holds any state of this run")

    def holds_stop(self, mark: Mark) -> bool:
        for peers, (first, last) in zip(mark.holders, self.rules.layers, strict=True):
            for peer in peers:
                member = self.state.members.get(peer)
                if member is None or member.leaving:
                    return False
                if not any(
                    s.kind == "step"
                    and (s.generation, s.step, s.first_layer, s.last_layer) == (mark.generation, mark.step, first, last)
                    for s in member.savepoints
                ):
                    return False
        return True

    def holders(self, mark: Mark) -> list[list[str]]:
        """Of each stage, the peers (leaving ones too) that hold its state at ``mark``."""
        found = []
        for i, (first, last) in enumerate(self.rules.layers):
            digest = mark.digests[i] if mark.digests else b""
            wanted = (mark.generation, mark.step, first, last, digest)
            found.append(
                [
                    p
                    for p, m in sorted(self.state.members.items())
                    if any(
                        (s.generation, s.step, s.first_layer, s.last_layer, s.digest) == wanted
                        for s in m.savepoints
                        if s.kind == "round"
                    )
                ]
            )
        return found

    def issue(self, mark: Mark, seats: list[list[str]]) -> None:
        """Starts a generation from ``mark``."""
        state, members = self.state, self.state.members
        if mark.step < state.committed.step:
            self.commands.append(Uncommit(step=mark.step))
            self.journal(ev.RolledBack(step=mark.step, why="nobody holds a newer state of every stage"))
            kept = tuple(m for m in state.marks if m.step < mark.step)
            self.set(committed=mark, marks=kept)
        if mark.kind != "step" and state.generation:
            self.commands.append(ReturnLeases(reason="a new plan starts from the last committed round"))
            self.set(stop=None)
        generation = state.generation + 1
        holders = seats if mark.kind == "step" else self.holders(mark)
        plan = Plan(
            generation=generation,
            first_step=mark.step,
            first_sample=mark.sample,
            origin=mark.kind,
            origin_generation=mark.generation,
            microbatches=self.rules.microbatches,
            microbatch_size=self.rules.microbatch_size,
            stages=tuple(
                StagePlan(
                    first_layer=first,
                    last_layer=last,
                    replicas=tuple(members[p].replica for p in peers),
                    donors=tuple(members[p].replica for p in held),
                )
                for (first, last), peers, held in zip(self.rules.layers, seats, holders, strict=True)
            ),
        )
        self.commands.append(Remember(generation=generation, stop=self.state.stop))
        for peer, member in list(members.items()):
            self.member(replace(member, step=mark.step, ready=0))
        self.set(generation=generation, plan=plan, until=mark.step, end=None, closing="", leased_at={})
        names = tuple(tuple(members[p].name for p in peers) for peers in seats)
        self.journal(ev.PlanIssued(generation=generation, step=mark.step, origin=mark.kind, stages=names))
        self.enter("preparing", "workers take over their stages")

    # Small change.

    def wait(self, why: str) -> None:
        if self.state.note != why:
            self.journal(ev.Waiting(why=why))
            self.set(note=why)

    def enter(self, phase: str, note: str) -> None:
        self.set(phase=phase, note=note, since=self.now)

    def member(self, member: Member) -> None:
        self.set(members={**self.state.members, member.peer: member})

    def dismiss(self, member: Member, code: str, text: str, hint: str) -> None:
        self.commands.append(Dismiss(peer=member.peer, session=member.session, code=code, text=text, hint=hint))

    def journal(self, event: ev.Event) -> None:
        self.commands.append(Journal(event=event))

    def set(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]


def minority(votes: dict[str, bytes]) -> set[str]:
    """Those who do not say what most say; everybody, if there is no most."""
    counts = {v: sum(1 for o in votes.values() if o == v) for v in votes.values()}
    best = max(counts.values())
    winners = [v for v, n in counts.items() if n == best]
    return set(votes) if len(winners) > 1 else {p for p, v in votes.items() if v != winners[0]}
