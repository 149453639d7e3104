"""The integer tiles: error, independence of rows, rounding by chance, the ends of the number range."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.codec import CodecError
from potluck.compression.grid import pack_codes, packed_nbytes, unpack_codes
from potluck.compression.registry import build
from potluck.compression.tile_format import parse

BITS = (2, 3, 4, 6, 8)
# Squared error over squares on N(0,1): plain, zero, hadamard (tile 64), hadamard (tile 128).
NORMAL_ERROR = {
    2: (0.135, 0.130, 0.135, 0.145),
    3: (0.0343, 0.0320, 0.0343, 0.0402),
    4: (0.0090, 0.0079, 0.0090, 0.0105),
    6: (6.00e-4, 4.93e-4, 6.00e-4, 7.06e-4),
    8: (3.83e-5, 3.08e-5, 3.83e-5, 4.50e-5),
}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sent(spec: str, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    codec = build(spec)
    return codec.decode(codec.encode(x, seed), x.shape)


def error(spec: str, x: torch.Tensor) -> float:
    return ((sent(spec, x) - x).square().mean() / x.square().mean()).item()


def tile_bound(x: torch.Tensor, bits: int, tile: int, zero: bool, random: bool) -> torch.Tensor:
    """Largest error allowed for each element of x [R, N]: a step of its tile's scale, or one and a half."""
    scales = torch.zeros_like(x)
    half, top = 1 << (bits - 1), (1 << bits) - 1
    for start in range(0, x.shape[1], tile):
        part = x[:, start : start + tile].double()
        low, high = part.amin(dim=1, keepdim=True), part.amax(dim=1, keepdim=True)
        if zero:
            unit = 2.0 ** (bits - 6)
            scale = torch.maximum((high - low) / (top + (not random) - unit), low.abs() / (127 * unit))
        else:
            below, above = (-low).clamp(min=0), high.clamp(min=0)
            scale = torch.maximum(below, above) / (half + 0.5)
            if random:
                scale = torch.maximum(
                    torch.maximum(below, above) / half, torch.minimum(below, above) / max(half - 1, 1)
                )
        scales[:, start : start + tile] = (scale * 1.1251).float()
    smallest = (scales.amax(dim=1, keepdim=True) * 2.0**-14).clamp(min=3e-38)
    return torch.maximum(scales, smallest) * (1.0 if zero or random else 1.5)


@given(
    bits=st.sampled_from(BITS),
    tile=st.sampled_from([32, 64, 128]),
    options=st.sampled_from(["", ",zero", ",random", ",zero,random"]),
    outliers=st.sampled_from([0, 2, 9]),
    rows=st.integers(1, 5),
    n=st.integers(1, 300),
    seed=st.integers(0, 1 << 30),
    power=st.floats(-44, 29.9),
    spread=st.floats(0, 6),
    offset=st.sampled_from([0.0, 0.0, 1.0, -30.0]),
)
@settings(max_examples=200, deadline=None)
def test_error_is_within_steps(
    bits: int,
    tile: int,
    options: str,
    outliers: int,
    rows: int,
    n: int,
    seed: int,
    power: float,
    spread: float,
    offset: float,
) -> None:
    x = normal(rows, n, seed=seed) * torch.exp(spread * normal(rows, n, seed=seed + 1)) + offset
    x = (x.double() / x.abs().max() * 10.0**power).float()
    picks = f",outliers={outliers}" if outliers and bits < 8 else ""
    y = sent(f"int{bits}:tile={tile}{options}{picks}", x, seed)
    bound = tile_bound(x, bits, tile, "zero" in options, "random" in options)
    assert ((y - x).abs() <= bound + x.abs() * 1e-6).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sigma", [1.0, 1e-6, 1e-30, 1e28])
