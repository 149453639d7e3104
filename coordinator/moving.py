"""Moving a peer to a stage that has become thin: it gets ready beside its work, so that nobody waits for it.

A lost replica's stage is the slowest from then on. Most who are lost come back within minutes, so for
``Rules.move_seconds`` nothing is done; then the peer whose move relieves that stage most is told to fetch its state, as
a newcomer is. Once it has it, the generation closes with a round and the next plan seats it there. If it is lost or
slow, or somebody joins who makes the move unnecessary, it stays where it is, and nothing was lost but its download.
"""

from __future__ import annotations

from dataclasses import replace

from . import events as ev
from .assignment import Offer, relief
from .losses import Losses
from .planning import committed_point, is_ready, newcomers, prospects
from .state import Move, Rules, RunState

AT_REST = 0.5  # of the memory that a stage needs to train: its state (inventory.py) against weights, gradients, copies


def best_move(rules: Rules, state: RunState, only: Move | None = None) -> Move | None:
    """The move that would relieve the slowest stage clearly, once all who are on their way are there; None if none.

    ``only``: whether this one still does.
    """
    plan = state.plan
    if plan is None or state.phase != "training" or state.committed.kind != "round":
        return None
    members, needs = state.members, rules.division(len(plan.stages)).needs
    offers = {p: Offer(speed=m.speed, memory_gb=m.memory_gb, device=m.device) for p, m in members.items()}
    placed = [{r.peer for r in replicas} for replicas in plan.replicas]
    for peer, stage in newcomers(rules, state, {}).items():
        placed[stage].add(peer)

    def may(peer: str, origin: int, stage: int) -> bool:
        if only is not None and (peer, stage) != (only.peer, only.stage):
            return False
        beside = needs[origin].memory_gb + AT_REST * needs[stage].memory_gb
        fits = members[peer].device != "cpu" or offers[peer].memory_gb >= beside  # a GPU's peer has other memory, too
        able = peer in plan.peers and members[peer].away is None and peer not in state.slow
        return able and fits and len(placed[origin]) > rules.quorum

    found = relief(needs, offers, placed, may)
    if found is None:
        return None
    peer, origin, stage = found
    return Move(peer=peer, origin=origin, stage=stage, since=0.0)


class Moves(Losses):
    """Who moves, and when a generation closes for those who are ready for another stage."""

    def consider_move(self) -> None:
        """With every tick: begins a move, or gives one up."""
        state, move = self.state, self.state.move
        if not self.rules.prepare_seconds or state.phase != "training" or state.closing or state.stop_asked:
            return
        if any(m.leaving for m in state.members.values()):  # the generation ends anyhow
            return
        if move is None or not move.begun:
            best = best_move(self.rules, state)
            if best is None:
                self.stay()
                return
            since = move.since if move is not None and move.stage == best.stage else self.now
            begun = self.now - since >= self.rules.move_seconds
            self.set(move=replace(best, since=self.now if begun else since, begun=begun))
            if begun:
                name = state.members[best.peer].name
                self.journal(ev.Moving(peer=best.peer, name=name, origin=best.origin, stage=best.stage))
        elif best_move(self.rules, state, move) is None:
            self.stay()
        elif self.now - move.since > self.rules.prepare_seconds:
            self.set(slow=state.slow | {move.peer})
            self.stay()

    def stay(self) -> None:
        """Nobody moves."""
        move = self.state.move
        if move is not None and (member := self.state.members.get(move.peer)) is not None:
            self.member(replace(member, prepared=None))
        self.set(move=None)

    def moved(self) -> None:
        """A new plan: the move has come about, or has to be thought of anew."""
        move, plan = self.state.move, self.state.plan
        if move is not None and plan is not None and plan.places.get(move.peer, (-1, 0))[0] == move.stage:
            name = self.state.members[move.peer].name
            self.journal(ev.Moved(peer=move.peer, name=name, origin=move.origin, stage=move.stage))
        self.set(move=None)

    def are_due(self) -> bool:
        """Whether there are newcomers who could be seated, and all of them have their stage, or had time enough; or
        who is to move is ready, and no newcomer about to be."""
        plan, move = self.state.plan, self.state.move
        assert plan is not None
        needs = self.rules.division(len(plan.stages)).needs
        new = {
            p: m
            for p, m in self.state.members.items()
            if p not in plan.peers
            and not m.leaving
            and m.away is None
            and m.memory_gb >= min(need.gigabytes(m.device) for need in needs)
            and not (p in self.state.barred and self.now < self.state.barred[p].until)
        }
        stages, members = prospects(self.rules, self.state), self.state.members

        def has_stage(peer: str) -> bool:
            return is_ready(members[peer], committed_point(self.rules, self.state, stages[peer]))

        late = self.now - self.state.last_join >= self.rules.prepare_seconds
        if new:
            return late or (all(has_stage(p) for p in new if p in stages) and not self.are_uncompared())
        return move is not None and move.peer in stages and has_stage(move.peer)

    def are_uncompared(self) -> bool:
        """Whether somebody joined since divisions of the layers were compared: with him, another may be better."""
        state = self.state
        waits = state.paused is None and self.now >= state.whole_until
        return len(self.rules.divisions) > 1 and state.looked < state.last_join and waits

    def settled(self) -> bool:
        return self.now - self.state.last_join >= self.rules.settle_seconds
