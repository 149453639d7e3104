"""Whether a round counts: the one place that decides it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..protocol import control_pb2 as pb
from ..protocol.plan import Plan
from .state import Mark, Part, Rules


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``wrong`` is empty and ``mark`` is to be committed, or these peers must take the state over anew."""

    mark: Mark
    wrong: frozenset[str] = frozenset()
    why: str = ""


def judge(plan: Plan, committed: Mark, at: int, reports: Mapping[str, pb.RoundDone]) -> Verdict:
    """Looks at what every replica reported of the round after ``at`` steps.

    Of each stage: all entered with the committed reference, all left with the same one, and together they trained on
    exactly the samples leased since the last round.
    """
    sample = plan.first_sample_of(at)
    since = sample - committed.sample
    wrong, why, digests = set[str](), "", []
    for i, replicas in enumerate(plan.replicas):
        said = {r.peer: reports[r.peer] for r in replicas}
        known = committed.digests[i] if committed.digests else None
        if odd := {p for p, r in said.items() if known and r.base_digest != known}:
            wrong, why = wrong | odd, "a replica came with other reference weights"
        elif odd := {p for p, r in said.items() if not r.digest}:
            wrong, why = wrong | odd, "a replica does not say what it holds"
        elif odd := minority({p: r.digest for p, r in said.items()}):
            wrong, why = wrong | odd, "the digests differ"
        elif sum(r.samples for r in said.values()) != since:
            wrong, why = wrong | set(said), f"stage {i} counts other samples than were leased"
        digests.append(bytes(reports[replicas[0].peer].digest))
    mark = Mark(kind="round", generation=plan.generation, step=at, sample=sample, digests=tuple(digests))
    return Verdict(mark=mark, wrong=frozenset(wrong), why=why)


def minority(votes: Mapping[str, bytes]) -> set[str]:
    """Those who do not say what most say; everybody, if there is no most; nobody, if all agree."""
    counts: dict[bytes, int] = {}
    for vote in votes.values():
        counts[vote] = counts.get(vote, 0) + 1
    if len(counts) == 1:
        return set()
    best = max(counts.values())
    winners = [v for v, n in counts.items() if n == best]
    return set(votes) if len(winners) > 1 else {p for p, v in votes.items() if v != winners[0]}


def parts_of(rules: Rules, plan: Plan, reports: Mapping[str, pb.RoundDone]) -> tuple[Part, ...]:
    """What each replica brought into a round that is committed."""
    work = [need.work for need in rules.division(len(plan.stages)).needs]
    return tuple(
        Part(
            peer=replica.peer,
            stage=i,
            samples=reports[replica.peer].samples,
            work=reports[replica.peer].samples * work[i] / sum(work),
            nbytes=min(reports[replica.peer].nbytes, 2**63 - 1),
            seconds=reports[replica.peer].seconds if math.isfinite(reports[replica.peer].seconds) else 0.0,
            digest=bytes(reports[replica.peer].digest),
        )
        for i, replicas in enumerate(plan.replicas)
        for replica in replicas
    )
