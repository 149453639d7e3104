"""The codec of a round: sizes, exactness at both ends, refusals."""

import itertools
import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from potluck.compression.codec import CodecError
from potluck.compression.mask import count
from potluck.compression.sync import SYNC_BITS, Sparse, SyncCodec

SETTINGS = st.tuples(st.sampled_from([1.0, 0.9, 0.2, 0.03, 0.001]), st.sampled_from(SYNC_BITS))
CODECS = st.builds(
    lambda both, chunk, bucket: SyncCodec(topk=both[0], bits=both[1], chunk=chunk, bucket=bucket),
    SETTINGS.filter(lambda both: both != (1.0, 1)),
    st.sampled_from([0, 0, 64, 100, 1024]),
    st.sampled_from([8, 100, 256]),
)


def values(n: int, seed: int, power: float = -6.0) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 10.0**power).clamp(-3.3e38, 3.3e38).float()  # scales saturate there


def signs(codec: SyncCodec) -> bool:
    """Whether values are written as signs and levels."""
    return codec.topk < 1.0 and codec.bits <= 2


def largest(x: torch.Tensor, topk: float, chunk: int) -> list[int]:
    """Top-k by sorting: what the codec must pick."""
    picked = []
    for start in range(0, x.numel(), chunk or max(1, x.numel())):
        part = x[start : start + chunk] if chunk else x
        order = np.argsort(-part.abs().numpy(), kind="stable")
        picked += sorted(start + int(i) for i in order[: count(part.numel(), topk)])
    return picked


@given(codec=CODECS, n=st.integers(0, 3000), seed=st.integers(0, 1000), power=st.floats(-44, 38))
@settings(max_examples=200, deadline=None)
def test_both_ends_know_exactly_what_was_sent(codec: SyncCodec, n: int, seed: int, power: float) -> None:
    delta = values(n, seed, power)
    encoded = codec.encode(delta)
    received = codec.decode(encoded.payload, n)
    assert len(encoded.payload) <= codec.bound(n)
    assert torch.equal(received.values.view(torch.int32), encoded.sent.values.view(torch.int32))
    picked = largest(delta, codec.topk, codec.chunk)
    if received.indices is None:
        assert encoded.sent.indices is None
        assert len(picked) == n
        assert len(encoded.payload) == codec.bound(n)
    else:
        assert torch.equal(received.indices, encoded.sent.indices)
        assert received.indices.tolist() == picked
    dense = received.dense(n)
    assert torch.isfinite(dense).all()
    # No error above a step (1.5 at 2 bits) of the largest scale, itself rounded to float32's smallest unit; none of a
    # sign and a level above the largest value.
    sent_from = delta if received.indices is None else delta[received.indices]
    step = {2: 1.5 / 2.5, 3: 1.5 / 4.5, 32: 0.0}.get(codec.bits, 2 / (1 << codec.bits))
    if signs(codec):
        step = 1.0
    if sent_from.numel():
        bound = sent_from.abs().max() * step * 1.03 + 2.0 ** (codec.bits - 149)
        assert (received.values - sent_from).abs().max() <= bound


@pytest.mark.parametrize("bits", SYNC_BITS[1:])
def test_error_on_normal_values(bits: int) -> None:
    x = values(1 << 16, 3, -7.0)
    y = SyncCodec(bits=bits).encode(x).sent.dense(1 << 16)
    error = ((y - x).square().sum() / x.square().sum()).item()
    assert error <= {2: 0.16, 3: 0.045, 4: 0.0125, 6: 8e-4, 8: 5e-5, 16: 1e-9, 32: 0.0}[bits]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("topk", [0.03, 0.2])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_error_on_the_largest_values(kind: str, topk: float, bits: int) -> None:
    most = {
        ("normal", 0.03): {1: 0.017, 2: 0.0058, 4: 0.0035},
        ("normal", 0.2): {1: 0.054, 2: 0.018, 4: 0.0052},
        ("laplace", 0.03): {1: 0.050, 2: 0.018, 4: 0.0066},
        ("laplace", 0.2): {1: 0.132, 2: 0.047, 4: 0.0105},
    }[kind, topk][bits]
    x = values(1 << 19, 3, -7.0)
    if kind == "laplace":
        u = torch.rand(1 << 19, generator=torch.Generator().manual_seed(4))
        x = x.sign() * (1 - u).log() * 1e-7
    sent = SyncCodec(topk=topk, chunk=4096, bits=bits).encode(x).sent
    exact = x[sent.indices]
    assert 0.8 * most < ((sent.values - exact).square().sum() / exact.square().sum()).item() < most


