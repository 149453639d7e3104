"""AdamW's moments in 8 bits: near to those in 32, and the same after they went through fp32."""

from __future__ import annotations

import sys

import pytest
import torch

from potluck.protocol.config import OptimizerConfig
from potluck.protocol.errors import ConfigError
from potluck.worker.moments import (
    BLOCK,
    Coded,
    Moments8,
    Moments32,
    code_map,
    dense,
    dequantized,
    moments,
    part_of,
    quantized,
)

CPU = torch.device("cpu")
N = 40 * BLOCK + 77  # the last block is short


def spread(seed: int, n: int = N) -> torch.Tensor:
    """Of many sizes, as gradients are, with blocks of nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** (-6 * torch.rand(n, generator=generator))
    values[3 * BLOCK : 5 * BLOCK] = 0.0
    return values


def test_a_run_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"optimizer\.bits 8") as error:
        moments(OptimizerConfig(bits=8), N, CPU)
    assert "pip install 'potluck[bnb]'" in error.value.hint


class TestIn8Bits:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("signed", [True, False])
    def test_codes_come_back_as_they_were(self, signed):
        for seed in range(5):
            values = spread(seed) if signed else spread(seed).square()
            codes, scales = quantized(values, signed)
            again, same = quantized(dequantized(codes, scales, signed), signed)
            assert torch.equal(codes, again) and torch.equal(scales, same)

    @pytest.mark.parametrize("signed", [True, False])
    def test_every_code_comes_back(self, signed):
        codes = torch.arange(256, dtype=torch.uint8)
        for scale in (1.0, 3e-7, 1.2345e-20, 0.7e10):
            values = dequantized(codes, torch.tensor([scale]), signed)
            again, found = quantized(values, signed)
            assert torch.equal(again, codes) and float(found) == float(torch.tensor(scale))

    @pytest.mark.parametrize("signed", [True, False])
    def test_codes_are_the_nearest(self, signed):
        values = spread(9, BLOCK) if signed else spread(9, BLOCK).square()
        codes, scales = quantized(values, signed)
        distance = (values[:, None].double() / scales.double() - code_map(signed).double()).abs()
        taken = distance.gather(1, codes.long()[:, None])[:, 0]
        assert bool((taken <= distance.amin(1) + 1e-7).all())

    def test_what_updates_leave_comes_back_as_it_was(self):
        ours = Moments8(OptimizerConfig(), N, CPU)
        p = torch.zeros(N)
        for update in range(1, 30):
            ours.step(p, spread(update), 0, rate=1e-3, update=update)
            m, v = map(dense, ours.copies())
            assert float(v.min()) >= 0
            other = Moments8(OptimizerConfig(), N, CPU)
            other.load(m, v)
            for one, two, scale, same in zip(ours.codes, other.codes, ours.scales, other.scales, strict=True):
                zero = (scale == 0).repeat_interleave(BLOCK)[:N]  # there, all codes say the same
                assert torch.equal(one[~zero], two[~zero]) and torch.equal(scale, same)

    def test_codes_are_kept_and_read_in_parts(self):
        """Nothing has to be made fp32 as a whole: not for a copy, a file or a piece on its way."""
        ours, other = Moments8(OptimizerConfig(), N, CPU), Moments8(OptimizerConfig(), N, CPU)
        ours.step(torch.zeros(N), spread(1), 0, rate=1e-3, update=1)
        m, v = ours.copies()
        assert isinstance(m, Coded) and m.codes.dtype == torch.uint8 and m.codes.data_ptr() != ours.codes[0].data_ptr()
        whole = dense(m)
        assert whole.dtype == torch.float32 and whole.numel() == N
        for start, end in ((0, 1), (255, 257), (BLOCK, 3 * BLOCK), (700, N), (N - 1, N)):
            assert torch.equal(part_of(m, start, end), whole[start:end])
        other.load(m, v)
        for one, two in zip([*ours.codes, *ours.scales], [*other.codes, *other.scales], strict=True):
            assert torch.equal(one, two)

    def test_parts_make_the_whole(self):
        """Wherever a tensor or a part of the vector ends."""
        whole, parts = Moments8(OptimizerConfig(), N, CPU), Moments8(OptimizerConfig(), N, CPU)
        p, q = torch.ones(N), torch.ones(N)
        for update in range(1, 6):
            grad = spread(update)
            whole.step(p, grad, 0, rate=1e-3, update=update)
            for start in range(0, N, 7 * BLOCK):
                here = slice(start, start + 7 * BLOCK)
                parts.step(q[here], grad[here], start, rate=1e-3, update=update)
        assert torch.equal(p, q) and torch.equal(dense(whole.copies()[1]), dense(parts.copies()[1]))

    def test_updates_are_near_to_those_in_32_bits(self):
        c = OptimizerConfig(lr=1e-2, weight_decay=0.1)
        kinds = [Moments8(c, N, CPU), Moments32(c, N, CPU)]
        weights = [torch.ones(N), torch.ones(N)]
        for update in range(1, 50):
            for kind, p in zip(kinds, weights, strict=True):
                kind.step(p, spread(update % 7) + 0.1, 0, rate=1e-2, update=update)
        moved = [float((p - 1).abs().mean()) for p in weights]
        assert moved[0] == pytest.approx(moved[1], rel=0.02)
        assert float((weights[0] - weights[1]).abs().mean()) < 0.05 * moved[1]

    def test_the_state_takes_a_quarter_of_the_memory(self):
        ours = Moments8(OptimizerConfig(), N, CPU)
        nbytes = sum(t.numel() * t.element_size() for t in [*ours.codes, *ours.scales])
        assert nbytes < 0.26 * 8 * N


def test_32_bits_are_torchs_adamw():
    c = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    ours, p = Moments32(c, N, CPU), torch.ones(N)
    theirs = torch.ones(N, requires_grad=True)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=0.1, fused=True)
    for update in range(1, 10):
        grad = spread(update)
        ours.step(p, grad, 0, rate=1e-2, update=update)
        theirs.grad = grad.clone()
        adamw.step()
    assert torch.equal(p, theirs.detach())
