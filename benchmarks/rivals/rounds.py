"""Whether ranks that say they averaged really did: each shows a few of its values, and they are compared.

Some averagers report success when nobody was averaged with, and train alone from then on with a falling loss. So after
each round every rank shows a *sketch*: the values at the same few hundred places of what was averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Spread below which a round counts, if it does not say its own ``tolerance``; one of four that had no part in it leaves
# 0.5 and more.
AVERAGED = 0.1


def places(count: int, wanted: int = 256) -> NDArray[np.int64]:
    """The places of ``count`` values that a sketch shows, the same for everybody; sorted."""
    return np.sort(np.random.default_rng(0).choice(count, min(count, wanted), replace=False))


def apart(sketches: Sequence[Sequence[float]]) -> float:
    """How far ranks are from their mean: root mean square."""
    values = np.array(sketches, np.float64)
    return float(np.sqrt(np.square(values - values.mean(0)).mean()))


@dataclass(frozen=True)
class Round:
    """What one left of the ranks' differences, and how much its codecs may leave."""

    spread: float
    tolerance: float = AVERAGED


def judged(records: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Round]:
    """What each round left of the ranks' differences; ``records`` are the lines of each rank.

    A round shows ``values`` after it. If it shows its ``own`` before it, too, as gradients do, the spread is how far
    ranks are apart afterwards relative to before: 1 if nobody was averaged with. Otherwise (weights) it is relative to
    how far the mean went since the round before: about 1 for ranks that train alone. Rounds that not all ranks of a
    ``group`` (default 0; its ranks hold the same weights) had a part in count as 1.
    """
    groups: dict[int, dict[int, dict[int, Mapping[str, Any]]]] = {}
    members: dict[int, set[int]] = {}
    for rank, events in records.items():
        for event in events:
            if event["event"] == "round":
                groups.setdefault(event.get("group", 0), {}).setdefault(event["step"], {})[rank] = event
                members.setdefault(event.get("group", 0), set()).add(rank)
    out = []
    for group, rounds in groups.items():
        before: NDArray[np.float64] | None = None
        newest = min(max(step for step, shown in rounds.items() if rank in shown) for rank in members[group])
        for step in sorted(rounds):
            shown = list(rounds[step].values())
            values = [event["values"] for event in shown]
            mean = np.array(values, np.float64).mean(0)
            if set(rounds[step]) != members[group]:
                out += [Round(1.0)] if step < newest else []  # later ones: somebody was stopped
            elif all("own" in event for event in shown):
                out.append(_round(shown, apart(values), apart([event["own"] for event in shown])))
            elif before is not None:
                out.append(_round(shown, apart(values), float(np.sqrt(np.square(mean - before).mean()))))
            before = mean
    return out


def _round(shown: Sequence[Mapping[str, Any]], left: float, whole: float) -> Round:
    spread = left / whole if whole else float("inf") if left else 0.0
    return Round(spread, shown[0].get("tolerance", AVERAGED))


def averaged_share(found: Sequence[Round]) -> float | None:
    """The share of rounds that really averaged; None without any."""
    return sum(r.spread < r.tolerance for r in found) / len(found) if found else None


def claimed_share(records: Mapping[int, Sequence[Mapping[str, Any]]], world: int) -> float | None:
    """The share of rounds of which ranks themselves say that all took part; None if they say nothing."""
    said = [event["peers"] == world for events in records.values() for event in events if "peers" in event]
    return sum(said) / len(said) if said else None
