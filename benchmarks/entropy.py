"""Does entropy coding of the codes pay? On real tensors, one core, about three minutes.

    python -m benchmarks.entropy             (from the checkout, with pip install 'potluck[worker,bench]')

It pays if a message loses more than 5 % of its bytes, statistics and scales counted, and if coding and decoding
together take no more than a tenth of the time that the message as it is takes on the line.

Bounds. `order 0`: the entropy of the codes' frequencies. `context`: an ideal adaptive coder with a model of its own
for each channel, or for each tile of a row, whichever is shorter, learning included. Coders: zstd on the whole
message, on its codes as they are packed now, on one code a byte (unpacked), and on as many whole codes a byte as fit
(grouped); zlib without its search for repeats, which is Huffman's code; constriction's range coder and ANS with the
message's frequencies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import one_core
from .coders import Coder, Codes, adaptive, coders, order0

if TYPE_CHECKING:
    from .real_tensors import Real

WIDTH = 120
BITS, TILE = (3, 4, 6, 8), 64
LINES_MBPS = (20, 100)
SAVING, SHARE = 0.05, 0.10  # the rule
# settings of a round: density, topk, chunk, bits
ROUNDS = ((0.1, 1.0, 0, 4), (0.1, 1.0, 0, 8), (1.0, 1.0, 0, 8), (0.1, 0.2, 0, 4), (1.0, 0.03, 4096, 2))
SHOWN = ("zstd 1 message", "zstd 1 packed", "zstd 1 unpacked", "zstd 1 grouped", "zlib grouped", "range coder")


@dataclass(frozen=True)
class Message:
    """One message on the wire, and its codes."""

    tensor: str
    spec: str
    bits: int
    payload: bytes
    packed: bytes  # the codes' part of it
    codes: Codes
    error: float  # relative and squared, of the median token
    n: int  # elements that it stands for


def messages(tensors: Iterable[Real]) -> Iterator[Message]:
    for real in tensors:
        if real.kind == "difference":
            yield from differences(real)
        else:
            yield from activations(real)


def activations(real: Real) -> Iterator[Message]:
    import torch

    from potluck.compression.codec import CodecError
    from potluck.compression.grid import unpack_codes
    from potluck.compression.registry import build
    from potluck.compression.tile_format import parse

    n = real.x.shape[-1]
    for option in ("", ",hadamard"):
        for bits in BITS:
            spec = f"int{bits}:tile={TILE}{option}"
            try:
                codec = build(spec)
            except CodecError as error:
                print(f"left out: {error}")
                continue
            payload = codec.encode(real.x, 1)
            *_, start, stop, _ = parse(spec).sections(n)
            packed = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(
                -1, len(payload) * n // real.x.numel()
            )
            packed = packed[:, start:stop].contiguous()
            error = (codec.decode(payload, real.x.shape) - real.x).square().sum(-1) / real.x.square().sum(-1)
            yield Message(
                tensor=f"{real.model} {real.kind}",
                spec=spec.removesuffix(":tile=64").replace(":tile=64,", " "),
                bits=bits,
                payload=payload,
                packed=packed.numpy().tobytes(),
                codes=unpack_codes(packed, bits, n).numpy(),
                error=float(error.median()),
                n=real.x.numel(),
            )


def differences(real: Real) -> Iterator[Message]:
    import torch

    from potluck.compression.grid import packed_nbytes, unpack_codes
    from potluck.compression.mask import Mask
    from potluck.compression.sync import SyncCodec

    for density, topk, chunk, bits in ROUNDS:
        values = Mask(real.x.numel(), density, 1).gather(real.x)
        codec = SyncCodec(topk=topk, chunk=chunk, bits=bits)
        encoded = codec.encode(values)
        kept = encoded.sent.values.numel()
        packed = encoded.payload[-packed_nbytes(kept, bits) :]
        as_tensor = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(1, -1)
        lost = encoded.sent.add_to(values.clone(), -1.0).square().sum() / values.square().sum()
        parts = [f"mask {density:g}"] * (density < 1) + [f"top {topk:g}"] * (topk < 1) + [f"of {chunk}"] * (chunk > 0)
        yield Message(
            tensor=f"{real.model} {real.kind}",
            spec=" ".join([f"int{bits}", *parts]),
            bits=bits,
            payload=encoded.payload,
            packed=packed,
            codes=unpack_codes(as_tensor, bits, kept).numpy(),
            error=float(lost),
            n=real.x.numel(),
        )


def measure(message: Message, repeats: int) -> dict[str, Any]:
    """Savings as shares of the message, and the coders' best times of `repeats`, taking turns."""
    nbytes = len(message.payload)
    rest = nbytes - len(message.packed)
    bits, codes = message.bits, message.codes
    row: dict[str, Any] = {
        "tensor": message.tensor,
        "kind": message.tensor.rpartition(" ")[2],
        "spec": message.spec,
        "bits": bits,
        "nbytes": nbytes,
        "bits_per_element": 8 * nbytes / message.n,
        "error": message.error,
        "entropy": 8 * order0(codes, bits) / codes.size,
        "order 0": 1 - (rest + order0(codes, bits)) / nbytes,
        "adaptive": 1 - (rest + adaptive(codes, bits)) / nbytes,
        "coders": {},
    }
    if codes.shape[0] > 1:
        channel = np.arange(codes.shape[1])[None]
        context = min(adaptive(codes, bits, channel), adaptive(codes, bits, channel // TILE))
        row["context"] = 1 - (rest + context) / nbytes
    contestants = list(coders(codes, message.payload, message.packed, bits))
    times: dict[str, list[tuple[float, float]]] = {coder.name: [] for coder in contestants}
    for _ in range(repeats):
        for coder in contestants:
            encode, decode, sent = once(coder)
            times[coder.name].append((encode, decode))
            row["coders"][coder.name] = {"saving": 1 - (len(sent) + rest * (not coder.whole)) / nbytes}
    for name, taken in times.items():
        encode, decode = (min(column) for column in zip(*taken, strict=True))
        packed_mb = len(message.packed) / 1e6
        share = {str(mbps): (encode + decode) / (nbytes * 8 / (mbps * 1e6)) for mbps in LINES_MBPS}
        row["coders"][name] |= {"encode": packed_mb / encode, "decode": packed_mb / decode, "share": share}
    return row


def once(coder: Coder) -> tuple[float, float, bytes]:
    start = time.perf_counter()
    sent = coder.encode()
    middle = time.perf_counter()
    coder.decode(sent)
    return middle - start, time.perf_counter() - middle, sent


def show_savings(console: Console, rows: list[dict[str, Any]]) -> None:
    console.print("percent of the message saved; error: relative and squared, of the median token", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("codec", no_wrap=True)
    headings = ["sq.\nerror", "bits/\nel.", "entropy\nof code", "order\n0", "con-\ntext"]
    headings += [
        name.replace(" ", "\n", 1) if name == "range coder" else name[::-1].replace(" ", "\n", 1)[::-1]
        for name in SHOWN
    ]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    tensor = None
    for row in rows:
        if row["tensor"] != tensor:
            tensor = row["tensor"]
            table.add_row()
            table.add_row(f"[bold]{tensor}[/bold]")
        found = [row["order 0"], row.get("context"), *(row["coders"].get(name, {}).get("saving") for name in SHOWN)]
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in found]
        numbers = [f"{row['error']:.1e}", f"{row['bits_per_element']:.3f}", f"{row['entropy']:.2f}"]
        table.add_row(f"  {row['spec']}", *numbers, *cells)
    console.print(table)


def show_speeds(console: Console, rows: list[dict[str, Any]]) -> None:
    title = (
        "speed: MB/s of packed codes, one core, best of the repeats, median of the messages; share of the line's time"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("coder", "bits", "encode", "decode", *(f"at {mbps} Mbit/s" for mbps in LINES_MBPS)):
        table.add_column(heading, justify="left" if heading == "coder" else "right", no_wrap=True)
    names = dict.fromkeys(name for row in rows for name in row["coders"])
    for name in names:
        for bits in sorted({row["bits"] for row in rows}):
            made = [row["coders"][name] for row in rows if row["bits"] == bits and name in row["coders"]]
            speeds = [f"{statistics.median(m[key] for m in made):,.0f}" for key in ("encode", "decode")]
            shares = [f"{100 * statistics.median(m['share'][str(mbps)] for m in made):.1f} %" for mbps in LINES_MBPS]
            table.add_row(name, str(bits), *speeds, *shares)
    console.print(table)


def show_verdict(console: Console, rows: list[dict[str, Any]]) -> None:
    """For each kind of message the coder that saves most in the time it has, over the tensors of that kind."""
    title = f"verdict: pays if it saves more than {SAVING:.0%} in at most {SHARE:.0%} of the line's time"
    console.print(title, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("direction", "codec", "at Mbit/s", "best coder in time", "saves, %", "pays"):
        table.add_column(heading, justify="right" if heading in ("at Mbit/s", "saves, %") else "left", no_wrap=True)
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["kind"], row["spec"]), []).append(row)
    for (kind, spec), same in alike.items():
        for mbps in LINES_MBPS:
            made = {name: [row["coders"][name] for row in same] for name in same[0]["coders"]}
            in_time = {k: v for k, v in made.items() if all(m["share"][str(mbps)] <= SHARE for m in v)}
            if not in_time:
                table.add_row(kind, spec, str(mbps), "none", "-", "no")
                continue
            best = max(in_time, key=lambda name: statistics.median(m["saving"] for m in in_time[name]))
            saved = sorted(100 * m["saving"] for m in in_time[best])
            good = sum(s > 100 * SAVING for s in saved)
            word = "yes" if good == len(saved) else "no" if not good else f"for {good} of {len(saved)}"
            much = f"{saved[0]:.1f} to {saved[-1]:.1f}" if len(saved) > 1 else f"{saved[0]:.1f}"
            table.add_row(kind, spec, str(mbps), best, much, word)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps of the small model (default 200)")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each coder on each message (default 3)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--core", type=int, help="which core to run on (default the last one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows there too")
    arguments = parser.parse_args()
    said = one_core.conditions(one_core.pin(arguments.core))
    from .real_tensors import of_pretrained, trained_here  # after pinning

    for key, value in said.items():
        print(f"{key + ':':10} {value}", flush=True)
    said["models"] = ""

    def say(line: str) -> None:
        said["models"] += f"{line}\n"
        print(f"model:     {line}", flush=True)

    def tensors() -> Iterator[Real]:
        yield from trained_here(arguments.steps, arguments.d_model, arguments.seed, say)
        yield from of_pretrained(say)

    rows = [measure(message, arguments.repeats) for message in messages(tensors())]
    console = Console(width=WIDTH, highlight=False)
    for show in (show_savings, show_speeds, show_verdict):
        console.print()
        show(console, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"conditions": said, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