def test_ratios_are_as_good_as_any() -> None:
    """Against all cuts of the sorted values themselves, on buckets of which each has another scale."""
    x = values(1 << 14, 5, 0.0).exp() * torch.logspace(-30, 30, 1 << 8).repeat_interleave(64)
    codec = SyncCodec(topk=0.9999, bits=2, bucket=64)
    sent = codec.encode(x).sent
    picked = x[sent.indices].double()
    means = torch.cat([b.mean().expand(b.numel()) for b in picked.split(64)])
    ratios = (picked / means).sort().values
    low, n = ratios.cumsum(0), torch.arange(1, ratios.numel() + 1)
    best = ratios.square().sum() - (low**2 / n + (low[-1] - low) ** 2 / (ratios.numel() - n).clamp(min=1)).max()
    error = ((sent.values - picked) / means).square().sum()
    assert best * 0.9999 < error < best * 1.0001


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1e-45, 3e-42, 1.1754944e-38, 1e-6, 1.0, 0.3, 3.4028235e38])
def test_equal_magnitudes_are_exact_in_signs(size: float, bits: int) -> None:
    x = torch.tensor([size]) * values(3000, 1).sign()
    sent = SyncCodec(topk=0.5, bits=bits).encode(x).sent
    assert torch.equal(sent.values, x[sent.indices])


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(
    "x",
    [
        [],
        [0.0],
        [-7.0],
        [1e-45] + [0.0] * 99,  # its mean is no float32
        [3.4e38] * 90 + [1e38] * 10 + [1e-45] * 100 + [1.0] + [0.0] * 99,  # the upper ratio is far above 1
        [3.4028235e38, -1e-45] * 50,
    ],
    ids=str,
)
def test_signs_of_extreme_values_stay_finite(x: list[float], bits: int) -> None:
    for topk in (0.3, 0.9999):
        codec = SyncCodec(topk=topk, bits=bits, bucket=100)
        encoded = codec.encode(torch.tensor(x))
        assert torch.isfinite(encoded.sent.values).all()
        assert torch.equal(codec.decode(encoded.payload, len(x)).values, encoded.sent.values)
        assert len(encoded.payload) <= codec.bound(len(x))


def test_ratios_and_means_of_a_stranger_are_checked() -> None:
    """One value, so no positions: two ratios, the mean, a code."""
    codec = SyncCodec(topk=0.5, bits=2)

    def payload(low: float, high: float, mean: float) -> bytes:
        return np.array([low, high, mean], "<f4").tobytes() + b"\3"

    assert codec.decode(payload(0.5, 1.5, 4.0), 1).values.tolist() == [-6.0]
    assert codec.decode(payload(3e38, 3e38, 3e38), 1).values.tolist() == [-float(np.finfo(np.float32).max)]
    for bad in (-1.0, -0.0, np.inf, -np.inf, np.nan):
        for at in range(3):
            head = [0.5, 1.5, 4.0]
            head[at] = bad
            with pytest.raises(CodecError, match="negative or not finite"):
                codec.decode(payload(*head), 1)
    with pytest.raises(CodecError, match="do not rise"):
        codec.decode(payload(1.5, 0.5, 4.0), 1)
    with pytest.raises(CodecError, match="not zero"):
        codec.decode(payload(0.5, 1.5, 4.0)[:-1] + b"\7", 1)
    with pytest.raises(CodecError, match="negative or not finite"):
        SyncCodec(topk=0.5, bits=1).decode(np.array([-1], "<f4").tobytes() + b"\0", 1)


