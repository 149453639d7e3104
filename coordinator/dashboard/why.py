"""Why a step took so long, in words: its causes by what their absence would save, then where its time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .shapes import Segment
from .whatif import Change, Names

CAUSE_SHARE = 0.05  # of a step: what saves less is not called its cause
SLOW = 1.1  # times the usual: what is within took as long as usual
MOST_PIECES = 5
Piece = tuple[str, str, str | None]  # what, who, to whom


def words(
    pieces: Sequence[Segment], changes: Sequence[Change], usual: float, name: Names, stages: Mapping[str, int]
) -> list[str]:
    """One sentence each; the first names the cause if there is one. ``stages``: of each peer, counted from 0."""
    if not pieces:
        return ["Nobody has told what happened in this step."]
    took = pieces[-1].end - pieces[0].start
    length = f"The step took {seconds(took)}"
    is_usual = usual / SLOW <= took <= SLOW * usual
    length += ", which is usual" if is_usual else f" where {seconds(usual)} are usual"
    out = [f"{length}{cause(took, changes, name, is_quick=took < usual / SLOW)}."]
    spent: dict[Piece, float] = {}
    for s in pieces:
        key: Piece = (s.what, s.peer, s.receiver)
        spent[key] = spent.get(key, 0.0) + s.end - s.start
    order = sorted(spent, key=lambda k: -spent[k])
    for most in [k for k in order if spent[k] >= 0.01 * took][:MOST_PIECES]:
        out.append(f"{seconds(spent[most])} of it {piece(most, name, stages)}.")
    rest = sum(spent[k] for k in spent) - sum(spent[k] for k in order[: len(out) - 1])
    if rest >= 0.01 * took:
        out.append(f"The other {seconds(rest)} went in smaller pieces.")
    return out


def cause(took: float, changes: Sequence[Change], name: Names, *, is_quick: bool) -> str:
    """The rest of the first sentence. In a step quicker than usual nobody is to blame for what cost most."""
    causes = [change.told for change in changes if change.kind != "absence"]
    if not causes or took - causes[0].seconds < CAUSE_SHARE * took:
        return "; no peer and no line stands out"
    first = causes[0]
    lost = seconds(took - first.seconds)
    if first.receiver is not None and first.peer is not None:
        line = f"line from {name(first.peer)} to {name(first.receiver)}"
        return f"; a quicker {line} would have saved {lost}" if is_quick else f": the slow {line} cost {lost}"
    who = name(first.peer or "")
    return f"; with {who} as quick as others, {lost} less" if is_quick else f": {who} was slow, which cost {lost}"


def piece(key: Piece, name: Names, stages: Mapping[str, int]) -> str:
    what, peer, receiver = key
    who = name(peer)
    match what:
        case "compute":
            return f"{who} computed at stage {stages.get(peer, 0)}"
        case "wire":
            return f"went over the line from {who} to {name(receiver or '')}"
        case "codec":
            return f"{who} encoded and decoded"
        case "update":
            return f"{who} updated its weights"
    return f"passed at {who} between two steps"


def seconds(value: float) -> str:
    """With two or three digits."""
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"
