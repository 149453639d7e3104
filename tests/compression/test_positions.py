"""Positions: every form comes back, none is far from entropy, and strangers' bytes do no harm."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from potluck.compression import position_kernels, rans
from potluck.compression.codec import CodecError
from potluck.compression.positions import Form, Layout, decode_positions, encode_positions, positions_bound


def draw(layout: Layout, seed: int) -> torch.Tensor:
    """A random choice of positions that fits the layout."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, layout.n, layout.chunk or 1):
        size = min(layout.chunk, layout.n - start)
        k = layout.each if size == layout.chunk else layout.last
        parts.append(start + torch.randperm(size, generator=g)[:k].sort().values)
    return torch.cat(parts)


LAYOUTS = st.builds(
    Layout.of,
    st.integers(0, 3000),
    st.sampled_from([1.0, 0.97, 0.5, 0.2, 0.03, 0.001]),
    st.sampled_from([0, 64, 100, 1000]),
)


@given(layout=LAYOUTS, seed=st.integers(0, 1 << 30))
@settings(max_examples=250, deadline=None)
def test_positions_come_back(layout: Layout, seed: int) -> None:
    positions = draw(layout, seed)
    payload = encode_positions(positions, layout)
    assert len(payload) <= positions_bound(layout)
    assert torch.equal(decode_positions(payload, layout), positions)


