"""What a worker uploads as its stage is looked into before it can become part of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potluck.coordinator.publish import Publisher
from potluck.protocol.config import ModelConfig, PipelineConfig, RunConfig
from potluck.protocol.errors import WireError
from potluck.protocol.manifest import Manifest
from potluck.protocol.plan import stage_parameters

MODEL = ModelConfig(d_model=8, layers=1, heads=1, rotary_dim=2, seq_len=8)
COUNT = stage_parameters(0, 1, 1, d_model=8, vocab_size=300)


def stage_file(header: object, nbytes: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


def tensor(start: int, count: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [start, start + 4 * count]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        stage_file([1, 2]),
        stage_file({"w": 5}),
        stage_file({"w": {"dtype": "F32"}}),
        stage_file({"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}),
        stage_file({"w": tensor(0, COUNT, dtype="F16")}),
        stage_file({"w": tensor(0, COUNT - 1)}),
        stage_file({"w": tensor(4, COUNT)}),
        stage_file({"v": tensor(0, 10), "w": tensor(20, COUNT - 10)}),
    ],
)
async def test_an_upload_that_is_no_stage_is_refused(data: bytes, tmp_path: Path) -> None:
    manifest = Manifest(
        source="text",
        tokens_sha256="0" * 64,
        n_tokens=(8 + 1) * 8 + 2,
        dtype="uint16",
        vocab_size=300,
        seq_len=8,
        n_train=8,
        n_heldout=1,
        tokenizer_sha256="0" * 64,
        eos_id=0,
        license="unknown",
    )

    async def published(step: int, path: Path) -> None:
        raise AssertionError("nothing may be published")

    config = RunConfig(model=MODEL, pipeline=PipelineConfig(stages=1))
    publisher = Publisher(tmp_path / "out", tmp_path, config, manifest, ((0, 1),), published)
    publisher.part(3, 0).write_bytes(data)
    with pytest.raises(WireError):
        await publisher.arrived(3, 0)
    assert not publisher.path(3).exists()
