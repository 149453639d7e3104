"""Bits per byte and prefix gain on tiny random models, against the same written out."""

from __future__ import annotations

import json
import math
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny_models import POSITIONS, build, one_by_one, save, tokenizer

from potluck.protocol.errors import ConfigError, StateError
from potluck.worker.evaluation import texts
from potluck.worker.evaluation.models import Opened
from potluck.worker.evaluation.run import Plan, evaluate
from potluck.worker.evaluation.scoring import Scorer

DOCUMENTS = tuple(f"Document {i}: it was {i} o'clock and the café was empty. " * (i + 1) for i in range(4))


def opened(kind, prefix, special=None):
    model = build(kind, prefix=prefix)
    return Opened(model, tokenizer(), prefix, POSITIONS, special), Scorer(model, prefix=prefix, max_length=POSITIONS)


@pytest.mark.parametrize("prefix", [False, True])
def test_bits_per_byte_are_causal_and_those_of_the_definition(prefix):
    have, scorer = opened("gptj", prefix)
    found = texts.bits_per_byte(have, scorer, texts.Source("s", DOCUMENTS[:2]))
    bits = 0.0
    for document in DOCUMENTS[:2]:
        tokens = tokenizer()(document).input_ids
        assert len(tokens) < POSITIONS
        bits -= sum(one_by_one(have.model, [256], tokens, False)) / math.log(2)
    assert found.score.value == pytest.approx(bits / sum(len(d.encode()) for d in DOCUMENTS[:2]), rel=1e-5)
    assert found.score.low <= found.score.value <= found.score.high


def test_split_gain_is_causal_loss_minus_prefix_loss():
    have, scorer = opened("llama", True)
    found = texts.split_gain(have, scorer, texts.Source("s", DOCUMENTS[:1]))
    tokens = tokenizer()(DOCUMENTS[0]).input_ids[: texts.SPLIT_TOKENS]
    n = int(found.weights[0])
    context, answer = tokens[:-n], tokens[-n:]
    assert len(tokens) // 4 <= len(context) < 3 * len(tokens) // 4
    causal, prefix = (-sum(one_by_one(have.model, context, answer, both)) / n for both in (False, True))
    assert found.score.value == pytest.approx(causal - prefix, abs=1e-5)
    assert abs(found.score.value) > 1e-3
    assert found == texts.split_gain(have, scorer, texts.Source("s", DOCUMENTS[:1]))


class Packed(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    is_prefix: np.ndarray
    modes: tuple[str, ...]


def sample(row, answers, objective, special, key):
    """In the place of ``worker.objectives.make_sample``: two documents, the first R, the second X, then padding."""
    half, length = 24, len(row) - 1
    targets = np.full(length, -100)
    targets[10 : half - 1], targets[half + 4 : 2 * half - 1] = row[11:half], row[half + 5 : 2 * half]
    segments = np.zeros(length, np.int16)
    segments[:half], segments[half : 2 * half] = 1, 2
    is_prefix = np.zeros(length, bool)
    is_prefix[:11] = is_prefix[half : half + 5] = True
    return Packed(row[:-1], targets, segments, is_prefix, ("R", "X"))


def test_denoising_gains_are_one_per_mode(monkeypatch):
    fake = types.ModuleType("potluck.worker.objectives")
    fake.make_sample = sample
    monkeypatch.setitem(sys.modules, "potluck.worker.objectives", fake)
    special = {"eos": 256, "pad": 256, "sentinels": [250, 251], "modes": {"R": [252], "X": [253]}}
    have, scorer = opened("gptj", True, special)
    found = texts.denoising_gains(have, scorer, texts.Source("s", DOCUMENTS[1:2]))
    assert [(task.name, task.weights) for task in found] == [("s R", (13.0,)), ("s X", (19.0,))]
    tokens = tokenizer()(DOCUMENTS[1]).input_ids
    for task, begin, given in zip(found, (0, 24), (11, 5), strict=True):
        context, answer = tokens[begin : begin + given], tokens[begin + given : begin + 24]
        causal, prefix = (-sum(one_by_one(have.model, context, answer, both)) for both in (False, True))
        assert task.score.value == pytest.approx((causal - prefix) / len(answer), abs=1e-5)


def test_denoisers_unknown_to_the_model_are_skipped_and_wrong_ids_refused():
    have, scorer = opened("gptj", True)
    [task] = texts.denoising_gains(have, scorer, texts.Source("s", DOCUMENTS))
    assert "potluck_special" in task.skipped
    with pytest.raises(ConfigError, match="potluck_special"):
        texts.denoising_gains(have._replace(special={"eos": "x"}), scorer, texts.Source("s", DOCUMENTS))


def test_a_model_folder_and_files_give_a_whole_evaluation(tmp_path):
    folder = save(tmp_path / "model", "llama", prefix=True, is_causal=False)
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    sources = (("a", tmp_path / "a.txt"), ("b", tmp_path / "b.jsonl"))
    found = evaluate(Plan(model=folder, suite="text", texts=sources, device="cpu", limit=3))
    assert [(t.name, t.metric) for t in found.tasks if t.score] == [
        ("a", "bits-per-byte"),
        ("a S", "prefix-gain"),
        ("b", "bits-per-byte"),
        ("b S", "prefix-gain"),
    ]
    assert found.is_prefix and found.tasks[3].score.n == 3
    assert torch.isfinite(torch.tensor([t.score.value for t in found.tasks if t.score])).all()


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"\xff\xfe"), ("a.txt", b"  \n"), ("a.jsonl", b"[1]\n"), ("a.jsonl", b"{}\n")]
)
def test_files_without_text_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StateError, match=r"no text|cannot be read"):
        texts.read("a", tmp_path / name, None)
