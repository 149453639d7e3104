"""Bytes, positions and means that may never change while the protocol has this version.

POTLUCK_REWRITE_GOLDEN=1 writes golden_sync.json anew; do that only together with a new protocol version.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from potluck.compression.mask import Mask
from potluck.compression.mean import weighted_mean
from potluck.compression.position_kernels import write_golomb
from potluck.compression.positions import Layout, encode_positions
from potluck.compression.sync import Sparse, SyncCodec

GOLDEN = Path(__file__).with_name("golden_sync.json")
SYNC = {
    "2 bits": (40, SyncCodec(bits=2, bucket=8)),
    "4 bits": (40, SyncCodec(bits=4, bucket=8)),
    "3 bits": (40, SyncCodec(bits=3, bucket=8)),
    "6 bits": (40, SyncCodec(bits=6, bucket=8)),
    "8 bits": (40, SyncCodec(bits=8, bucket=16)),
    "16 bits": (40, SyncCodec(bits=16, bucket=8)),
    "32 bits": (10, SyncCodec(bits=32)),
    "topk, bitmap": (40, SyncCodec(topk=0.5, bits=8, bucket=8)),
    "topk, golomb": (600, SyncCodec(topk=0.05, bits=2, bucket=8)),
    "topk, signs": (600, SyncCodec(topk=0.05, bits=1, bucket=8)),
    "topk, chunks": (600, SyncCodec(topk=0.01, chunk=64, bits=4, bucket=8)),
}
MASKS = ((100, 0.1, 0), (1000, 0.013, 12345), (2_000_000_000, 5e-9, -3), (20, 0.8, 1 << 64))


def fixed(n: int) -> torch.Tensor:
    """Exact in every float format: small whole numbers over 64, of both signs."""
    return torch.tensor([((i * 37 + 11) % 101 - 50) / 64 for i in range(n)])


def current() -> dict[str, object]:
    made: dict[str, object] = {}
    for name, (n, codec) in SYNC.items():
        made[f"sync {name}"] = codec.encode(fixed(n)).payload.hex()
    runs = torch.cat([torch.arange(4000 * i, 4000 * i + 1000) for i in range(4)])
    made["positions rans"] = encode_positions(runs, Layout(16000, 16000, 4000, 0)).hex()
    for n, density, seed in MASKS:
        made[f"mask n={n} density={density} seed={seed}"] = Mask(n, density, seed).indices().tolist()
    pieces = [(Sparse(None, fixed(8) / 7), 5), (Sparse(torch.tensor([1, 6]), fixed(2) * 1e-9), 3)]
    made["mean"] = weighted_mean(pieces, 8).numpy().astype("<f4").tobytes().hex()
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


def test_golden_topk_by_hand() -> None:
    """Form 0, bits 1 and 2 of the bitmap, scale -1 as float32, codes -8 and 3 counted from 8."""
    x = torch.tensor([1.0, 8.0, -3.0, 0.0])
    assert SyncCodec(topk=0.5, bucket=8).encode(x).payload.hex() == "00" + "06" + "000080bf" + "b0"


def test_golden_golomb_by_hand() -> None:
    """Parameter 3, gaps 0, 4, 0: a zero and rest 0; a one, a zero and rest 1 as 1 0; a zero and rest 0."""
    out = np.zeros(1, np.uint8)
    write_golomb(np.array([0, 5, 6]), 3, out)
    assert out.tolist() == [0b00_01_01_00]


def test_golden_signs_by_hand() -> None:
    """All three values, in one bucket whose mean is 4: ratios 0.5 and 2, the mean, codes low, high and minus, low."""
    x = torch.tensor([2.0, -8.0, 2.0])
    assert SyncCodec(topk=0.9, bits=2).encode(x).payload.hex() == "0000003f" + "00000040" + "00008040" + "0c"
    assert SyncCodec(topk=0.9, bits=1).encode(x).payload.hex() == "00008040" + "02"
