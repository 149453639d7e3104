"""``potluck eval``: what it prints, and what it refuses before it loads a model."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tiny_models import save

from potluck.cli import main


def run(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def test_a_text_is_scored_written_down_and_compared(tmp_path):
    (tmp_path / "t.txt").write_text("A line of text that has some words in it. " * 8)
    for name, seed in (("a", 0), ("b", 1)):
        folder = save(tmp_path / name, "gptj", prefix=True, seed=seed, is_causal=False)
        done = run(
            *(folder, "--suite", "text", "--text", f"mine={tmp_path / 't.txt'}", "--device", "cpu"),
            *("--json", tmp_path / f"{name}.json"),
        )
        assert done.exit_code == 0, done.output
        assert "(prefix), text" in done.output and "bits-per-byte (lower is better)" in done.output
        assert "skipped mine R/X" in done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["is_prefix"] and found["versions"]["torch"] and found["settings"]["attention"] == "eager"
    done = run("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.exit_code == 0 and "mine" in done.output and "B - A" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a MODEL"),
        (["MODEL"], "the offline suite needs its texts"),
        (["MODEL", "--suite", "nonsense"], "no suite 'nonsense'"),
        (["MODEL", "--suite", "lm-eval:"], "no suite"),
        (["MODEL", "--suite", "text"], "needs a text"),
        (["MODEL", "--suite", "text", "--text", "x"], "--text x"),
        (["MODEL", "--suite", "text", "--text", "x=missing.txt"], "missing.txt cannot be read"),
        (["MODEL", "--suite", "raft", "--data", "nowhere"], "holds no task of RAFT"),
        (["MODEL", "--suite", "text", "--text", "x={text}"], "config.json is missing"),
        (["MODEL", "--suite", "text", "--text", "x={text}", "--json", "no/such/a.json"], "no is no folder"),
        (["--compare", "a.json", "b.json"], "cannot read a.json"),
    ],
)
def test_a_wrong_command_is_one_line_with_the_fix(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    done = run(*[argument.format(text=tmp_path / "text.txt") for argument in arguments])
    assert done.exit_code == 1
    assert message in done.output.replace("no/such", "no") and done.output.count("\n") == 1
