"""`keep` of a recipe: pairs by their scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_texts import append, foreign, make
from recipe_texts import recipe_of, write_sources
from tokenizers import Tokenizer

from potluck.cli_score import show_left_out
from potluck.coordinator.recipes import examples, pairs
from potluck.coordinator.recipes.left_out import KEPT_FILE
from potluck.protocol.errors import ConfigError
from potluck.protocol.manifest import SHARDS_FOLDER, TOKENIZER_FILE
from potluck.protocol.recipe import Recipe, SourceConfig
from potluck.protocol.strict import convert_to


def scores(here: Path, name: str, config: SourceConfig, value: Any) -> dict[str, tuple[str, str]]:
    known = pairs.pairs(examples.tasks(config, here, 3))
    lines = [json.dumps({"model": "tiny", "model_sha256": "00"})]
    for number, (key, (x, y)) in enumerate(sorted(known.items())):
        row = {"key": key, "pmi": value(number, x, y), "given": -1.0, "alone": -2.0}
        lines.append(json.dumps(row | {"x_tokens": len(x.split()), "y_tokens": len(y.split())}))
    (here / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return known


def kept_recipe(**keep: Any) -> dict[str, Any]:
    raw = recipe_of()
    raw["sources"]["p3"]["keep"] = {"pmi": "p3.scores", **keep}
    return raw


def test_low_scores_are_dropped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = write_sources(tmp_path / "sources")
    config = SourceConfig(loader="p3", path="p3.jsonl", license="x")
    append(here / "p3.jsonl", [{"inputs": f"p3 strange{i}?", "targets": foreign(i, 2)} for i in range(30)])
    known = scores(here, "p3.scores", config, lambda number, x, y: -1.0 - number / 100 if "strange" in x else number)
    out = tmp_path / "out"
    manifest = make(kept_recipe(share=0.8), out, here)
    kept = json.loads((out / KEPT_FILE).read_text(encoding="utf-8"))["sources"]["p3"]
    assert len(known) == 180
    assert (kept["pairs"], kept["kept"], kept["model"], kept["scores"]) == (180, 144, "tiny", "p3.scores")
    assert kept["best"][0]["pmi"] > kept["worst"][0]["pmi"]
    assert "strange" in kept["worst"][0]["x"]
    show_left_out(out)
    printed = capsys.readouterr().out
    assert "p3: 144 of 180 pairs kept by the scores of tiny" in printed
    assert re.search(r"worst dropped \(-\d\.\d\d\): p3 strange\d+\? -> ", printed)
    tokenizer = Tokenizer.from_file(str(out / TOKENIZER_FILE))
    shard = manifest.sources[1].train[0]
    data = (out / SHARDS_FOLDER / shard.sha256).read_bytes()[: shard.rows * 66]
    assert "strange" not in tokenizer.decode(np.frombuffer(data, "<u2").tolist())
    again = make(kept_recipe(above=-0.5), tmp_path / "above", here)
    kept = json.loads((tmp_path / "above" / KEPT_FILE).read_text(encoding="utf-8"))["sources"]["p3"]
    assert (kept["kept"], kept["lowest_kept"] >= 0, again.sources[1].rows) == (150, True, 42)
    # Everything kept: the bytes of a build without.
    whole, plain = make(kept_recipe(share=1), tmp_path / "all", here), make(recipe_of(), tmp_path / "plain", here)
    assert whole == plain


def test_an_answer_is_dropped_without_its_example_and_long_ones_by_their_length(tmp_path: Path) -> None:
    rows = [{"input": f"q{i}", "output": ["good", f"bad {i}", "much too long for it"]} for i in range(5)]
    (tmp_path / "task.json").write_text(json.dumps({"Definition": "Do it.", "Instances": rows}), encoding="utf-8")
    config = SourceConfig(loader="ni_json", path=".", license="x")
    tasks = examples.tasks(config, tmp_path, 0)
    scores(tmp_path, "s", config, lambda number, x, y: 0.0 if "bad" in y else 1.0)
    recipe = convert_to(Recipe, recipe_of(), "r")
    assert recipe.sources["ni"].keep is None
    keep = convert_to(SourceConfig, {"loader": "p3", "license": "x", "keep": {"pmi": "s", "above": 0.5}}, "r").keep
    assert keep is not None
    (task,), report = pairs.keep(tasks, keep, "ni", tmp_path)
    assert [one.answers for one in task.examples] == [("good", "much too long for it")] * 5
    assert (report.pairs, report.kept, report.too_long) == (15, 10, 0)
    raw = {"loader": "p3", "license": "x", "keep": {"pmi": "s", "above": -1, "max_ratio": 1.4}}
    keep = convert_to(SourceConfig, raw, "r").keep
    assert keep is not None
    (task,), report = pairs.keep(tasks, keep, "ni", tmp_path)
    assert {one.answers for one in task.examples} == {("good", f"bad {i}") for i in range(5)}
    assert (report.kept, report.too_long) == (10, 5)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, r"sources\.p3: keep needs one of share and above"),
        ({"share": 0.5, "above": 0}, "keep needs one of"),
        ({"shar": 0.5}, r"Did you mean `sources\.p3\.keep\.share`"),
        ({"share": 2}, r"sources\.p3\.keep\.share"),
        ({"share": 0.5, "pmi": "none.scores"}, r"none\.scores does not exist: there are no scores"),
        ({"share": 0.5, "pmi": "p3.jsonl"}, "has no scores"),
        ({"share": 0.5, "pmi": "few.scores"}, "149 of 150 pairs of sources.p3 have no score .* --source p3"),
        ({"above": 99}, "keeps none of 150 pairs"),
    ],
)
def test_what_is_wrong_with_keep_is_one_line(tmp_path: Path, keep: dict[str, Any], message: str) -> None:
    here = write_sources(tmp_path / "sources")
    scores(here, "p3.scores", SourceConfig(loader="p3", path="p3.jsonl", license="x"), lambda number, x, y: 1.0)
    lines = (here / "p3.scores").read_text(encoding="utf-8").splitlines(keepends=True)
    (here / "few.scores").write_text("".join(lines[:2]) + '{"key": "cut of', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        make(kept_recipe(**keep), tmp_path / "out", here)
    assert re.search(message, caught.value.one_line()), caught.value.one_line()


def test_only_pairs_have_scores(tmp_path: Path) -> None:
    raw = recipe_of()
    raw["sources"]["web"]["keep"] = {"pmi": "x", "share": 0.5}
    with pytest.raises(ConfigError, match=r"sources\.web\.keep: text has no questions and answers"):
        make(raw, tmp_path, tmp_path)
