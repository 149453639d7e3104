"""What is packed is what comes out, small; what is damaged is nothing."""

from __future__ import annotations

import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.coordinator.records import pack, unpack
from potluck.coordinator.state import Part

PART = st.builds(
    Part,
    peer=st.sampled_from("abcdef"),
    stage=st.integers(0, 3),
    samples=st.integers(0, 2**40),
    work=st.just(0.0),
    nbytes=st.integers(0, 2**63 - 1),
    seconds=st.floats(0.0, 1e6),
    digest=st.binary(min_size=32, max_size=32),
)
KEYS = {peer: 7 * i for i, peer in enumerate("abcdef")}
PEERS = {key: peer for peer, key in KEYS.items()}


@given(st.lists(PART, max_size=12))
def test_parts_come_back(parts: list[Part]) -> None:
    found = unpack(pack(parts, KEYS), PEERS)
    assert [(p.peer, p.stage, p.samples, p.nbytes, p.digest) for p in found] == [
        (p.peer, p.stage, p.samples, p.nbytes, p.digest[:8]) for p in parts
    ]
    assert [p.seconds for p in found] == pytest.approx([p.seconds for p in parts], abs=0.0006)


def test_many_alike_are_few_bytes() -> None:
    parts = [
        Part(
            peer=f"p{i}",
            stage=i % 8,
            samples=64 + i % 2,
            work=(64 + i % 2) * 0.125,
            nbytes=500_000 + i % 7,
            seconds=i * 0.003,
            digest=bytes([i % 8]) * 32,
        )
        for i in range(500)
    ]
    data = pack(parts, {f"p{i}": i for i in range(500)})
    assert len(data) < 500 * 8
    assert [p.work for p in unpack(data, {i: f"p{i}" for i in range(500)})] == [p.work for p in parts]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zlib",
        zlib.compress(b"\xc1"),
        zlib.compress(msgspec.msgpack.encode([[1], [0], [1], [], [1], [1], [b"d"], [0]])),
        zlib.compress(msgspec.msgpack.encode([[1], [0], [1], [1.0], [1], [1], [b"d"], [5]])),
        zlib.compress(msgspec.msgpack.encode([[99], [0], [1], [1.0], [1], [1], [b"d"], [0]])),
        zlib.compress(msgspec.msgpack.encode([[1, 2], [0], [1], [1.0], [1], [1], [b"d"], [0]])),
    ],
    ids=["empty", "foreign", "no message", "no work", "no digest", "a stranger", "uneven"],
)
def test_damage_is_nothing(data: bytes) -> None:
    assert unpack(data, {1: "a", 2: "b"}) == ()
