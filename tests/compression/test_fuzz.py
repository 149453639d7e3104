"""Payloads spoilt in every way: refused, or decoded to the shape asked for, in no more memory than that takes."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from mutations import Mutator, outcome, traced

from potluck.compression import rans
from potluck.compression.aq import Mark, Mode, pack_marks, parse_marks
from potluck.compression.codec import CodecError
from potluck.compression.positions import Layout, decode_positions, encode_positions
from potluck.compression.registry import build
from potluck.compression.sync import SyncCodec

pytestmark = pytest.mark.timeout(60)
SLACK = 64 * 1024


def normal(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("spec", ["fp32", "bf16", "int4:tile=64", "int3:tile=32,zero", "int2:tile=32,outliers=3"])
def test_tiles_and_casts(spec: str) -> None:
    mutate, seen, codec, shape = Mutator(1), Counter[str](), build(spec), (5, 200)
    valid = [codec.encode(normal(1000).view(shape)), codec.encode(torch.zeros(shape))]
    codec.decode(valid[0], shape)  # compiles
    with traced():
        for _ in range(300):
            data = mutate(valid)
            data = (data + valid[0])[: len(valid[0])] if mutate.random.random() < 0.7 else data
            found = outcome(lambda data=data: codec.decode(data, shape), (CodecError,), SLACK + 8000, seen)
            assert found is None or found.shape == shape
    assert seen["taken"] > 50
    assert seen["refused"] > 50


@pytest.mark.parametrize("topk", [0.03, 0.2])
def test_positions_in_every_form(topk: float) -> None:
    mutate, seen, layout = Mutator(2), Counter[str](), Layout.of(20_000, topk)
    clustered = torch.arange(layout.kept) * 2
    spread = torch.randperm(20_000, generator=torch.Generator().manual_seed(1))[: layout.kept].sort().values
    valid = [encode_positions(p, layout) for p in (clustered, spread, torch.arange(layout.kept))]
    valid += [bytes([form]) + valid[1][1:] for form in range(5)]
    for data in valid:
        with contextlib.suppress(CodecError):  # compiles
            decode_positions(data, layout)
    with traced():
        for _ in range(500):
            data = mutate(valid)
            most = SLACK + 8 * layout.kept
            found = outcome(lambda data=data: decode_positions(data, layout), (CodecError,), most, seen)
            if found is not None:
                assert found.shape == (layout.kept,)
                assert int(found[0]) >= 0 and int(found[-1]) < 20_000 and bool((found.diff() > 0).all())
    assert seen["refused"] > 50
    assert seen["taken"] > 3


def test_rans() -> None:
    mutate, seen = Mutator(3), Counter[str]()
    positions = np.sort(np.random.default_rng(1).choice(5000, 800, replace=False)).astype(np.int64)
    made = rans.write(positions, 1 << 20)
    assert made is not None
    out = np.empty(800, np.int64)
    with traced():
        for _ in range(600):
            data = np.frombuffer(mutate([made]) or b"\0", np.uint8)
            if outcome(lambda data=data: rans.read(data, 5000, out), (), SLACK, seen):
                seen["read"] += 1
                assert out[0] >= 0 and out[-1] < 5000
    assert seen["read"] < 300


@pytest.mark.parametrize("codec", [SyncCodec(topk=0.05, bits=2), SyncCodec(bits=4), SyncCodec(topk=0.2, chunk=64)])
def test_differences_of_weights(codec: SyncCodec) -> None:
    mutate, seen, n = Mutator(4), Counter[str](), 3000
    valid = [codec.encode(x).payload for x in (normal(n), torch.zeros(n), torch.arange(n).float())]
    codec.decode(valid[0], n)
    with traced():
        for _ in range(400):
            data = mutate(valid)
            found = outcome(lambda data=data: codec.decode(data, n), (CodecError,), SLACK + 16 * n, seen)
            if found is not None:
                assert found.dense(n).shape == (n,)
    assert seen["refused"] > 50
    assert seen["taken"] > 5


def test_marks() -> None:
    mutate, seen = Mutator(5), Counter[str]()
    valid = [pack_marks([Mark(3, Mode.DELTA, 4, b"8 bytes."), Mark(5, Mode.KEPT)])]
    with traced():
        for _ in range(400):
            data = mutate(valid)
            found = outcome(lambda data=data: parse_marks(data), (CodecError,), SLACK, seen)
            assert found is None or pack_marks(found) == data
    assert min(seen["taken"], seen["refused"]) > 20
