"""Codecs on one core, side by side in one run: speed, bytes on the wire, error.

    python -m benchmarks.codecs              (from the checkout; the others come with pip install 'potluck[bench]')
    python -m benchmarks.codecs --quick      (a minute, for a look)

Activations: an fp32 tensor of 8 x 512 x 4096, heavy-tailed, with outlier channels. Weight differences: 200 million
fp32 elements. Everyone gets the same tensor and gives bytes; everyone decodes to fp32 in memory. A round times
everyone once, in an order drawn anew, so that a machine that drifts drifts for all; the best round counts, and
`spread` is the median round over the best (near 1.0 on a quiet machine).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from . import one_core

if TYPE_CHECKING:
    from torch import Tensor

    from .contestants import Contestant, Errors

WIDTH = 120
FULL, QUICK = (8, 512, 4096), (2, 256, 4096)
ELEMENTS, QUICK_ELEMENTS = 200_000_000, 4_000_000
GB = 1e9
# heading, key of the row, format
ACTIVATION_COLUMNS = (
    ("encode\nGB/s", "encode", ".2f"),
    ("decode\nGB/s", "decode", ".2f"),
    ("both\nGB/s", "both", ".2f"),
    ("spread", "spread", ".2f"),
    ("bits per\nelement", "bits", ".3f"),
    ("times less\nthan fp16", "reduction", ".2f"),
    ("relative\nsq. error", "error", ".1e"),
    ("without\noutliers", "error_plain", ".1e"),
)
SYNC_COLUMNS = (
    *ACTIVATION_COLUMNS[:6],
    ("relative\nsq. error", "error", ".1e"),
    ("encode\n+MB", "encode_mb", ",.0f"),
    ("decode\n+MB", "decode_mb", ",.0f"),
)


def race(contestants: list[Contestant], x: Tensor, errors: Errors, rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row per contestant: times of `rounds` rounds after an untimed one, in which the bytes are counted."""
    rows = [{"group": c.group, "codec": c.name, "note": c.missing} for c in contestants]
    running = [(c, row) for c, row in zip(contestants, rows, strict=True) if not c.missing]
    for c, row in list(running):
        try:
            row |= first_time(c, x, errors)
        except Exception as error:  # another project's code on a version it was not made for: its row says so
            row["note"] = f"failed: {type(error).__name__}: {error}"[:WIDTH]
            running.remove((c, row))
    times: dict[int, list[tuple[float, float]]] = {id(row): [] for _, row in running}
    order = random.Random(seed)
    for number in range(rounds):
        order.shuffle(running)
        for c, row in running:
            times[id(row)].append(once(c))
        print(f"round {number + 1} of {rounds}", flush=True)
    for _, row in running:
        row |= speeds(times[id(row)], 4 * x.numel())
    return rows


def once(c: Contestant) -> tuple[float, float]:
    assert c.encode is not None and c.decode is not None
    start = time.perf_counter()
    sent = c.encode()
    middle = time.perf_counter()
    c.decode(sent)
    return middle - start, time.perf_counter() - middle


def first_time(c: Contestant, x: Tensor, errors: Errors) -> dict[str, Any]:
    """Bytes, error and memory; also where numba compiles."""
    assert c.encode is not None and c.decode is not None
    c.decode(c.encode())
    before = one_core.start_peak()
    sent = c.encode()
    row: dict[str, Any] = {} if before is None else {"encode_mb": (one_core.peak() - before) / 1e6}
    c.reset()
    before = one_core.start_peak()
    y = c.decode(sent)
    row |= {} if before is None else {"decode_mb": (one_core.peak() - before) / 1e6}
    nbytes = memoryview(sent).nbytes
    bits = 8 * nbytes / x.numel()
    return row | {"nbytes": nbytes, "bits": bits, "reduction": 16 / bits} | errors(c.counted(x), c.counted(y))


def speeds(times: list[tuple[float, float]], nbytes: int) -> dict[str, Any]:
    totals = [encode + decode for encode, decode in times]
    encode, decode = (min(column) for column in zip(*times, strict=True))
    return {
        "encode": nbytes / encode / GB,
        "decode": nbytes / decode / GB,
        "both": nbytes / min(totals) / GB,
        "spread": statistics.median(totals) / min(totals),
        "seconds": times,
    }


def table(title: str, columns: tuple[tuple[str, str, str], ...], rows: list[dict[str, Any]]) -> Table:
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    made.add_column("codec", justify="left", no_wrap=True)
    for heading, *_ in columns:
        made.add_column(heading, justify="right", no_wrap=True)
    group = None
    for row in rows:
        if row["note"]:
            continue
        if row["group"] != group:
            made.add_row()
            group = row["group"]
        cells = [format(row[key], spec) if key in row else "-" for _, key, spec in columns]
        made.add_row(f"{group} {row['codec']}", *cells)
    return made


def show(title: str, columns: tuple[tuple[str, str, str], ...], rows: list[dict[str, Any]]) -> None:
    console = Console(width=WIDTH, highlight=False)
    console.print()
    console.print(table(title, columns, rows))
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            left_out.setdefault(f"{row['group']}, {row['note']}", []).append(row["codec"])
    for why, codecs in left_out.items():
        console.print(f"{why}:\n    {'; '.join(codecs)}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors and 3 rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 9; a third of it for weight differences)")
    parser.add_argument("--only", choices=("activations", "differences"), help="one of the two tables")
    parser.add_argument("--elements", type=int, help=f"of the weight difference (default {ELEMENTS:,})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--core", type=int, help="which core to run on (default the last one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows there too")
    arguments = parser.parse_args()
    pinned = one_core.pin(arguments.core)
    from . import contestants  # after pinning: it imports everything that starts threads

    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    warnings.filterwarnings("ignore", module="hivemind")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it misses kernels that are not used here
    shape = QUICK if arguments.quick else FULL
    elements = arguments.elements or (QUICK_ELEMENTS if arguments.quick else ELEMENTS)
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    said = one_core.conditions(pinned) | {
        "activations": f"{' x '.join(map(str, shape))} fp32, {contestants.OUTLIERS} outlier channels",
        "differences": f"{elements:,} fp32",
        "seed": str(arguments.seed),
    }
    for key, value in said.items():
        print(f"{key + ':':13} {value}")
    print("GB/s:         of fp32 input or output, 1 GB = 1e9 bytes, the best round; a copy is the ceiling")
    result: dict[str, Any] = {"conditions": said}
    if arguments.only != "differences":
        x, outliers = contestants.activations(shape, arguments.seed)
        title = f"activations, {4 * x.numel() / 1e6:,.0f} MB, {rounds} rounds"
        errors = contestants.errors_of_activations(outliers)
        result["activations"] = race(list(contestants.everyone(x)), x, errors, rounds, arguments.seed)
        show(title, ACTIVATION_COLUMNS, result["activations"])
        del x
    if arguments.only != "activations":
        rounds = max(2, rounds // 3)
        x = contestants.difference(elements, arguments.seed)
        title = f"weight differences, {4 * x.numel() / 1e6:,.0f} MB, {rounds} rounds"
        result["differences"] = race(
            list(contestants.everyone_of_sync(x)), x, contestants.errors_of_differences, rounds, arguments.seed
        )
        show(title, SYNC_COLUMNS, result["differences"])
        print("\nmask .1, top .2, 4 bit is CocktailSGD's message; top .03 of 4096, 2 bit is SparseLoCo's")
        print("relative sq. error: of the values that the seeded mask opened; what top-k leaves out counts as error")
        print("+MB: the most memory above what was there before, result included; the difference itself is not in it")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
