"""Samples of a corpus with objectives, with a stand-in for what makes them of rows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from potluck.coordinator.recipes.shards import ShardWriter, windows
from potluck.protocol.manifest import MANIFEST_FILE, SHARDS_FOLDER, WHOLE, Manifest, Source, Stage
from potluck.protocol.objective import Objective, Special
from potluck.worker.data import Dataset

T = 12
FLAGS = np.random.default_rng(0).random((40, T + 1)) < 0.4


class Sample(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    is_prefix: np.ndarray
    modes: tuple[str, ...] = ()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    sources = []
    for number, name in enumerate(("web", "ni")):
        parts = []
        for n in (40, 10):
            with ShardWriter(tmp_path / SHARDS_FOLDER, T + 1, "uint16", 16) as writer:
                stream = (np.arange(n * T + 1) * 31 + number * 7) % 300
                writer.add(windows(stream, T), np.packbits(FLAGS[:n], axis=1) if name == "ni" else None)
            parts.append(tuple(writer.shards))
        sources.append(Source(name=name, origin="", license="", answers=name == "ni", train=parts[0], heldout=parts[1]))
    manifest = Manifest(
        seq_len=T,
        dtype="uint16",
        vocab_size=300,
        special=Special(eos=0, pad=0),
        tokenizer_sha256="0" * 64,
        sources=tuple(sources),
        stages=(
            Stage(name="first", rows=20, mix={"web": WHOLE}),
            Stage(name="second", rows=99, mix={"web": 5000, "ni": 5000}, objective=Objective(kind="answers")),
        ),
    )
    (tmp_path / MANIFEST_FILE).write_bytes(manifest.encode())
    module: Any = ModuleType("potluck.worker.objectives")
    module.asked = []

    def make_sample(row: Any, answers: Any, objective: Objective, special: Special, key: tuple[int, ...]) -> Sample:
        module.asked.append((row, answers, objective, special, key))
        targets = row[1:].copy()
        targets[: key[2] % 5] = -100
        return Sample(row[:-1], targets, np.ones(T, np.int16), np.arange(T) < key[2] % 5)

    module.make_sample = make_sample
    monkeypatch.setitem(sys.modules, "potluck.worker.objectives", module)
    return Dataset(tmp_path)


def asked() -> list[Any]:
    return sys.modules["potluck.worker.objectives"].asked  # type: ignore[attr-defined, no-any-return]


def test_samples_come_with_their_layout(data: Dataset) -> None:
    x, targets, layout = data.batch([3, 44, 47], seed=5)
    assert layout is not None
    assert (x.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert (layout.segments.dtype, layout.is_prefix.dtype) == (torch.int16, torch.bool)
    assert x.shape == targets.shape == layout.segments.shape == layout.is_prefix.shape == (3, T)
    assert layout.is_prefix.sum(1).tolist() == [3, 4, 2]
    assert (targets == -100).sum(1).tolist() == [3, 4, 2]
    assert [key for *_, key in asked()] == [(5, 0, 3), (5, 1, 44), (5, 1, 47)]
    assert [objective.kind for _, _, objective, _, _ in asked()] == ["causal", "answers", "answers"]


def test_rows_come_with_the_flags_of_their_answers(data: Dataset) -> None:
    data.batch(range(20, 100), seed=5)
    seen = 0
    for row, answers, *_, key in asked():
        place = data.mixture(5).place(key[2])
        assert row.tolist() == data.sample(key[2], 5).tolist()
        if place.source == 0:
            assert answers is None
            continue
        number = place.number - 40
        assert row.tolist() == ((np.arange(number * T, number * T + T + 1) * 31 + 7) % 300).tolist()
        assert answers.tolist() == FLAGS[number].tolist()
        seen += 1
    assert seen == 40


def test_heldout_samples_draw_chances_of_their_own(data: Dataset) -> None:
    batch = data.heldout_batch([0, 1, 2], seed=9)
    assert batch.layout is not None
    data.heldout_batch([1], stage=0)
    assert [key for *_, key in asked()] == [(9, 1_000_001, i) for i in range(3)] + [(0, 1_000_000, 1)]
    again = data.heldout_batch([0, 1, 2], seed=9)
    assert (again.x == batch.x).all()
