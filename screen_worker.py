"""What ``potluck worker status`` and ``top`` show: five words first, then the run, the machine, and what was given."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .screen_live import clean, duration, mbits, nbytes

if TYPE_CHECKING:
    from .worker.status import Status

STYLES = {"running": "bold green", "waiting": "bold yellow", "yielding": "bold blue", "paused": "bold blue"}


def show(found: Status) -> None:
    """Once."""
    Console(highlight=False).print(block(found))


def block(s: Status) -> Group:
    """Everything in one block that fits 80 columns."""
    head = Text.assemble((clean(s.text), STYLES.get(s.word, "bold red")))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows(s):
        table.add_row(name, Text(clean(text, 500)))
    return Group(head, table)


def rows(s: Status) -> list[tuple[str, str]]:
    t = s.totals
    found = [("worker", f"{s.name} ({s.peer[:8]}), process {s.pid}, up for {duration(s.now - s.started)}")]
    if s.run:
        place = ""
        if s.stage is not None and s.layers:
            beside = s.replicas - 1
            others = f", beside {beside} other{'s' if beside > 1 else ''}" if beside else ", alone"
            place = f", stage {s.stage} of {s.stages} (layers {s.layers[0]}-{s.layers[1] - 1}){others}"
        found.append(("run", f"{s.run} at {s.coordinator}, {s.phase}, {s.peers} workers{place}"))
        step = f"{s.step:,} of {s.steps:,}, " if s.stage is not None else ""
        found.append(("step", f"{step}committed up to {s.committed:,}"))
    else:
        found.append(("run", f"at {s.coordinator}, not taking part now"))
    gpu = "" if s.gpu is None else f", {nbytes(s.gpu)} of the GPU's"
    freed = "" if s.freed_seconds is None else f" (free {s.freed_seconds:.1f} s after it was asked)"
    found.append(("machine", f"{s.device}, holds {nbytes(s.ram)} of memory{gpu}{freed}"))
    if s.up is not None:
        found.append(("line", f"{mbits(s.up)} up, {mbits(s.down)} down"))
    found += [("to " + clean(w.peer)[:8], way) for w in s.ways if (way := f"{w.path}, {latency(w.rtt_seconds)}")]
    found.append(("allowed", allowed(s)))
    found.append(("given", f"{t.committed:,} samples that count ({t.work:,.1f} whole ones), {t.computed:,} computed"))
    energy = "" if t.joules is None else f", {t.joules / 3.6e6:.3g} kWh"
    used = f"{duration(t.seconds)} in runs{energy}, {nbytes(t.sent)} up, {nbytes(t.received)} down"
    found.append(("used", f"{used}; today {nbytes(t.sent_today)} up, {nbytes(t.received_today)} down"))
    if t.since:
        found.append(("since", f"{datetime.fromisoformat(t.since):%Y-%m-%d}"))
    return found


def latency(seconds: float | None) -> str:
    return "round trip not known yet" if seconds is None else f"{seconds * 1e3:.3g} ms"


def allowed(s: Status) -> str:
    """The owner's limits in words."""
    a = s.limits
    words = [f"{a.memory_gb:.3g} GB", f"{a.threads} core{'s' if a.threads > 1 else ''}"]
    words.append(f"{a.upload_mbps:g} Mbit/s up" if a.upload_mbps else "any upload")
    words.append(f"{a.state_mbps:g} Mbit/s for stages" if a.state_mbps else "stages at any speed")
    words.append(f"at {'; '.join(a.hours)}" if a.hours else "at any hour")
    words.append("on battery too" if a.on_battery else "not on battery")
    if a.yield_to:
        words.append(f"room for {', '.join(a.yield_to)}")
    return ", ".join(words)
