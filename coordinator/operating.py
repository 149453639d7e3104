"""The operator's hand on a running run: pause, drain, ban, a checkpoint now. All are inputs of the state machine.

A pause lets the leased steps be done and closes a round; the next plan seats everybody where it was, and has nothing
to do until the operator says so. Who joins or leaves meanwhile is seated or let go as ever; nobody is waited for
against the clock. A drained peer leaves as if its owner wished it. A banned one is dropped as a lost one is, and its
key stays out. Pause, bans and the wish for a checkpoint are on disk with their event (:mod:`.resume`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..protocol.hello import DRAINED
from ..protocol.plan import Plan
from ..protocol.schedule import is_round
from . import events as ev
from .orders import reason
from .planning import Wait, holders, known_marks, seated, without
from .sharing import Sharing
from .state import Ban, Mark, Member, Order, Pause, ReturnLeases, Rules, RunState
from .turn import needed


@dataclass(frozen=True, kw_only=True)
class Objection:
    """Why an order cannot be carried out. ``forcible``: it can, if the operator insists."""

    text: str
    hint: str
    forcible: bool = False


def objection(rules: Rules, state: RunState, order: Order) -> Objection | None:
    """What speaks against an order; None if it can be carried out."""
    if state.phase in ("finished", "stopped"):
        return Objection(text=f"the run is {state.phase}", hint="There is nothing to operate any more.")
    match order.action:
        case "pause":
            return _against_pause(rules, state)
        case "resume" if state.paused is None:
            return Objection(text="the run is not paused", hint="Nothing has to be done.")
        case "unban" if order.peer not in state.bans:
            return Objection(text=f"{order.name or order.peer} is not banned", hint="It may join as it is.")
        case "drain" | "ban":
            return _against_going(rules, state, order)
        case "checkpoint":
            return _against_checkpoint(state)
    return None


def _against_pause(rules: Rules, state: RunState) -> Objection | None:
    if state.paused is not None:
        why = f": {state.paused.why}" if state.paused.why else ""
        return Objection(
            text=f"the run is paused already, by {state.paused.who}{why}", hint="Resume it first to pause it anew."
        )
    if state.stop_asked:
        return Objection(text="the run is being stopped", hint="It goes on when its coordinator is started again.")
    if state.phase == "finishing" or (state.phase == "training" and state.until >= rules.steps):
        return Objection(text="the run's last steps are given out already", hint="It is about to finish: let it.")
    return None


def _against_going(rules: Rules, state: RunState, order: Order) -> Objection | None:
    member = state.members.get(order.peer)
    if order.action == "ban" and order.peer in state.bans:
        return Objection(text=f"{state.bans[order.peer].name} is banned already", hint="Nothing has to be done.")
    if member is None:
        absent = Objection(text=f"{order.name or order.peer} is not here", hint="Name a peer that the page shows.")
        return absent if order.action == "drain" else None
    if order.action == "drain" and member.leaving:
        return Objection(text=f"{member.name} is leaving already", hint="It goes as soon as it has handed over.")
    loss = stranded(rules, state, member, at_once=order.action == "ban")
    if loss and not order.force:
        return Objection(text=loss, hint="Wait for another worker, or insist: --force.", forcible=True)
    return None


def _against_checkpoint(state: RunState) -> Objection | None:
    at = state.committed.step
    if state.phase == "finishing":
        return Objection(text="the last model is being published", hint="Wait for it.")
    if state.checkpoint is not None:
        return Objection(text="a checkpoint is asked for already", hint="It is made of the next round: wait for it.")
    if not open_steps(state) and state.paused is not None and at in (state.publish, state.published):
        how = "is being published" if state.publish == at else "is published"
        hint = "Nothing is trained while the run is paused: there is nothing newer."
        return Objection(text=f"the model of step {at} {how} already", hint=hint)
    return None


def open_steps(state: RunState) -> int:
    """Steps that are leased and not in a committed round."""
    return max(0, state.until - state.committed.step) if state.phase == "training" else 0


def stranded(rules: Rules, state: RunState, member: Member, *, at_once: bool) -> str:
    """What the run would lack without a peer, in words; empty: nothing that others cannot take over.

    ``at_once``: nobody can fetch anything from it any more.
    """
    peer, last = member.peer, state.committed
    if state.stop is not None and any(peer in peers for peers in state.stop.holders):
        stop = f"{member.name} holds its part of the stop at step {state.stop.step}"
        return f"{stop}: what came after step {last.step} is trained again"
    fewer = without(state, {peer})
    if last.kind == "round" and (at_once or state.plan is None):
        marks = [m for m in known_marks(state) if m.step == last.step]
        lost = [_only_here(rules, state, fewer, mark) for mark in marks]
        if lost and all(lost):
            stages = " and ".join(str(stage) for stage in lost[0])
            where = f"stage {stages}" if len(lost[0]) == 1 else f"stages {stages}"
            return f"only {member.name} holds {where} as of step {last.step}: the run would fall back or wait"
    if state.plan is None or not needed(state, peer):
        return ""
    after = outlook(rules, state, member, at_once=at_once)
    return f"the run would wait: {after.why}" if isinstance(after, Wait) else ""


def _only_here(rules: Rules, state: RunState, fewer: RunState, mark: Mark) -> list[int]:
    """The stages of a round that nobody else holds."""
    both = zip(holders(rules, state, mark), holders(rules, fewer, mark), strict=True)
    return [stage for stage, (before, after) in enumerate(both) if before and not after]


def outlook(rules: Rules, state: RunState, member: Member, *, at_once: bool) -> Wait | list[list[str]]:
    """Who would sit where, in the next plan, without a peer; ``Wait`` if there would be none."""
    if at_once:
        fewer = without(state, {member.peer})
    else:
        fewer = replace(state, members={**state.members, member.peer: replace(member, leaving=True)})
    if not any(not m.leaving for m in fewer.members.values()):
        return Wait("nobody else is here")
    held = holders(rules, fewer, state.committed)
    found = seated(rules, fewer, state.committed, held, at_once)
    return found if isinstance(found, Wait) else found.seats


def publishable(state: RunState) -> bool:
    """Whether those who train hold the last committed round, and it is not published or about to be."""
    plan, last = state.plan, state.committed
    if plan is None or last.kind != "round" or state.publish is not None or state.published >= last.step:
        return False
    return plan.origin != "step" or last.generation == plan.generation


def checkpoint_from(state: RunState) -> int:
    """The step from which on a committed round is what the operator wants: the last one, if nothing came after it."""
    last = state.committed
    return last.step if not open_steps(state) and publishable(state) else last.step + 1


def is_round_near(rules: Rules, state: RunState) -> bool:
    """Whether a round comes by itself within the steps that are given out soon."""
    soon = range(max(0, state.committed.step), state.until + rules.lease_ahead)
    return any(is_round(rules.sync, rules.seed, step) for step in soon)


class Operating(Sharing):
    """What the operator orders, and what follows from it."""

    def order(self, order: Order) -> None:
        """Carries out what can be; nothing is journaled of what cannot."""
        if objection(self.rules, self.state, order) is not None:
            return
        match order.action:
            case "pause":
                self.pause(order)
            case "resume":
                self.resume(order)
            case "drain":
                self.drain(order, self.state.members[order.peer])
            case "ban":
                self.ban(order)
            case "unban":
                bans = dict(self.state.bans)
                name = bans.pop(order.peer).name
                self.journal(ev.Unbanned(peer=order.peer, name=name, who=order.who, why=order.why))
                self.set(bans=bans)
            case "checkpoint":
                at = checkpoint_from(self.state)
                self.journal(ev.CheckpointAsked(step=at, who=order.who, why=order.why))
                self.set(checkpoint=at)

    def pause(self, order: Order) -> None:
        self.stay()
        at = max(self.state.until, self.state.committed.step)
        self.journal(ev.Paused(who=order.who, why=order.why, step=at))
        self.set(paused=Pause(who=order.who, why=order.why, since=self.now), redivide=None, uneven=None)
        if self.state.checkpoint is None:  # the plan that follows may leave off what is being published
            self.set(checkpoint=self.state.publish)

    def resume(self, order: Order) -> None:
        """Goes on; the time meanwhile counts for nobody."""
        state, pause = self.state, self.state.paused
        assert pause is not None
        self.journal(ev.Resumed(who=order.who, why=order.why, seconds=max(0.0, self.now - pause.since)))
        for member in list(state.members.values()):
            if member.busy is not None:
                self.member(replace(member, busy=self.now))
        self.set(
            paused=None,
            since=self.now if state.phase == "waiting" else state.since,
            pace=replace(state.pace, since=self.now),
            held=None if state.held is None else state.held + self.now - max(state.held, pause.since),
        )

    def drain(self, order: Order, member: Member) -> None:
        self.journal(ev.Drained(peer=member.peer, name=member.name, who=order.who, why=order.why))
        told = f"{DRAINED} by {order.who}{reason(order.why)}"
        self.member(replace(member, leaving=True, drained=told))

    def ban(self, order: Order) -> None:
        """At once: nothing that it holds counts any more, and nobody waits for it."""
        member = self.state.members.get(order.peer)
        name = member.name if member else order.name or order.peer[:8]
        self.journal(ev.Banned(peer=order.peer, name=name, who=order.who, why=order.why))
        self.set(bans={**self.state.bans, order.peer: Ban(name=name, who=order.who, why=order.why)})
        if member is not None:
            self.refuse_banned(member)
            self.lost(member, graceful=True)
        # Nobody has to tell it how the run ended.
        self.set(unaware={p: at for p, at in self.state.unaware.items() if p != order.peer})

    def wants_a_round(self) -> bool:
        """Whether a round is to be closed for the operator: to stand still, or for a checkpoint that is not near."""
        state = self.state
        if not open_steps(state):
            return False
        if state.paused is not None:
            return True
        is_asked = state.checkpoint is not None and state.checkpoint > state.committed.step and state.publish is None
        return is_asked and not is_round_near(self.rules, state)

    def publish_asked(self) -> None:
        """Publishes the last committed round, if it is what the operator wants."""
        state = self.state
        if state.checkpoint is not None and state.committed.step >= state.checkpoint and publishable(state):
            self.set(publish=state.committed.step)

    def uploaded(self, at: int, path: str) -> None:
        super().uploaded(at, path)
        if self.state.checkpoint is not None and at >= self.state.checkpoint:
            self.set(checkpoint=None)

    def unpublished(self, at: int, why: str) -> None:
        """What could not be written is not tried again: its workers think that it is there."""
        is_due = self.state.publish == at
        super().unpublished(at, why)
        if is_due and self.state.publish is None and self.state.checkpoint is not None:
            self.set(checkpoint=max(self.state.checkpoint, at + 1))

    # An orderly stop.

    def has_stop(self, peer: str, plan: Plan) -> bool:
        member = self.state.members.get(peer)
        if member is None:
            return False
        return any(
            s.kind == "step" and s.generation == plan.generation and s.step == self.state.end for s in member.savepoints
        )

    def stopped(self) -> None:
        at = self.state.stop or self.state.committed
        if at.kind != "step":
            self.commands.append(ReturnLeases(reason="the run was stopped"))
        self.journal(ev.Stopped(step=at.step))
        self.enter("stopped", "the operator stopped the run")
