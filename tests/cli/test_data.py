"""``potluck data``, as somebody types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from recipe_texts import recipe_of, write_sources

from potluck import cli
from potluck.protocol.manifest import MANIFEST_FILE, Manifest
from potluck.worker.data import Dataset


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.main, ["data", *map(str, words)])


def causal() -> dict[str, Any]:
    raw = recipe_of()
    del raw["stages"][1]["objective"]
    return raw


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = write_sources(tmp_path_factory.mktemp("data"))
    recipe = here.parent / "recipes" / "mine.yaml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(causal(), sort_keys=False), encoding="utf-8")
    out = here / "corpus"
    built = run("build", recipe, "--root", here, "--out", out)
    assert built.exit_code == 0, built.output
    manifest = Manifest.decode((out / MANIFEST_FILE).read_bytes())
    assert f"{manifest.n_tokens:,} tokens in {len(manifest.shards)} shards, vocabulary 400" in built.output
    assert f"potluck data show 0 --manifest {out}" in built.output
    lines = [line for line in built.output.splitlines() if "%  " in line]
    assert 5 <= len(lines) <= 25
    assert any(line.endswith("of 42 sequences") for line in lines)
    return out


def test_show_says_what_a_sample_is_and_where_it_is_from(corpus: Path) -> None:
    data = Dataset(corpus)
    first = run("show", 0, "--manifest", corpus, "--seed", 7).output
    place = data.mixture(7).place(0)
    assert first.startswith(
        "sample 0: stage first (causal), source web from web.jsonl, license CC0-1.0,"
        f" row {place.number}, pass 1\ntarget | "
    )
    assert run("show", 0, "--manifest", corpus, "--seed", 8).output != first
    index = next(i for i in range(250, 400) if data.mixture(0).place(i).source == 2)
    task = run("show", index, "--manifest", corpus).output
    assert f"sample {index}: stage second (causal), source ni from ni, license Apache-2.0" in task
    assert "ni " in task.split("|", 1)[1]
    held = run("show", 1, "--manifest", corpus, "--heldout").output
    assert held.startswith("held-out sample 1: stage second")
    too_far = run("show", 10**6, "--manifest", corpus, "--heldout")
    assert too_far.exit_code == 1
    assert f"there are {data.manifest.n_heldout} held-out samples" in too_far.output
    assert run("show", 10**9, "--manifest", corpus).exit_code == 0


def test_stats_count_rows_shares_and_passes(corpus: Path) -> None:
    text = run("stats", corpus).output
    assert "licenses: CC0-1.0, Apache-2.0, MIT" in text
    for words in (("web", "CC0-1.0"), ("p3", "Apache-2.0", "42", "1,344"), ("first", "causal", "8,000"), ("55.00%",)):
        assert any(all(word in line for word in words) for line in text.splitlines()), (words, text)


def test_what_is_no_corpus_is_one_line(tmp_path: Path) -> None:
    for words in (("show", 0, "--manifest", tmp_path), ("stats", tmp_path), ("build", tmp_path / "none.yaml")):
        ended = run(*words)
        assert ended.exit_code == 1
        assert ended.output.startswith("potluck: ")
        assert ended.output.count("\n") == 1


def test_none_of_it_needs_torch(corpus: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors'): sys.modules[name] = None\n"
        "from potluck.cli import main\n"
        "main(['data', sys.argv[1], *sys.argv[2:]])\n"
    )
    for words in (("show", "0", "--manifest", str(corpus)), ("stats", str(corpus))):
        ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert "web" in ended.stdout


def test_pieces_tell_what_is_given_from_what_is_to_be_said() -> None:
    """Of a sample of two documents, the second without a prefix."""
    from types import SimpleNamespace

    import numpy as np

    from potluck.cli_data import pieces

    packed = SimpleNamespace(
        tokens=np.array([10, 11, 12, 20, 21, 0]),
        targets=np.array([-100, 12, 13, -100, 22, -100]),
        segments=np.array([1, 1, 1, 2, 2, 0]),
        is_prefix=np.array([True, True, False, False, False, False]),
        modes=("X", ""),
    )
    data = SimpleNamespace(manifest=SimpleNamespace(masked=True), packed=lambda index, seed: packed)
    found = [(kind, list(tokens)) for kind, tokens in pieces(data, 0, 0, False)]
    assert found == [
        ("--- 1 of 2: X", []),
        ("given", [10, 11]),
        ("target", [12, 13]),
        ("--- 2 of 2: causal", []),
        ("other", [20, 21]),
        ("target", [22]),
    ]
