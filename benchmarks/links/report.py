"""docs/BENCHMARKS.md, from docs/benchmarks.json."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.netlab.profiles import PROFILES

from .contest import WORKERS, Outcome, line
from .path import Records, draw, shares
from .runs import plain_tokens_per_second
from .scale import LAYOUTS, MICROBATCHES

AIMS = {"100m": 0.95, "home-cable": 0.80, "home-dsl": 0.60, "worldwide-8": 0.75}
PICTURED = ("home-cable", "2x2", "default")
TOP = 8  # rows of a critical path
HEAD = """# Speed on home lines

Made by `python -m benchmarks.links`; do not edit. Coordinator and workers are real processes in network namespaces;
an emulated router gives each a line of its own (`benchmarks/netlab`, checked by `python -m benchmarks.netlab check`).
Bytes are those of the kernel's interface counters: whole IP packets.
"""


def load(docs: Path) -> dict[str, Any]:
    path = docs / "benchmarks.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(docs: Path, part: str, what: dict[str, Any]) -> None:
    everything = load(docs) | {part: what | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}}
    (docs / "benchmarks.json").write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n")


def where_time_goes(
    traces: Mapping[str, Sequence[dict[str, Any]]], first: int, docs: Path, cell: dict[str, Any]
) -> dict[str, float]:
    """Mean seconds a step on the critical path, by kind and by line, and the picture if this is the cell for it."""
    records = Records(traces)
    steps = sorted(set.intersection(*(set(s) for s in records.steps.values())))
    paths = {step: path for step in steps if step >= first and (path := records.path(step))}
    if not paths:
        return {}
    if (cell["profile"], cell["layout"], cell["setting"]) == PICTURED:
        step = sorted(paths)[len(paths) // 2]
        title = f"A step of {cell['layout']} on {cell['profile']}, settings: {cell['setting']}"
        draw(records, step, paths[step], docs / "critical-path.png", title)
    kinds: dict[str, float] = defaultdict(float)
    for label, seconds in shares(list(paths.values())).items():
        kinds[label.split(" ")[0]] += seconds
        if label.startswith("wire"):
            kinds[label] += seconds
    return {label: round(seconds, 4) for label, seconds in kinds.items()}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    rule = ["---"] * words + ["---:"] * (len(headings) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *rows))


def efficiency(found: dict[str, Any]) -> str:
    order = list(PROFILES)
    cells = sorted(found["cells"], key=lambda c: (c["layout"], c["setting"], order.index(c["profile"])))
    base = {(c["layout"], c["setting"]): c for c in cells if c["profile"] == "unlimited" and "failed" not in c}
    out = []
    for layout in sorted({c["layout"] for c in cells}):
        rows = []
        for c in (c for c in cells if c["layout"] == layout):
            unlimited = base.get((layout, c["setting"]))
            if "failed" in c or unlimited is None:
                rows.append(
                    [c["profile"], c["setting"], "failed: " + c.get("failed", "")[:80].replace("\n", " "), *[""] * 6]
                )
                continue
            machines = LAYOUTS[layout].stages * LAYOUTS[layout].replicas
            share = c["tokens_per_second"] / unlimited["tokens_per_second"]
            ideal = c["tokens_per_second"] / (machines * plain_tokens_per_second(LAYOUTS[layout]))
            aim = AIMS.get(c["profile"])
            up = min(line.up_mbit for line in PROFILES[c["profile"]].lines) * LAYOUTS[layout].rate_factor
            busy = f"{c['most_sent_mbit'] / up:.0%}" if math.isfinite(up) else "-"
            rows.append(
                [
                    c["profile"],
                    c["setting"],
                    f"{c['seconds_per_step']:.2f}",
                    f"**{share:.2f}**" if c is not unlimited else "1",
                    "-" if aim is None else f"{aim:.2f}",
                    f"{ideal:.2f}",
                    busy,
                    f"{c['late_share']:.1%}",
                    f"{c['late_packets']:.1%}",
                ]
            )
        heads = [
            "line",
            "settings",
            "s/step",
            "of unlimited",
            "aim",
            "of plain loops",
            "uplink used",
            "late",
            "late packets",
        ]
        out += [LAYOUTS[layout].describe() + ".", "", table(heads, rows, 2), ""]
    left = [MICROBATCHES / (MICROBATCHES + bubbles) for bubbles in (1, 3)]
    words = f"""
