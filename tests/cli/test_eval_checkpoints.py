"""``potluck eval`` on the checkpoints of a run: what it leaves there, and how it follows a run."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_models import save

from potluck import cli_eval
from potluck.cli import main
from potluck.coordinator.events import Finished, PlanIssued
from potluck.coordinator.state import Journal
from potluck.coordinator.store import Store
from potluck.protocol.evaluation import CHECKPOINTS, parse

FILE = "evaluation-text.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder as a coordinator publishes it."""
    folder = save(tmp_path_factory.mktemp("model") / "m", "gptj", prefix=False)
    (folder / "model.safetensors.index.json").write_text("{}")  # the one file beside it holds everything
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose training goes on; a text is at hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("A line of text that has some words in it. " * 8)
    (tmp_path / "run" / CHECKPOINTS).mkdir(parents=True)
    journal(tmp_path / "run", PlanIssued(generation=1, step=0, origin="init", stages=(("a",),)))
    return tmp_path / "run"


def journal(run: Path, event: Finished | PlanIssued) -> None:
    with closing(Store(run / "run.sqlite")) as store:
        store.write([Journal(event=event)], 0.0)


def publish(model: Path, run: Path, step: int) -> Path:
    return shutil.copytree(model, run / CHECKPOINTS / f"step-{step:08d}")


def evaluate(*arguments: object):
    text = ("--suite", "text", "--text", "mine=t.txt", "--device", "cpu")
    return CliRunner().invoke(main, ["eval", *map(str, arguments), *text])


def test_the_result_is_left_in_a_published_step(run, model):
    folder = publish(model, run, 240)
    done = evaluate(folder, "--json", "a.json")
    assert done.exit_code == 0, done.output
    assert f"written for the run's history, step 240: {folder / FILE}" in done.output
    found = parse((folder / FILE).read_bytes(), FILE, 240)
    assert [task.metric for task in found.tasks][:2] == ["bits-per-byte", "prefix-gain"] and found.tasks[0].score
    assert str(run) not in (folder / FILE).read_text()
    assert json.loads(Path("a.json").read_text()) == json.loads((folder / FILE).read_text())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_nothing_is_left_in_other_folders(run, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "step-00000240")
    before = sorted(other.iterdir())
    done = evaluate(other, "--json", "a.json")
    assert done.exit_code == 0 and "history" not in done.output and sorted(other.iterdir()) == before
    assert "step" not in json.loads(Path("a.json").read_text())


def test_watching_evaluates_what_comes_until_the_run_is_finished(run, model, monkeypatch):
    publish(model, run, 0)
    events = [
        lambda: publish(model, run, 4),
        lambda: None,
        lambda: (publish(model, run, 8), journal(run, Finished(step=8))),
    ]
    monkeypatch.setattr(cli_eval.time, "sleep", lambda seconds: events.pop(0)())
    done = evaluate("--watch", "run")
    assert done.exit_code == 0 and not events, done.output
    for step in (0, 4, 8):
        folder = run / CHECKPOINTS / f"step-{step:08d}"
        parse((folder / FILE).read_bytes(), FILE, step)
        assert f"step {step}: evaluating\n" in done.output
        assert f"step {step}: mine bits-per-byte " in done.output and str(folder / FILE) in done.output
    assert done.output.count("waiting for the next checkpoint") == 2
    assert done.output.endswith("The run is finished: 3 checkpoints evaluated.\n")

    (run / CHECKPOINTS / "step-00000004" / FILE).unlink()
    done = evaluate("--watch", "run")
    assert done.output.count("is evaluated already") == 2
    assert done.output.endswith("The run is finished: 1 checkpoint evaluated.\n")


def test_ctrl_c_ends_the_watch_in_order(run, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    (run / "run.sqlite").unlink()  # a copy of the checkpoints alone
    monkeypatch.setattr(cli_eval.time, "sleep", interrupt)
    done = evaluate("--watch", "run")
    assert done.exit_code == 0 and done.output.endswith("Ended: 0 checkpoints evaluated.\n")
    assert "cannot see whether the run is finished" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "nowhere"], "nowhere holds no run"),
        (["--watch", "run", "--json", "a.json"], "--json is of one model"),
        (["--watch", "run", "MODEL"], "name a MODEL, or --watch RUN"),
        (["--watch", "run", "--text", "other=missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_a_wrong_watch_is_told_before_anything_is_published(run, arguments, message):
    done = evaluate(*arguments)
    assert done.exit_code == 1 and message in done.output and done.output.count("\n") == 1


def test_a_checkpoint_that_is_no_model_ends_the_watch_with_its_error(run, model):
    (publish(model, run, 4) / "config.json").write_text('{"model_type": "bert"}')
    done = evaluate("--watch", "run")
    assert done.exit_code == 1 and "is a bert model" in done.output
