"""What ``potluck status`` and ``potluck top`` show: the run in rows, its peers in a table, what happened last."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .page_client import Peer, Seen, StepTime
from .screen_live import clean, duration, nbytes

MOST_PEERS, MOST_EVENTS = 30, 6
LEAST_SHARE = 0.05  # of a step, that is worth naming
UNSAID = ("RoundCommitted", "HeldOut")  # events that the rows say already
STYLES = {"training": "green", "away": "red", "leaving": "yellow", "loading": "yellow", "waiting": "yellow"}


def show(seen: Seen, page: str) -> None:
    """Once."""
    Console(highlight=False).print(block(seen, page))


def block(s: Seen, page: str) -> Group:
    """Everything in one block that fits 80 columns."""
    phase = "paused" if s.is_paused else s.phase
    note = f": {clean(s.note)}" if s.note else ""
    head = Text.assemble((clean(s.run.name, 40), "bold"), f"  {clean(phase, 20)}{note}")
    parts: list[RenderableType] = [head]
    if s.steps:
        bar = Table.grid()  # a bar alone does not end its line
        bar.add_row(ProgressBar(total=max(1, s.steps), completed=min(s.step, s.steps), width=60))
        parts.append(bar)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows(s, page):
        table.add_row(name, Text(text))
    parts.append(table)
    for alert in s.alerts:
        ago = duration(max(0.0, s.now - alert.since))
        parts.append(Text(f"! {clean(alert.text)} (for {ago})", style="bold red"))
    if s.peers:
        parts += [Text(), peers(s)]
    events = [e for e in s.events if e.kind not in UNSAID][:MOST_EVENTS] or s.events[:2]
    if events:
        parts.append(Text())
        for event in events:
            at = time.strftime("%H:%M:%S", time.localtime(event.time)) if 0 < event.time < 1e11 else "--:--:--"
            line = Text(f"{at}  {clean(event.text, 300)}", no_wrap=True, overflow="ellipsis")
            line.stylize("dim", 0, 8)
            parts.append(line)
    return Group(*parts)


def rows(s: Seen, page: str) -> list[tuple[str, str]]:
    left = ""
    if s.phase == "training" and s.eta:
        left = f", {between(s.eta.low, s.eta.high)} left"
    elif s.phase == "training" and s.eta_seconds:
        left = f", about {duration(s.eta_seconds)} left"
    found = [("step", f"{s.step:,} of {s.steps:,}{left}")]
    first = f" (from {number(s.heldout_first)})" if s.heldout_first is not None else ""
    found.append(("loss", f"{number(s.train_loss)} training, {number(s.heldout_loss)} held-out{first}"))
    speed = "-" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f} tokens/s"
    found.append(("speed", f"{speed}, {s.tokens:,} tokens so far"))
    if s.bytes_per_token and s.dense_bytes_per_token:
        fewer = f"{s.dense_bytes_per_token / s.bytes_per_token:.1f} times fewer than uncompressed"
        found.append(("line", f"{s.bytes_per_token:,.0f} bytes a token, {fewer}"))
    if s.goodput and s.goodput.computed > 0:
        share = min(1.0, s.goodput.committed / s.goodput.computed)
        found.append(("goodput", f"{share:.1%} of what was computed counts"))
    thin = [str(stage.stage) for stage in s.stages if stage.is_thin]
    alone = f"; one replica left of stage {', '.join(thin)}" if thin else ""
    found.append(("plan", f"{len(s.stages)} stages, generation {s.generation}, {s.round:,} rounds committed{alone}"))
    found.append(("page", clean(page)))
    return found


def peers(s: Seen) -> Table:
    """Who does what. Where time goes is of a step, largest first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("peer", "stage", "state", "s/step", "samples", "sent"):
        table.add_column(name, justify="left" if name in ("peer", "state") else "right", no_wrap=True)
    table.add_column("where its time goes", overflow="fold")
    names = {p.id: clean(p.name, 16) for p in s.peers}
    order = sorted(s.peers, key=lambda p: (p.stage is None, p.stage or 0, p.name))
    for p in order[:MOST_PEERS]:
        table.add_row(
            Text(clean(p.name, 16) or p.id[:8]),
            "-" if p.stage is None else str(p.stage),
            Text(clean(p.state, 10), style=STYLES.get(p.state, "")),
            number(p.seconds_per_step, 2),
            f"{p.samples:,}",
            nbytes(p.sent),
            Text(where(p, names)),
        )
    if len(order) > MOST_PEERS:
        table.add_row(Text(f"and {len(order) - MOST_PEERS} more", style="dim"))
    return table


def where(peer: Peer, names: dict[str, str]) -> str:
    """``61% compute, 20% for anna``: shares of a step above a twentieth."""
    if peer.time is None:
        return clean(peer.region, 20)
    t = peer.time
    parts = {"compute": t.compute + t.codec + t.update, "wire": t.wire, "other": t.other}
    for wait in t.waits[:3]:
        parts[f"for {names.get(wait.peer, wait.peer[:8])}"] = wait.seconds
    whole = whole_of(t)
    shares = sorted(((seconds / whole, name) for name, seconds in parts.items()), reverse=True) if whole > 0 else []
    return ", ".join(f"{share:.0%} {clean(name, 24)}" for share, name in shares if share >= LEAST_SHARE)


def whole_of(t: StepTime) -> float:
    return t.compute + t.codec + t.update + t.wire + t.other + sum(wait.seconds for wait in t.waits)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def between(low: float, high: float) -> str:
    a, b = duration(low), duration(high)
    return f"about {a}" if a == b else f"{a} to {b}"
