"""Attention under a layout, of both architectures, against stock models that are given the mask in so many numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from potluck.protocol.architecture import tensors
from potluck.protocol.config import ModelConfig
from potluck.worker.layout import Layout
from potluck.worker.model import StageModule, hf_config

T, VOCAB = 24, 300
GPTJ = ModelConfig(d_model=32, layers=3, heads=4, d_ff=80, norm_eps=1e-6, seq_len=T)
LLAMA = ModelConfig(architecture="llama", d_model=32, layers=3, heads=4, kv_heads=2, rope_theta=1e5, seq_len=T)
Documents = list[tuple[int, int]]  # of a sequence: length and prefix

both = pytest.mark.parametrize("model", [GPTJ, LLAMA], ids=["gptj", "llama"])


def whole(model: ModelConfig) -> StageModule:
    module = StageModule(model, VOCAB, 0, model.layers, 7)
    with torch.no_grad():  # weights as large as after training: otherwise attention is nearly even
        for parameter in module.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    return module


def stock(module: StageModule, model: ModelConfig) -> PreTrainedModel:
    found = AutoModelForCausalLM.from_config(hf_config(model, VOCAB), attn_implementation="eager")
    found.load_state_dict(module.state_dict())
    return found


def laid_out(*sequences: Documents) -> Layout:
    segments = torch.zeros(len(sequences), T, dtype=torch.int16)
    is_prefix = torch.zeros(len(sequences), T, dtype=torch.bool)
    for b, documents in enumerate(sequences):
        start = 0
        for number, (length, prefix) in enumerate(documents, 1):
            segments[b, start : start + length] = number
            is_prefix[b, start : start + prefix] = True
            start += length
    return Layout(segments, is_prefix)


def spelled_out(*sequences: Documents) -> tuple[Tensor, Tensor]:
    """An additive mask [B, 1, T, T] and positions [B, T], made position by position."""
    mask = torch.full((len(sequences), 1, T, T), torch.finfo(torch.float32).min)
    positions = torch.zeros(len(sequences), T, dtype=torch.int64)
    for b, documents in enumerate(sequences):
        start = 0
        for length, prefix in [*documents, (T - sum(n for n, _ in documents), 0)]:  # the last one is padding
            for q in range(length):
                positions[b, start + q] = q
                for k in range(length):
                    if k <= q or k < prefix:
                        mask[b, 0, start + q, start + k] = 0.0
            start += length
    return mask, positions


def ids(batch: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, T), generator=torch.Generator().manual_seed(3))


def logits(module: StageModule, x: Tensor, layout: Layout | None) -> Tensor:
    return module.logits(module(x, layout))


SEQUENCES = [[(10, 4), (9, 0), (3, 2)], [(24, 0)], [(24, 24)], [(1, 1), (1, 0), (20, 19)]]


@both
def test_forward_and_backward_are_those_of_a_stock_model_with_the_same_mask(model: ModelConfig) -> None:
    module = whole(model)
    other, x, layout = stock(module, model), ids(len(SEQUENCES)), laid_out(*SEQUENCES)
    mask, positions = spelled_out(*SEQUENCES)
    assert torch.equal(layout.mask(), mask == 0) and torch.equal(layout.positions(), positions)
    mine = logits(module, x, layout)
    theirs = other(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mine, logits(module, x, None), atol=1e-2)

    targets = torch.where(layout.segments > 0, x, -100)
    for found in (mine, theirs):
        F.cross_entropy(found.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").backward()
    expected = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5 * scale)


@both
def test_without_a_layout_it_is_one_causal_document(model: ModelConfig) -> None:
    module, x = whole(model), ids(2)
    torch.testing.assert_close(logits(module, x, laid_out([(T, 0)], [(T, 0)])), logits(module, x, None))


@both
def test_a_packed_document_is_the_same_as_alone(model: ModelConfig) -> None:
    module, x, documents = whole(model), ids(), [(10, 4), (9, 0), (3, 3)]
    packed = logits(module, x, laid_out(documents))
    start = 0
    for length, prefix in documents:
        part = x[:, start : start + length]
        layout = Layout(torch.ones(1, length, dtype=torch.int16), (torch.arange(length) < prefix)[None])
        torch.testing.assert_close(packed[:, start : start + length], logits(module, part, layout))
        start += length


@both
def test_who_sees_whom(model: ModelConfig) -> None:
    """Which logits change with a token: those that may see it, no others, bit for bit."""
    module, layout = whole(model), laid_out([(10, 4), (9, 0)])

    def changed_by(place: int) -> set[int]:
        other = ids()
        other[0, place] = (other[0, place] + 1) % VOCAB
        with torch.no_grad():
            differ = (logits(module, other, layout) != logits(module, ids(), layout)).any(-1)[0]
        return set(differ.nonzero().flatten().tolist())

    assert changed_by(3) == set(range(10))  # of the prefix: all of its document, what is before it, too
    assert changed_by(4) == set(range(4, 10))  # the first target: no earlier one, nothing of the prefix
    assert changed_by(9) == {9}
    assert changed_by(10) == set(range(10, 19))  # the second document, which has no prefix
    assert changed_by(18) == {18}
    assert changed_by(20) == set(range(20, T))  # padding, which no document sees


@both
def test_padding_alone_is_no_trouble(model: ModelConfig) -> None:
    module = whole(model)
    hidden = module(ids(), laid_out([]))
    module.loss_sum(hidden, torch.full((1, T), -100)).backward()
    assert torch.isfinite(hidden).all()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_near(model: ModelConfig, dtype: torch.dtype) -> None:
    """Weights of 16 bits, as they may come from a checkpoint: no NaN under any mask, and about the same."""
    module, x, layout = whole(model), ids(len(SEQUENCES)), laid_out(*SEQUENCES)
    with torch.no_grad():
        expected = logits(module, x, layout)
        found = logits(module.to(dtype), x, layout)
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


@both
def test_a_view_made_in_inference_serves_training(model: ModelConfig) -> None:
    other = ModelConfig(**{**{f: getattr(model, f) for f in model.__struct_fields__}, "layers": 1, "seq_len": T + 1})
    module = StageModule(other, VOCAB, 0, 1, 1)
    with torch.inference_mode():
        module(ids(), None)
    module(ids(), None).sum().backward()


@both
@pytest.mark.parametrize("cut", [(0, 3), (0, 1), (1, 2), (2, 3)])
def test_a_stage_holds_the_tensors_that_are_counted(model: ModelConfig, cut: tuple[int, int]) -> None:
    module = StageModule(model, VOCAB, *cut, 1)
    expected = tensors(model, VOCAB, *cut)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
    assert [name for name, _ in module.named_parameters()] == list(expected) == list(module.state_dict())
    assert all(math.prod(shape) for shape in expected.values())


@both
def test_stages_in_turn_are_the_whole(model: ModelConfig) -> None:
    module, x, layout = StageModule(model, VOCAB, 0, 3, 5), ids(2), laid_out([(10, 4), (9, 0)], [(24, 7)])
    first, last = StageModule(model, VOCAB, 0, 2, 5), StageModule(model, VOCAB, 2, 3, 5)
    for given in (None, layout):
        assert torch.equal(last.logits(last(first(x, given), given)), logits(module, x, given))
