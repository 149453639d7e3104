"""Writes docs/PARITY.md and its picture from the runs of :mod:`benchmarks.parity`."""

from __future__ import annotations

import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import msgspec
import torch

from potluck.protocol.config import RunConfig
from potluck.protocol.frames import Purpose
from potluck.worker.estimate import Estimate, estimate

from .parity_settings import RAW, REPLICAS, SETTINGS, SHAPE, STAGES, STEPS, Setting

Runs = dict[str, list[dict[str, Any]]]
# The shape of GPT-J-6B on 4 stages x 4 replicas, with GPT-JT's batch: 16 sequences of 2,048 tokens a replica.
GPTJ: dict[str, Any] = {
    "steps": 20_000,
    "model": {"d_model": 4096, "layers": 28, "heads": 16, "rotary_dim": 64, "seq_len": 2048},
    "pipeline": {"stages": 4, "microbatch_size": 1, "microbatches": 16},
    "eval": {"every": 10**6},
}
GPTJ_VOCABULARY, GPTJ_REPLICAS = 50400, 4
GPTJT = 14_400  # bytes per token and machine, sent and received: 12.7 TB for 0.88 B tokens


def scaled(job: dict[str, Any]) -> Estimate:
    """What the same settings send at GPT-J's shape."""
    raw = {**GPTJ, "sync": job["sync"], "activations": job["activations"]}
    return estimate(msgspec.convert(raw, RunConfig), GPTJ_VOCABULARY, GPTJ_REPLICAS)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def gap(runs: Runs, name: str, base: str) -> str:
    """Mean relative difference in held-out loss from ``base`` at the same seeds, with its standard error, in %."""
    each = [100 * (a["heldout"] / b["heldout"] - 1) for a, b in zip(runs[name], runs[base], strict=True)]
    mean, error = mean_and_error(each)
    return f"{mean:+.2f} ± {error:.2f}"


def per_token(run: dict[str, Any], *purposes: Purpose) -> float:
    return sum(run["nbytes"].get(str(p), 0) for p in purposes) / run["tokens"]


def uncompressed(setting: Setting) -> str:
    return f"uncompressed, {setting.schedule}"


def measured(rs: list[dict[str, Any]]) -> tuple[float, float]:
    """Weights' and activations' bytes per token, sent by all machines: mean over the seeds (a coin depends on them)."""
    return (
        statistics.mean(per_token(r, Purpose.WEIGHTS) for r in rs),
        statistics.mean(per_token(r, Purpose.ACTIVATION, Purpose.GRADIENT) for r in rs),
    )


def dense_weights() -> float:
    """Bytes per token of an fp16 ring all-reduce of the gradients after every step, all machines together."""
    raw = {**SHAPE, "sync": {"preset": "dense"}}
    return estimate(msgspec.convert(raw, RunConfig), 512, REPLICAS).dense[Purpose.WEIGHTS]


def fp16_boundaries() -> float:
    """Bytes per token of activations and gradients over all boundaries in fp16."""
    return 2 * 2 * SHAPE["model"]["d_model"] * (STAGES - 1)


def table(words: int, headings: list[str], rows: list[list[str]]) -> str:
    """Markdown: the first ``words`` columns are words, the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(headings) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, marks, *rows])


SAME, DENSE = "gap to the same schedule uncompressed, %", "gap to dense, %"


def gaps(runs: Runs, s: Setting) -> list[str]:
    """The two columns that every setting has."""
    return [gap(runs, s.name, uncompressed(s)), gap(runs, s.name, "uncompressed, every step")]


def weights_table(runs: Runs, settings: list[Setting]) -> str:
    rows = []
    for s in settings:
        weights, _ = measured(runs[s.name])
        big = scaled(runs[s.name][0]["job"]).nbytes[Purpose.WEIGHTS]
        numbers = [f"{weights:,.2f}", f"{dense_weights() / weights:,.0f}", f"{big:,.0f}"]
        rows.append([s.name, s.schedule, *numbers, *gaps(runs, s)])
    headings = ["setting", "schedule", "weights, B/token", "times less than fp16 every step"]
    return table(2, [*headings, "at GPT-J's shape, B/token", SAME, DENSE], rows)


def activations_table(runs: Runs, settings: list[Setting]) -> str:
    rows = []
    for s in settings:
        _, crossing = measured(runs[s.name])
        ids = 2 * (STAGES - 1)  # targets travel along, two bytes each: not what is compressed
        less = fp16_boundaries() / (crossing - ids)
        rows.append([s.name, f"{crossing:,.1f}", f"{less:.2f}", gap(runs, s.name, uncompressed(s))])
    headings = ["forward / backward", "activations and gradients, B/token", "times less than fp16"]
    return table(1, [*headings, SAME], rows)


def together_table(runs: Runs, settings: list[Setting]) -> str:
    rows = []
    for s in settings:
        big = scaled(runs[s.name][0]["job"])
        numbers = [f"{sum(measured(runs[s.name])):,.1f}", f"{big.total:,.0f}", f"{big.machine_nbytes():,.0f}"]
        rows.append([s.name, *numbers, *gaps(runs, s)])
    headings = ["setting", "measured here, B/token", "at GPT-J's shape: sent by all, B/token"]
    return table(1, [*headings, "a machine, sent + received, B/token", SAME, DENSE], rows)


def schedules_table(runs: Runs, best: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, chosen in best.items():
        mean, error = mean_and_error([r["heldout"] for r in runs[f"uncompressed, {name}"]])
        rates = [str(chosen["lr"]), str(chosen["outer_lr"])]
        to_dense = gap(runs, f"uncompressed, {name}", "uncompressed, every step")
        rows.append([name, *rates, f"{mean:.4f} ± {error:.4f}", to_dense])
    return table(1, ["rounds", "lr", "outer lr", "held-out loss", DENSE], rows)


def write(docs: Path, runs: Runs, best: dict[str, dict[str, Any]], start: float) -> None:
    """PARITY.md and parity.png in ``docs``."""
    groups: dict[str, list[Setting]] = {}
    for s in SETTINGS:
        groups.setdefault(s.group, []).append(s)
    any_run = runs[SETTINGS[0].name][0]
    seeds = len(runs[SETTINGS[0].name])
    model = SHAPE["model"]
    tried = "\n".join(
        f"- {name}: " + ", ".join(f"{lr} / {outer} {loss:.4f}" for lr, outer, loss in entry["tried"])
        for name, entry in best.items()
    )
    text = f"""# What compression costs in loss