*Compute is replaced by calibrated waiting in every row of this section*: what is sent is real, what is learned is not.
*Of unlimited*: committed tokens/s over those of the same run on lines without limits. *Of plain loops*: over those of
as many machines that train the whole model alone and talk to nobody, by calculation from the calibrated time; the
bubbles of a step alone leave {left[0]:.2f} of it with two stages, {left[1]:.2f} with four. *Uplink used*: of the host
that sends most. *Late*: forwards and backwards that took longer than they should have, and packets that the emulator
handed over more than 1 ms late: more than a per cent or two of either says that the machine was busy with other things.
"""
    return "\n".join(["## potluck's own efficiency", words, *out])


def critical(found: dict[str, Any]) -> str:
    rows = []
    order = list(PROFILES)
    for c in sorted(found["cells"], key=lambda c: (c["layout"], c["setting"], order.index(c["profile"]))):
        if path := c.get("path"):
            total = sum(seconds for label, seconds in path.items() if " " not in label)
            lines = sorted(((s, x) for x, s in path.items() if x.startswith("wire ")), reverse=True)
            kinds = [f"{path.get(k, 0.0):.2f}" for k in ("compute", "encode", "wire", "update", "round")]
            slowest = f"{lines[0][1].removeprefix('wire ')} ({lines[0][0]:.2f})" if lines else "-"
            rows.append([c["layout"], c["profile"], c["setting"], f"{total:.2f}", *kinds, slowest])
    heads = ["layout", "line", "settings", "step", "compute", "encode", "wire", "update", "round", "slowest line"]
    return f"""## Where the time goes

Seconds of a mean step on its critical path, found by walking back from its end (`benchmarks/links/path.py`). *Round* is
what lies between two steps: the capture of a round, and waiting for one that is due.

