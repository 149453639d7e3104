"""Bytes of the activation codecs that may never change while the protocol has this version.

POTLUCK_REWRITE_GOLDEN=1 writes golden.json anew; do that only together with a new protocol version.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from potluck.compression.registry import build

GOLDEN = Path(__file__).with_name("golden.json")
SEED = 7
SPECS = [
    "fp32",
    "fp16",
    "bf16",
    *(f"int{bits}:tile=32" for bits in (2, 3, 4, 6, 8)),
    *(f"int{bits}:tile=32,random" for bits in (2, 3, 4, 6, 8)),
    *(f"int{bits}:tile=32,zero" for bits in (2, 4, 8)),
    *(f"int4:tile={tile},hadamard" for tile in (32, 64, 128)),
    *(f"int{bits}:tile=32,outliers=2" for bits in (2, 3, 4, 6)),
    "int4:tile=32,zero,random",
    "int4:tile=32,hadamard,random,outliers=3",
    "int3:tile=32,zero,random,outliers=4",
    "int2:tile=32,outliers=20",
]


def fixed(rows: int, n: int) -> torch.Tensor:
    """Exact in every float format: small whole numbers over 64, of both signs."""
    return torch.tensor([((i * 37 + 11) % 101 - 50) / 64 for i in range(rows * n)]).view(rows, n)


def current() -> dict[str, str]:
    """One row with a short last tile, as hex; long enough for every section to be there."""
    lengths = {"int2:tile=32,outliers=20": 700, "int4:tile=128,hadamard": 150}
    return {spec: build(spec).encode(fixed(1, lengths.get(spec, 75)), SEED).hex() for spec in SPECS}


def golden() -> dict[str, str]:
    if os.environ.get("POTLUCK_REWRITE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
    made: dict[str, str] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return made


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_the_protocol(spec: str) -> None:
    assert current()[spec] == golden()[spec]


def test_golden_has_nothing_else() -> None:
    assert golden().keys() == current().keys()


def test_golden_casts_by_hand() -> None:
    assert build("fp32").encode(torch.tensor([1.0, -2.0])).hex() == "0000803f000000c0"
    assert build("fp16").encode(torch.tensor([1.0, -2.0])).hex() == "003c00c0"
    assert build("bf16").encode(torch.tensor([1.0, -2.0])).hex() == "803f00c0"


def test_golden_int4_by_hand() -> None:
    """8.5 / 8.5 = 1 = 2^(112 - 127) * 2^15 is code 15 * 8, turned: 0xf8. Codes -8, 3, -1, 0 from 8; j and j + 2."""
    assert build("int4").encode(torch.tensor([8.5, -3.0, 1.0, 0.0])).hex() == "70" + "f8" + "708b"


def test_golden_zero_by_hand() -> None:
    """Range 15.75 / (16 - 1/4) = 1, no sign and 4 bits: 0xf0; minimum (2 + 1/2) / (1/4) = 10 units, so 2.5."""
    assert build("int4:zero").encode(torch.tensor([2.0, 17.75, 2.5, 9.5])).hex() == "70" + "f0" + "0a" + "007f"
