"""Dividing the layers anew, when what the peers bring has changed much: an explicit, journaled transition.

The generation closes with a round, and the next plan has other stages. It starts from that round as the old stages hold
it: ``Plan.parts`` says who has them, and each peer makes its new stage of those it overlaps (worker/origin.py). Once
all are ready and the replicas of every new stage have said the same digest, the round is known in its new stages too;
until another round follows it, everybody can go back to the old ones (``RunState.undivided``).
"""

from __future__ import annotations

from dataclasses import replace

from ..protocol.plan import Plan
from . import events as ev
from .assignment import Offer, slowest
from .moving import Moves
from .planning import best_division
from .state import Redivide, Rules, RunState
from .verdict import minority

DIVIDE_GAIN = 0.75  # the slowest stage gets at least this much faster: everybody waits for a transfer
LOOK_SECONDS = 5.0  # between two looks: every division is tried in each


def better_division(rules: Rules, state: RunState) -> Redivide | None:
    """The division by which these peers would be clearly faster than by the present one, all of them seated anew."""
    plan = state.plan
    if plan is None:
        return None
    free = [m for m in state.members.values() if not m.leaving]
    offers = {m.peer: Offer(speed=m.speed, memory_gb=m.memory_gb, device=m.device) for m in free}
    own, best = rules.division(len(plan.stages)), best_division(rules, free)
    if best is None or best is own:
        return None
    before, after = slowest(own.needs, offers), slowest(best.needs, offers)
    if after >= DIVIDE_GAIN * before:
        return None
    why = f"the slowest stage is {before / after:.1f} times as fast" if before < float("inf") else "workers are few"
    return Redivide(stages=len(best.layers), since=0.0, why=why)


class Dividing(Moves):
    """When the layers are divided anew, and what holds of the round that this starts from."""

    def consider_division(self) -> None:
        """With every tick: whether another division has been better for long enough."""
        state, wish = self.state, self.state.redivide
        if len(self.rules.divisions) == 1 or state.phase != "training" or state.closing or state.stop_asked:
            return
        if self.now < state.whole_until or not (self.are_uncompared() or self.now - state.looked >= LOOK_SECONDS):
            return
        if any(m.away is not None for m in state.members.values()):  # for a moment: no reason to think again
            return
        self.set(looked=self.now)
        best = better_division(self.rules, state)
        if best is None or state.committed.kind != "round":
            self.set(redivide=None)
            return
        since = wish.since if wish is not None and wish.stages == best.stages else self.now
        self.set(redivide=replace(best, since=since, begun=self.now - since >= self.rules.divide_seconds))

    def planned(self, plan: Plan) -> None:
        """A plan is issued: says so, if it divides the layers anew."""
        wish = self.state.redivide
        if plan.parts:
            why = wish.why if wish is not None and wish.begun else "nobody is left who can hold one of the stages"
            before = tuple((p.first_layer, p.last_layer) for p in plan.parts)
            self.journal(ev.Redivided(generation=plan.generation, before=before, after=plan.layers, why=why))
        if plan.parts or (wish is not None and wish.begun):
            self.set(redivide=None)
        self.moved()

    def undivide(self, why: str) -> None:
        """A plan ends before it began: if it was to divide the layers, they stay as they are for a while."""
        plan = self.state.plan
        if plan is not None and plan.parts and self.state.phase == "preparing":
            self.journal(ev.DivisionFailed(generation=plan.generation, why=why))
            self.set(whole_until=self.now + self.rules.divide_seconds)

    def is_agreed(self, plan: Plan) -> bool:
        """Everybody is ready: whether all replicas of each new stage have made the same of it. Ends the plan if not."""
        said = {p: self.state.members[p].digest for p in plan.peers}
        for replicas in plan.replicas if plan.parts else ():
            votes = {r.peer: said[r.peer] for r in replicas}
            if odd := {p for p, digest in votes.items() if not digest} or minority(votes):
                names = tuple(sorted(self.state.members[p].name for p in odd))
                why = "the replicas of a new stage hold different weights"
                self.journal(ev.RoundRefused(step=plan.first_step, peers=names, why=why))
                self.abort(why)
                return False
        return True

    def found(self, plan: Plan) -> None:
        """A plan begins: the round that it starts from is known in the stages that it has."""
        state = self.state
        if plan.origin != "round":
            return
        old = state.undivided
        if old is not None and state.committed.stages != len(plan.parts or plan.stages):
            self.set(committed=old, undivided=None)  # back to the stages before
        if not plan.parts:
            return
        committed = self.state.committed
        digests = tuple(self.state.members[replicas[0].peer].digest for replicas in plan.replicas)
        mark = replace(committed, digests=digests)
        self.set(committed=mark, undivided=committed)
        points = mark.savepoints(self.rules.division(len(plan.stages)))
        for peer, (stage, _) in plan.places.items():
            member = self.state.members[peer]
            self.member(replace(member, savepoints=member.savepoints | {points[stage]}))