def test_uncompressed_is_bit_exact() -> None:
    x = torch.cat([values(999, 1), torch.tensor([-0.0, 1e-45, 3.4028235e38])])
    codec = SyncCodec(topk=1.0, bits=32)
    sent = codec.decode(codec.encode(x).payload, x.numel())
    assert sent.indices is None
    assert torch.equal(sent.values.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(("chunk", "n"), [(0, 5000), (0, 70_000), (64, 5000), (4096, 70_000), (65536, 140_000)])
@pytest.mark.parametrize(
    "kind", ["normal", "few levels", "equal", "zero", "rising", "falling", "one large", "denormal"]
)
def test_topk_takes_the_largest_and_the_first_of_equals(chunk: int, n: int, kind: str) -> None:
    x = {
        "normal": values(n, 4),
        "few levels": values(n, 4, 0.0).round(),
        "equal": torch.ones(n) * torch.sign(values(n, 5)),
        "zero": torch.zeros(n),
        "rising": torch.arange(float(n)) ** 3,
        "falling": torch.exp(-torch.arange(float(n)) / 500),
        "one large": torch.cat([torch.tensor([1e30]), torch.zeros(n - 1)]),
        "denormal": values(n, 4, -43.0),
    }[kind]
    sent = SyncCodec(topk=0.03, chunk=chunk, bits=32).encode(x).sent
    assert sent.indices.tolist() == largest(x, 0.03, chunk)
    assert torch.equal(sent.values, x[sent.indices])


def test_any_strides_and_real_dtypes_go_in() -> None:
    x = values(3000, 2, 0.0)
    codec = SyncCodec(topk=0.1, chunk=100)
    assert codec.encode(x[::3]).payload == codec.encode(x[::3].contiguous()).payload
    half = x.bfloat16()
    assert codec.encode(half).payload == codec.encode(half.float()).payload
    assert codec.encode(torch.nn.Parameter(x)).payload == codec.encode(x).payload


@pytest.mark.parametrize("n", [10_000, 100_003, 2_500_000])
def test_expected_size(n: int) -> None:
    for topk, chunk, bits in ((0.2, 0, 4), (0.03, 4096, 2), (0.01, 64, 4), (1.0, 0, 8), (0.001, 0, 2), (0.03, 4096, 1)):
        codec = SyncCodec(topk=topk, chunk=chunk, bits=bits)
        messages = 1 + 300_000 // n
        mean = sum(len(codec.encode(values(n, seed)).payload) for seed in range(messages)) / messages
        assert codec.expected(n) == pytest.approx(mean, rel=0.01)
        assert codec.expected(n) <= codec.bound(n)


def test_wire_sizes_of_known_methods() -> None:
    """Bits per parameter, with fp32 scales: CocktailSGD's bitmap made 0.1825, SparseLoCo's 12-bit indices 0.219."""
    assert 0.1 * SyncCodec(topk=0.2, bits=4).expected(10**7) * 8 / 1e7 == pytest.approx(0.1547, abs=2e-4)
    assert SyncCodec(topk=64 / 4096, chunk=4096, bits=2).expected(10**8) * 8 / 1e8 == pytest.approx(0.1499, abs=1e-3)


@given(codec=CODECS, n=st.integers(0, 400), data=st.binary(min_size=0, max_size=64))
@settings(max_examples=600, deadline=None)
def test_garbage_raises_or_decodes_to_the_right_shape(codec: SyncCodec, n: int, data: bytes) -> None:
    size = codec.bound(n)
    for payload in (data, (data * (size // max(1, len(data)) + 1))[:size]):
        check(codec, payload, n)


def check(codec: SyncCodec, payload: bytes, n: int) -> bool:
    """Decode a stranger's bytes: CodecError (False), or finite values at positions inside the vector (True)."""
    try:
        sparse = codec.decode(memoryview(payload), n)
    except CodecError:
        return False
    assert torch.isfinite(sparse.dense(n)).all()
    if sparse.indices is not None:
        assert sparse.values.shape == sparse.indices.shape
        assert (sparse.indices.diff() > 0).all()
    assert len(payload) <= codec.bound(n)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_damaged_payloads_raise_or_decode_to_something_valid(seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    for _ in range(110):
        chunk = rng.choice([0, 0, 64, 1000])
        topk = rng.choice([1.0, 0.5, 0.2, 0.03])
        bits = rng.choice(SYNC_BITS[topk == 1.0 :])
        codec = SyncCodec(topk=topk, chunk=chunk, bits=bits, bucket=rng.choice([8, 256]))
        n = rng.choice([1, 77, 500, 20_000])
        valid = codec.encode(values(n, rng.randrange(1000))).payload
        assert check(codec, valid, n)
        for _ in range(25):
            payload = bytearray(valid)
            kind = rng.randrange(5)
            if kind == 0:
                payload = payload[: rng.randrange(len(payload))]
            elif kind == 1:
                payload += rng.randbytes(rng.randint(1, 9))
            elif kind == 2:
                start = rng.randrange(len(payload))
                payload[start : start + 8] = rng.randbytes(min(8, len(payload) - start))
            for _ in range(rng.randint(kind == 3, 4) if kind >= 3 else 0):
                payload[rng.randrange(min(len(payload), rng.choice([2, 100, 1 << 30])))] ^= 1 << rng.randrange(8)
            refused += not check(codec, bytes(payload), n)
    assert 500 < refused < 2700


def test_non_finite_and_misshapen_input_is_refused() -> None:
    codecs = [
        {"bits": 4},
        {"bits": 32},
        {"topk": 0.9999, "bits": 1},
        {"topk": 0.9999, "bits": 2},
        {"topk": 0.5},
        {"topk": 0.5, "chunk": 64},
        {"topk": 0.01},
    ]
    for settings_, bad, n in itertools.product(codecs, (torch.nan, -torch.inf, torch.inf), (10, 70_000)):
        x = values(n, 1)
        x[n // 2] = bad
        with pytest.raises(CodecError, match="infinite or NaN"):
            SyncCodec(**settings_).encode(x)
    with pytest.raises(CodecError, match="flat"):
        SyncCodec().encode(torch.ones(2, 2))
    with pytest.raises(CodecError, match="not finite"):
        SyncCodec(bits=32).decode(b"\x00\x00\xc0\x7f", 1)
    for n in (-1, 1 << 31):
        with pytest.raises(CodecError, match="elements"):
            SyncCodec().decode(b"", n)


def test_bits_after_the_end_are_refused() -> None:
    codec = SyncCodec(bits=4)
    payload = codec.encode(values(7, 1)).payload
    with pytest.raises(CodecError, match="not zero"):
        codec.decode(payload[:-1] + bytes([payload[-1] | 0xF0]), 7)
    for wrong in (payload + b"\0", payload[:-1], b""):
        with pytest.raises(CodecError, match="bytes"):
            codec.decode(wrong, 7)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"topk": t} for t in (0, -0.1, 1.5, float("nan"))),
        *({"chunk": c} for c in (-1, 63, 65537, 64.0)),
        *({"bits": b} for b in (0, 1, 5, 64)),
        *({"bucket": b} for b in (0, 7, 8.0, 65537)),
    ],
    ids=str,
)
def test_settings_are_validated(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyncCodec(**wrong)  # type: ignore[arg-type]


def test_sparse_adds_in_place_with_a_scale() -> None:
    vector = torch.ones(4)
    sparse = Sparse(torch.tensor([1, 3]), torch.tensor([2.0, 4.0]))
    assert sparse.add_to(vector, -0.5) is vector
    assert vector.tolist() == [1.0, 0.0, 1.0, -1.0]
    wide = torch.zeros(8)
    sparse.add_to(wide[::2])
    assert wide.tolist() == [0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 4.0, 0.0]
    assert Sparse(None, torch.ones(4)).add_to(vector).tolist() == [2.0, 1.0, 2.0, 0.0]
    with pytest.raises(IndexError, match="outside"):
        sparse.add_to(torch.zeros(3))