![a step's critical path](critical-path.png)

{table(heads, rows, 3)}
"""


def one_line(o: Outcome) -> str:
    reached = "-" if o.to_target is None else f"{o.to_target:.0f} s"
    loss = "-" if o.loss is None else f"{o.loss:.3f}"
    return f"{o.name} on {o.line}: to target {reached}, {o.steps} steps in {o.seconds:.0f} s, held out {loss}"


def least_seconds(outcomes: Sequence[dict[str, Any]], name: str, slow: str) -> float:
    """What a contestant's machines sent until the target on the unlimited line, at another line's rate; 0: unknown."""
    free = next((o for o in outcomes if (o["name"], o["line"]) == (name, "unlimited")), None)
    if free is None or not free["sent_per_sample"]:
        return 0.0
    share = (free["to_target"] or free["seconds"]) / free["seconds"]
    nbytes = share * free["steps"] * 2 * MICROBATCHES * free["sent_per_sample"]
    return nbytes / WORKERS / (line(slow).lines[0].up_mbit * 125_000)


def contest(found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(o["name"] for o in found["outcomes"]))
    by = {(o["name"], o["line"]): o for o in found["outcomes"]}
    slow = found["slow"]
    rows, notes = [], []
    for name in names:
        free, bound = by.get((name, "unlimited")), by.get((name, slow))
        cells = [name]
        for o in (free, bound):
            cells.append("-" if o is None else f"{o['to_target']:.0f}" if o["to_target"] else f"> {o['seconds']:.0f}")
        least = least_seconds(found["outcomes"], name, slow)
        cells.append(f"{least:,.0f}" if least else "-")
        for o in (bound, free):
            cells.append("-" if o is None or o["seconds_per_step"] is None else f"{o['seconds_per_step']:.2f}")
        each = (bound or free or {}).get("sent_per_sample") or (free or {}).get("sent_per_sample")
        cells.append("-" if not each else f"{each:,.0f}")
        averaged = (free or {}).get("averaged")
        cells.append("-" if averaged is None else f"{averaged:.0%}")
        rows.append(cells)
        for o in (free, bound):
            notes += [f"- {name}, {o['line']}: {text[:300]}" for text in (o or {}).get("notes", [])]
    heads = [
        "what",
        "unlimited, s",
        f"{slow}, s",
        "at least, s",
        f"s/step, {slow}",
        "s/step, unlimited",
        "bytes/sample",
        "rounds averaged",
    ]
    listed = "\n".join(dict.fromkeys(notes)) or "None."
    return f"""## Against others

Seconds of training until the held-out loss is {found["target"]:g}, on lines without limits and on `{slow}`
({PROFILES[slow].about}). {found["conditions"]}.
At most {found["seconds"]:.0f} s of training each. Compute is real, and padded to its time.

{table(heads, rows)}

*At least*: what its machines sent on the unlimited line until the target (or until the time was up), at the slow line's
rate: no run of it can be shorter, and those for which it is longer than the limit were not made. *Bytes/sample*: sent
by all machines together. *Rounds averaged*: those after which parameters had really come together.
Rivals' evaluations stop their clock, potluck's do not. How each is set up: `benchmarks/rivals`.

What they said on the way:

{listed}
"""


def uneven(found: dict[str, Any]) -> str:
    """One slow machine."""
    rows = "\n".join(
        f"| {r['layout']} | {r['profile']} | {r['times']:g} | {r['before']:.2f} | {r['after']:.2f} |"
        f" {r['before'] / r['after']:.2f} | {r['calculated']:.2f} | {shares_of(r['shares'])} |"
        for r in found["rows"]
    )
    return f"""## One slow machine

One of the machines takes several times as long for a microbatch; after a minute its stage's microbatches are shared by
what each was seen to need. *Computing is replaced by calibrated waiting.* *Calculated*: the most that shares can bring.

| layout | line | times as slow | before, s/step | after, s/step | times as fast | calculated | shares |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |
{rows}
"""


def shares_of(stages: Sequence[Sequence[int]]) -> str:
    return "; ".join(f"stage {i}: {' + '.join(map(str, shares)) or 'even'}" for i, shares in enumerate(stages))


def churn(found: dict[str, Any]) -> str:
    rows = []
    for r in found["rows"]:
        same = (r["layout"], r["profile"], 0.0)
        calm = next((c for c in found["rows"] if (c["layout"], c["profile"], c["share_per_hour"]) == same), None)
        kept = "-" if calm is None else f"{r['samples_per_second'] / calm['samples_per_second'] / r['up']:.2f}"
        wrong = f"{len(r['problems'])} problems" if r["problems"] else "0, 0"
        cells = [f"{r['share_per_hour']:.0%}", r["layout"], r["profile"], str(r["deaths"]), f"{r['up']:.2f}"]
        rows.append([*cells, f"{r['samples_per_second']:.2f}", kept, wrong])
    heads = ["lost an hour", "layout", "line", "deaths", "mean share up", "samples/s", "kept", "samples lost, twice"]
    return f"""## Under churn

Machines lose power (SIGKILL, line cut) and come back after five minutes in the mean, in scaled time, one seed. *Kept*:
committed samples/s over those of the run without deaths times the mean share of machines that were up. *Samples lost,
twice*: as `potluck ledger verify` proves from the run's file. Compute is calibrated waiting here, too.

{table(heads, rows, 3)}
"""


def schedule(found: dict[str, Any]) -> str:
    rows = [
        [
            r["case"],
            str(r["microbatches"]),
            f"{r['best']:.2f}" + ("" if r["proven"] else " (bound)"),
            f"{r['ours'] / r['best']:.3f}",
            f"{r['one_f_one_b'] / r['best']:.3f}",
        ]
        for r in found["rows"]
    ]
    heads = ["stages of 1 s a microbatch", "microbatches", "best, s", "potluck's rule", "1F1B with one forward more"]
    return f"""## The order of a step

How long a step takes by the worker's rule and by 1F1B, over the best possible (`benchmarks/links/schedule.py`, exact
search; *bound*: a lower bound where the search was cut off). Calculated, not measured.

{table(heads, rows)}
"""


def write(docs: Path) -> None:
    found = load(docs)
    parts = [HEAD]
    if machine := next((part["machine"] for part in found.values() if "machine" in part), ""):
        parts.append(f"Machine: {machine}, no GPU.\n")
    if "efficiency" in found:
        how = next((c["how"] for c in found["efficiency"]["cells"] if c.get("how")), "")
        parts += [f"Emulation: {how}.\n", efficiency(found["efficiency"]), critical(found["efficiency"])]
    if "contest" in found:
        parts.append(contest(found["contest"]))
    if "uneven" in found:
        parts.append(uneven(found["uneven"]))
    if "churn" in found:
        parts.append(churn(found["churn"]))
    if "schedule" in found:
        parts.append(schedule(found["schedule"]))
    (docs / "BENCHMARKS.md").write_text("\n".join(parts))
