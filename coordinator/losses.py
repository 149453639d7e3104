"""When a generation has lost somebody: going on without it, telling who hangs, waiting for missing replicas."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from . import events as ev
from .pace import Pace
from .planning import is_dispensable
from .state import Bar, Member, Relet, Rules, RunState
from .turn import Turn, needed

BAR_SECONDS, MOST_BAR_SECONDS = 30.0, 3600.0  # before somebody that was given up is taken in again


class Losses(Turn):
    """What to do about a replica that is dead, cut off, or hangs."""

    def expendable(self, peer: str) -> bool:
        """Whether others of its stage can do again all that is lost with it: they have its neighbours' bytes."""
        plan, committed = self.state.plan, self.state.committed
        if self.state.phase != "training" or plan is None or peer not in plan.peers:
            return False
        stage, _ = plan.places[peer]
        begun_here = plan.origin != "step" or committed.generation == plan.generation
        return self.rules.reroutes and len(plan.replicas[stage]) > 1 and begun_here and self.state.closing != "save"

    def go_on_without(self, member: Member) -> bool:
        """The generation goes on: no round that was on its way counts, so nothing of it was applied anywhere.

        False if it cannot.
        """
        state, plan = self.state, self.state.plan
        if plan is None or not self.expendable(member.peer):
            return False
        stage, _ = plan.places[member.peer]
        since, void = state.committed.step, state.until
        after = plan.without(member.peer, since, void)
        holders = {
            plan.samples(at, seat.start).start: after.peer_of(0, seat.start)
            for at in range(since, state.until)
            for seat in plan.seats
            if plan.peer_of(0, seat.start) == member.peer
        }
        if holders:
            self.commands.append(Relet(generation=plan.generation, peer=member.peer, holders=holders))
        self.journal(
            ev.Rerouted(
                generation=plan.generation,
                peer=member.peer,
                name=member.name,
                stage=stage,
                since=since,
                void=void,
                left=len(after.replicas[stage]),
            )
        )
        self.set(
            plan=after,
            rounds_done={},
            evals={},
            evaluated=max(state.evaluated, min(void, self.rules.steps - 1)),
            leased_at={
                at: self.now + self.rules.lease_seconds * (2 + i) for i, at in enumerate(sorted(state.leased_at))
            },
            losses={s: {p: m for p, m in said.items() if p in after.peers} for s, said in state.losses.items()},
        )
        return True

    def parted(self, member: Member, other: str, what: str) -> None:
        """Two peers do not reach each other: the generation goes on without one of them if it can, else the next
        begins without one of them if it can."""
        beyond = self.state.members.get(other)
        if beyond is None or not needed(self.state, other):
            return  # it is given up already
        if beyond.away is not None:  # it is about to be, unless it dials again
            self.member(replace(beyond, missed=member.peer))
            return
        if any(self.given_up(m) for m in (beyond, member)):
            return
        self.set(broken=(*self.state.broken, (member.peer, other)))
        ways = Counter(peer for way in self.state.broken for peer in way)
        for one in sorted((beyond, member), key=lambda m: -ways[m.peer]):
            if is_dispensable(self.rules, self.state, one.peer, self.now):
                self.bar(one)
                break
        self.abort(f"{member.name}: {what}")

    def given_up(self, member: Member) -> bool:
        """Goes on without a peer that may live, if that is possible; it is not taken in again for a while."""
        if not self.go_on_without(member):
            return False
        self.bar(member)
        return True

    def bar(self, member: Member) -> None:
        times = self.state.barred[member.peer].times if member.peer in self.state.barred else 0
        bar = Bar(until=self.now + min(BAR_SECONDS * 2**times, MOST_BAR_SECONDS), times=times + 1)
        self.set(barred={**self.state.barred, member.peer: bar})

    def look_for_hangs(self) -> None:
        """When no step is done for longer than it ever takes, those who do not wait for others are given up, if they
        have not for as long: who has just got what it waited for is not to blame."""
        pace, plan = self.state.pace, self.state.plan
        assert plan is not None
        late = [s for s, expires in self.state.leased_at.items() if expires < self.now]
        grace = pace.grace_seconds(self.rules.lease_seconds)
        overdue = plan.first_step <= pace.step < self.state.until and self.now - pace.since > grace
        if not late and not overdue:
            return
        behind = min(late, default=pace.step)
        members = [self.state.members[p] for p in sorted(plan.peers)]
        hung = [m for m in members if m.busy is not None and self.now - m.busy > grace and m.step <= behind]
        if len(hung) < len(plan.peers) and any([self.given_up(m) for m in hung]):
            self.set(pace=Pace(step=pace.step, since=self.now))  # what has to be done again takes its time
        elif late:
            self.abort(f"the lease of step {min(late)} expired")

    def is_held(self) -> bool:
        """Whether a stage has fewer replicas than the run wants, and somebody may still come."""
        short, since = short_of_quorum(self.rules, self.state), self.state.held
        if short and since is None:
            self.set(held=self.now, note=f"held: {short}")
            self.journal(ev.Held(why=short))
        elif short and not self.state.degraded and self.now - (since or 0.0) > self.rules.patience_seconds:
            self.set(degraded=True, note=f"degraded: {short}")
            self.journal(ev.Degraded(why=short))
        elif not short and since is not None:
            self.set(held=None, degraded=False, note="")
        return bool(short) and not self.state.degraded


def short_of_quorum(rules: Rules, state: RunState) -> str:
    """Which stage has fewer replicas than the run wants, in words; empty if none."""
    for i, replicas in enumerate(state.plan.replicas if state.plan else ()):
        if len(replicas) < rules.quorum:
            return f"stage {i} has {len(replicas)} of the {rules.quorum} replicas that a round needs"
    return ""
