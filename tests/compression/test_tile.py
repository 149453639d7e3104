"""The integer tiles: error, independence of rows, the ends of the number range."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.codec import CodecError
from potluck.compression.registry import build
from potluck.compression.grid import DIVISORS, pack_codes, packed_nbytes, unpack_codes

# Relative squared error on N(0,1), tile 64; see the table in grid.py.
EXPECTED_ERROR = {2: 0.134, 4: 0.0090, 8: 3.5e-5}


def tile_bound(x: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """Largest error allowed for each element of x [R, N]: a step of the tile's scale, at 2 bits 1.5."""
    bound = torch.empty_like(x)
    top = x.abs().amax(dim=1, keepdim=True)
    for start in range(0, x.shape[1], tile):
        part = x[:, start : start + tile]
        step = part.abs().amax(dim=1, keepdim=True) / DIVISORS[bits]
        bound[:, start : start + tile] = step * (1.5 if bits == 2 else 1.0) * 1.004
    return bound + top * 2.0**-35 + 1e-43


@given(
    bits=st.sampled_from([2, 4, 8]),
    tile=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 6),
    n=st.integers(1, 300),
    seed=st.integers(0, 1 << 30),
    power=st.floats(-42, 37),
    spread=st.floats(0, 6),
)
@settings(max_examples=400, deadline=None)
def test_error_is_within_a_step(
    bits: int, tile: int, rows: int, n: int, seed: int, power: float, spread: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g) * torch.exp(spread * torch.randn(rows, n, generator=g))
    x = (x.double() / x.abs().max() * 10.0**power).float()
    codec = build(f"int{bits}:tile={tile}")
    y = codec.decode(codec.encode(x), (rows, n))
    assert ((y - x).abs() <= tile_bound(x, bits, tile)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sigma", [1.0, 1e-4, 1e-9, 1e-30, 1e30])
def test_error_on_normal_values_does_not_depend_on_their_size(bits: int, sigma: float) -> None:
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    codec = build(f"int{bits}")
    y = codec.decode(codec.encode(x * sigma), (256, 512)) / sigma
    error = ((y - x).square().mean() / x.square().mean()).item()
    assert error == pytest.approx(EXPECTED_ERROR[bits], rel=0.04)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 1.2e-38, 65504.0 * 1000, 6e-8])
def test_extreme_values_stay_finite_and_close(bits: int, value: float) -> None:
    x = torch.tensor([[value, 0.0, value / 2], [0.0, 0.0, 0.0], [1.0, -1.0, value]])
    codec = build(f"int{bits}")
    y = codec.decode(codec.encode(x), (3, 3))
    assert torch.isfinite(y).all()
    assert (y[1] == 0).all()
    assert y[0, 1] == 0
    assert abs(y[0, 0] - value) <= max(abs(value) * 0.25, 1.5e-45)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 64, 69])
def test_infinite_and_nan_input_is_refused(bad: float, place: int) -> None:
    x = torch.zeros(2, 70)
    x[1, place] = bad
    with pytest.raises(CodecError, match="infinite or NaN"):
        build("int4").encode(x)


@pytest.mark.parametrize("spec", ["int2:tile=32", "int4:tile=64", "int8:tile=128"])
def test_bytes_of_a_row_depend_on_that_row_only(spec: str) -> None:
    codec = build(spec)
    x = torch.randn(3, 700, 333) * torch.logspace(-8, 8, 700).view(1, 700, 1)  # more than one chunk of rows
    whole = codec.encode(x)
    assert whole == b"".join(codec.encode(part) for part in x)
    size = codec.nbytes((333,))
    for i in (0, 699, 700, 1500, 2099):
        assert whole[i * size : (i + 1) * size] == codec.encode(x.view(-1, 333)[i])


def test_wire_bits_per_value() -> None:
    for bits, expected in ((2, 2.252), (4, 4.252), (8, 8.252)):
        assert build(f"int{bits}").nbytes((1, 2048, 4096)) * 8 / (2048 * 4096) == pytest.approx(expected, abs=1e-3)


def test_an_outlier_spoils_only_its_tile() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    spoiled = x.clone()
    spoiled[:, 5] = 300.0
    codec = build("int4")
    clean, dirty = (codec.decode(codec.encode(v), (64, 256)) for v in (x, spoiled))
    torch.testing.assert_close(clean[:, 64:], dirty[:, 64:], rtol=2e-3, atol=0.05)


@pytest.mark.parametrize("where", [0, 2])
def test_scales_that_are_not_finite_are_refused(where: int) -> None:
    codec = build("int4")
    payload = bytearray(codec.encode(torch.randn(1, 64)))
    payload[where] = 0xFF if where == 0 else 0x7E  # the exponent, the high byte of the fp16 scale
    with pytest.raises(CodecError, match="not finite"):
        codec.decode(bytes(payload), (1, 64))


@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 3), n=st.integers(1, 40), seed=st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_packing_is_lossless(bits: int, rows: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, n), generator=g, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_nbytes(n, bits))
    assert torch.equal(unpack_codes(packed, bits, n), codes)
