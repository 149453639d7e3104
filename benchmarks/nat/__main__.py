"""Workers behind home routers: which path two of them get, training through a relay, and what a relay bears.

    python -m benchmarks.nat             all of these, one after the other: about 12 minutes
    python -m benchmarks.nat pairs       every kind of router with every kind: path, time to the first frame, rate
    python -m benchmarks.nat p2p         some of these pairs, meeting at relays of libp2p: is a hole punched?
    python -m benchmarks.nat train       real runs through the coordinator's relay, whole and cut: the same weights?
    python -m benchmarks.nat relay       one relay: MB/s, CPU, and how evenly it serves many
    python -m benchmarks.nat report      docs/NAT.md from what the others have found

Every part puts what it found into docs/nat.json, and docs/NAT.md is written anew. Needs Linux, and root or user
namespaces (``relay`` does not; ``p2p`` needs root and the extra p2p, and is left out of all where they are not); two
idle cores for figures that mean something.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.netlab.profiles import PROFILES
from potluck.protocol.p2pd import is_installed

from . import load, pairs, punch, report, train

DOCS = Path(__file__).parents[2] / "docs"
ROUTERS = "symmetric"  # the hardest kind: of both workers, in training


def do_pairs(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    how = {"line": options.line, "seconds": options.seconds, "hold": options.hold}
    for pair in pairs.measure(**how, folder=folder):
        rows.append(asdict(pair))
        print(report.one_pair(rows[-1]), flush=True)
    return {**how, "rows": rows}


def do_p2p(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    how = {"line": options.line, "seconds": options.seconds, "hold": options.hold}
    for pair in punch.measure(**how, folder=folder):
        rows.append(asdict(pair))
        print(report.one_pair(rows[-1]), flush=True)
    return {**how, "rows": rows}


def do_train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    for layout in options.layouts:
        for routers, cuts in (("none", 0), (ROUTERS, 0), (ROUTERS, options.cuts)):
            place = folder / f"{layout}-{routers}-{cuts}"
            place.mkdir()
            found = train.train(layout, routers, options.line, steps=options.steps, cuts=cuts, folder=place)
            rows.append(asdict(found))
            print(report.one_training(rows[-1]), flush=True)
    return {"rows": rows}


def do_relay(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    for count in options.counts:
        rows.append(asdict(load.bear(count, seconds=options.relay_seconds, folder=folder)))
        print(report.one_load(rows[-1]), flush=True)
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"pairs": do_pairs, "p2p": do_p2p, "train": do_train, "relay": do_relay}
    parser.add_argument("part", nargs="?", choices=(*parts, "report"), help="left out: all")
    parser.add_argument("--line", choices=PROFILES, default="home-cable", help="of every worker (default home-cable)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a pair's stream that count (default 4)")
    parser.add_argument("--hold", type=float, default=60.0, help="seconds until a path is looked at again (default 60)")
    parser.add_argument("--layouts", nargs="+", choices=train.LAYOUTS, default=list(train.LAYOUTS))
    parser.add_argument("--steps", type=int, default=24, help="of a training run (default 24)")
    parser.add_argument("--cuts", type=int, default=6, help="of the run that is cut (default 6)")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 100], help="pairs at one relay (1 4 100)")
    parser.add_argument("--relay-seconds", type=float, default=10.0, help="that count, of a relay's load (default 10)")
    options = parser.parse_args()
    for name, part in parts.items():
        possible = name != "p2p" or (is_installed() and os.geteuid() == 0)
        if options.part == name or (options.part is None and possible):
            busy = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as folder:
                report.save(DOCS, name, part(options, Path(folder)) | {"load": busy})
    report.write(DOCS)


if __name__ == "__main__":
    main()
