"""The compiled path of the tiles and the one in torch operations make the same bytes and the same values."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from potluck.compression import tile_torch
from potluck.compression.codec import CodecError
from potluck.compression.tile import TileCodec
from potluck.compression.tile_format import TileFormat, parse

FORMATS = st.builds(
    lambda bits, tile, mode, random, outliers: TileFormat(
        bits=bits,
        tile=tile,
        zero=mode == "zero",
        hadamard=mode == "hadamard",
        random=random,
        outliers=outliers if bits < 8 else 0,
    ),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(["", "zero", "hadamard"]),
    st.booleans(),
    st.sampled_from([0, 0, 2, 5, 20]),
)


@given(
    fmt=FORMATS,
    n=st.one_of(st.integers(1, 300), st.integers(300, 5000)),
    kind=st.sampled_from(["normal", "spread", "tiny", "large", "zeros", "equal", "one-sided"]),
    seed=st.integers(-(1 << 40), 1 << 70),
)
@settings(max_examples=300, deadline=None)
def test_both_paths_agree_bit_for_bit(fmt: TileFormat, n: int, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed % 9999)
    x = torch.randn(4, n, generator=g)
    x = {
        "normal": x,
        "spread": x * torch.exp(6 * torch.randn(4, n, generator=g)),
        "tiny": x * 1e-38,
        "large": x * 2e29,
        "zeros": x * (torch.rand(4, n, generator=g) < 0.02),
        "equal": torch.full_like(x, -2.75),
        "one-sided": x.abs() + 0.1,
    }[kind]
    x[3, : n // 2] = 0.0
    codec = TileCodec(fmt)
    payload = codec.encode(x, seed)
    reference = torch.empty((4, codec.nbytes((n,))), dtype=torch.uint8)
    tile_torch.encode_rows(fmt, x, reference, seed)
    assert payload == reference.numpy().tobytes()
    y, expected = codec.decode(payload, (4, n)), torch.empty(4, n)
    tile_torch.decode_rows(fmt, reference, expected)
    assert torch.equal(y.view(torch.int32), expected.view(torch.int32))


@given(fmt=FORMATS, n=st.integers(1, 3000), seed=st.integers(0, 1 << 30), damage=st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_both_paths_read_garbage_alike(fmt: TileFormat, n: int, seed: int, damage: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codec = TileCodec(fmt)
    size = codec.nbytes((n,))
    data = torch.randint(0, 256, (1, size), generator=g, dtype=torch.uint8)
    if damage:
        whole = codec.encode(torch.randn(n, generator=g), seed)
        places = torch.randint(0, size, (damage,), generator=g)
        data = (
            torch.frombuffer(bytearray(whole), dtype=torch.uint8)
            .view(1, -1)
            .scatter_(1, places.unsqueeze(0), data[:, places])
        )
    y, expected = None, torch.empty(1, n)
    try:
        tile_torch.decode_rows(fmt, data, expected)
    except CodecError as error:
        with pytest.raises(CodecError, match=str(error)[:20]):
            codec.decode(data.numpy().tobytes(), (1, n))
        return
    y = codec.decode(data.numpy().tobytes(), (1, n))
    assert torch.isfinite(y).all()
    assert torch.equal(y.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.3e30])
def test_the_torch_path_refuses_what_the_compiled_one_does(bad: float) -> None:
    fmt = parse("int4")
    with pytest.raises(CodecError, match="infinite or NaN"):
        tile_torch.encode_rows(fmt, torch.tensor([[1.0, bad]]), torch.empty((1, 4), dtype=torch.uint8), 0)


def test_rotating_twice_is_the_identity_times_the_tile() -> None:
    x = torch.randint(-99, 99, (3, 150)).float()
    for tile in (32, 64, 128):
        fmt = parse(f"int4:tile={tile},hadamard")
        cut = 150 // tile * tile
        y = tile_torch.rotated(fmt, x)
        assert torch.equal(y[:, cut:], x[:, cut:])
        assert torch.equal(tile_torch.rotated(fmt, y)[:, :cut], x[:, :cut] * tile)
        assert torch.equal(y[:, 0], x[:, :tile].sum(dim=1))


def test_no_folder_for_the_compiler_to_write_to_is_no_failure(tmp_path: Path) -> None:
    """As on a read-only install: numba then refuses to cache, and the kernels do without."""
    script = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from potluck.compression import tile_kernels\n"
        "print(type(tile_kernels.encode).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Dispatcher" in done.stdout
