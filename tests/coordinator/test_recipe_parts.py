from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from recipe_texts import make, recipe_of
from tokenizers import AddedToken, Tokenizer

from potluck.coordinator.recipes import build as building
from potluck.coordinator.recipes import examples, texts, words
from potluck.protocol import recipe as recipes
from potluck.protocol.errors import ConfigError
from potluck.protocol.manifest import Manifest
from potluck.protocol.recipe import SourceConfig, TokenizerConfig

# What is wrong with a recipe.

WEB = {"loader": "text", "path": "web.jsonl", "license": "CC0-1.0"}
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"seqlen": 3}, r"unknown key `seqlen`. Did you mean `seq_len`\?"),
    (
        {"sources": {"web": WEB | {"licence": "x"}}},
        r"`sources.web.licence`. Did you mean `sources.web.license`\?",
    ),
    ({"stages": [{"name": "s", "tokns": 1}]}, r"unknown key `stages\[0\].tokns`. Did you mean `stages\[0\].tokens`\?"),
    ({"sources": {"web": {"loader": "text", "path": "web.jsonl"}}}, "sources.web has no license"),
    ({"sources": {"web": WEB | {"loader": "csv"}}}, "sources.web.loader: must be one of builtin, text, hf"),
    ({"sources": {"web": WEB | {"render": "blocks"}}}, "text cannot be rendered as blocks. Use render: document"),
    ({"sources": {"web": WEB | {"path": ""}}}, "sources.web has no path"),
    ({"sources": {"web": WEB, "b": WEB}}, "sources.b is in no stage's mix"),
    (
        {"stages": [{"name": "s", "tokens": 1e4, "mix": {"wed": 1.0}}]},
        "no source is called wed. There are web",
    ),
    ({"stages": [{"name": "s", "tokens": 1e4, "mix": {"web": 0.9}}]}, r"stages\[0\].mix sums to 0.9"),
    ({"stages": [{"name": "s", "tokens": 3, "mix": {"web": 1.0}}]}, "less than one sequence"),
    ({"stages": 2 * [{"name": "s", "tokens": 1e4, "mix": {"web": 1.0}}]}, "two stages have the same name"),
    (
        {"stages": [{"name": "s", "tokens": 1e4, "mix": {"web": 1.0}, "objective": {"kind": "ul"}}]},
        r"stages\[0\].objective.kind: must be one of causal, prefix",
    ),
    ({"tokenizer": {"kind": "train", "vocab_size": 200}}, "tokenizer.vocab_size 200 is too small"),
    ({"tokenizer": {"kind": "gptj"}}, "needs a path"),
    ({"locations": ["file:///etc"]}, "must begin with https://"),
    ({"sources": {"../x": WEB}}, "letters, digits"),
    ({"shard_mb": 0}, "shard_mb"),
    ({"heldout_share": "much"}, "heldout_share"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_with_a_recipe_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = recipe_of(sources={"web": WEB}, stages=[{"name": "s", "tokens": 1e4, "mix": {"web": 1.0}}]) | change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as caught:
        recipes.load(tmp_path / "recipe.yaml")
    assert "\n" not in caught.value.one_line()
    assert re.search(message, caught.value.one_line()), caught.value.one_line()


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\ud7ff: x"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        recipes.load(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        recipes.load(tmp_path / "none.yaml")


def test_recipes_that_come_with_potluck_are_recipes() -> None:
    folder = Path(recipes.__file__).parent.parent / "deploy" / "recipes"
    found = {path.stem: recipes.load(path) for path in folder.glob("*.yaml")}
    assert set(found) == {"gpt-jt", "smoke"}
    whole = found["gpt-jt"]
    assert (whole.seq_len, [stage.tokens for stage in whole.stages]) == (2048, [2.62e9, 0.92e9])
    assert sorted(whole.stages[1].mix.values()) == [0.05, 0.2, 0.2, 0.55]


def test_denoising_needs_spare_words(here: Path, tmp_path: Path) -> None:
    raw = recipe_of(tokenizer={"kind": "train", "vocab_size": 400})
    raw["stages"][0]["objective"] = {"kind": "ul2r"}
    with pytest.raises(ConfigError, match=r"stages\[0\]\.objective\.kind ul2r needs sentinels") as caught:
        make(raw, tmp_path, here)
    assert "tokenizer.spare" in caught.value.hint
    assert make(recipe_of(stages=[raw["stages"][0]], sources={"web": WEB}), tmp_path, here).masked


# Tokenizers and readers.


def test_gpt2s_files_are_checked(tmp_path: Path) -> None:
    config = TokenizerConfig(kind="gptj", path="package:no_such_package/data")
    with pytest.raises(ConfigError, match="no package no_such_package"):
        words.make(config, tmp_path, tmp_path, 8, [])
    config = TokenizerConfig(kind="gptj", path="gpt2")
    with pytest.raises(ConfigError, match=r"encoder\.json: No such file"):
        words.make(config, tmp_path, tmp_path, 8, [])
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "encoder.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not GPT-2's"):
        words.make(config, tmp_path, tmp_path, 8, [])


