"""What a worker uploads as its stage is looked into before it can become part of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from manifests import manifest

from potluck.coordinator.publish import Publisher
from potluck.protocol.architecture import tensors
from potluck.protocol.config import ModelConfig, PipelineConfig, RunConfig
from potluck.protocol.errors import WireError

MODEL = ModelConfig(d_model=8, layers=1, heads=1, rotary_dim=2, seq_len=8)
STAGE = tensors(MODEL, 300, 0, 1)

MANIFEST = manifest(8, 1, 8)


def stage_file(header: object, nbytes: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


def stage(shapes: dict[str, tuple[int, ...]], name: str = "", **changes: object) -> bytes:
    """A stage's file; the entry of ``name`` is changed, or left out by ``changes`` that are none."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for each, shape in shapes.items():
        header[each] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * math.prod(shape)]}
        end += 4 * math.prod(shape)
    if name and not changes:
        del header[name]
    elif name:
        header[name].update(changes)
    return stage_file(header, end)


LAST, NORM = "lm_head.bias", "transformer.ln_f.weight"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        stage_file([1, 2]),
        stage_file({"w": 5}),
        stage_file({"w": {"dtype": "F32"}}),
        stage(STAGE, LAST),
        stage({**STAGE, "more": (1,)}),
        stage({**{name: shape for name, shape in STAGE.items() if name != LAST}, "other": (300,)}),
        stage({**STAGE, LAST: (299,)}),
        stage({**STAGE, LAST: (300, 1)}),
        stage(STAGE, LAST, dtype="F16"),
        stage(STAGE, LAST, shape=["x"]),
        stage(STAGE, LAST, shape=[300.0]),
        stage(STAGE, LAST, shape=300),
        stage(STAGE, LAST, data_offsets=[0, 1200]),
        stage(STAGE, NORM, data_offsets=None),
        stage(STAGE)[:-1],
        stage(STAGE) + b"x",
    ],
)
async def test_an_upload_that_is_no_stage_is_refused(data: bytes, tmp_path: Path) -> None:
    async def published(step: int, path: Path) -> None:
        raise AssertionError("nothing may be published")

    config = RunConfig(model=MODEL, pipeline=PipelineConfig(stages=1))
    publisher = Publisher(tmp_path / "out", tmp_path, config, MANIFEST, published)
    publisher.begin(3, 1, ((0, 1),))
    publisher.part(3, 0).write_bytes(data)
    with pytest.raises(WireError):
        await publisher.arrived(3, 0)
    assert not publisher.path(3).exists()


async def test_uploads_of_two_generations_are_never_one_model(tmp_path: Path) -> None:
    model = msgspec.structs.replace(MODEL, layers=2)
    layers = ((0, 1), (1, 2))
    done: list[Path] = []

    async def published(step: int, path: Path) -> None:
        done.append(path)

    publisher = Publisher(tmp_path / "out", tmp_path, RunConfig(model=model), MANIFEST, published)

    async def upload(generation: int, number: int) -> None:
        publisher.begin(3, generation, layers)
        publisher.part(3, number).write_bytes(stage(tensors(model, 300, *layers[number])))
        await publisher.arrived(3, number)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    await upload(1, 0)
    await upload(2, 1)
    assert not done
    await upload(2, 0)
    assert done == [publisher.path(3)]
    assert not list((tmp_path / "out").glob(".step-*"))


@pytest.mark.parametrize("arrived", [1, 2])
async def test_a_coordinator_started_again_goes_on_collecting(arrived: int, tmp_path: Path) -> None:
    """What has arrived is not sent again; with all of it there, the model is made at once."""
    layers, done = ((0, 1), (1, 2)), []

    async def published(step: int, path: Path) -> None:
        done.append(path)

    config = RunConfig(model=msgspec.structs.replace(MODEL, layers=2))
    first, second = (Publisher(tmp_path / "out", tmp_path, config, MANIFEST, published) for _ in range(2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    first.begin(3, 1, layers)
    for number, (a, b) in enumerate(layers):
        first.part(3, number).write_bytes(stage(tensors(config.model, 300, a, b)))
    if arrived == 1:
        await first.arrived(3, 0)
    else:
        for number in range(2):
            first.part(3, number).rename(first.part(3, number).with_suffix(""))
    await second.resume(3, 1, layers)
    if arrived == 1:
        assert not done
        second.begin(3, 1, layers)
        await second.arrived(3, 1)
    assert done == [second.path(3)] and not list((tmp_path / "out").glob(".step-*"))
