"""The codec of a round: sizes, exactness at both ends, refusals."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.codec import CodecError
from potluck.compression.mask import seeded_indices
from potluck.compression.sync import Sparse, SyncCodec

CODECS = st.builds(
    SyncCodec,
    density=st.sampled_from([1.0, 0.5, 0.1, 0.013]),
    topk=st.sampled_from([1.0, 0.9, 0.2, 0.03, 0.001]),
    bits=st.sampled_from([2, 4, 8, 16, 32]),
    bucket=st.sampled_from([8, 100, 256]),
)


def values(n: int, seed: int, power: float = -6.0) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 10.0**power).clamp(-3.3e38, 3.3e38).float()  # scales saturate there


@given(codec=CODECS, n=st.integers(0, 3000), seed=st.integers(0, 1 << 62), power=st.floats(-44, 38))
@settings(max_examples=400, deadline=None)
def test_both_ends_know_exactly_what_was_sent(codec: SyncCodec, n: int, seed: int, power: float) -> None:
    delta = values(n, seed % 1000, power)
    encoded = codec.encode(delta, seed)
    received = codec.decode(encoded.payload, n, seed)
    assert len(encoded.payload) == codec.nbytes(n)
    assert torch.equal(received.values, encoded.sent.values)
    if received.indices is None:
        assert encoded.sent.indices is None
        assert codec.density == codec.topk == 1.0 or n <= 1000
    else:
        assert encoded.sent.indices is not None
        assert torch.equal(received.indices, encoded.sent.indices)
        assert (received.indices.diff() > 0).all()
    dense = received.dense(n)
    assert torch.isfinite(dense).all()
    # No error above a step (1.5 at 2 bits) of the largest scale, itself rounded to float32's smallest unit.
    sent_from = delta if received.indices is None else delta[received.indices]
    step = {2: 1.5 / 2.5, 4: 1 / 8, 8: 1 / 128, 16: 1 / 32768, 32: 0.0}[codec.bits]
    if sent_from.numel():
        bound = sent_from.abs().max() * step * 1.03 + 2.0 ** (codec.bits - 149)
        assert (received.values - sent_from).abs().max() <= bound


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_error_on_normal_values(bits: int) -> None:
    x = values(1 << 16, 3, -7.0)
    y = SyncCodec(bits=bits).encode(x, 0).sent.dense(1 << 16)
    error = ((y - x).square().sum() / x.square().sum()).item()
    assert error <= {2: 0.16, 4: 0.0125, 8: 5e-5, 16: 1e-9, 32: 0.0}[bits]


def test_uncompressed_is_bit_exact() -> None:
    x = torch.cat([values(999, 1), torch.tensor([-0.0, 1e-45, 3.4028235e38])])
    codec = SyncCodec(density=1.0, topk=1.0, bits=32)
    sent = codec.decode(codec.encode(x, 9).payload, x.numel(), 9)
    assert sent.indices is None
    assert torch.equal(sent.values.view(torch.int32), x.view(torch.int32))


def test_topk_takes_the_largest_inside_the_mask_and_the_first_of_equals() -> None:
    x = values(5000, 4)
    codec = SyncCodec(density=0.5, topk=0.2, bits=32)
    mask = seeded_indices(5000, 0.5, 11)
    sent = codec.encode(x, 11).sent
    best = mask[x[mask].abs().topk(500).indices].sort().values
    assert torch.equal(sent.indices, best)
    ties = SyncCodec(topk=0.3, bits=32).encode(torch.ones(10), 0).sent
    assert ties.indices.tolist() == [0, 1, 2]


def test_positions_take_the_shorter_form() -> None:
    n = 200_000
    bitmap, blocks = (SyncCodec(topk=topk, bits=32).nbytes(n) - 4 * int(n * topk) for topk in (0.2, 0.01))
    assert bitmap == n // 8
    assert blocks == 4 * 4 + 2 * 2000
    for topk in (0.2, 0.01, 1e-5):
        codec = SyncCodec(topk=topk, bits=32)
        x = values(n, 5)
        encoded = codec.encode(x, 0)
        assert len(encoded.payload) == codec.nbytes(n)
        assert torch.equal(encoded.sent.values, x[encoded.sent.indices])


def test_cocktail_wire_size() -> None:
    assert SyncCodec(density=0.1, topk=0.2, bits=4).nbytes(10**8) * 8 / 1e8 == pytest.approx(0.1825, abs=1e-4)


@given(codec=CODECS, n=st.integers(0, 400), seed=st.integers(0, 99), data=st.binary(min_size=1, max_size=64))
@settings(max_examples=1500, deadline=None)
def test_garbage_raises_or_decodes_to_the_right_shape(codec: SyncCodec, n: int, seed: int, data: bytes) -> None:
    size = codec.nbytes(n)
    for payload in (data, (data * (size // len(data) + 1))[:size]):
        try:
            sparse = codec.decode(memoryview(payload), n, seed)
        except CodecError:
            continue
        assert torch.isfinite(sparse.dense(n)).all()


@given(seed=st.integers(0, 1 << 30), flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_damaged_payloads_never_leave_the_vector(seed: int, flips: list[tuple[int, int]]) -> None:
    codec = SyncCodec(density=0.5, topk=(0.2, 0.01)[seed % 2], bits=4)
    payload = bytearray(codec.encode(values(3000, seed), seed).payload)
    for place, bit in flips:
        payload[place % len(payload)] ^= 1 << bit
    try:
        sparse = codec.decode(bytes(payload), 3000, seed)
    except CodecError:
        return
    assert sparse.indices is not None
    assert sparse.indices.min() >= 0
    assert sparse.indices.max() < 3000


def test_non_finite_and_misshapen_input_is_refused() -> None:
    for bits, bad in itertools.product((4, 32), (torch.nan, torch.inf)):
        with pytest.raises(CodecError, match="infinite or NaN"):
            SyncCodec(bits=bits).encode(torch.tensor([1.0, bad]), 0)
    with pytest.raises(CodecError, match="flat"):
        SyncCodec().encode(torch.ones(2, 2), 0)
    with pytest.raises(CodecError, match="not finite"):
        SyncCodec(bits=32).decode(b"\x00\x00\xc0\x7f", 1, 0)
    with pytest.raises(CodecError):
        SyncCodec().decode(b"", -1, 0)


@pytest.mark.parametrize(
    "wrong",
    [{"density": 0.0}, {"density": 1.5}, {"topk": 0}, {"topk": float("nan")}, {"bits": 3}, {"bucket": 0}],
)
def test_settings_are_validated(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyncCodec(**wrong)  # type: ignore[arg-type]


def test_sparse_adds_in_place_with_a_scale() -> None:
    vector = torch.ones(4)
    assert Sparse(torch.tensor([1, 3]), torch.tensor([2.0, 4.0])).add_to(vector, -0.5) is vector
    assert vector.tolist() == [1.0, 0.0, 1.0, -1.0]
    assert Sparse(None, torch.ones(4)).add_to(vector).tolist() == [2.0, 1.0, 2.0, 0.0]
