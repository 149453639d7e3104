"""docs/NAT.md, from docs/nat.json."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from benchmarks.links.report import table
from benchmarks.netlab.nat import NATS
from benchmarks.netlab.profiles import PROFILES

from .load import LEAST_WINDOW
from .load import WINDOW_NBYTES as LOAD_WINDOW
from .pairs import WARM_SECONDS, WINDOW_NBYTES
from .peer import FRAME_NBYTES
from .punch import RELAYS

AIM_MB = 300.0  # a second and core, of a relay
KINDS = {
    "none": "a public address",
    "port-keeping": "the host's own port, the same for everybody; once it is mapped, everybody may send to it",
    "port-restricted": "the same, but only who was sent to may answer, from the very address and port",
    "symmetric": "another port, at random, for each destination; only the destination may answer",
    "double": "two of the port-restricted kind, one behind the other",
}
HEAD = """# Behind home routers

Made by `python -m benchmarks.nat`; do not edit. Workers are real, their lines and routers emulated on one machine:
each is a network namespace, and the process that carries packets between them translates addresses as a home router
does (`benchmarks/netlab/nat.py`; RFC 4787's kinds, for TCP as for UDP, nothing opened by hand, no UPnP).
"""


def load(docs: Path) -> dict[str, Any]:
    path = docs / "nat.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(docs: Path, part: str, found: dict[str, Any]) -> None:
    """``found`` says how busy the machine was before: ``load``."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    everything = load(docs) | {part: found | {"machine": machine}}
    (docs / "nat.json").write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n")


def one_pair(row: dict[str, Any]) -> str:
    way = f"{row['dialler']} to {row['listener']}"
    if row["failed"]:
        return f"{way}: {row['failed']}"
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    return f"{way}: {row['path']}, {row['first_seconds']:.2f} s, {share}; later {row['later']}"


def one_training(row: dict[str, Any]) -> str:
    pauses = ", ".join(f"{pause:.1f}" for pause in row["pauses"])
    return (
        f"{row['layout']} {row['routers']}, {row['cuts']} cuts: {row['seconds']:.0f} s, {row['model'][:12]}, "
        f"{row['samples']} samples, {len(row['problems'])} problems, pauses [{pauses}]"
    )


def one_load(row: dict[str, Any]) -> str:
    return (
        f"{row['pairs']} pairs: {row['rate']:.0f} MB/s, {row['cpu_per_gb']:.1f} CPU seconds per GB, "
        f"{row['memory_mb']:.0f} MB; each {row['least']:.2f} to {row['most']:.2f}, median {row['median']:.2f}"
    )


def paths(found: dict[str, Any]) -> str:
    by = {(row["dialler"], row["listener"]): row for row in found["rows"]}

    def cell(dialler: str, listener: str) -> str:
        row = by[dialler, listener]
        if row["failed"]:
            return "none: " + row["failed"].split(":")[0]
        changed = "" if row["later"] == row["path"] else f", then {row['later']}"
        return f"{row['path']}{changed}, {row['first_seconds']:.2f} s, {row['share']:.0%}"

    rows = [[dialler, *(cell(dialler, listener) for listener in NATS)] for dialler in NATS]
    kinds = "\n".join(f"- *{kind}*: {KINDS[kind]}" for kind in NATS)
    shares = {kind: [row["share"] for row in found["rows"] if row["path"] == kind] for kind in ("direct", "relayed")}
    means = "; ".join(f"{kind}: {statistics.mean(s):.0%} of the line" for kind, s in shares.items() if s)
    line, hold = found["line"], found["hold"]
    changed = sum(row["later"] != row["path"] for row in found["rows"])
    changes = f"{changed} had changed" if changed else "none had changed"
    return f"""## Who reaches whom

Every row dials every column. Path, seconds from dialling to the first frame's arrival, and the share of the line's
rate that a stream of frames then takes ({means}).
After {hold:g} s each path was looked at again: {changes}.

{table(["from, to", *NATS], rows)}

{kinds}

Every worker's line: `{line}` ({PROFILES[line].about}); the relay's host has one without limits, so both ways take the
same round trip. Share: frames' bytes of {found["seconds"]:g} s, after {WARM_SECONDS:g} s, over the uplink's rate, which
counts headers too; frames of {FRAME_NBYTES >> 10} KiB, at most {WINDOW_NBYTES >> 20} MiB unacknowledged. Workers named
the addresses that they have; the others were told of those at which they answered the coordinator
(`coordinator/addresses.py`). Without libp2p there is no hole punching: two that both have routers meet at a
relay; if one of two has a public address, the other dials it, whoever wants to send: the relay only passes that request
on. {found.get("note", "")}
"""


def punching(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        ways = [row["dialler"], row["listener"]]
        if row["failed"]:
            rows.append([*ways, "none: " + row["failed"].split(":")[0], "-", "-", "-"])
            continue
        share = "-" if row["share"] is None else f"{row['share']:.0%}"
        rows.append([*ways, row["path"], f"{row['first_seconds']:.2f}", row["later"], share])
    line = found["line"]
    return f"""## With libp2p

Some of these pairs where both workers have the extra `p2p` and meet at {RELAYS} relays of libp2p at as many public
addresses, and at no other relay. *First*: the path on which the first frame came, and seconds from dialling to that,
once relays keep a place for both. *Later*: the path after {found["hold"]:g} s, and the share of the line that it takes
(frames' bytes of {found["seconds"]:g} s, after {WARM_SECONDS:g} s, over the uplink's rate). *Punched*: straight through
both routers. A channel looks for such a path after 10 s and after a minute.

{table(["from", "to", "first", "s", "later", "share"], rows, 3)}

Every worker's line: `{line}` ({PROFILES[line].about}).
"""


def training(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        plain = next(r for r in found["rows"] if (r["layout"], r["routers"]) == (row["layout"], "none"))
        same = "yes" if row["model"] == plain["model"] else "NO"
        pauses = f"{statistics.median(row['pauses']):.1f} ({max(row['pauses']):.1f})" if row["pauses"] else "-"
        wrong = f"{len(row['problems'])} problems" if row["problems"] else "0, 0"
        cells = [row["layout"], row["routers"], str(row["cuts"]), f"{row['seconds']:.0f}", f"{row['relayed_mb']:.0f}"]
        rows.append([*cells, pauses, str(row["rollbacks"]), wrong, same if row is not plain else "-"])
    heads = ["layout", "routers", "cuts", "s", "MB at the coordinator", "pause, s", "rollbacks", "samples lost, twice"]
    row = found["rows"][0]
    return f"""## Training through the relay

`potluck coordinator up` on a public host and two `potluck worker join` behind `{row["line"]}`, {row["steps"]} steps
of a tiny model to the end, nothing compressed: activations in fp32, weights averaged every step. 2x1 is two stages, so
that every microbatch crosses; 1x2 two replicas, so that every step is a round. A *cut*: while a worker's line is busy,
its router loses all mappings, so that its connections, to the coordinator and through the relay, are dead at once, in
the middle of what they carry.

{table([*heads, "same weights"], rows, 2)}

*MB at the coordinator*: IP packets that came to its host after the first step. *Pause*: from a cut to the next step
done, median and longest. *Samples lost, twice*: by `potluck ledger verify`. *Same weights*: the published files, bit
for bit, are those of the run without routers.
"""


def bearing(found: dict[str, Any]) -> str:
    rows = [
        [
            str(2 * row["pairs"]),
            f"{row['rate']:.0f}",
            f"{row['cpu_per_gb']:.1f}",
            f"{1000 / row['cpu_per_gb']:.0f}",
            f"{row['memory_mb']:.0f}",
            f"{row['least']:.2f}",
            f"{row['median']:.2f}",
            f"{row['most']:.2f}",
        ]
        for row in found["rows"]
    ]
    heads = ["peers", "MB/s", "CPU s/GB", "MB/s a core", "memory, MB", "least", "median", "most"]
    return f"""## One relay

Half of the peers send to the other half through one relay, as fast as it goes, over loopback; all share this machine's
cores, and encrypting, checking and decrypting at the ends takes most of them. *CPU s/GB* and *memory* (at most) are of
the relay's process alone. *MB/s a core*: what that comes to with a core of its own, by calculation (aim: {AIM_MB:.0f}).
*Least* to *most*: MB/s of a single pair. Frames of {FRAME_NBYTES >> 10} KiB, at most {LOAD_WINDOW >> 20} MiB of them
unacknowledged by all together, but {LEAST_WINDOW >> 10} KiB by each at the least.

{table(heads, rows)}
"""


def write(docs: Path) -> None:
    found = load(docs)
    parts = [HEAD]
    if machine := next((part["machine"] for part in found.values()), ""):
        loads = ", ".join(f"{name} {part['load']:.1f}" for name, part in found.items() if "load" in part)
        parts.append(f"Machine: {machine}. Load average before each part, other work on it: {loads or 'unknown'}.\n")
    for name, section in (("pairs", paths), ("p2p", punching), ("train", training), ("relay", bearing)):
        if name in found:
            parts.append(section(found[name]))
    (docs / "NAT.md").write_text("\n".join(parts))