@given(n=st.integers(2, 2000), seed=st.integers(0, 1 << 30), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_form_comes_back(n: int, seed: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, n - 1))
    layout = Layout(n, n, kept, 0)
    array = draw(layout, seed).numpy()
    m = data.draw(st.integers(1, n))
    out = np.empty(kept, np.int64)
    golomb = np.zeros(-(-position_kernels.golomb_bits(array, m) // 8), np.uint8)
    position_kernels.write_golomb(array, m, golomb)
    assert position_kernels.read_golomb(golomb, m, n, out) and (out == array).all()
    tight = np.zeros(-(-kept * layout.width // 8), np.uint8)
    position_kernels.write_indices(array, n, layout.width, tight)
    assert position_kernels.read_indices(tight, n, kept, layout.width, out) and (out == array).all()
    bitmap = np.zeros(-(-n // 8), np.uint8)
    position_kernels.write_bitmap(array, bitmap)
    assert position_kernels.read_bitmap(bitmap, out) and (out == array).all()
    made = rans.write(array, 1 << 30)
    assert made is not None
    assert rans.read(np.frombuffer(made, np.uint8), n, out) and (out == array).all()


@pytest.mark.parametrize("density", [0.2, 0.1, 0.05, 0.03, 0.01])
def test_bits_are_near_entropy(density: float) -> None:
    n = 100_000
    entropy = -n * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
    for chunk in (0, 4096):
        layout = Layout.of(n, density, chunk)
        for seed in range(3):
            assert len(encode_positions(draw(layout, seed), layout)) <= 1.01 * entropy + 4


def test_clustered_positions_take_less_than_entropy_of_their_density() -> None:
    n = 100_000
    layout = Layout.of(n, 0.05)
    rows = torch.exp(torch.randn(100, 1, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(100, 1000, generator=torch.Generator().manual_seed(2)) * rows
    positions = x.abs().view(-1).topk(layout.kept).indices.sort().values
    payload = encode_positions(positions, layout)
    assert payload[0] == Form.RANS
    assert len(payload) < 0.75 * 0.2864 * n / 8
    assert torch.equal(decode_positions(payload, layout), positions)


@pytest.mark.parametrize(
    ("n", "share", "chunk", "form"),
    [
        (1000, 0.5, 0, Form.BITMAP),
        (4096 * 8, 1 / 4096, 4096, Form.INDICES),
        (3000, 0.01, 0, Form.GOLOMB),
        (1 << 17, 0.2, 0, Form.RANS),
    ],
)
def test_each_form_has_its_place(n: int, share: float, chunk: int, form: Form) -> None:
    layout = Layout.of(n, share, chunk)
    assert encode_positions(draw(layout, 0), layout)[0] == form


def test_far_positions_fit() -> None:
    n = (1 << 31) - 1
    layout = Layout(n, n, 3, 0)
    for places in ([0, 1, 2], [0, 1 << 30, n - 1], [n - 3, n - 2, n - 1]):
        positions = torch.tensor(places)
        payload = encode_positions(positions, layout)
        assert len(payload) <= positions_bound(layout)
        assert torch.equal(decode_positions(payload, layout), positions)
    made = rans.write(np.array([0, n - 1]), 1 << 30)
    out = np.empty(2, np.int64)
    assert made is not None and rans.read(np.frombuffer(made, np.uint8), n, out) and out.tolist() == [0, n - 1]


def test_layout_shares_out_the_last_chunk() -> None:
    assert Layout.of(10_000, 0.03, 4096) == Layout(10_000, 4096, 123, 54)
    assert Layout.of(100, 0.001, 64) == Layout(100, 64, 1, 1)
    assert Layout.of(128, 0.5, 64).kept == 64
    assert Layout.of(50, 0.1, 64) == Layout(50, 50, 5, 0)
    assert Layout.of(0, 0.5, 64).kept == 0
    for n in (-1, 1 << 31):
        with pytest.raises(CodecError, match="elements"):
            Layout.of(n, 0.5)


BAD = {
    "unknown form": (Layout(16, 16, 2, 0), "04 0000"),
    "bitmap, one too many": (Layout(16, 16, 2, 0), "00 0700"),
    "bitmap, one too few": (Layout(16, 16, 2, 0), "00 0100"),
    "bitmap, past the end": (Layout(12, 12, 2, 0), "00 0180"),
    "bitmap, too long": (Layout(16, 16, 2, 0), "00 030000"),
    "bitmap, wrong chunk": (Layout(16, 8, 1, 0), "00 0300"),
    "indices, equal": (Layout(16, 16, 2, 0), "01 33"),
    "indices, decreasing": (Layout(16, 16, 2, 0), "01 23"),
    "indices, past the end": (Layout(12, 12, 2, 0), "01 d0"),
    "indices, padding": (Layout(16, 16, 1, 0), "01 13"),
    "golomb, too short": (Layout(1000, 1000, 9, 0), "02 00"),
    "golomb, past the end": (Layout(1000, 1000, 2, 0), "02 0f0000"),
    "golomb, padding": (Layout(8, 8, 4, 0), "02 10"),
    "golomb, unused byte": (Layout(64, 64, 32, 0), "02 00000000 00"),
    "golomb, wrong chunk": (Layout(8, 4, 2, 0), "02 00"),
    "empty": (Layout(16, 16, 2, 0), ""),
    "form only": (Layout(16, 16, 2, 0), "00"),
    "too long": (Layout(16, 16, 2, 0), "00" * 20),
    "all kept": (Layout(16, 16, 16, 0), "00ffff"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_encoder_makes_is_refused(name: str) -> None:
    layout, payload = BAD[name]
    with pytest.raises(CodecError):
        decode_positions(bytes.fromhex(payload), layout)


def test_damaged_rans_is_refused_or_still_positions() -> None:
    layout = Layout.of(200_000, 0.2)
    payload = encode_positions(draw(layout, 0), layout)
    assert payload[0] == Form.RANS
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(payload)
        for _ in range(rng.integers(1, 4)):  # half of the damage goes to the table and the state
            place = rng.integers(len(damaged)) if rng.random() < 0.5 else rng.integers(150)
            damaged[place] ^= 1 << rng.integers(8)
        try:
            positions = decode_positions(bytes(damaged), layout)
        except CodecError:
            refused += 1
            continue
        assert position_kernels.fits(positions.numpy(), layout.n, layout.chunk, layout.each)
    assert refused > 400
    for wrong in (payload + b"\0", payload[:-1], payload[:30], bytes([3, 255]) + payload[2:]):
        with pytest.raises(CodecError):
            decode_positions(wrong, layout)
