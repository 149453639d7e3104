"""Every codec: exact size, right shape, clear refusals, and no harm from any bytes."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.codec import CodecError
from potluck.compression.registry import build

TILED = [
    f"int{bits}:tile={tile}{mode}{random}{outliers}"
    for bits, tile, mode, random, outliers in itertools.product(
        (2, 3, 4, 6, 8), (32, 64, 128), ("", ",zero", ",hadamard"), ("", ",random"), ("", ",outliers=4")
    )
    if not (outliers and bits == 8)
]
CASTS = ["fp32", "fp16", "bf16"]
SPECS = [*CASTS, *TILED]
SOME = [*CASTS, "int2:tile=32", "int3:tile=64,random", "int4:tile=64", "int4:tile=128,hadamard", "int8:tile=64"]
SOME += ["int6:tile=32,zero,random,outliers=9", "int4:tile=64,hadamard,random,outliers=2"]
SHAPES = st.lists(st.integers(0, 5), max_size=3).flatmap(
    lambda head: st.integers(0, 200).map(lambda last: (*head, last))
)


@given(spec=st.sampled_from(SPECS), shape=SHAPES, seed=st.integers(0, 1 << 30), power=st.integers(-45, 29))
@settings(max_examples=500, deadline=None)
def test_round_trip_has_the_promised_size_and_shape(spec: str, shape: tuple[int, ...], seed: int, power: int) -> None:
    codec = build(spec)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (10.0**power)
    payload = codec.encode(x, seed)
    y = codec.decode(payload, shape)
    assert len(payload) == codec.nbytes(shape)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert codec.encode(x, seed) == payload
    y.add_(1.0)  # its own memory, not the payload's


def test_fp32_is_bit_exact() -> None:
    bits = torch.tensor([0, -(2**31), 1, 0x7F800000, 0x7FC00001, 0x3F800000], dtype=torch.int32)
    y = build("fp32").decode(build("fp32").encode(bits.view(torch.float32)), (6,))
    assert torch.equal(y.view(torch.int32), bits)


@pytest.mark.parametrize(("spec", "limit"), [("fp16", 65504.0), ("bf16", torch.finfo(torch.bfloat16).max)])
def test_narrow_casts_saturate(spec: str, limit: float) -> None:
    x = torch.tensor([1e30, -3.4028e38, torch.inf, 1.5])
    y = build(spec).decode(build(spec).encode(x), (4,))
    assert y.tolist() == [min(1e30, limit) if spec == "fp16" else y[0].item(), -limit, limit, 1.5]
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("spec", SOME)
def test_strides_dtype_and_gradient_do_not_matter(spec: str) -> None:
    codec = build(spec)
    x = torch.randn(6, 70, 5).bfloat16()
    turned = x.transpose(1, 2)
    assert codec.encode(turned) == codec.encode(turned.contiguous().float())
    assert codec.encode(turned.float().requires_grad_()) == codec.encode(turned.contiguous())
    assert codec.encode(x[::2, ::3]) == codec.encode(x[::2, ::3].clone())
    assert codec.encode(x.double()) == codec.encode(x)
    assert codec.encode(x.half()) == codec.encode(x.half().float())
    long = torch.randn(700, 1000).half()  # more than is converted at a time
    assert codec.encode(long, 3) == codec.encode(long.float(), 3)


@pytest.mark.parametrize("spec", SOME)
def test_no_dimensions_one_element_and_none(spec: str) -> None:
    codec = build(spec)
    for shape in ((), (1,), (1, 1, 1)):
        x = torch.full(shape, 3.0)
        assert codec.decode(codec.encode(x), shape).shape == shape
    for shape in ((0,), (3, 0), (0, 64), (2, 0, 7)):
        assert codec.encode(torch.empty(shape)) == b""
        assert codec.decode(b"", shape).shape == shape


@pytest.mark.parametrize("spec", SPECS)
def test_decode_of_garbage_raises_or_has_the_shape(spec: str) -> None:
    """A hundred payloads of the right length for each codec: of noise, and good ones with some bytes changed."""
    codec = build(spec)
    random = np.random.default_rng(len(spec))
    decoded = 0
    for i in range(100):
        shape = (int(random.integers(1, 4)), int(random.integers(1, 400)))
        payload = random.integers(0, 256, codec.nbytes(shape), dtype=np.uint8)
        if i % 2:
            good = np.frombuffer(codec.encode(torch.randn(shape), i), np.uint8).copy()
            places = random.integers(0, good.size, i % 7)
            good[places] = payload[places]
            payload = good
        try:
            y = codec.decode(memoryview(payload.tobytes()), shape)
        except CodecError:
            continue
        decoded += 1
        assert y.shape == shape
        assert spec in CASTS or torch.isfinite(y).all()
    assert decoded >= 10


@given(spec=st.sampled_from(SPECS), shape=SHAPES, data=st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_a_payload_of_another_length_is_refused(spec: str, shape: tuple[int, ...], data: bytes) -> None:
    if len(data) != build(spec).nbytes(shape):
        with pytest.raises(CodecError, match="expected"):
            build(spec).decode(data, shape)


@pytest.mark.parametrize("shape", [(-1,), (-1, -4), (1 << 60,), (0, 1 << 60), (1,) * 9, (1.5,), ("4",), (1 << 100, 0)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for spec in SOME:
        with pytest.raises(CodecError):
            build(spec).decode(b"1234", shape)


def test_a_large_shape_with_a_short_payload_allocates_nothing() -> None:
    for spec in SOME:
        with pytest.raises(CodecError, match="expected"):
            build(spec).decode(b"abc", (1 << 20, 1 << 20))


@pytest.mark.parametrize(
    "spec",
    [
        *("", "int1", "int5", "int16", "int", "int4:tile=63", "int4:", "INT4", "fp64", "int4:tile=064", "x" * 999),
        *("int4:zero,", "int4:,zero", "int4:zero,zero", "int4:tile=32,tile=64", "int4:tile", "int4:tile=", " int4"),
        *("int4:outliers", "int4:outliers=", "int4:outliers=0", "int4:outliers=-3", "int4:outliers=08", "int4\n"),
        *("int4:zero=1", "int4:Zero", "int4 :zero", "int4:outliers=1e3", "int4:outliers=99999", "int4:tile=32:zero"),
        *("fp32:zero", "int4:hadamard=64", "int４", "int4:tile=٣٢", "int4:outliers=²"),
    ],
)
def test_unknown_specs_name_the_legal_ones(spec: str) -> None:
    with pytest.raises(CodecError, match=r"fp32, fp16, bf16, int\{2,3,4,6,8\}\[:tile") as caught:
        build(spec)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int8:outliers=4", "all tiles"),
        ("int4:outliers=1", "from 2"),
        ("int4:outliers=1025", "to 1024"),
        ("int4:zero,hadamard", "leave one"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(spec: str, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        build(spec)


@given(spec=st.text(alphabet="int2348:tile=6zero,hadmrnous", max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_codec_or_a_refusal(spec: str) -> None:
    try:
        codec = build(spec)
    except CodecError:
        return
    assert build(codec.spec).spec == codec.spec


def test_build_is_cached_and_canonical() -> None:
    assert build("int4").spec == "int4:tile=64"
    assert build("int3:outliers=16,random,hadamard").spec == "int3:tile=64,hadamard,random,outliers=16"
    assert build("fp16") is build("fp16")
    assert all(build(spec).spec == spec for spec in SPECS)
    longest = build("int4:outliers=1024,random,hadamard,tile=128").spec
    assert len(longest) < 64
    assert longest.isascii() and longest.isprintable()