def test_error_on_normal_values_does_not_depend_on_their_size(bits: int, sigma: float) -> None:
    x = normal(128, 512) * sigma
    specs = (f"int{bits}", f"int{bits}:zero", f"int{bits}:hadamard", f"int{bits}:tile=128,hadamard")
    for spec, expected in zip(specs, NORMAL_ERROR[bits], strict=True):
        y = sent(spec, x) / sigma
        assert ((y - x / sigma).square().mean()).item() == pytest.approx(expected, rel=0.05), spec


def test_options_help_where_they_should() -> None:
    spiky = normal(64, 4096)
    spiky[:, 5::509] *= 20.0
    assert error("int4:hadamard", spiky) < 0.3 * error("int4", spiky)
    assert error("int4:outliers=8", spiky) < 0.2 * error("int4", spiky)
    assert error("int4:tile=128,hadamard", spiky) < 0.5 * error("int4:tile=64", spiky)
    assert error("int4:zero", normal(64, 4096) + 3.0) < 0.3 * error("int4", normal(64, 4096) + 3.0)
    assert error("int3:tile=128,hadamard", normal(64, 4096)) < 0.045


@pytest.mark.parametrize("spec", ["int4", "int2:zero", "int8", "int3:random", "int6:hadamard", "int4:outliers=2"])
@pytest.mark.parametrize("value", [1.2e30, -1.2e30, 1e-45, -1e-45, 1.2e-38, 65504.0 * 1000, 6e-8])
def test_extreme_values_stay_finite_and_close(spec: str, value: float) -> None:
    x = torch.tensor([[value, 0.0, value / 2], [0.0, 0.0, 0.0], [1.0, -1.0, value]])
    y = sent(spec, x)
    assert torch.isfinite(y).all()
    assert (y[1] == 0).all()
    assert abs(y[0, 0] - value) <= max(abs(value) * 0.26, 2e-38)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 1.3e30, -3.4e38])
@pytest.mark.parametrize("place", [0, 64, 69])
@pytest.mark.parametrize("spec", ["int4", "int2:zero,random", "int8:hadamard", "int3:outliers=4"])
def test_infinite_and_nan_input_is_refused(bad: float, place: int, spec: str) -> None:
    x = torch.zeros(2, 70)
    x[1, place] = bad
    with pytest.raises(CodecError, match="infinite or NaN"):
        build(spec).encode(x)


@pytest.mark.parametrize(
    "spec",
    [
        "int2:tile=32",
        "int4:tile=64",
        "int8:tile=128,random",
        "int3:zero,random,outliers=3",
        "int6:tile=32,hadamard,random,outliers=2",
    ],
)
def test_bytes_of_a_row_depend_on_that_row_and_the_seed_only(spec: str) -> None:
    codec = build(spec)
    x = normal(3, 300, 333) * torch.logspace(-8, 8, 300).view(1, 300, 1)
    whole = codec.encode(x, 5)
    assert whole == b"".join(codec.encode(part, 5) for part in x)
    size = codec.nbytes((333,))
    for i in (0, 299, 300, 599, 899):
        assert whole[i * size : (i + 1) * size] == codec.encode(x.view(-1, 333)[i], 5)
    assert (whole == codec.encode(x, 6)) == ("random" not in spec)


