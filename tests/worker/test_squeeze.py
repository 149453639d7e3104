"""zstd over payloads: nothing but the same bytes comes back, and a stranger's cannot make us hold more."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import zstandard
from hypothesis import given, settings

from potluck.compression.registry import build
from potluck.protocol.errors import WireError
from potluck.worker.squeeze import SUFFIX, is_squeezed, release, squeeze


@given(payload=st.one_of(st.binary(max_size=3000), st.integers(0, 4000).map(lambda n: b"potluck" * n)))
@settings(max_examples=300, deadline=None)
def test_what_goes_in_comes_out_and_is_never_longer(payload: bytes) -> None:
    name, wire = squeeze("int4:tile=64", payload)
    assert len(wire) <= len(payload)
    assert is_squeezed(name) == (wire != payload)
    assert bytes(release(name, memoryview(wire), len(payload))) == payload


def test_gradients_of_a_normal_kind_get_shorter() -> None:
    payload = build("int4:tile=64,hadamard").encode(torch.randn(64, 512, generator=torch.Generator().manual_seed(1)))
    name, wire = squeeze("int4:tile=64,hadamard", payload)
    assert name == "int4:tile=64,hadamard" + SUFFIX
    assert len(wire) < 0.96 * len(payload)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    with pytest.raises(WireError, match="at most 1000 were expected"):
        release("sync" + SUFFIX, bomb, 1000)


def test_a_size_that_is_not_given_or_not_true_is_refused() -> None:
    quiet = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 100)
    two = zstandard.ZstdCompressor().compress(b"abc" * 100) * 2
    for payload in (quiet, two, b"", b"plain"):
        with pytest.raises(WireError):
            release("sync" + SUFFIX, payload, 10_000)


@given(start=st.binary(max_size=60), at=st.integers(0, 200), flip=st.integers(1, 255))
@settings(max_examples=500, deadline=None)
def test_any_bytes_give_bytes_within_the_limit_or_an_error(start: bytes, at: int, flip: int) -> None:
    whole = bytearray(zstandard.ZstdCompressor().compress(b"weights and activations " * 40))
    whole[at % len(whole)] ^= flip
    for payload in (bytes(whole), start, bytes(whole[: at % len(whole)]), zstandard.FRAME_HEADER + start):
        try:
            assert len(release("x" + SUFFIX, payload, 960)) <= 960
        except WireError:
            pass
