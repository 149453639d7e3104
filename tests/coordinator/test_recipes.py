from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from recipe_texts import recipe_of, write_sources
from tokenizers import Tokenizer

from potluck.coordinator import corpus
from potluck.coordinator.recipes import build as building
from potluck.coordinator.recipes import examples, rendered, streams, texts, words
from potluck.coordinator.recipes.build import BUILDING, Work, build, whole_shares
from potluck.protocol import config as run_yaml
from potluck.protocol import recipe as recipes
from potluck.protocol.errors import ConfigError, StateError
from potluck.protocol.failpoints import Action, arm
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, TOKENIZER_FILE, WHOLE, Manifest
from potluck.protocol.recipe import Recipe, SourceConfig, TokenizerConfig
from potluck.protocol.strict import convert_to


def silent(line: str, share: float) -> None: ...


def make(raw: dict[str, Any], out: Path, here: Path, say: Any = silent) -> Manifest:
    return build(Work(recipe=convert_to(Recipe, raw, "recipe.yaml")), out, here, say)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def built(here: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("built") / "corpus"
    return out, make(recipe_of(), out, here)


def rows(folder: Path, manifest: Manifest, name: str, part: str = "train") -> tuple[np.ndarray, np.ndarray | None]:
    """All rows of a source, and the flags of their tokens."""
    source = next(source for source in manifest.sources if source.name == name)
    width, tokens, flags = manifest.seq_len + 1, [], []
    for shard in getattr(source, part):
        data = (folder / SHARDS_FOLDER / shard.sha256).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        assert len(data) == manifest.nbytes(source, shard)
        cut = shard.rows * width * 2
        tokens.append(np.frombuffer(data[:cut], "<u2").reshape(-1, width))
        bits = np.frombuffer(data[cut:], np.uint8)
        flags.append(np.unpackbits(bits.reshape(shard.rows, -1), axis=1, count=width) if len(bits) else None)
    return np.concatenate(tokens), np.concatenate(flags) if flags[0] is not None else None  # type: ignore[arg-type]


def test_a_recipe_becomes_sources_in_shards(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    assert [(s.name, s.license, s.answers) for s in manifest.sources] == [
        ("web", "CC0-1.0", False),
        ("p3", "Apache-2.0", True),
        ("ni", "Apache-2.0", True),
        ("cot", "MIT", True),
    ]
    assert [(s.name, s.rows, s.mix) for s in manifest.stages] == [
        ("first", 250, {"web": WHOLE}),
        ("second", 200, {"web": 5500, "p3": 2000, "ni": 2000, "cot": 500}),
    ]
    assert manifest.stages[1].objective.kind == "answers"
    web, p3, ni, cot = manifest.sources
    # What the stages ask for, and a few rows more; of a text rather some more than fewer.
    assert 250 + 110 <= web.rows < 420
    assert (p3.rows, ni.rows, cot.rows) == (42, 42, 12)
    assert all(source.heldout_rows >= 1 for source in manifest.sources)
    assert len(web.train) > 3
    assert max(manifest.shards.values()) <= 0.005 * 2**20
    assert sorted(p.name for p in (folder / SHARDS_FOLDER).iterdir()) == sorted(manifest.shards)
    assert not (folder / BUILDING).exists()
    assert len(manifest.special.sentinels) == 13
    assert manifest.special.modes == {"R": (14,), "X": (15,), "S": (16,)}


def test_rows_of_a_text_overlap_in_one_token_and_rendered_ones_know_their_answers(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    web, none = rows(folder, manifest, "web")
    assert none is None
    assert (web[1:, 0] == web[:-1, -1]).all()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    for name, least in (("p3", 0.2), ("ni", 0.1), ("cot", 0.3)):
        tokens, flags = rows(folder, manifest, name)
        assert flags is not None
        assert flags.any(axis=1).all()
        assert least < flags.mean() < 0.9
        for row, flag in zip(tokens, flags.astype(bool), strict=True):
            said = tokenizer.decode(row[flag].tolist(), skip_special_tokens=False)
            assert name not in said.split()  # every prompt of these begins with its source's name
    assert not {tuple(row) for row in rows(folder, manifest, "p3")[0]} & {
        tuple(row) for row in rows(folder, manifest, "p3", "heldout")[0]
    }


def test_the_same_recipe_and_texts_give_the_same_bytes(
    built: tuple[Path, Manifest], here: Path, tmp_path: Path
) -> None:
    folder, manifest = built
    assert make(recipe_of(), tmp_path / "again", here) == manifest
    for name in (MANIFEST_FILE, TOKENIZER_FILE, words.CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert make(recipe_of(seed=4), tmp_path / "other", here).sources != manifest.sources


@pytest.mark.parametrize(
    ("place", "hit"),
    [
        ("coordinator.corpus.write", 1),
        ("coordinator.corpus.write", 200),
        ("coordinator.corpus.row", 1),
        ("coordinator.corpus.row", 60),
        ("coordinator.corpus.row", 100),
        ("coordinator.corpus.rename", 1),
    ],
)
def test_a_build_that_broke_off_goes_on_to_the_same_bytes(
    built: tuple[Path, Manifest], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, hit: int
) -> None:
    monkeypatch.setattr(streams, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(rendered, "BATCH", 8)
    arm({place: Action(do="full", hit=hit)}, lambda name, action: None)
    with pytest.raises(StateError, match="No space left"):
        make(recipe_of(), tmp_path, here)
    assert not (tmp_path / MANIFEST_FILE).exists()
    # A process that is killed leaves half a row, and a document without its entry.
    for path in (tmp_path / BUILDING).iterdir():
        if path.suffix in (".tokens", ".documents", ".train", ".heldout"):
            with path.open("ab") as file:
                file.write(b"half")
    encoded: list[str] = []
    monkeypatch.setattr(streams, "failpoint", encoded.append)
    assert make(recipe_of(), tmp_path, here) == built[1]
    if hit == 200:
        assert 0 < len(encoded) < 200  # not from the start
    elif place != "coordinator.corpus.write":
        assert not encoded


def test_other_texts_are_not_mixed_with_those_of_a_build_that_broke_off(here: Path, tmp_path: Path) -> None:
    mine = write_sources(tmp_path / "mine")
    arm({"coordinator.corpus.write": Action(do="full", hit=200)}, lambda name, action: None)
    with pytest.raises(StateError):
        make(recipe_of(), tmp_path / "out", mine)
    lines = (mine / "web.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (mine / "web.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    found = make(recipe_of(), tmp_path / "out", mine)
    arm({}, lambda name, action: None)
    tokenizer = (tmp_path / "out" / TOKENIZER_FILE).read_bytes()  # of before: it was done
    assert found.sources[0].train != make(recipe_of(), tmp_path / "old", here).sources[0].train
    assert tokenizer == (tmp_path / "old" / TOKENIZER_FILE).read_bytes()
    text = Tokenizer.from_file(str(tmp_path / "out" / TOKENIZER_FILE)).decode(
        rows(tmp_path / "out", found, "web")[0].flatten().tolist()
    )
    assert text.index("web290") < text.index("web270")


def test_a_share_that_a_source_cannot_give_is_an_error_that_says_what_would_do(here: Path, tmp_path: Path) -> None:
    raw = recipe_of()
    raw["sources"] |= {"p3": raw["sources"]["p3"] | {"max_epochs": 0.5}}
    with pytest.raises(ConfigError, match=r"passes over sources\.p3, its max_epochs is 0\.5") as caught:
        make(raw, tmp_path / "a", here)
    needed = int(caught.value.hint.rpartition(" ")[2].rstrip("."))
    raw["sources"]["p3"]["max_epochs"] = needed
    assert make(raw, tmp_path / "a", here).sources[1].rows == 42
    few = recipe_of(stages=[{"name": "first", "tokens": 1e6, "mix": {"web": 1.0}}])
    few["sources"] = {"web": few["sources"]["web"]}
    with pytest.raises(ConfigError, match=r"passes over sources\.web, its max_epochs is 4"):
        make(few, tmp_path / "b", here)
    assert not (tmp_path / "b" / BUILDING).exists()


def test_new_locations_need_no_new_build(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(recipe_of(), tmp_path, here)
    monkeypatch.setattr(building, "_Build", None)
    moved = make(recipe_of(locations=["https://example.org/shards"]), tmp_path, here)
    assert moved.locations == ("https://example.org/shards",)
    assert moved.sha256 == first.sha256
    assert Manifest.decode((tmp_path / MANIFEST_FILE).read_bytes()) == moved


def test_progress_says_what_is_done(here: Path, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    make(recipe_of(), tmp_path, here, lambda line, share: said.append((line, share)))
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert {line.partition(":")[0] for line, _ in said} == {"the tokenizer", "web", "p3", "ni", "cot"}


def test_shares_are_rounded_to_the_right_sum() -> None:
    assert whole_shares({"a": 0.55, "b": 0.2, "c": 0.2, "d": 0.05}) == {"a": 5500, "b": 2000, "c": 2000, "d": 500}
    for mix in ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 0.0001, "b": 0.9999}, {str(i): 1 / 7 for i in range(7)}):
        found = whole_shares(mix)
        assert sum(found.values()) == WHOLE
        assert all(abs(found[name] - share * WHOLE) < 1 for name, share in mix.items())


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


# What run.yaml may name.


def test_a_run_takes_a_recipe_or_what_was_built_of_it(built: tuple[Path, Manifest], here: Path, tmp_path: Path) -> None:
    (here / "mine.yaml").write_text(yaml.safe_dump(recipe_of(), sort_keys=False), encoding="utf-8")

    def of_run(source: Path, seq_len: int) -> tuple[Path, Manifest]:
        raw = {"name": "r", "steps": 1, "model": {"seq_len": seq_len}, "data": {"source": str(source)}}
        return corpus.of_run(run_yaml.convert(raw), tmp_path / "own", silent)

    assert of_run(built[0], 32) == built
    assert not (tmp_path / "own").exists()
    for source in (built[0], here / "mine.yaml"):
        with pytest.raises(ConfigError, match=r"model\.seq_len 64 is not the 32 tokens") as caught:
            of_run(source, 64)
        assert "Set model.seq_len to 32" in caught.value.hint
    assert of_run(here / "mine.yaml", 32) == (tmp_path / "own", built[1])
    shard = tmp_path / "own" / SHARDS_FOLDER / next(iter(built[1].shards))
    shard.unlink()
    with pytest.raises(StateError, match="no whole corpus"):
        of_run(tmp_path / "own", 32)