@pytest.mark.parametrize("seed", [-1, 0, 1 << 63, (1 << 64) + 3, -(1 << 80)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    codec = build("int4:random")
    assert codec.encode(normal(2, 70), seed) == codec.encode(normal(2, 70), seed % (1 << 64))


@pytest.mark.parametrize(
    "spec",
    [*(f"int{b}:tile=32,random" for b in BITS), "int2:zero,random", "int4:hadamard,random", "int3:random,outliers=2"],
)
def test_rounding_by_chance_is_unbiased(spec: str) -> None:
    """The mean over seeds is the value: in the middle, at both ends of the grid, in tiny tiles."""
    x = normal(134, seed=4)
    x[0], x[1], x[70], x[71] = 5.0, -5.0, -9.0, 8.9
    x[96:128] *= 1e-4
    codec, rounds = build(spec), 2000
    total, squares = torch.zeros(134, dtype=torch.float64), torch.zeros(134, dtype=torch.float64)
    for seed in range(rounds):
        wrong = codec.decode(codec.encode(x, seed), (134,)).double() - x
        total += wrong
        squares += wrong.square()
    mean = total / rounds
    variance = (squares / rounds - mean.square()).clamp(min=0)
    fmt = parse(spec)
    step = tile_bound(x.unsqueeze(0), fmt.bits, fmt.tile, fmt.zero, random=True)[0]
    if fmt.hadamard:
        step = step.max().expand(134)
    # Chances below 5 / rounds may have shown no example: their part of a step is allowed for.
    assert (mean.abs() <= 4.5 * (variance / rounds).sqrt() + step * 5 / rounds).all()
    moving = variance > 1e-6 * x.square().max()
    assert 0.6 < (mean[moving].square() / (variance[moving] / rounds)).mean() < 1.5
    assert moving.sum() > 60


def test_noise_differs_between_elements_rows_and_seeds() -> None:
    """With half steps, every code is a fair coin: coins of neighbours and of other seeds agree half the time."""
    codec = build("int8:random")
    x = torch.full((200, 64), 0.25)
    x[:, 0] = 64.0  # so that the scale is 0.5
    x[:, 1] = torch.arange(200) * 2.0**-10  # rows are told apart by their content
    coins = [codec.decode(codec.encode(x, seed), x.shape)[:, 2:] for seed in (0, 1)]
    for a, b in ((coins[0], coins[1]), (coins[0][1:], coins[0][:-1]), (coins[0][:, 1:], coins[0][:, :-1])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("int2", 2.127),
        ("int3:tile=128", 3.065),
        ("int4", 4.127),
        ("int4:tile=128,hadamard", 4.065),
        ("int8", 8.127),
        ("int4:zero", 4.252),
        ("int4:outliers=16", 4.385),
        ("int4:outliers=8", 4.643),
    ],
)
def test_wire_bits_per_value(spec: str, expected: float) -> None:
    assert build(spec).nbytes((1, 2048, 4096)) * 8 / (2048 * 4096) == pytest.approx(expected, abs=1e-3)


def test_an_outlier_spoils_only_its_tile() -> None:
    x = normal(64, 256, seed=2)
    spoiled = x.clone()
    spoiled[:, 5] = 300.0
    torch.testing.assert_close(sent("int4", x)[:, 64:], sent("int4", spoiled)[:, 64:], rtol=0, atol=0)


def test_an_exponent_past_the_range_is_refused() -> None:
    payload = bytearray(build("int4").encode(normal(1, 64)))
    payload[0] = 217
    with pytest.raises(CodecError, match="not finite"):
        build("int4").decode(bytes(payload), (1, 64))


@pytest.mark.parametrize(("spec", "n"), [("int4:outliers=3", 700), ("int4:tile=32,outliers=100", 6000)])
def test_wrong_outlier_positions_are_refused(spec: str, n: int) -> None:
    codec = build(spec)
    payload = codec.encode(normal(n))
    _, start, stop, _, _ = codec.fmt.sections(n)
    for positions in (b"\x00" * (stop - start), b"\xff" * (stop - start)):
        with pytest.raises(CodecError, match="positions"):
            codec.decode(payload[:start] + positions + payload[stop:], (n,))


@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]), rows=st.integers(1, 3), n=st.integers(1, 40), seed=st.integers(0, 99)
)
@settings(max_examples=150, deadline=None)
def test_packing_is_lossless(bits: int, rows: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, n), generator=g, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_nbytes(n, bits))
    assert -(-n * bits // 8) <= packed_nbytes(n, bits) <= -(-n * bits // 8) + 1
    assert torch.equal(unpack_codes(packed, bits, n), codes)
