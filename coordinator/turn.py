"""One input's turn of the state machine: notes what came in. What follows from it is decided in :mod:`.run`."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

from ..protocol import control_pb2 as pb
from ..protocol.errors import WireError
from ..protocol.plan import SavePoint
from . import events as ev
from .masking import masked
from .orders import reason
from .planning import known_marks
from .state import Ban, Command, Dismiss, Journal, Member, Point, Rules, RunState

TRANSFER_LEASES = 30  # leases' time that taking over a stage, or publishing it, may take
UNAWARE_SECONDS = 600.0  # that a worker dials in vain, if its owner says nothing else
STATE_LENGTH = 20  # of the word a worker says of itself
MOST_HELD = 1000
BANNED_HINT = "Ask the operator of the run, who alone can let it in again."
FAULT_LENGTH = 300  # of a peer's text, in the log and in everybody's note


class Turn(ABC):
    """Collects the new state and the commands."""

    def __init__(self, rules: Rules, state: RunState, now: float) -> None:
        self.rules, self.state, self.now = rules, state, now
        self.commands: list[Command] = []

    @abstractmethod
    def abort(self, why: str) -> None:
        """Ends the generation at once."""

    @abstractmethod
    def go_on_without(self, member: Member) -> bool:
        """The others of its stage take over what it serves; False if they cannot."""

    @abstractmethod
    def parted(self, member: Member, other: str, what: str) -> None:
        """Two peers do not reach each other."""

    @abstractmethod
    def look_for_hangs(self) -> None:
        """When no step is done for longer than it ever takes, who is to blame is given up."""

    @abstractmethod
    def consider_move(self) -> None:
        """Somebody may have to go to a stage that has become thin."""

    @abstractmethod
    def consider_division(self) -> None:
        """The layers may have to be divided anew."""

    @abstractmethod
    def consider_shares(self) -> None:
        """Replicas may need other shares of a step."""

    @abstractmethod
    def paced(self, member: Member, done: pb.StepDone) -> Member:
        """A member, with what its step tells of its speed."""

    # What comes in.

    def joined(self, member: Member) -> None:
        if member.peer in self.state.bans:
            self.refuse_banned(member)
            return
        if member.peer in self.state.unaware:
            self.set(unaware={p: at for p, at in self.state.unaware.items() if p != member.peer})
        present = self.state.members.get(member.peer)
        if present and present.away is not None and present.session != member.session:
            self.lost(present)  # one key, one process: the old one is no more
            present = None
        if present and present.session != member.session:
            self.dismiss(
                member,
                "duplicate",
                "another worker with this key is connected",
                "Give this one a key of its own: --data-dir",
            )
            return
        smallest = self.rules.smallest_gb(member.device)
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
        if present:  # its line broke and it dialled again: it is where it was
            known = replace(present, addresses=member.addresses, savepoints=member.savepoints, away=None, missed="")
            self.member(replace(known, last_seen=self.now))
            if (witness := self.state.members.get(present.missed)) is not None:
                self.parted(witness, member.peer, f"could not send to {member.name}")
            return
        self.journal(
            ev.PeerJoined(
                peer=member.peer,
                name=member.name,
                device=member.device,
                region=member.region,
                memory_gb=member.memory_gb,
                threads=member.caps.threads,
                upload_mbps=member.caps.upload_mbps,
                state_mbps=member.caps.state_mbps,
            )
        )
        self.member(replace(member, joined=self.now, last_seen=self.now, busy=self.now))
        self.set(last_join=self.now)

    def gone(self, peer: str, session: bytes) -> None:
        member = self.state.members.get(peer)
        if member is None or (session and session != member.session):
            return
        if not needed(self.state, peer):
            self.lost(member)
        elif member.away is None:
            self.member(replace(member, away=self.now + self.rules.away_seconds))
            self.give_up()

    def give_up(self) -> None:
        """Who has not dialled again in time is lost."""
        for member in list(self.state.members.values()):
            if member.away is not None and member.away <= self.now:
                self.lost(member)

    def lost(self, member: Member, *, graceful: bool = False) -> None:
        """A peer is no more. ``graceful``: it is known why, or by its own word."""
        wanted, graceful = needed(self.state, member.peer), graceful or released(self.state, member.peer)
        self.journal(ev.PeerGone(peer=member.peer, name=member.name, graceful=graceful))
        self.set(members={p: m for p, m in self.state.members.items() if p != member.peer})
        self.set(slow=self.state.slow - {member.peer})
        if member.state != "leaving":
            recent = {p: at for p, at in self.state.unaware.items() if self.now - at < UNAWARE_SECONDS}
            self.set(unaware={**recent, member.peer: self.now})
        if wanted and not self.go_on_without(member):
            self.abort(f"{member.name} is gone")

    def said(self, peer: str, report: pb.Up) -> None:
        member = self.state.members.get(peer)
        if member is None:
            return
        self.member(replace(member, last_seen=self.now))
        body = report.WhichOneof("body")
        if body == "heartbeat":
            beat = report.heartbeat
            word = beat.state[:STATE_LENGTH] or "training"
            busy = None if beat.idle else self.now if member.busy is None else member.busy
            relayed = self.paths(member, beat.links)
            self.member(replace(self.state.members[peer], state=word, busy=busy, relayed=relayed))
        elif body == "leaving":
            if report.leaving.at_once:  # it does not dial again either
                self.lost(replace(self.state.members[peer], state="leaving"), graceful=True)
            elif not member.leaving:
                self.journal(ev.PeerLeaving(peer=peer, name=member.name))
                self.member(replace(self.state.members[peer], leaving=True))
        elif body == "held":
            self.held(self.state.members[peer], report.held)
        elif body == "prepared":
            with contextlib.suppress(WireError):
                point, plan, move = SavePoint.from_proto(report.prepared.savepoint), self.state.plan, self.state.move
                if plan is None or peer not in plan.peers or (move is not None and move.begun and move.peer == peer):
                    self.member(replace(self.state.members[peer], prepared=point))
        elif body in ("ready", "step_done", "round_done", "eval_done", "saved", "fault"):
            message = getattr(report, body)
            if body == "ready":
                self.took_over(self.state.members[peer], message)
            if self.state.plan is None or message.generation != self.state.plan.generation:
                return  # of a generation that is over
            if peer in self.state.plan.peers:
                getattr(self, body)(self.state.members[peer], message)

    def paths(self, member: Member, links: Iterable[pb.Link]) -> frozenset[str]:
        """The peers that a member reaches through a relay; tells of those that it reaches otherwise than before."""
        others = {link.peer: link.path for link in links if link.peer in self.state.members}
        relayed = frozenset(peer for peer, path in others.items() if path == "relayed")
        direct = frozenset(peer for peer, path in others.items() if path in ("direct", "punched"))
        for path, changed in (("relayed", relayed - member.relayed), ("direct", direct & member.relayed)):
            for other in sorted(changed):
                name = self.state.members[other].name
                self.journal(
                    ev.PathChanged(peer=member.peer, name=member.name, other=other, other_name=name, path=path)
                )
        return relayed

    def ready(self, member: Member, message: pb.Ready) -> None:
        self.member(replace(member, ready=message.generation, digest=message.digest))

    def took_over(self, member: Member, message: pb.Ready) -> None:
        """What a peer got from a donor, it holds from now on, even if the donor is lost before the plan begins."""
        plan = self.state.plan
        if plan and plan.origin == "step" and plan.generation == message.generation:
            return
        for mark in known_marks(self.state):
            for point in mark.savepoints(self.rules.division(mark.stages)) if mark.digests else ():
                if point.digest == message.digest:
                    self.member(replace(member, savepoints=member.savepoints | {point}))
                    return

    def step_done(self, member: Member, message: pb.StepDone) -> None:
        if not member.step <= message.step < self.state.until:  # after a restart it may be ahead of what is known
            return
        self.member(replace(self.paced(member, message), step=message.step + 1))
        plan = self.state.plan
        assert plan is not None
        last = {r.peer for r in plan.replicas[-1]}
        if member.peer in last and message.step >= self.state.charted:
            losses = {**self.state.losses.get(message.step, {}), member.peer: message}
            kept = {**self.state.losses, message.step: losses}
            if losses.keys() >= last:
                targets = sum(m.targets for m in losses.values())
                loss = sum(m.loss_sum for m in losses.values()) / max(1, targets)
                samples = plan.first_sample_of(message.step + 1)
                self.commands.append(Point(step=message.step + 1, tokens_samples=samples, train=loss))
                self.set(charted=message.step + 1)
            self.set(losses={s: said for s, said in kept.items() if s >= self.state.charted})

    def round_done(self, member: Member, message: pb.RoundDone) -> None:
        plan = self.state.plan
        assert plan is not None
        if not self.state.committed.step < message.step <= self.state.until or message.attempt != plan.attempt:
            return
        done = {**self.state.rounds_done.get(message.step, {}), member.peer: message}
        self.set(rounds_done={**self.state.rounds_done, message.step: done})

    def eval_done(self, member: Member, message: pb.EvalDone) -> None:
        plan = self.state.plan
        assert plan is not None
        last = {r.peer for r in plan.replicas[-1]}
        if member.peer not in last or not self.state.evaluated < message.step <= self.state.until:
            return
        done = {**self.state.evals.get(message.step, {}), member.peer: message}
        self.set(evals={**self.state.evals, message.step: done})
        if done.keys() >= last:
            loss = sum(m.loss_sum for m in done.values()) / max(1, sum(m.targets for m in done.values()))
            samples = plan.first_sample_of(message.step)
            self.commands.append(Point(step=message.step, tokens_samples=samples, heldout=loss))
            self.journal(ev.HeldOut(step=message.step, loss=loss))
            later = {s: e for s, e in self.state.evals.items() if s > message.step}
            self.set(evaluated=message.step, evals=later)

    def saved(self, member: Member, message: pb.Saved) -> None:
        try:
            point = SavePoint.from_proto(message.savepoint)
        except WireError:
            return
        self.member(replace(member, savepoints=member.savepoints | {point}))

    def held(self, member: Member, message: pb.Held) -> None:
        """What a keeper can do again, all of it."""
        points = set()
        for savepoint in message.savepoints[:MOST_HELD]:
            try:
                points.add(SavePoint.from_proto(savepoint))
            except WireError:
                return
        self.member(replace(member, held=frozenset(p for p in points if p.kind == "round")))

    def fault(self, member: Member, message: pb.Fault) -> None:
        what = masked(" ".join(message.text[:1000].split()))[:FAULT_LENGTH]
        self.journal(ev.Faulted(peer=member.peer, name=member.name, what=what))
        if message.missing:
            self.lacks_origin(message.peer)
        elif message.peer and message.peer != member.peer:
            self.parted(member, message.peer, what)
            return
        else:
            self.set(broken=(*self.state.broken, (member.peer, member.peer)))
        self.abort(f"{member.name}: {what}")

    def lacks_origin(self, peer: str) -> None:
        """What the plan starts from is not there after all."""
        holder, plan = self.state.members.get(peer), self.state.plan
        if self.state.phase == "preparing" and holder and plan:
            origin = (plan.origin_generation, plan.first_step)
            kept, held = (
                frozenset(s for s in points if (s.generation, s.step) != origin)
                for points in (holder.savepoints, holder.held)
            )
            self.member(replace(holder, savepoints=kept, held=held))

    def uploaded(self, at: int, path: str) -> None:
        self.journal(ev.Published(step=at, path=path))
        self.set(published=max(self.state.published, at))
        if self.state.publish is not None and self.state.publish <= at:
            self.set(publish=None)

    def unpublished(self, at: int, why: str) -> None:
        """Only the last model is worth waiting for: its workers try again. Else they go on, and the next one is due."""
        if self.state.publish != at:
            return
        last = self.state.phase == "finishing"
        self.journal(ev.PublishFailed(step=at, why=why, again=last))
        if not last:
            self.set(publish=None)

    def stop_asked(self) -> None:
        self.set(stop_asked=True)

    def tick(self) -> None:
        self.give_up()
        for member in list(self.state.members.values()):
            if member.away is None and self.now - member.last_seen > self.rules.silence_seconds:
                self.dismiss(
                    member,
                    "silent",
                    "no word for too long",
                    "Check the line; the worker dials again by itself.",
                )
                self.lost(member)
        slow = self.state.phase in ("preparing", "finishing")
        if slow and self.now - self.state.since > TRANSFER_LEASES * self.rules.lease_seconds:
            self.abort(f"{self.state.phase} took too long")
        if self.state.phase == "training":
            self.look_for_hangs()
        if self.state.phase == "training" and self.state.paused is None:
            self.consider_move()
            self.consider_division()
            self.consider_shares()

    # Small change.

    def enter(self, phase: str, note: str) -> None:
        self.set(phase=phase, note=note, since=self.now)

    def member(self, member: Member) -> None:
        self.set(members={**self.state.members, member.peer: member})

    def dismiss(self, member: Member, code: str, text: str, hint: str) -> None:
        self.commands.append(Dismiss(peer=member.peer, session=member.session, code=code, text=text, hint=hint))

    def refuse_banned(self, member: Member) -> None:
        self.dismiss(member, "banned", banned(self.state.bans[member.peer]), BANNED_HINT)

    def journal(self, event: ev.Event) -> None:
        self.commands.append(Journal(event=event))

    def set(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]


def banned(ban: Ban) -> str:
    """What a banned peer is told."""
    return f"this worker is banned from the run{reason(ban.why)}"


def needed(state: RunState, peer: str) -> bool:
    """Whether the generation cannot go on without a peer."""
    plan = state.plan
    if plan is None or state.phase in ("waiting", "finished", "stopped"):
        return False
    donors = {d.peer for s in (*plan.stages, *plan.parts) for d in s.donors} if state.phase == "preparing" else set()
    return peer in plan.peers or peer in donors


def released(state: RunState, peer: str) -> bool:
    """Whether nothing more is wanted from a peer."""
    return state.phase in ("finished", "stopped") or (state.members[peer].leaving and not needed(state, peer))