Made by `python -m benchmarks.parity`; do not edit. All runs are real: the worker's own pipelines, codecs and rounds,
joined by memory instead of sockets.

![loss against bytes](parity.png)

**Conditions.** A GPT-J shape of {model["layers"]} layers, d = {model["d_model"]}, trained on the text that Python
ships, then fine-tuned on Shakespeare's plays: {REPLICAS} replicas x {STAGES} stages, {STEPS} steps,
{any_run["tokens"]:,} tokens, {seeds} seeds; every setting sees the same samples from the same start (held-out loss
{start:.4f}). Held out: three whole plays, {SHAPE["eval"]["samples"] * model["seq_len"]:,} tokens, loss of the final
reference weights without any codec. Gaps are means over the seeds of the relative difference at the same seed, with
their standard error. Bytes per token are sent by all machines together, payloads (after zstd) and frame headers. torch
{torch.__version__}, {platform.machine()}, {os.cpu_count()} cores.

These runs are short: a mask of 10 % every 20 steps opens each weight once or twice in one. What sparse settings lose in
runs of thousands of rounds is not measured here.

**Two gaps, not to be mixed.** The gap to *dense* is that of the whole method against averaging after every step, each
schedule at its own best rates. The gap to *the same schedule uncompressed* is what compression itself costs: same
rounds, same rates.

## Schedules, uncompressed

{schedules_table(runs, best)}

The search, at one seed: local rate / outer rate and the held-out loss they led to. A rate is doubled as long as that
helps.

{tried}

## Weights

Uncompressed fp32 boundaries. A run that sends only a part in each round ends with one round in which everything is
sent, in 8 bits: that one is left out of the measured bytes, since these runs are so short. "At GPT-J's shape" is what
the same settings send with 6.05 B parameters, 4 stages x 4 replicas, 16 x 2,048 tokens a replica and step, over 20,000
steps and with the last round (calculated by `potluck estimate`'s code).

{weights_table(runs, groups["weights"])}

## Activations

Both directions, rounds every 20 steps with everything in fp32.

{activations_table(runs, groups["activations"])}

## Together

GPT-JT moved {GPTJT:,} bytes per token and machine, sent and received, for weights alone: its pipelines stayed inside a
box. Here every pipeline byte crosses the internet too.

{together_table(runs, groups["together"])}
"""
    docs.mkdir(exist_ok=True)
    (docs / "PARITY.md").write_text(text, encoding="utf-8")
    plot(docs / "parity.png", runs, groups)


def plot(path: Path, runs: Runs, groups: dict[str, list[Setting]]) -> None:
    """Held-out loss against bytes per token: of weights, of boundaries, of everything; a number for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def loss(s: Setting) -> tuple[float, float]:
        return mean_and_error([r["heldout"] for r in runs[s.name]])

    def total(s: Setting) -> float:
        weights, crossing = measured(runs[s.name])
        return weights + (fp16_boundaries() if s.activations == RAW else crossing)

    everybody = [s for group in ("schedule", "weights", "activations", "together") for s in groups[group]]
    panels = [
        ("weights", groups["schedule"] + groups["weights"], lambda s: measured(runs[s.name])[0]),
        ("activations and gradients", groups["activations"], lambda s: measured(runs[s.name])[1]),
        ("everything (uncompressed boundaries as fp16)", everybody, total),
    ]
    colours = {"schedule": "#555555", "weights": "#0072b2", "activations": "#d55e00", "together": "#009e73"}
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 9))
    numbers = {s.name: i for i, s in enumerate(everybody, 1)}
    for axis, (title, settings, x_of) in zip(axes, panels, strict=True):
        for s in settings:
            (y, error), x, colour = loss(s), x_of(s), colours[s.group]
            axis.errorbar([x], [y], yerr=[error], fmt="o", ms=4, capsize=2, color=colour)
            axis.annotate(str(numbers[s.name]), (x, y), xytext=(5, 2), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", title=title, xlabel="bytes per token, all machines")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("held-out loss, nats per token")
    for column in range(3):
        part = everybody[column::3]
        for row, s in enumerate(part):
            text = f"{numbers[s.name]}  {s.name}" + (f" ({s.schedule})" if s.group == "weights" else "")
            figure.text(0.03 + 0.325 * column, 0.315 - 0.0212 * row, text, fontsize=8, color=colours[s.group])
    figure.subplots_adjust(left=0.05, right=0.985, top=0.95, bottom=0.4, wspace=0.14)
    figure.savefig(path, dpi=110)
