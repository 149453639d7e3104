"""Small sources of every kind, and a recipe that mixes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from potluck.coordinator.recipes.build import Work, build
from potluck.protocol.manifest import Manifest
from potluck.protocol.recipe import Recipe
from potluck.protocol.strict import convert_to


def recipe_of(**changes: Any) -> dict[str, Any]:
    """Plain data of a recipe for what :func:`write_sources` writes."""
    return {
        "seed": 3,
        "seq_len": 32,
        "tokenizer": {"kind": "train", "vocab_size": 400, "spare": 16},
        "heldout_share": 0.1,
        "shard_mb": 0.005,
        "sources": {
            "web": {"loader": "text", "path": "web.jsonl", "license": "CC0-1.0"},
            "p3": {"loader": "p3", "path": "p3.jsonl", "license": "Apache-2.0", "max_epochs": 20},
            "ni": {"loader": "ni_json", "path": "ni", "license": "Apache-2.0", "max_epochs": 20},
            "cot": {"loader": "json_dict", "path": "cot.json", "license": "MIT", "max_epochs": 50},
        },
        "stages": [
            {"name": "first", "tokens": 8000, "mix": {"web": 1.0}},
            {
                "name": "second",
                "tokens": 6400,
                "mix": {"web": 0.55, "p3": 0.2, "ni": 0.2, "cot": 0.05},
                "objective": {"kind": "answers"},
            },
        ],
    } | changes


def write_sources(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{a}{b}" for a in ("po", "ta", "ri", "lu") for b in ("ko", "mi", "sa", "ne", "vu")]

    def sentence(number: int, n: int) -> str:
        return " ".join(words[(number * k * k + k) % len(words)] for k in range(1, n))

    def write(name: str, text: str) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    write("web.jsonl", "".join(json.dumps({"text": f"web{i} {sentence(i, 40)}."}) + "\n" for i in range(300)))
    rows = [
        {"inputs": f"p3 {i} {sentence(i, 4)}{':' if i % 2 else '?'}", "targets": sentence(i, 3)} for i in range(150)
    ]
    write("p3.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for task in range(4):
        outputs = [[("bad", "good")[i % 2]] if task == 0 else sentence(i, 3) for i in range(40)]
        instances = [{"input": f"ni {task} {i} {sentence(i, 5)}", "output": out} for i, out in enumerate(outputs)]
        raw = {"Definition": [f"Do {task}."], "Instances": instances, "Reviewers": []}
        write(f"ni/task{task}.json", json.dumps(raw))
    blocks = {f"b{i}": f"Q: {sentence(i, 5)}?\nA: Let's see. {sentence(i, 6)}." for i in range(30)}
    write("cot.json", json.dumps(blocks))
    return folder


def silent(line: str, share: float) -> None: ...


def make(raw: dict[str, Any], out: Path, here: Path, say: Any = silent) -> Manifest:
    """Builds a recipe of plain data."""
    return build(Work(recipe=convert_to(Recipe, raw, "recipe.yaml")), out, here, say)
