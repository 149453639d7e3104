"""potluck on emulated home lines, side by side with what people would use instead.

    python -m benchmarks.links efficiency      share of the unlimited line's speed that it keeps, by line
    python -m benchmarks.links contest         time to the same loss, against others: benchmarks/rivals/requirements.txt
    python -m benchmarks.links churn           throughput kept while machines lose power and come back, scaled time
    python -m benchmarks.links uneven          one machine is slower than the others: a step before and after new shares
    python -m benchmarks.links schedule        the order of a step against the best possible
    python -m benchmarks.links report          docs/BENCHMARKS.md from what the others have found

Every part adds what it found to docs/benchmarks.json, and the report is written anew. Needs Linux, and root or user
namespaces; two idle cores for figures that mean something.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.netlab.profiles import PROFILES

from . import churn, contest, report, uneven
from .runs import Failed, measure, read_trace
from .scale import LAYOUTS, SETTINGS
from .schedule import best, even, one_f_one_b, replay
from .schedule import uneven as uneven_stages

DOCS = Path(__file__).parents[2] / "docs"
LINES = ("100m", "home-fibre", "home-cable", "home-dsl", "worldwide-8")


def efficiency(options: argparse.Namespace) -> dict[str, Any]:
    """Cells of lines x layouts x settings, the unlimited line first."""
    cells: list[dict[str, Any]] = report.load(DOCS).get("efficiency", {}).get("cells", [])
    for layout in options.layouts:
        for setting in options.settings:
            for line in ("unlimited", *options.lines):
                with tempfile.TemporaryDirectory() as name:
                    folder, began = Path(name), time.monotonic()
                    try:
                        cell = asdict(
                            measure(
                                PROFILES[line],
                                LAYOUTS[layout],
                                setting,
                                steps=options.steps,
                                warmup=options.warmup,
                                folder=folder,
                            )
                        )
                    except Failed as error:
                        cell = {"profile": line, "layout": layout, "setting": setting, "failed": str(error)[-800:]}
                    else:
                        traces = {path.stem: read_trace(path) for path in sorted(folder.glob("*.trace"))}
                        cell["path"] = report.where_time_goes(traces, options.warmup + 1, DOCS, cell)
                key = (line, layout, setting)
                cells = [c for c in cells if (c["profile"], c["layout"], c["setting"]) != key] + [cell]
                report.save(DOCS, "efficiency", {"cells": cells})
                took = time.monotonic() - began
                said = (
                    cell.get("failed") or f"{cell['seconds_per_step']:.2f} s a step, {cell['tokens_per_second']:.0f}/s"
                )
                print(f"{layout} {setting} {line}: {said} ({took:.0f} s)", flush=True)
    return {"cells": cells}


def compete(options: argparse.Namespace) -> dict[str, Any]:
    """Everybody on the unlimited line, then on ``--line`` those whose bytes leave a chance to be done in time."""
    found: list[dict[str, Any]] = report.load(DOCS).get("contest", {}).get("outcomes", [])
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        contest.prepare(corpus)
        how = {"steps": options.steps, "every": options.every, "target": options.target}
        task = contest.task(corpus, seconds=options.seconds, **how)
        for i, contestant in enumerate(options.contestants or (*contest.OURS, *contest.RIVALS)):
            for line in ("unlimited", options.line):
                if line != "unlimited" and (least := report.least_seconds(found, contestant, line)) > options.seconds:
                    print(f"{contestant} on {line}: left out, its bytes alone take {least:,.0f} s")
                    continue
                folder = Path(name) / f"{i}-{line}"
                folder.mkdir()
                try:
                    if contestant in contest.OURS:
                        outcome = contest.ours(contestant, line, seconds=options.seconds, folder=folder, **how)
                    else:
                        outcome = contest.theirs(contestant, line, task, folder / "run")
                except Failed as error:
                    print(f"{contestant} on {line}: {error}")
                    continue
                found = [o for o in found if (o["name"], o["line"]) != (contestant, line)] + [asdict(outcome)]
                rest = {"target": options.target, "seconds": options.seconds, "slow": options.line}
                rest["conditions"] = contest.describe()
                report.save(DOCS, "contest", {"outcomes": found, **rest})
                print(report.one_line(outcome), flush=True)
    return {"outcomes": found}


def survive(options: argparse.Namespace) -> dict[str, Any]:
    """The same run with more and more of its machines going in an hour."""
    rows: list[dict[str, Any]] = report.load(DOCS).get("churn", {}).get("rows", [])
    for share in (0.0, *options.shares):
        with tempfile.TemporaryDirectory() as name:
            how = {"seconds": options.seconds, "seed": options.seed, "folder": Path(name)}
            try:
                row = asdict(churn.endure(PROFILES[options.line], LAYOUTS[options.layout], share, **how))
            except Failed as error:
                print(f"{share:.0%}: {error}")
                continue
        key = (row["layout"], row["profile"], share)
        rows = [r for r in rows if (r["layout"], r["profile"], r["share_per_hour"]) != key] + [row]
        report.save(DOCS, "churn", {"rows": rows})
        print(row, flush=True)
    return {"rows": rows}


def unevenly(options: argparse.Namespace) -> dict[str, Any]:
    """A slow machine, and how much of it the others feel."""
    rows = []
    for times in options.times:
        with tempfile.TemporaryDirectory() as name:
            rows.append(asdict(uneven.share(LAYOUTS["2x2"], times, options.line, Path(name))))
        print(rows[-1], flush=True)
        report.save(DOCS, "uneven", {"rows": rows})
    return {"rows": rows}


def schedules(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step whose stages take a second a microbatch, by our rule, by 1F1B, and at best."""
    rows = []
    cases = [
        (f"{stages} stages, line {wire:g}, latency {latency:g}", even(stages, wire=wire, latency=latency), count)
        for stages, count in ((2, 16), (4, 16))
        for wire, latency in ((0.0, 0.0), (0.2, 0.05), (0.5, 0.1), (0.5, 0.5), (1.0, 0.1), (1.5, 0.2))
    ]
    cases += [(f"3 uneven stages, seed {seed}", uneven_stages(3, seed), 8) for seed in range(8)]
    for name, times, count in cases:
        shortest, proven = best(times, count, options.nodes)
        row = {"case": name, "microbatches": count, "best": shortest, "proven": proven}
        rows.append({**row, "ours": replay(times, count), "one_f_one_b": one_f_one_b(times, count)})
        print(rows[-1])
    report.save(DOCS, "schedule", {"rows": rows})
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("efficiency", help="share of the unlimited line's speed")
    one.add_argument("--lines", nargs="+", default=list(LINES), choices=sorted(PROFILES))
    one.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=sorted(LAYOUTS))
    one.add_argument("--settings", nargs="+", default=["default", "lean"], choices=sorted(SETTINGS))
    one.add_argument("--steps", type=int, default=15, help="measured steps: a multiple of the steps between rounds")
    one.add_argument("--warmup", type=int, default=3, help="steps over the line before them")
    two = parts.add_parser("contest", help="time to the same loss, against others")
    two.add_argument("contestants", nargs="*", help="names (default: all)")
    two.add_argument("--line", default="home-cable", choices=sorted(PROFILES))
    two.add_argument("--target", type=float, default=6.53, help="held-out nats per token")
    two.add_argument("--steps", type=int, default=150, help="at most")
    two.add_argument("--every", type=int, default=10, help="steps between looks at the held-out loss")
    two.add_argument("--seconds", type=float, default=240.0, help="of training, at most")
    four = parts.add_parser("churn", help="throughput kept while machines lose power and come back")
    four.add_argument("--shares", nargs="+", type=float, default=[0.10, 0.33, 1.0], help="of the machines, an hour")
    four.add_argument("--line", default="home-fibre", choices=sorted(PROFILES))
    four.add_argument("--layout", default="2x2", choices=sorted(LAYOUTS))
    four.add_argument("--seconds", type=float, default=390.0, help="of training: 390 are an hour of 2x2's real run")
    four.add_argument("--seed", type=int, default=1)
    five = parts.add_parser("uneven", help="one machine slower than the others")
    five.add_argument("--times", nargs="+", type=float, default=[3.0], help="as long as the others for a microbatch")
    five.add_argument("--line", default="unlimited", choices=sorted(PROFILES))
    three = parts.add_parser("schedule", help="the order of a step against the best possible")
    three.add_argument("--nodes", type=int, default=50_000, help="of the search, at most, before a bound is told")
    parts.add_parser("report", help="docs/BENCHMARKS.md")
    options = parser.parse_args()
    if options.part != "report":
        run = {
            "efficiency": efficiency,
            "contest": compete,
            "churn": survive,
            "uneven": unevenly,
            "schedule": schedules,
        }
        run[options.part](options)
    report.write(DOCS)
    print(json.dumps({"written": "docs/BENCHMARKS.md"}))


if __name__ == "__main__":
    main()
