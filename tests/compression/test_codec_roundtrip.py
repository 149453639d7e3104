"""Every codec: exact size, right shape, bounded error, clear refusals."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.codec import CodecError
from potluck.compression.registry import Packed, build, pack, unpack

SPECS = ["fp32", "fp16", "bf16", *(f"int{b}:tile={t}" for b in (2, 4, 8) for t in (32, 64, 128))]
SHAPES = st.lists(st.integers(0, 5), max_size=3).flatmap(
    lambda head: st.integers(0, 200).map(lambda last: (*head, last))
)


@given(spec=st.sampled_from(SPECS), shape=SHAPES, seed=st.integers(0, 1 << 30), power=st.integers(-45, 38))
@settings(max_examples=400, deadline=None)
def test_round_trip_has_the_promised_size_and_shape(spec: str, shape: tuple[int, ...], seed: int, power: int) -> None:
    codec = build(spec)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (10.0**power)
    x = x.clamp(-3.4e38, 3.4e38)
    payload = codec.encode(x)
    y = codec.decode(payload, shape)
    assert len(payload) == codec.nbytes(shape)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert codec.encode(x) == payload


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


@pytest.mark.parametrize("spec", SPECS)
def test_strides_dtype_and_gradient_do_not_matter(spec: str) -> None:
    codec = build(spec)
    x = torch.randn(6, 70, 5).bfloat16()
    turned = x.transpose(1, 2)
    assert codec.encode(turned) == codec.encode(turned.contiguous().float())
    assert codec.encode(turned.float().requires_grad_()) == codec.encode(turned.contiguous())
    assert codec.encode(x[::2, ::3]) == codec.encode(x[::2, ::3].clone())


@pytest.mark.parametrize("spec", SPECS)
def test_no_dimensions_one_element_and_none(spec: str) -> None:
    codec = build(spec)
    for shape in ((), (1,), (1, 1, 1)):
        x = torch.full(shape, 3.0)
        assert codec.decode(codec.encode(x), shape).shape == shape
    for shape in ((0,), (3, 0), (0, 64), (2, 0, 7)):
        assert codec.encode(torch.empty(shape)) == b""
        assert codec.decode(b"", shape).shape == shape


@given(spec=st.sampled_from(SPECS), shape=SHAPES, data=st.binary(max_size=64), fit=st.booleans())
@settings(max_examples=1500, deadline=None)
def test_decode_of_garbage_raises_or_has_the_shape(spec: str, shape: tuple[int, ...], data: bytes, fit: bool) -> None:
    codec = build(spec)
    n = codec.nbytes(shape)
    payload = (data * (n // max(len(data), 1) + 1))[:n] if fit else data
    try:
        y = codec.decode(memoryview(payload), shape)
    except CodecError:
        return
    assert y.shape == shape
    assert spec.startswith(("fp", "bf")) or torch.isfinite(y).all()


@pytest.mark.parametrize("shape", [(-1,), (-1, -4), (1 << 60,), (0, 1 << 60), (1,) * 9, (1.5,), ("4",), (1 << 100, 0)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for spec in SPECS:
        with pytest.raises(CodecError):
            build(spec).decode(b"1234", shape)


def test_a_large_shape_with_a_short_payload_allocates_nothing() -> None:
    with pytest.raises(CodecError, match="expected"):
        build("int2").decode(b"abc", (1 << 20, 1 << 20))


@pytest.mark.parametrize("spec", ["", "int3", "int4:tile=63", "int4:", "INT4", "fp64", "int4:tile=064", "x" * 999])
def test_unknown_specs_name_the_legal_ones(spec: str) -> None:
    with pytest.raises(CodecError, match=r"fp32, fp16, bf16, int\{2,4,8\}:tile") as caught:
        build(spec)
    assert len(str(caught.value)) < 300


def test_build_is_cached_and_canonical() -> None:
    assert build("int4").spec == "int4:tile=64"
    assert build("fp16") is build("fp16")
    assert all(build(spec).spec == spec for spec in SPECS)


def test_packed_carries_what_decoding_needs() -> None:
    x = torch.randn(3, 50)
    packed = pack(build("int8"), x)
    assert packed == Packed("int8:tile=64", (3, 50), build("int8").encode(x))
    assert packed.nbytes == build("int8").nbytes((3, 50))
    assert torch.equal(unpack(packed), build("int8").decode(packed.payload, (3, 50)))