def test_a_layout_like_gptjs_is_made_of_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary of a few words: the published one is not in this repository."""
    (tmp_path / "gpt2").mkdir()
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    (tmp_path / "gpt2" / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "gpt2" / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    known = {name: building.sha256(tmp_path / "gpt2" / name) for name in words.GPTJ_FILES}
    monkeypatch.setattr(words, "GPTJ_FILES", known)
    (tmp_path / "out").mkdir()
    words.make(TokenizerConfig(kind="gptj", path="gpt2"), tmp_path / "out", tmp_path, 8, [])
    found = words.load(tmp_path / "out")
    assert found.vocab_size == 4 + 143
    assert (found.special.eos, found.special.sentinels) == (3, tuple(range(4, 144)))
    assert found.special.modes == {"R": (144,), "X": (145,), "S": (146,)}
    assert found.encode(["abb", "ab<|extratoken_1|>"])[0] == [2, 1]
    assert 4 not in found.encode(["ab<|extratoken_1|>"])[0]


def test_special_words_of_a_checkpoint_serve_as_sentinels_and_modes(
    built: tuple[Path, Manifest], here: Path, tmp_path: Path
) -> None:
    folder, stage = tmp_path / "theirs", {"name": "s", "tokens": 6400, "mix": {"web": 1.0}}
    stage["objective"] = {"kind": "ul2r"}
    shutil.copytree(built[0], folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    n_words, names = tokenizer.get_vocab_size(), [f"<file_{number}>" for number in range(6)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.add_tokens([AddedToken("<plain>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    raw = recipe_of(sources={"web": WEB}, stages=[stage])
    raw["tokenizer"] = {"kind": "folder", "path": str(folder), "spare_words": names}
    special = make(raw, tmp_path / "a", here).special
    assert special.sentinels == tuple(range(n_words, n_words + 3))
    assert special.modes == {mode: (n_words + 3 + place,) for place, mode in enumerate("RXS")}
    raw["tokenizer"]["spare_words"] = [*names[:5], "<plain>"]  # a text may spell that one
    with pytest.raises(ConfigError, match="<plain>: no special word") as caught:
        make(raw, tmp_path / "b", here)
    assert "<file_0>" in caught.value.hint
    raw["tokenizer"]["spare_words"] = [*names[:5], words.EOS]
    with pytest.raises(ConfigError, match="end of text"):
        make(raw, tmp_path / "b", here)
    for wrong in (names[:4], [*names, names[0]]):
        raw["tokenizer"]["spare_words"] = wrong
        with pytest.raises(ConfigError, match="five or more different words"):
            make(raw, tmp_path / "b", here)


def test_a_checkpoints_tokenizer_may_have_an_embedding_with_more_rows(
    built: tuple[Path, Manifest], here: Path, tmp_path: Path
) -> None:
    raw = recipe_of(sources={"web": WEB}, stages=[{"name": "s", "tokens": 6400, "mix": {"web": 1.0}}])
    raw["tokenizer"] = {"kind": "folder", "path": str(built[0]), "vocab_size": 70_000}
    manifest = make(raw, tmp_path / "a", here)
    assert (manifest.vocab_size, manifest.dtype, manifest.eos_id) == (70_000, "uint32", 0)
    assert manifest.tokenizer_sha256 == built[1].tokenizer_sha256
    raw["tokenizer"]["vocab_size"] = 100
    with pytest.raises(ConfigError, match="less than its 400 words"):
        make(raw, tmp_path / "b", here)
    raw["tokenizer"]["path"] = "nowhere"
    with pytest.raises(ConfigError, match="cannot copy"):
        make(raw, tmp_path / "c", here)


def test_natural_instructions_lists_of_tasks(here: Path, tmp_path: Path) -> None:
    config = SourceConfig(loader="ni_json", path="ni", license="x", max_rows=20)
    (here / "drop.txt").write_text("task1\ntask2.json\n", encoding="utf-8")
    found = examples.tasks(msgspec.structs.replace(config, drop_tasks="drop.txt"), here, 0)
    assert [task.name for task in found] == ["task0", "task3"]
    assert [len(task.examples) for task in found] == [10, 10]
    taken = examples.tasks(msgspec.structs.replace(config, tasks="drop.txt", max_rows=1000), here, 0)
    assert [task.name for task in taken] == ["task1", "task2"]
    assert found[1].labels == taken[0].labels == ()
    assert set(examples.tasks(msgspec.structs.replace(config, max_rows=1000), here, 0)[0].labels) == {"good", "bad"}


def test_conversations_and_columns(tmp_path: Path) -> None:
    talk = {"categories": ["food"], "conversations": [["a?", "b"], ["a?", "b"], ["c?", "d", "e"], ["alone"], [1, 2]]}
    (tmp_path / "food.yml").write_text(yaml.safe_dump(talk), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "", "a": "y"}\n', encoding="utf-8")
    config = SourceConfig(loader="pairs", path=".", license="x", columns=("q", "a"))
    found = {task.name: [(e.prompt, e.answers) for e in task.examples] for task in examples.tasks(config, tmp_path, 0)}
    assert found == {"food": [("a?", ("b",)), ("c?", ("d",)), ("1", ("2",))], "rows": [("x", ("y",))]}
    with pytest.raises(ConfigError, match="no strings inputs and targets but q, a"):
        examples.tasks(SourceConfig(loader="p3", path="rows.jsonl", license="x"), tmp_path, 0)
    (tmp_path / "bad.yml").write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="no list of conversations"):
        examples.tasks(config, tmp_path, 0)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", "two"], "inputs": ["a:", "b"], "targets": ["c", "d"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(texts.files(tmp_path).documents()) == ["one", "two"]
    (task,) = examples.tasks(SourceConfig(loader="p3", path=".", license="x"), tmp_path, 0)
    assert [example.prompt for example in task.examples] == ["a:", "b"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ConfigError, match="cannot read"):
        list(texts.files(tmp_path).documents())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs the datasets package"):
        list(texts.files(tmp_path / "a.parquet").documents())


def test_prompts_of_the_hub_are_shuffled_the_same_way_each_time(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes((here / "p3.jsonl").read_bytes())
    config = SourceConfig(loader="p3", path=f"hf:{tmp_path / 'set'}", license="x")
    one, same, other = (examples.tasks(config, here, seed)[0].examples for seed in (1, 1, 2))
    assert one == same != other
    assert Counter(one) == Counter(other)
    assert len(one) == 150
