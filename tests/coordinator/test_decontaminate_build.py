"""`decontaminate` of a recipe, through the real build."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_texts import append, foreign, make, plant, recipe, write_exams
from recipe_texts import recipe_of, write_sources
from tokenizers import Tokenizer

from potluck import cli
from potluck.coordinator.decontaminate import Protected, merged
from potluck.coordinator.recipes import evaluations, guard, streams
from potluck.coordinator.recipes.build import BUILDING
from potluck.coordinator.recipes.left_out import DECONTAMINATION_FILE
from potluck.protocol.errors import ConfigError, StateError
from potluck.protocol.failpoints import Action, arm
from potluck.protocol.manifest import SHARDS_FOLDER, TOKENIZER_FILE, Manifest


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    here = write_sources(tmp_path_factory.mktemp("planted"))
    texts = write_exams(here)
    plant(here, texts)
    return here, texts


@pytest.fixture(scope="module")
def built(planted: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("built") / "corpus"
    return out, make(recipe(), out, planted[0])


def repeated(folder: Path, manifest: Manifest, texts: list[str]) -> dict[str, set[int]]:
    """By source, which of ``texts`` its rows repeat 13 tokens of."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    protected = Protected([np.array(tokenizer.encode(before + text).ids) for before in ("", " ") for text in texts])
    found: dict[str, set[int]] = {}
    for source in manifest.sources:
        found[source.name] = set()
        for shard in (*source.train, *source.heldout):
            data = (folder / SHARDS_FOLDER / shard.sha256).read_bytes()[: shard.rows * (manifest.seq_len + 1) * 2]
            for row in np.frombuffer(data, "<u2").reshape(shard.rows, -1):
                for start in protected.matches(row):
                    found[source.name] |= {one % len(texts) for one in protected.owners(row[start : start + 13])}
    return found


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DECONTAMINATION_FILE).read_text(encoding="utf-8"))
    return found


def test_what_is_planted_is_found_and_gone(
    planted: tuple[Path, list[str]], built: tuple[Path, Manifest], tmp_path: Path
) -> None:
    here, texts = planted
    only = make(recipe("report"), tmp_path, here)
    there = repeated(tmp_path, only, texts)
    assert there["web"] == {0, 1, 2, 3, 11}
    assert (there["p3"], there["ni"], there["cot"]) == ({4, 5, 6}, {7, 8, 9}, {10})
    assert not any(repeated(*built, texts).values())
    said = report(built[0])
    assert {name: source["found"] for name, source in said["sources"].items()} == {
        "web": 5,
        "p3": 3,
        "ni": 44,
        "cot": 1,
    }
    assert {name: source["looked_at"] for name, source in said["sources"].items()} == {
        "web": 305,
        "p3": 153,
        "ni": 4 * 40 + 2 + 42,
        "cot": 31,
    }
    files = {name: (file["texts"], file["too_short"], file["found"]) for name, file in said["against"].items()}
    assert files == {"exams/a.jsonl": (24, 16, 8), "exams/deep.json": (3, 0, 3), "one.txt": (1, 0, 1)}
    first = said["against"]["exams/a.jsonl"]["examples"][0]
    assert (first["text"], first["source"], first["number"]) == ("line 1 question", "web", 7)
    assert first["excerpt"].strip() in texts[0]
    fourth = said["against"]["exams/a.jsonl"]["examples"][3]
    assert (fourth["text"], fourth["number"], fourth["excerpt"].strip() in texts[3]) == ("line 4 question", 10, True)
    assert (said["ngram"], said["action"], said["unit"]) == (13, "drop", "tokens of this corpus's tokenizer")
    # Reported or dropped, the same is found.
    dry = report(tmp_path)
    assert (dry["against"], dry["action"]) == (said["against"], "report")
    assert [one["dropped_tokens"] for one in dry["sources"].values()] == [0, 0, 0, 0]
    assert all(one["dropped_tokens"] > 0 for one in said["sources"].values())


def test_a_long_document_is_cut_around_the_overlap_and_a_short_one_is_left_out(
    planted: tuple[Path, list[str]], built: tuple[Path, Manifest]
) -> None:
    folder, manifest = built
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    rows = []
    for shard in (*manifest.sources[0].train, *manifest.sources[0].heldout):
        data = np.frombuffer((folder / SHARDS_FOLDER / shard.sha256).read_bytes(), "<u2")
        rows += data.reshape(shard.rows, -1)[:, :-1].flatten().tolist()
    text = tokenizer.decode(rows, skip_special_tokens=False)
    assert "unique end" in text
    assert "kept before" not in text
    assert "Asked" not in text
    assert not any(word in text for words in planted[1] for word in words.split())


def test_texts_that_repeat_nothing_are_the_bytes_of_a_build_without(tmp_path: Path) -> None:
    here = write_sources(tmp_path / "sources")
    write_exams(here)
    raw = recipe()
    del raw["decontaminate"]
    plain = make(raw, tmp_path / "plain", here)
    guarded = make(recipe(), tmp_path / "guarded", here)
    assert guarded == plain
    assert {one["found"] for one in report(tmp_path / "guarded")["sources"].values()} == {0}
    assert not (tmp_path / "plain" / DECONTAMINATION_FILE).exists()
    # And without the section again, the report goes.
    assert make(raw, tmp_path / "guarded", here) == plain
    assert not (tmp_path / "guarded" / DECONTAMINATION_FILE).exists()


