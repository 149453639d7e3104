"""The loss in parts of the positions, and blocks one after the other: the same numbers with less memory."""

from __future__ import annotations

import pytest
import torch

from potluck.protocol.config import ModelConfig
from potluck.worker import head_loss, model
from potluck.worker.layout import Layout
from potluck.worker.model import StageModule

B, T, V = 2, 16, 300


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
@pytest.mark.parametrize("positions", [1, 5, 32, 1000])
def test_in_parts_the_loss_and_its_gradients_are_the_same(monkeypatch, architecture, positions):
    shape = ModelConfig(architecture=architecture, d_model=32, layers=2, heads=2, rotary_dim=0, seq_len=T)
    module = StageModule(shape, V, 1, 2, seed=3)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, :5] = -100
    found = []
    for limit in (1 << 60, 0):
        monkeypatch.setattr(model, "LOGITS_NBYTES", limit)
        monkeypatch.setattr(head_loss, "LOGITS_PART_NBYTES", 4 * V * positions)
        module.zero_grad()
        hidden = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss = module.loss_sum(hidden, targets)
        with torch.no_grad():
            assert torch.equal(module.loss_sum(hidden, targets), loss)
        (0.5 * loss).backward()
        head = [p.grad.clone() for p in module.lm_head.parameters()]
        assert len(head) == 1 + (architecture == "gptj")
        found.append([loss.detach(), hidden.grad, *head])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_lost_position_has_no_gradient(monkeypatch):
    monkeypatch.setattr(model, "LOGITS_NBYTES", 0)
    module = StageModule(ModelConfig(d_model=32, layers=1, heads=2, seq_len=T), V, 0, 1, seed=3)
    hidden = torch.randn(B, T, 32).requires_grad_()
    loss = module.loss_sum(hidden, torch.full((B, T), -100))
    loss.backward()
    assert float(loss.detach()) == 0.0 and not hidden.grad.any() and not module.lm_head.weight.grad.any()


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
@pytest.mark.parametrize("layers", [(0, 3), (0, 2), (1, 3), (1, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_made_anew_give_the_same_bits_and_keep_less(architecture, layers, packed):
    shape = ModelConfig(architecture=architecture, d_model=32, layers=3, heads=2, rotary_dim=0, seq_len=T)
    module = StageModule(shape, V, *layers, seed=3)
    generator = torch.Generator().manual_seed(1)
    layout = None
    if packed:
        segments = torch.ones(B, T, dtype=torch.int16)
        segments[:, 7:] = 2
        layout = Layout(segments, torch.zeros(B, T, dtype=torch.bool))
    gradient = torch.randn(B, T, 32, generator=generator)
    found, kept = [], []
    for recomputes in (False, True):
        module.recomputes = recomputes
        module.zero_grad()
        ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(4))
        hidden = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
        nbytes: dict[int, int] = {}

        def note(tensor: torch.Tensor, nbytes=nbytes) -> torch.Tensor:
            nbytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = module(ids if layers[0] == 0 else hidden, layout)
        out.backward(gradient)
        found.append([out.detach(), *([] if layers[0] == 0 else [hidden.grad]), *(p.grad for p in module.parameters())])
        kept.append(sum(nbytes.values()))
        found[-1] = [t if t is None else t.clone() for t in found[-1]]
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    if layers == (1, 2):
        assert kept[1] < 0.2 * kept[0]
