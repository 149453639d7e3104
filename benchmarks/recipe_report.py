"""Writes docs/RECIPE.md from docs/recipe.json; benchmarks/recipe.py and benchmarks/loading.py fill in a part each."""

from __future__ import annotations

import json
import os
import platform
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from potluck.coordinator.recipes.words import N_MODES

from .pretrained import SPARE_WORDS
from .recipe_data import MIX, SEQ_LEN, SPARE, TOKENS, VOCABULARY

JSON_FILE, FILE = "recipe.json", "RECIPE.md"
WAYS = {"ul2r": "UL2R", "causal": "causal (control)"}
_HEAD = """# GPT-JT's recipe in small

Made by `python -m benchmarks.recipe`, `python -m benchmarks.recipe --checkpoint` and `python -m benchmarks.loading`; do
not edit. The numbers are in [recipe.json](recipe.json).
"""


def update(docs: Path, part: str, found: dict[str, Any]) -> None:
    """Replaces ``part`` (``training``, ``checkpoint`` or ``loading``) of the results and writes the page anew."""
    path = docs / JSON_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[part] = found | {
        "machine": f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}"
    }
    docs.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    parts = [_HEAD]
    if "training" in known:
        parts.append(training(known["training"]))
    if "checkpoint" in known:
        parts.append(checkpoint(known["checkpoint"]))
    if "loading" in known:
        parts.append(loading(known["loading"]))
    (docs / FILE).write_text("\n".join(parts), encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown: the first column is words, the others numbers."""
    lines = [list(headings), ["---", *["---:"] * (len(headings) - 1)], *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and from where to where the seeds are."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def training(found: dict[str, Any]) -> str:
    """From a small model that was pretrained for it."""
    c = found["conditions"]
    sources = " and ".join(f"{share:.0%} {name}" for name, share in MIX.items())
    about = filled(
        f"**Conditions.** `python -m benchmarks.recipe --pretrain {c['pretrain']} --steps {c['steps']}`: a GPT-J shape",
        f"of 4 layers, d = 128, 4 heads, {c['parameters']:,} parameters; {VOCABULARY:,} words of an own",
        f"byte-level BPE, {SPARE - N_MODES} of them sentinels and {N_MODES} modes. Text: {sources} by",
        f"tokens, {TOKENS:,} tokens, the same rows and tokenizer for all runs. {c['pretrain']} steps of pretraining",
        f"(lr {c['pretrain_lr']:g}), then {c['steps']} steps of each way.",
        *measured(found),
    )
    intro = filled(
        "Every run is a coordinator and four workers as processes of one machine, two stages of two replicas,",
        "that talk over loopback with the default codecs (activations and gradients int4, weights 2 bits in",
        "fragments every 20 steps). The start is a model pretrained causally and published; the other runs begin",
        "from that folder (`model.init`).",
    )
    gain = filled(
        "Prefix gain: target loss with a causal mask minus that with the prefix mask, same weights and targets.",
        "Above 0, the model does better for seeing its whole prefix; of a model trained with prefixes, a part of",
        "that may be that it was never asked under a causal mask.",
    )
    losses, gains, said = compared(found)
    return "\n".join(["## UL2R through potluck's workers\n", intro, losses, gain, gains, said, about])


def checkpoint(found: dict[str, Any]) -> str:
    """From a model that others have pretrained."""
    c = found["conditions"]
    sources = " and ".join(f"{share:.0%} {name}" for name, share in MIX.items())
    intro = filled(
        f"The same from {c['model']}, a Llama of 30 layers and 135 M parameters that was pretrained causally. All of",
        f"its weights are trained, `model.dtype` {c.get('dtype', 'fp32')}, with moments in 8 bits.",
    )
    about = filled(
        f"**Conditions.** `python -m benchmarks.recipe --checkpoint --steps {c['steps']} --seeds {c['seeds']}`: the",
        f"published 4-bit weights, dequantized; {len(SPARE_WORDS) - N_MODES} of its tokenizer's special words",
        f"serve as sentinels and {N_MODES} as modes, so span examples are short. Text: {sources} by tokens.",
        *measured(found),
    )
    return "\n".join(["## From a really pretrained model\n", intro, *compared(found), about])


def compared(found: dict[str, Any]) -> tuple[str, str, str]:
    """Tables of losses and of gains, and what holds at every seed."""
    c, start, ways = found["conditions"], found["start"], found["ways"]
    names = list(start["losses"])
    denoisers = [name for name in names if name != "causal"]

    def rows(value: Callable[[dict[str, float]], float], form: str, which: Sequence[str]) -> list[list[str]]:
        out = [["start", *(format(value(start["losses"][name]), form) for name in which)]]
        for way, results in ways.items():
            cells = [spread([value(result["losses"][name]) for result in results], form) for name in which]
            out.append([f"+ {c['steps']} steps {WAYS[way]}", *cells])
        return out

    losses = table(["target loss, prefix mask", *names], rows(lambda loss: loss["prefix"], ".3f", names))
    gains = table(["prefix gain", *denoisers], rows(lambda loss: loss["causal"] - loss["prefix"], "+.4f", denoisers))
    return losses, gains, filled(*summary(ways, denoisers))


def measured(found: dict[str, Any]) -> list[str]:
    """Sentences on what all studies have in common."""
    c, losses = found["conditions"], found["start"]["losses"]
    targets = ", ".join(f"{name} {loss['targets']:,}" for name, loss in losses.items())
    each = [result["seconds"] for results in found["ways"].values() for result in results]
    return [
        f"{c['step_tokens']:,} tokens a step in sequences of {SEQ_LEN}, lr {c['lr']:g}, {c['warmup']} steps of warm-up",
        f"and a cosine to the run's end. {c['seeds']} seeds: the mean, and from the lowest to the highest. UL2R: half",
        "S, a quarter R (mean span 3, 15 % cut out), an eighth each X (32, 15 %) and X (3, 50 %). Losses are nats",
        f"per target, of the published models in stock transformers under masks that are given, on {c['examples']}",
        f"held-out examples of each denoiser, the same for all models; targets: {targets}. `causal`: whole",
        "held-out rows. The loss of UL2R training and that of causal training are not comparable. A run of",
        f"{c['steps']} steps took {min(each):.0f} to {max(each):.0f} s with its processes' start and end, on a",
        f"machine that was busy with other things. {found['machine']}.",
    ]


def summary(ways: dict[str, list[dict[str, Any]]], denoisers: Sequence[str]) -> list[str]:
    """What holds at every seed: each UL2R run against the control of the same seed."""

    def where(holds: Callable[[dict[str, float], dict[str, float]], bool], which: Sequence[str]) -> str:
        pairs = list(zip(ways["ul2r"], ways["causal"], strict=True))
        found = [name for name in which if all(holds(u["losses"][name], c["losses"][name]) for u, c in pairs)]
        return ", ".join(found) or "none"

    def gain(loss: dict[str, float]) -> float:
        return loss["causal"] - loss["prefix"]

    return [
        f"At every seed the UL2R run's prefix gain is above 0 for: {where(lambda u, c: gain(u) > 0, denoisers)};",
        f"above the control's for: {where(lambda u, c: gain(u) > gain(c), denoisers)}.",
        f"Its loss is below the control's for: {where(lambda u, c: u['prefix'] < c['prefix'], denoisers)};",
        f"above it for: {where(lambda u, c: u['prefix'] > c['prefix'], [*denoisers, 'causal'])}.",
    ]


def loading(found: dict[str, Any]) -> str:
    stages, coordinator = found["stages"], found["coordinator"]
    whole = 2 * found["stored_nbytes"]

    def mb(nbytes: float) -> str:
        return f"{nbytes / 1e6:,.0f}"

    rows = [
        [
            f"stage {number}: layers {stage['layers'][0]} to {stage['layers'][1] - 1}",
            mb(stage["own"]),
            mb(stage["peak"] - stage["bare"]),
            f"{(stage['peak'] - stage['bare']) / stage['own']:.2f}",
            f"{(stage['peak'] - stage['bare']) / whole:.0%}",
        ]
        for number, stage in enumerate(stages)
    ]
    above = coordinator["peak"] - coordinator["bare"]
    rows.append(["coordinator, hashing all", "-", mb(above), "-", f"{above / whole:.1%}"])
    headings = [
        "process",
        "own weights, fp32, MB",
        "peak above a bare process, MB",
        "times its own",
        "of the whole model",
    ]
    about = filled(
        f"**Conditions.** `python -m benchmarks.loading --d-model {found['d_model']} --layers {found['layers']}`:",
        f"a GPT-J shape of random fp16 weights, {found['stored_nbytes'] / 1e9:.2f} GB in {found['files']}",
        f"safetensors files as the hub has them; {whole / 1e9:.2f} GB in fp32. Each stage in a process of its own:",
        "its tensors are brought one by one into files, mapped, and copied into fp32. Peak resident memory",
        "(`VmHWM`) above what the process had after its imports; pages of the mapped file count, and memory that",
        "the imports left free is used first. What training adds is not in it: the reference weights, the",
        f"gradient and AdamW's two moments. {found['machine']}.",
    )
    title = "## Beginning from a checkpoint: no process holds the whole model\n"
    return "\n".join([title, table(headings, rows), about])


def filled(*parts: str) -> str:
    """A paragraph, in lines of 120."""
    return textwrap.fill(" ".join(parts), 120, break_long_words=False, break_on_hyphens=False) + "\n"
