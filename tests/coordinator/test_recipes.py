from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from recipe_texts import make, recipe_of, silent, write_sources
from tokenizers import Tokenizer

from potluck.coordinator import corpus
from potluck.coordinator.recipes import build as building
from potluck.coordinator.recipes import rendered, streams, words
from potluck.coordinator.recipes.build import BUILDING, whole_shares
from potluck.protocol import config as run_yaml
from potluck.protocol.errors import ConfigError, StateError
from potluck.protocol.failpoints import Action, arm, failpoint
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, TOKENIZER_FILE, WHOLE, Manifest


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
        ("row", 1),
        ("row", 60),
        ("row", 100),
        ("coordinator.corpus.rename", 1),
    ],
)
def test_a_build_that_broke_off_goes_on_to_the_same_bytes(
    built: tuple[Path, Manifest], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, hit: int
) -> None:
    monkeypatch.setattr(streams, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(rendered, "BATCH", 8)
    monkeypatch.setattr(rendered, "failpoint", lambda name: failpoint("row"))
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


# What run.yaml may name.


def test_a_run_takes_a_recipe_or_what_was_built_of_it(built: tuple[Path, Manifest], here: Path, tmp_path: Path) -> None:
    (here / "mine.yaml").write_text(yaml.safe_dump(recipe_of(), sort_keys=False), encoding="utf-8")

    def of_run(source: Path, seq_len: int, **more: Any) -> tuple[Path, Manifest]:
        raw = {"name": "r", "steps": 1, "model": {"seq_len": seq_len}, "data": {"source": str(source)}, **more}
        return corpus.of_run(run_yaml.convert(raw), tmp_path / "own", silent)

    assert of_run(built[0], 32) == built
    assert not (tmp_path / "own").exists()
    for source in (built[0], here / "mine.yaml"):
        with pytest.raises(ConfigError, match=r"model\.seq_len 64 is not the 32 tokens") as caught:
            of_run(source, 64)
        assert "Set model.seq_len to 32" in caught.value.hint
    with pytest.raises(ConfigError, match=r"activations\.reuse"):
        of_run(built[0], 32, activations={"reuse": True})
    assert of_run(here / "mine.yaml", 32) == (tmp_path / "own", built[1])
    shard = tmp_path / "own" / SHARDS_FOLDER / next(iter(built[1].shards))
    shard.unlink()
    with pytest.raises(StateError, match="no whole corpus"):
        of_run(tmp_path / "own", 32)
