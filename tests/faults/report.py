"""``docs/FAULTS.md``: what was done to runs, what they had to make of it, and what was seen."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck import __version__

from .catalogue import SHORT, every
from .crew import RESTART_SECONDS
from .judge import Result
from .roles import LINGER_SECONDS
from .scenario import WORDS, Scenario

HEAD = """# Faults, and what a run makes of them

Made by `python -m tests.faults --report docs/FAULTS.md`; not written by hand. Every line is a run of real processes on
loopback: a coordinator and workers as the command line starts them, struck once in a named place (`failpoint` in the
code), by a signal from outside, or by a bad line. The same runs are tests: `python -m pytest tests/faults` runs the
marked ones (CI), with `-m 'slow or not slow'` all of them.

Each one must end with the run finished, its ledger verified (every sample committed exactly once), the expected line
in its journal, and the published weights **bit for bit** those of an oracle: one process that does the run once more
from its journal and the workers' records, with the same layers, AdamW and mean, but no engine and no network. With one
replica to a stage they must also be those of an undisturbed run.
"""


@dataclass(frozen=True)
class Row:
    scenario: Scenario
    results: list[Result]

    @property
    def observed(self) -> str:
        if any(r.problems for r in self.results):
            return "**FAILED**: " + "; ".join(sorted({p.splitlines()[0] for r in self.results for p in r.problems}))
        seen = [r.observed for r in self.results]
        return max(set(seen), key=lambda text: (seen.count(text), text))

    @property
    def recovery(self) -> str:
        found = [r.recovery for r in self.results if r.recovery is not None]
        if not found:
            return "none needed"
        return f"{statistics.median(found):.2f}" + (f" / {p95(found):.2f}" if len(found) > 1 else "")


def p95(values: Sequence[float]) -> float:
    """The smallest of the values that 95 % are not above."""
    return sorted(values)[-(-95 * len(values) // 100) - 1]


def write(path: Path, results: Sequence[Result], seconds: float, times: int, width: int) -> None:
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    rows = [Row(s, by_name[s.name]) for s in every() if s.name in by_name]
    failed = sum(bool(r.problems) for r in results)
    text = [HEAD, *conditions(results, seconds, times, width)]
    text.append(f"\n**{len(rows)} scenarios, {len(results)} runs, {failed} failed.**\n")
    text += summary(rows)
    for layout, about in LAYOUTS.items():
        text += [f"\n## {about}\n", "| fault | expected | observed | recovery, s |", "| --- | --- | --- | --- |"]
        for row in rows:
            if row.scenario.layout.name == layout:
                mark = "" if row.scenario.ci else " (slow)"
                expected = WORDS[row.scenario.expect]
                text.append(f"| `{row.scenario.what}`{mark} | {expected} | {row.observed} | {row.recovery} |")
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


LAYOUTS = {
    "2x1": "Two stages, one replica each",
    "2x2": "Two stages, two replicas each",
    "2x1+1": "Two stages, one replica each, and a newcomer",
}


def conditions(results: Sequence[Result], seconds: float, times: int, width: int) -> list[str]:
    return [
        "## Conditions\n",
        f"- potluck {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()},"
        f" {os.cpu_count()} cores, no GPU; {width} runs at a time, each scenario {times} times, {seconds:.0f} s in all"
        f" (a run: {statistics.median(r.seconds for r in results):.1f} s in the median)",
        "- 2 layers of width 32, 16 tokens, 24 steps, a dense round every 3 steps applied one step late, fp32"
        " throughout; every committed round is saved to disk",
        f"- who dies is started again after {RESTART_SECONDS} s; waiting for the holders of a newer state: 1 s"
        " (`coordinator.patience_seconds`)",
        f"- scenarios with a stop, hole or cut of 2 s and more: silence {SHORT.silence_seconds:g} s instead of 20,"
        f" heartbeats every {SHORT.heartbeat_seconds:g} s instead of 2, a broken path given up after"
        f" {SHORT.give_up_seconds:g} s instead of 10; a worker's goodbye to its peers: {LINGER_SECONDS} s instead of 2",
        "- `name:point:action@n`: at the n-th time that the process gets there. kill and stop are signals, full is a"
        " full disk, error what the place may raise (out of memory, a broken line)",
        "- recovery: from the fault to the next step done or round committed that the coordinator wrote down after what"
        " the fault led to (going back, a new start); if it led to nothing, to the end of the longest pause among the"
        " next 6. Median / 95th percentile. It holds the pause before the restart",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    text = ["| what follows | scenarios | recovery in s: median | p95 | longest |", "| --- | --- | --- | --- | --- |"]
    for expect, words in WORDS.items():
        group = [row for row in rows if row.scenario.expect == expect]
        found = [r.recovery for row in group for r in row.results if r.recovery is not None]
        if group:
            numbers = (f"{statistics.median(found):.2f}", f"{p95(found):.2f}", f"{max(found):.2f}") if found else "---"
            text.append(f"| {words} | {len(group)} | {' | '.join(numbers)} |")
    return text
