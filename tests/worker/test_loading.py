"""No process holds the whole model when a run begins from a checkpoint: neither the coordinator nor a stage."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest

from benchmarks.loading import Job, measured, write_checkpoint
from potluck.coordinator.weights import open_checkpoint, shaped
from potluck.protocol.architecture import tensors
from potluck.protocol.config import ModelConfig
from potluck.protocol.errors import ConfigError

VOCAB = 1000
MODEL = ModelConfig(d_model=512, layers=12, heads=8, seq_len=64)  # 38.8 M parameters
SLACK = 24 << 20  # what the allocator and the kernel round up


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    stored = write_checkpoint(tmp_path / "hub", MODEL, VOCAB, shard_nbytes=8 << 20)
    assert stored > 75e6 and len(list((tmp_path / "hub").glob("*.safetensors"))) > 8
    (tmp_path / "data").mkdir()
    job = Job(checkpoint=str(tmp_path / "hub"), data_dir=str(tmp_path / "data"), vocab_size=VOCAB, stages=4)
    coordinator = measured(job)
    assert coordinator.above < SLACK < stored / 3
    stage = measured(dataclasses.replace(job, stage=1))
    largest = max(2 * math.prod(shape) for shape in tensors(MODEL, VOCAB, 0, MODEL.layers).values())
    assert stage.own == 4 * sum(map(math.prod, tensors(MODEL, VOCAB, *stage.layers).values()))
    # Its own weights in fp32 and a tensor's file; with all of the checkpoint's it would be more than this.
    assert stage.own / 2 < stage.above < stage.own + largest + SLACK < stage.own + stored


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_base_in_4_bits_is_made_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's matrices are never there in fp32, nor in the checkpoint's dtype: one at a time is."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")  # what is freed is given back
    model = ModelConfig(d_model=768, layers=12, heads=8, seq_len=64)
    write_checkpoint(tmp_path / "hub", model, VOCAB, shard_nbytes=8 << 20)
    (tmp_path / "data").mkdir()
    job = Job(checkpoint=str(tmp_path / "hub"), data_dir=str(tmp_path / "data"), vocab_size=VOCAB, stages=1)
    measured(job)
    stage = measured(dataclasses.replace(job, stage=0, base="4bit"))
    weights = sum(map(math.prod, tensors(model, VOCAB, 0, 12).values()))
    assert stage.own < weights
    largest = max(map(math.prod, tensors(model, VOCAB, 0, 12).values()))
    assert stage.own / 2 < stage.above < stage.own + (4 + 2) * largest + 2 * SLACK < 2 * weights


def test_what_is_written_is_a_checkpoint_of_the_shape(tmp_path: Path) -> None:
    model = ModelConfig(d_model=32, layers=2, heads=2, seq_len=16)
    write_checkpoint(tmp_path / "hub", model, 300, shard_nbytes=1 << 14)
    shape = shaped(ModelConfig(init=str(tmp_path / "hub"), seq_len=16))
    assert (shape.d_model, shape.layers, shape.heads) == (32, 2, 2)
    found = open_checkpoint(shape, 300, tmp_path)
    assert found is not None and len(found.spans) == len(tensors(model, 300, 0, 2))  # no two tensors are the same
    with pytest.raises(ConfigError, match="wte"):
        open_checkpoint(shape, 299, tmp_path / "other")
