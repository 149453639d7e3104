"""Bytes and positions that may never change while the protocol has this version.

POTLUCK_REWRITE_GOLDEN=1 writes golden.json anew; do that only together with a new protocol version.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from potluck.compression.mask import seeded_indices
from potluck.compression.registry import build
from potluck.compression.sync import SyncCodec

GOLDEN = Path(__file__).with_name("golden.json")
SPECS = ["fp32", "fp16", "bf16", "int2:tile=32", "int4:tile=32", "int8:tile=32"]
SYNC = {
    "4 bits": SyncCodec(bits=4, bucket=8),
    "16 bits": SyncCodec(bits=16, bucket=8),
    "mask": SyncCodec(density=0.25, bits=4, bucket=8),
    "mask, bitmap": SyncCodec(density=0.5, topk=0.5, bits=8, bucket=8),
    "blocks, 2 bits": SyncCodec(topk=0.02, bits=2, bucket=8),
}


def fixed(n: int) -> torch.Tensor:
    """Exact in every float format: small whole numbers over 64, of both signs."""
    return torch.tensor([((i * 37 + 11) % 101 - 50) / 64 for i in range(n)])


def current() -> dict[str, object]:
    made: dict[str, object] = {spec: build(spec).encode(fixed(70).view(2, 35)).hex() for spec in SPECS}
    for name, codec in SYNC.items():
        made[f"sync {name}"] = codec.encode(fixed(600 if "blocks" in name else 40), 7).payload.hex()
    for n, density, seed in (
        (100, 0.1, 0),
        (1000, 0.013, 12345),
        (2_000_000_000, 5e-9, -3),
        (20, 0.8, 1 << 64),
    ):
        made[f"mask n={n} density={density} seed={seed}"] = seeded_indices(n, density, seed).tolist()
    return made


def golden() -> dict[str, object]:
    if os.environ.get("POTLUCK_REWRITE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(current()))
def test_bytes_are_those_of_the_protocol(name: str) -> None:
    assert current()[name] == golden()[name]


def test_golden_has_nothing_else() -> None:
    assert golden().keys() == current().keys()


def test_golden_fp32_by_hand() -> None:
    assert build("fp32").encode(torch.tensor([1.0, -2.0])).hex() == "0000803f000000c0"
    assert build("fp16").encode(torch.tensor([1.0, -2.0])).hex() == "003c00c0"
    assert build("bf16").encode(torch.tensor([1.0, -2.0])).hex() == "803f00c0"


def test_golden_int4_by_hand() -> None:
    """Scale -1 = -2^14 * 2^-14 (fp16 0xf400, exponent 127 - 14); codes -8, 3, -1, 0 counted from 8."""
    assert build("int4").encode(torch.tensor([8.0, -3.0, 1.0, 0.0])).hex() == "71" + "00f4" + "708b"
