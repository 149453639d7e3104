"""How many microbatches each replica of a stage serves: so many that all are done at the same time.

What a peer needs for one is measured while it trains (its steps' computing, without waiting), relative to its stage's
work, so that it holds for any stage; before that its owner's ``--speed`` counts. If other shares would be clearly
faster for a minute, the generation closes with a round and the next plan has them. Nobody's weights move; a round
weighs everybody by its samples anyhow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..protocol import control_pb2 as pb
from ..protocol.plan import Plan, even_shares
from .dividing import Dividing
from .state import Member, Rules, RunState

WORTH = 1.1  # even shares are kept unless the slowest replica gets so many times as fast
SHARE_GAIN = 1.25  # and a generation ends for it only for so much
PAUSE_MOVES = 5.0  # of ``Rules.move_seconds``, between two generations that end for it
SMOOTHING = 16.0  # steps
LEARN_STEPS = 8  # before what was measured counts


def best_shares(count: int, paces: Sequence[float]) -> tuple[int, ...]:
    """``count`` microbatches among replicas that need ``paces`` seconds for each, so that the last is done as early as
    can be; each has one at least. Empty: as even as can be is about as good, or there are too few."""
    if count < len(paces) or not all(0 < pace < float("inf") for pace in paces):
        return ()
    shares = [1] * len(paces)
    for _ in range(count - len(paces)):
        first = min(range(len(paces)), key=lambda i: (shares[i] + 1) * paces[i])
        shares[first] += 1
    even = even_shares(count, len(paces))
    return tuple(shares) if last_done(even, paces) > WORTH * last_done(shares, paces) else ()


def last_done(shares: Sequence[int], paces: Sequence[float]) -> float:
    return max(share * pace for share, pace in zip(shares, paces, strict=True))


def paces_of(state: RunState, peers: Sequence[str]) -> list[float] | None:
    """What each needs for a microbatch, relative to its stage's work: as measured, or, as long as one of them has not
    trained enough for that, as their owners say. None if somebody is gone."""
    members = [state.members[peer] for peer in peers if peer in state.members]
    if len(members) < len(peers):
        return None
    known = [m.pace for m in members if m.pace is not None and m.paced >= LEARN_STEPS]
    return known if len(known) == len(members) else [1.0 / m.speed for m in members]


def shared(state: RunState, plan: Plan) -> Plan:
    """The plan with the best shares that can be told by now."""
    stages = []
    for stage in plan.stages:
        paces = paces_of(state, [replica.peer for replica in stage.replicas])
        shares = best_shares(plan.microbatches_per_step, paces) if paces else ()
        stages.append(replace(stage, shares=shares))
    return replace(plan, stages=tuple(stages))


def gain(rules: Rules, state: RunState, plan: Plan) -> float:
    """How many times as fast the slowest replica of all would be done with the best shares."""
    needs = rules.division(len(plan.stages)).needs
    before = after = 0.0
    for i, replicas in enumerate(plan.replicas):
        paces = paces_of(state, [replica.peer for replica in replicas])
        if paces is None:
            return 1.0
        now = [len(plan.served(i, j)) for j in range(len(replicas))]
        best = best_shares(plan.microbatches_per_step, paces) or even_shares(plan.microbatches_per_step, len(replicas))
        before = max(before, needs[i].work * last_done(now, paces))
        after = max(after, needs[i].work * last_done(best, paces))
    return before / after if after > 0 else 1.0


class Sharing(Dividing):
    """Learns how fast everybody is, and ends a generation when its shares are clearly wrong."""

    def paced(self, member: Member, done: pb.StepDone) -> Member:
        """A member after a step that it has done: the first one of a generation tells nothing."""
        plan = self.state.plan
        assert plan is not None
        count = done.samples / plan.microbatch_size
        if done.step == plan.first_step or not count or not 0 < done.compute_seconds < 1e6:
            return member
        work = self.rules.division(len(plan.stages)).needs[plan.places[member.peer][0]].work
        pace = done.compute_seconds / (count * work)
        if member.pace is not None:
            pace = member.pace + (pace - member.pace) / min(SMOOTHING, member.paced + 1)
        return replace(member, pace=pace, paced=member.paced + 1)

    def consider_shares(self) -> None:
        """With every tick."""
        state, plan = self.state, self.state.plan
        if plan is None or state.phase != "training" or state.closing or state.stop_asked:
            return
        if self.now < state.shared + PAUSE_MOVES * self.rules.move_seconds and state.shared:
            return
        if gain(self.rules, state, plan) < SHARE_GAIN:
            self.set(uneven=None)
            return
        self.set(uneven=self.now if state.uneven is None else state.uneven)

    def is_uneven(self) -> bool:
        """Whether the shares have been wrong for long enough."""
        since = self.state.uneven
        return since is not None and self.now - since >= self.rules.move_seconds

    def planned(self, plan: Plan) -> None:
        super().planned(plan)
        self.set(uneven=None, shared=self.now if self.is_uneven() else self.state.shared)
