"""Results beside a run's checkpoints: whole or not at all, and only beside the weights they are of."""

from __future__ import annotations

import shutil

import pytest
from evaluations import checkpoint as make
from msgspec.structs import replace

from potluck.protocol.errors import ConfigError, StateError
from potluck.protocol.evaluation import MOST_NBYTES, parse
from potluck.worker.evaluation import report
from potluck.worker.evaluation.checkpoints import Watch, checkpoint, keep, published
from potluck.worker.evaluation.report import Evaluation, Score, TaskScore

FILE = "evaluation-text.json"


def evaluation(rows=3):
    score = Score(value=2.5, low=2.0, high=3.0, n=rows)
    task = TaskScore(
        name="mine",
        metric="bits-per-byte",
        score=score,
        ids=tuple(f"document {i}" for i in range(rows)),
        values=(2.5,) * rows,
        weights=(1.0,) * rows,
        note="kept",
    )
    return Evaluation(model="m", is_prefix=False, suite="text", date="", versions={}, settings={}, tasks=(task,))


def again(folder):
    """The same step, published anew."""
    new = folder.with_name("new")
    shutil.copytree(folder, new)
    shutil.rmtree(folder)
    new.rename(folder)


def test_a_result_is_read_back_with_its_rows(tmp_path):
    at = checkpoint(make(tmp_path, 24))
    found = replace(evaluation(), step=24)
    assert report.read(keep(found, at)) == found
    assert keep(replace(found, date="later"), at) == at.folder / FILE  # in place of the old one
    assert report.read(at.folder / FILE).date == "later"


def test_one_that_no_coordinator_would_read_goes_without_its_rows(tmp_path):
    at = checkpoint(make(tmp_path, 24))
    large = replace(evaluation(MOST_NBYTES // 20), step=24)
    assert len(large.encode()) > MOST_NBYTES
    kept = report.read(keep(large, at))
    assert kept == large.without_rows() and kept.tasks[0].note == "kept" and kept.tasks[0].score.n == MOST_NBYTES // 20
    assert parse((at.folder / FILE).read_bytes(), FILE, 24).tasks[0].name == "mine"


def test_a_step_that_was_published_anew_gets_no_result_of_the_old_weights(tmp_path):
    at = checkpoint(make(tmp_path, 24))
    again(at.folder)
    with pytest.raises(StateError, match="published anew"):
        keep(replace(evaluation(), step=24), at)
    assert not (at.folder / FILE).exists()


def test_a_folder_that_cannot_be_written_is_an_error_that_leaves_nothing(tmp_path):
    at = checkpoint(make(tmp_path, 24))
    (at.folder / FILE).mkdir()
    with pytest.raises(StateError, match="cannot write"):
        keep(replace(evaluation(), step=24), at)
    assert not list(at.folder.glob(".*"))


def test_steps_come_in_order_and_unfinished_ones_not_at_all(tmp_path):
    assert list(published(tmp_path)) == []
    for step in (100_000_000, 48, 24):
        make(tmp_path, step)
    (make(tmp_path, 32) / "config.json").unlink()
    make(tmp_path, 40).rename(tmp_path / "checkpoints" / ".step-00000040")
    assert [at.step for at in published(tmp_path)] == [24, 48, 100_000_000]


class Scripted:
    """A model's evaluation whose course is given."""

    def __init__(self, *course):
        self.course, self.lines = list(course), []

    def __call__(self, folder):
        if self.course and (what := self.course.pop(0)):
            what(folder)
        return evaluation()


def watch(run, scripted):
    over = iter([False, True, True, True])
    return Watch(run, "text", scripted, finished=lambda: next(over), say=scripted.lines.append)


def refuse(folder):
    raise ConfigError(f"{folder} cannot be loaded", hint="x")


def vanish(folder):
    again(folder)
    refuse(folder)


@pytest.mark.parametrize("meanwhile", [again, vanish])
def test_a_step_that_is_published_anew_meanwhile_is_evaluated_again(tmp_path, meanwhile):
    folder, scripted = make(tmp_path, 24), Scripted(meanwhile)
    seen = watch(tmp_path, scripted)
    seen.until_finished(lambda: None)
    assert seen.evaluated == 1 and parse((folder / FILE).read_bytes(), FILE, 24).step == 24
    assert [line.partition("; took")[0] for line in scripted.lines] == [
        "step 24: evaluating",
        "step 24: was published anew meanwhile, again",
        "step 24: evaluating",
        "step 24: mine bits-per-byte 2.500",
    ]


def test_an_error_of_the_model_itself_ends_the_watch(tmp_path):
    make(tmp_path, 24)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        watch(tmp_path, Scripted(refuse)).until_finished(lambda: None)
