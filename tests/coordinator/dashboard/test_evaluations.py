"""Evaluations that are left in a run's checkpoints: read once, checked, written down, shown; others change nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from evaluations import checkpoint, leave, summary
from scripted_hub import CONFIG as HUB_CONFIG
from scripted_hub import a_hub

from potluck.coordinator import evaluations as module
from potluck.coordinator import service
from potluck.coordinator.dashboard.scores import Scores
from potluck.coordinator.evaluations import Evaluations, recorded
from potluck.coordinator.events import Evaluated, EvaluationIgnored, Finished, PlanIssued, Published
from potluck.coordinator.snapshot import finished
from potluck.coordinator.state import Journal, Noted
from potluck.coordinator.store import Store
from potluck.coordinator.verify import EVENTS
from potluck.protocol.config import CoordinatorConfig, DataConfig, ModelConfig, PipelineConfig, RunConfig
from potluck.protocol.errors import StateError
from potluck.protocol.evaluation import CHECKPOINTS, FILE, MOST_NBYTES, file_name, step_of


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as whole at first sight."""
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1e6)


def evaluated(step: int, suite: str = "offline", value: float = 0.5, digest: str = "00") -> Evaluated:
    said = summary(step, suite, value)
    return Evaluated(step=step, suite=suite, mean=said.mean, tasks=said.tasks, digest=digest)


# Looking.


def test_a_file_is_told_once_for_each_content(tmp_path: Path, settled: None) -> None:
    folder = checkpoint(tmp_path, 24)
    looking = Evaluations(tmp_path / CHECKPOINTS, {})
    assert looking.look() == []
    leave(folder, summary(24))
    [event] = looking.look()
    assert isinstance(event, Evaluated)
    assert (event.step, event.suite, event.mean, len(event.tasks)) == (24, "offline", summary(24).mean, 2)
    assert event.text == "Model of step 24 evaluated, offline: mean macro-f1 0.500 (0.400 … 0.600)"
    assert looking.look() == []
    leave(folder, summary(24)).touch()
    assert looking.look() == []
    leave(folder, summary(24, value=0.7))
    leave(checkpoint(tmp_path, 8), summary(8, "lm-eval:a,b"))
    first, second = looking.look()
    assert (first.step, second.step) == (8, 24)
    assert isinstance(second, Evaluated) and second.mean and second.mean.value == 0.7


def test_what_is_not_a_result_s_name_is_not_looked_at(tmp_path: Path, settled: None) -> None:
    folder = checkpoint(tmp_path, 24)
    for name in (".evaluation-offline.json.77", "evaluation-.json", "evaluation-a b.json", "config.json"):
        leave(folder, b"x", name)
    leave(tmp_path / CHECKPOINTS, b"x", "evaluation-offline.json")
    for other in (".step-00000032", "step-1", "step-000000048"):
        (tmp_path / CHECKPOINTS / other).mkdir()
        leave(tmp_path / CHECKPOINTS / other, summary(48))
    assert Evaluations(tmp_path / CHECKPOINTS, {}).look() == []


def test_a_file_that_is_still_being_copied_is_left_until_it_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", 1e6)
    folder, whole = checkpoint(tmp_path, 24), msgspec.json.encode(summary(24))
    looking = Evaluations(tmp_path / CHECKPOINTS, {})
    leave(folder, whole[:50], "evaluation-offline.json")
    assert looking.look() == []
    leave(folder, whole, "evaluation-offline.json")
    assert looking.look() == []
    assert [event.kind for event in looking.look()] == ["Evaluated"]
    assert looking.look() == []


def test_one_that_came_while_nobody_looked_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = leave(checkpoint(tmp_path, 24), summary(24))
    monkeypatch.setattr(module.time, "time", lambda: file.stat().st_ctime + 60.0)
    assert [event.kind for event in Evaluations(tmp_path / CHECKPOINTS, {}).look()] == ["Evaluated"]


def changed(**fields: object) -> bytes:
    return json.dumps({**msgspec.to_builtins(summary(24)), **fields}).encode()


SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 60}
TASK = {"name": "a", "metric": "b"}
BAD = {
    "empty": (b"", "is no evaluation"),
    "not JSON": (b"\xff\xfe", "is no evaluation"),
    "too deep": (b"[" * 100_000, "is no evaluation"),
    "other step": (changed(step=25), "of step 25"),
    "no step": (changed(step=None), "of no step"),
    "other suite": (changed(suite="raft"), "belongs into evaluation-raft.json"),
    "other format": (changed(format=2), "format is 2"),
    "no tasks": (b'{"suite": "offline", "step": 24}', "`tasks`"),
    "too many tasks": (changed(tasks=[TASK] * 257), "length <= 256"),
    "long name": (changed(tasks=[{**TASK, "name": "x" * 201}]), "length <= 200"),
    "a line in a name": (changed(tasks=[{**TASK, "name": "x\nWarning: y"}]), "not plain text"),
    "not a number": (changed(mean={**SCORE, "value": "0.5"}), "mean.value"),
    "infinite": (changed(mean={**SCORE, "high": 1}).replace(b'"high": 1', b'"high": 1e999'), "no evaluation"),
    "no rows": (changed(mean={**SCORE, "n": -1}), "mean.n"),
    "too large": (b" " * (MOST_NBYTES + 1), "over 8 MiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_warning_and_changes_nothing(tmp_path: Path, settled: None, name: str) -> None:
    data, why = BAD[name]
    file = leave(checkpoint(tmp_path, 24), data, "evaluation-offline.json")
    good = leave(checkpoint(tmp_path, 32), summary(32))
    looking = Evaluations(tmp_path / CHECKPOINTS, {})
    bad, fine = looking.look()
    assert isinstance(bad, EvaluationIgnored) and why in bad.why, bad
    assert bad.text.startswith("Warning: evaluation-offline.json of step 24 is left out: ")
    assert bad.text.isprintable() and len(bad.text) < 300
    assert isinstance(fine, Evaluated)
    assert looking.look() == []
    again = Evaluations(tmp_path / CHECKPOINTS, {(e.step, file.name): e.digest for e in (bad, fine)})
    assert again.look() == [] and good.exists()
    leave(file.parent, summary(24))
    assert [event.kind for event in looking.look()] == ["Evaluated"]


def test_links_pipes_and_folders_are_no_evaluations(tmp_path: Path, settled: None) -> None:
    secret = leave(tmp_path, summary(24))
    folder = checkpoint(tmp_path, 24)
    (folder / "evaluation-link.json").symlink_to(secret)
    os.mkfifo(folder / "evaluation-pipe.json")
    (folder / "evaluation-folder.json").mkdir()
    looking = Evaluations(tmp_path / CHECKPOINTS, {})
    assert [(e.kind, e.file) for e in looking.look() if isinstance(e, EvaluationIgnored)] == [
        ("EvaluationIgnored", f"evaluation-{name}.json") for name in ("folder", "link", "pipe")
    ]
    assert looking.look() == []


# Writing down and showing.


async def noted(folder: Path, *events: Evaluated | EvaluationIgnored | Published) -> list[dict[str, object]]:
    """The page's table after a hub took these."""
    hub = a_hub(HUB_CONFIG, folder)
    await hub.start()
    try:
        for event in events:
            hub.put(Noted(event))
        async with asyncio.timeout(10.0):
            while len(hub.store.rows("SELECT id FROM events WHERE kind != 'Waiting'")) < len(events):
                await hub.board.changed(hub.board.version)
        before = hub.board.state().evaluations
        rows = hub.board.evaluations()
    finally:
        await hub.close()
    with closing(Store(folder / "run.sqlite")) as store:  # a page that is opened after a restart shows the same
        scores = Scores.read(store)
        assert (scores.rows(), scores.version) == (rows, before)
    return rows


async def test_the_page_has_the_newest_of_each_step_and_suite(tmp_path: Path) -> None:
    bad = EvaluationIgnored(step=8, file="evaluation-raft.json", why="no", digest="33")
    events = evaluated(8), evaluated(8, "raft"), evaluated(16, digest="11"), evaluated(16, value=0.6, digest="22"), bad
    rows = await noted(tmp_path, *events)
    assert [(row["step"], row["suite"]) for row in rows] == [(16, "offline"), (8, "offline"), (8, "raft")]
    assert rows[0]["label"] == "mean macro-f1" and rows[0]["score"] == {"value": 0.6, "low": 0.5, "high": 0.7, "n": 60}
    assert json.dumps(rows)
    with closing(Store(tmp_path / "run.sqlite")) as store:
        assert recorded(store) == {
            (8, "evaluation-offline.json"): "00",
            (8, "evaluation-raft.json"): "33",
            (16, "evaluation-offline.json"): "22",
        }
        assert Scores.read(store).newest(before=16) and not Scores.read(store).newest(before=8)


async def test_a_step_that_is_published_anew_has_no_score_yet(tmp_path: Path) -> None:
    rows = await noted(tmp_path, evaluated(8), evaluated(16), Published(step=16, path="step-00000016"))
    assert [row["step"] for row in rows] == [8]
    with closing(Store(tmp_path / "run.sqlite")) as store:
        assert list(recorded(store)) == [(8, "evaluation-offline.json")]


def test_a_run_without_scores_says_so() -> None:
    event = Evaluated(step=8, suite="text", tasks=summary(8).tasks[1:], digest="00")
    assert event.text == "Model of step 8 evaluated, text: no task has a score"
    stored = json.dumps(msgspec.to_builtins(event))
    assert EVENTS.decode(stored) == event  # as the ledger's check reads it
    scores = Scores()
    scores.take(1, 0.0, event)
    assert scores.rows()[0]["score"] is None and scores.newest(before=9) is None


# A whole coordinator.

RUN = RunConfig(
    name="tiny",
    steps=10,
    model=ModelConfig(d_model=32, layers=2, heads=2, rotary_dim=8, seq_len=16),
    pipeline=PipelineConfig(stages=1, microbatch_size=2, microbatches=2),
    coordinator=CoordinatorConfig(host="127.0.0.1"),
)


async def test_a_coordinator_takes_what_is_there_and_what_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    text = "\n".join(f"Dish {i} came with {i * 7} spoons and left with {i * 13 % 97} crumbs.\n" for i in range(400))
    (tmp_path / "corpus.txt").write_text(text)
    data = DataConfig(source=str(tmp_path / "corpus.txt"), vocab_size=300, heldout_share=0.1)
    config, home = msgspec.structs.replace(RUN, data=data), tmp_path / "data"
    file = leave(checkpoint(home, 0), summary(0))
    shown: list[list[int]] = []

    async def until(up: service.Running, count: int) -> None:
        async with asyncio.timeout(20.0):
            while len(rows := up.board.evaluations()) < count:
                await up.board.changed(up.board.version)
        shown.append([row["step"] for row in rows])

    async with service.running(config, home) as up:
        await until(up, 1)
        leave(checkpoint(home, 5), summary(5))
        await until(up, 2)
    leave(checkpoint(home, 10), b"no", "evaluation-offline.json")
    file.touch()
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1e6)
    async with service.running(config, home) as up:
        async with asyncio.timeout(20.0):
            while not any("evaluation-offline.json of step 10" in e.text for e in up.board.state().events):
                await up.board.changed(up.board.version)
        leave(home / CHECKPOINTS / "step-00000010", summary(10))
        await until(up, 3)
    assert shown == [[0], [5, 0], [10, 5, 0]]
    with closing(Store(home / "run.sqlite")) as store:
        kinds = [kind for (kind,) in store.rows("SELECT kind FROM events WHERE kind LIKE 'Eval%' ORDER BY id")]
    assert kinds == ["Evaluated", "Evaluated", "EvaluationIgnored", "Evaluated"]


# Names and ends.


def test_every_suite_has_a_file_name_of_its_own() -> None:
    suites = ["offline", "raft", "text", "lm-eval:a,b", "lm-eval:" + "x" * 90, "lm-eval:" + "x" * 91, "lm-eval:é/.."]
    names = [file_name(suite) for suite in suites]
    assert len(set(names)) == len(suites) and all(FILE.fullmatch(name) for name in names)
    assert names[0] == "evaluation-offline.json"


def test_only_a_published_step_of_a_run_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path, 240)
    assert step_of(folder) == 240
    monkeypatch.chdir(folder)
    assert step_of(Path()) == 240
    assert step_of(folder.parent) is None
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert step_of(tmp_path / "elsewhere" / folder.name) is None
    (folder / "config.json").unlink()
    assert step_of(folder) is None


def test_a_run_is_finished_until_it_goes_on_with_more_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with pytest.raises(StateError, match="No such file"):
        finished(path)
    plan = PlanIssued(generation=1, step=0, origin="init", stages=(("a",),))
    with closing(Store(path)) as store:
        assert not finished(path)
        for event, over in ((plan, False), (Finished(step=4), True), (evaluated(4), True), (plan, False)):
            store.write([Journal(event=event)], 0.0)
            assert finished(path) is over
    assert not finished(path)
