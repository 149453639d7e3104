"""Weights in four bits: the nearest level of the paper's table, the bytes of bitsandbytes, and products with them."""

from __future__ import annotations

import sys

import pytest
import torch

from potluck.worker import lora, nf4

SHAPES = [(64, 64), (48, 96), (7, 10), (5, 33), (1, 1), (300, 128), (2100, 512)]
ODD = torch.Size((5, 33))


@pytest.fixture(params=["ours", "bitsandbytes"])
def unpacking(request, monkeypatch):
    """With the library, where it is installed, and without it."""
    nf4._library.cache_clear()
    if request.param == "ours":
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    else:
        pytest.importorskip("bitsandbytes")
        assert nf4._library() is not None
    yield
    nf4._library.cache_clear()


def normal(shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).mul_(0.02).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_has_the_nearest_level(unpacking, shape):
    values = normal(shape)
    codes, scales = nf4.quantized(values)
    assert (codes.numel(), scales.numel()) == nf4.nbytes(values.numel())
    found = nf4.dequantized(codes, scales, values.shape, torch.float32).flatten()
    flat = values.flatten()
    for start in range(0, min(flat.numel(), 4096), 64):
        block = flat[start : start + 64]
        levels = torch.tensor(nf4.LEVELS) * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(dim=1).values
        torch.testing.assert_close((found[start : start + 64] - block).abs(), nearest, rtol=1e-4, atol=1e-8)
    worst = scales.repeat_interleave(64)[: flat.numel()] * (1.0 - 0.6961928) / 2  # half of the widest gap
    assert ((found - flat).abs() <= worst * 1.001).all()


def test_what_the_levels_can_say_comes_back(unpacking):
    """The largest of a block, zeros, and blocks of nothing but zeros; in bf16, rounded once."""
    values = torch.tensor(nf4.LEVELS).repeat(8).view(2, 64) * torch.tensor([[3.0], [1e-3]])
    values = torch.cat([values, torch.zeros(1, 64)])
    codes, scales = nf4.quantized(values)
    assert scales.tolist() == pytest.approx([3.0, 1e-3, 0.0])
    torch.testing.assert_close(nf4.dequantized(codes, scales, values.shape, torch.float32), values, rtol=1e-6, atol=0)
    rough = nf4.dequantized(codes, scales, values.shape, torch.bfloat16)
    assert torch.equal(rough, nf4.dequantized(codes, scales, values.shape, torch.float32).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bytes_are_those_of_bitsandbytes(dtype):
    library = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        values = normal(shape, dtype)
        codes, scales = nf4.quantized(values)
        theirs, state = library.quantize_4bit(values, blocksize=64, quant_type="nf4")
        assert torch.equal(scales, state.absmax)
        assert (codes != theirs.view(-1)).float().mean() < 1e-4  # a tie may fall to the other side
        if shape[1] % 64 == 0:
            ours, unpacked = (
                unpack(codes, scales, values.shape, dtype)
                for unpack in (nf4._unpacked, lambda *a: nf4.unpacked_by(library, *a))
            )
            assert torch.equal(ours, unpacked)


def test_a_library_that_unpacks_otherwise_is_not_used(monkeypatch):
    class Other:
        class QuantState:
            def __init__(self, **state) -> None:
                self.shape = state["shape"]

        @staticmethod
        def dequantize_4bit(codes, quant_state):
            return torch.zeros(quant_state.shape)

    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", Other)
    nf4._library.cache_clear()
    assert nf4._library() is None
    nf4._library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_keeps_no_matrix(dtype):
    """Between forward and backward only the codes are there."""
    held = lora.Held(normal((96, 64)), "4bit", torch.device("cpu"))
    x = torch.randn(5, 3, 64).to(dtype).requires_grad_()
    bias = torch.randn(96).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = lora._Product.apply(x, held, bias)
    assert not kept
    gradient = torch.randn_like(out)
    out.backward(gradient)
    matrix = held.weight(dtype)
    assert torch.equal(out, torch.nn.functional.linear(x.detach(), matrix, bias))
    torch.testing.assert_close(x.grad, gradient @ matrix)