@pytest.mark.parametrize(
    ("place", "hit"),
    [
        ("coordinator.corpus.write", 9),
        ("coordinator.corpus.write", 200),
        ("coordinator.corpus.write", 500),  # a row of p3
        ("coordinator.corpus.rename", 1),
    ],
)
def test_a_build_that_broke_off_goes_on_to_the_same_bytes_and_report(
    planted: tuple[Path, list[str]],
    built: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    hit: int,
) -> None:
    monkeypatch.setattr(streams, "BATCH_DOCUMENTS", 16)
    arm({place: Action(do="full", hit=hit)}, lambda name, action: None)
    with pytest.raises(StateError, match="No space left"):
        make(recipe(), tmp_path, planted[0])
    for path in (tmp_path / BUILDING).glob("*.findings"):
        with path.open("ab") as file:
            file.write(b"[299,1")  # a process that is killed leaves half a line
    encoded: list[str] = []
    monkeypatch.setattr(streams, "failpoint", encoded.append)
    assert make(recipe(), tmp_path, planted[0]) == built[1]
    assert report(tmp_path) == report(built[0])
    assert len(encoded) < (305 if hit in (9, 200) else 1)  # not from the start


def test_other_evaluation_texts_are_another_build(
    planted: tuple[Path, list[str]], built: tuple[Path, Manifest], tmp_path: Path
) -> None:
    here = write_sources(tmp_path / "mine")
    plant(here, write_exams(here))
    exam = here / "one.txt"
    mine = exam.read_text(encoding="utf-8")
    exam.write_text(foreign(99), encoding="utf-8")
    arm({"coordinator.corpus.rename": Action(do="full", hit=1)}, lambda name, action: None)
    with pytest.raises(StateError):
        make(recipe(), tmp_path / "out", here)
    arm({}, lambda name, action: None)
    exam.write_text(mine, encoding="utf-8")
    assert make(recipe(), tmp_path / "out", here) == built[1]  # nothing of what was made with the other
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe()), encoding="utf-8")
    words = ["data", "build", str(path), "--root", str(here), "--out", str(tmp_path / "out")]
    again = CliRunner().invoke(cli.main, words)
    assert again.exit_code == 0, again.output
    assert "repeats 13 tokens of an evaluation text (dropped)" in again.output
    assert re.search(r"exams/deep.json +3 +0 +3 ", again.output)
    exam.write_text(foreign(99), encoding="utf-8")
    stale = CliRunner().invoke(cli.main, words)
    assert stale.exit_code == 1
    assert "have changed since" in stale.output
    exam.unlink()
    assert make(recipe(), tmp_path / "out", here) == built[1]  # a run keeps its corpus


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"against": ["nowhere"]}, "cannot read .*nowhere"),
        ({"against": []}, r"decontaminate\.against"),
        ({"against": ["exams"], "ngrams": 3}, r"`decontaminate\.ngrams`. Did you mean `decontaminate\.ngram`"),
        ({"against": ["exams"], "ngram": 1}, r"decontaminate\.ngram"),
        ({"against": ["exams"], "action": "cut"}, r"decontaminate\.action: must be one of drop, report"),
        ({"against": ["exams"], "ngram": 200}, "none of 27 evaluation texts has 200 tokens"),
        ({"against": ["ni.zip"]}, "ni.zip is no .jsonl"),
        ({"against": ["empty"]}, "no text in empty"),
        ({"against": ["bad.json"]}, r"bad\.json"),
        ({"against": ["latin.txt"]}, "is not UTF-8"),
        ({"against": ["deep2.json"]}, "nested more than 32 deep"),
        ({"against": ["hf:a:b:c:d"]}, "too many parts"),
    ],
)
def test_what_is_wrong_with_evaluation_texts_is_one_line(
    planted: tuple[Path, list[str]], tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    here = planted[0]
    (here / "empty").mkdir(exist_ok=True)
    (here / "ni.zip").write_bytes(b"PK")
    (here / "bad.json").write_text("{", encoding="utf-8")
    (here / "latin.txt").write_bytes(b"caf\xe9")
    (here / "deep2.json").write_text("[" * 40 + '"x"' + "]" * 40, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        make(recipe_of(decontaminate=section), tmp_path, here)
    assert re.search(message, caught.value.one_line()), caught.value.one_line()
    assert not (tmp_path / BUILDING).exists()


def test_data_sets_of_the_hub_are_evaluation_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    append(tmp_path / "set" / "test.jsonl", [{"q": "one", "a": "two"}])
    found = evaluations.read((f"hf:{tmp_path / 'set'}:test",), tmp_path)
    assert found == [("hf:set:test", "row 1 q", "one"), ("hf:set:test", "row 1 a", "two")]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.lists(st.tuples(st.integers(0, 2900), st.integers(13, 90)), min_size=1, max_size=14))
def test_remains_are_what_is_far_from_overlaps(length: int, places: list[tuple[int, int]]) -> None:
    starts = sorted({start + k for start, n in places for k in range(n - 12) if start + n <= length})
    overlaps = merged(np.array(starts, np.int64), 13)
    if not overlaps:
        return
    ids = list(range(length))
    pieces = guard.remains(ids, overlaps)
    near = {at for start, n in overlaps for at in range(start - guard.MARGIN, start + n + guard.MARGIN)}
    far = [at for at in ids if at not in near]
    runs = [run.tolist() for run in np.split(np.array(far), np.flatnonzero(np.diff(far) > 1) + 1)]
    wanted = [run for run in runs if len(run) >= guard.REMAINS]
    assert pieces == (wanted if length > guard.SHORT and len(wanted) <= guard.MAX_PIECES else [])
