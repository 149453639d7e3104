"""Sources with passages of evaluation texts in them, and recipes that look for these."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from recipe_texts import recipe_of

from potluck.coordinator.recipes.build import Work, build
from potluck.protocol.manifest import Manifest
from potluck.protocol.recipe import Recipe
from potluck.protocol.strict import convert_to

AGAINST = ["exams", "one.txt"]


def make(raw: dict[str, Any], out: Path, here: Path) -> Manifest:
    return build(Work(recipe=convert_to(Recipe, raw, "recipe.yaml")), out, here, lambda line, share: None)


def recipe(action: str = "drop", **changes: Any) -> dict[str, Any]:
    """Long enough for all texts and examples to be in a row."""
    mix = {"web": 0.2, "p3": 0.3, "ni": 0.3, "cot": 0.2}
    stages = [
        {"name": "first", "tokens": 20_000, "mix": {"web": 1.0}},
        {"name": "second", "tokens": 90_000, "mix": mix, "objective": {"kind": "answers"}},
    ]
    section = {"against": AGAINST, "ngram": 13, "action": action}
    return recipe_of(decontaminate=section, stages=stages, seq_len=96, **changes)


def foreign(number: int, n: int = 6) -> str:
    """Words that the sources do not have."""
    chance = random.Random(number)
    return " ".join("".join(chance.choice("bdfghjqwxyz") for _ in range(5)) for _ in range(n))


def write_exams(here: Path) -> list[str]:
    (here / "exams").mkdir()
    texts = [foreign(i) for i in range(12)]
    rows = [{"question": text, "choices": {"text": ["yes", "no"], "label": [0, 1]}, "n": 3} for text in texts[:8]]
    (here / "exams" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (here / "exams" / "deep.json").write_text(json.dumps({"tasks": [{"ask": t} for t in texts[8:11]]}), "utf-8")
    (here / "one.txt").write_text(texts[11], encoding="utf-8")
    return texts


def append(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def plant(here: Path, texts: list[str]) -> None:
    """Text 0 to 2 in short documents, 3 in a long one, 4 and 5 in prompts, 6 in an answer, 7 to 9 in tasks (9 in a
    definition), 10 in a block, 11 in another document."""
    web = (here / "web.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    long = " ".join(json.loads(line)["text"] for line in web[:12])
    rows = [f"kept before {texts[0]}", texts[1], f"Asked: ({texts[2]}), then.", f"{long} {texts[3]} {long} unique end"]
    web[7:7] = [json.dumps({"text": text}) + "\n" for text in [*rows, f"more. {texts[11]}"]]
    (here / "web.jsonl").write_text("".join(web), encoding="utf-8")
    some = [(f"p3 {texts[4]}?", "po"), (f"p3 so: {texts[5]} and?", "ta"), ("p3 what?", f"it is {texts[6]}")]
    append(here / "p3.jsonl", [{"inputs": x, "targets": y} for x, y in some])
    task = json.loads((here / "ni" / "task1.json").read_text(encoding="utf-8"))
    task["Instances"][3:3] = [{"input": texts[7], "output": ["a", "b"]}, {"input": "ni c", "output": ["a", texts[8]]}]
    (here / "ni" / "task1.json").write_text(json.dumps(task), encoding="utf-8")
    task["Definition"] = [f"Do this: {texts[9]}"]
    (here / "ni" / "task9.json").write_text(json.dumps(task), encoding="utf-8")
    blocks = json.loads((here / "cot.json").read_text(encoding="utf-8"))
    (here / "cot.json").write_text(json.dumps(blocks | {"bad": f"Q: {texts[10]}?\nA: yes."}), encoding="utf-8")
